"""The layouts in which heads can be grown: what their configs say of a larger head."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from outrider.errors import ConfigError, PairError
from outrider.models.heads.kv_head import KVHeadSpec
from outrider.models.heads.spec import Family, HeadSpec
from outrider.train.grow_pair import GrownPair
from outrider.train.placing import home
from outrider.train.shapes import GrownShape, choose_shape

NESTED = "transformer_layer_config"
LAYERS = "eagle_aux_hidden_state_layer_ids"
MEDUSA_WEIGHTS = "medusa_lm_head.safetensors"


class Growth(NamedTuple):
    """One head's growth.

    Attributes:
        spec: of the head as it was.
        old, new: sizes of the head; of Medusa, which has no attention, those of its target.
        dtype: of the weights that are written.
    """

    spec: HeadSpec
    pair: GrownPair
    old: GrownShape
    new: GrownShape
    dtype: str

    def eps(self, old: float) -> float:
        """Epsilon of a norm over the wider stream."""
        return old * self.old.hidden_size / self.new.hidden_size

    def home(self, boundary: int) -> int:
        """The layer before which the state of an old boundary is found, and whose KV is its."""
        return home(boundary, self.pair.old.num_layers, self.pair.new.num_layers)


class Layout(NamedTuple):
    """How a head is written down: its file of weights, and its config from that of the old one."""

    weights: str
    grow_config: Callable[[Mapping[str, Any], Growth], dict[str, Any]]


def find_layout(folder: Path, spec: HeadSpec, config: Mapping[str, Any]) -> Layout:
    """The layout of a head. ConfigError if it is none that can be grown."""
    is_served = {
        Family.EAGLE3: NESTED in config and "eagle_config" not in config,
        Family.MEDUSA: (folder / MEDUSA_WEIGHTS).is_file(),
        Family.KV: True,
    }
    if not is_served.get(spec.family, False):
        raise ConfigError(
            f"the head {str(folder)!r} is of the family {spec.family} in a layout that is not "
            "grown: name an EAGLE-3 head in the layout of speculators, a Medusa head in "
            f"{MEDUSA_WEIGHTS}, or a KV head, as `outrider train draft` writes them"
        )
    return LAYOUTS[spec.family]


def read_growth(spec: HeadSpec, pair: GrownPair, dtype: str) -> Growth:
    """From and to which sizes a head grows.

    Raises:
        ConfigError: it computes what the rules of growth do not keep.
        PairError: it reads KV that the source does not have.
    """
    if spec.widths.hidden != pair.old.hidden_size:
        raise ConfigError(
            f"the head {spec.source!r} is {spec.widths.hidden} wide and its target "
            f"{pair.old.hidden_size}: only heads of their target's width are grown, name another"
        )
    _check_norms(spec)
    old = _shape(spec, pair)
    # A head's heads need not be as many as its target's; they become so.
    units = pair.new.intermediate_size * old.intermediate_size // pair.old.intermediate_size
    wanted = {**vars(pair.new), "num_layers": old.num_layers, "intermediate_size": units}
    try:
        new = choose_shape(old, None, wanted)
    except ValueError as error:
        raise ConfigError(
            f"the head {spec.source!r} does not fit into {pair.name!r}: {error}"
        ) from error
    return Growth(spec, pair, old, new, dtype)


def _check_norms(spec: HeadSpec) -> None:
    shape = spec.kv if isinstance(spec, KVHeadSpec) else spec.decoder
    if shape is not None and shape.has_qk_norm:
        raise ConfigError(
            f"the head {spec.source!r} norms its queries and keys, whose width stays while the "
            "epsilon that all its norms share is scaled: name a head without q_norm and k_norm"
        )
    if spec.conventions.norm_gain != "weight":
        raise ConfigError(
            f"the head {spec.source!r} has norm_gain={spec.conventions.norm_gain!r}, and only "
            "gains that multiply as they are can be scaled: name another head"
        )


def _shape(spec: HeadSpec, pair: GrownPair) -> GrownShape:
    if isinstance(spec, KVHeadSpec):
        return _kv_shape(spec, pair)
    shape = spec.decoder
    if shape is None:
        return pair.old
    if shape.head_dim != pair.head_dim:
        raise ConfigError(
            f"the head {spec.source!r} has attention heads of {shape.head_dim} values, its target "
            f"of {pair.head_dim}: only heads with their target's head_dim are grown"
        )
    return GrownShape(
        hidden_size=spec.widths.hidden,
        num_layers=shape.num_layers,
        intermediate_size=shape.intermediate_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
    )


def _kv_shape(spec: KVHeadSpec, pair: GrownPair) -> GrownShape:
    kv = spec.kv
    found = (kv.num_kv_heads, kv.key_width, kv.value_width)
    wanted = (pair.old.num_kv_heads, pair.head_dim, pair.head_dim)
    if found != wanted:
        raise PairError(
            f"the head {spec.source!r} reads KV as {found} (heads, key width, value width), "
            f"target {pair.source.name!r} has {wanted}: it was made for another model"
        )
    return replace(
        pair.old,
        num_layers=kv.num_layers,
        intermediate_size=kv.intermediate_size,
        num_heads=kv.num_heads,
    )


def _grow_eagle3(config: Mapping[str, Any], growth: Growth) -> dict[str, Any]:
    spec, new = growth.spec, growth.new
    assert spec.decoder is not None
    nested = {
        **_without_dtype(config[NESTED]),
        **_sizes(new),
        "head_dim": spec.decoder.head_dim,
        "rms_norm_eps": growth.eps(spec.decoder.norm_eps),
        "torch_dtype": growth.dtype,
    }
    grown = {
        **_without_dtype(config),
        "target_hidden_size": new.hidden_size,
        "torch_dtype": growth.dtype,
        NESTED: nested,
    }
    grown.pop("aux_hidden_state_layer_ids", None)  # the same under its other name
    if spec.conventions.feature_layers:
        grown[LAYERS] = [growth.home(layer) for layer in spec.conventions.feature_layers]
    about = config.get("speculators_config") or {}
    verifier = {**(about.get("verifier") or {}), "name_or_path": growth.pair.name}
    return {**grown, "speculators_config": {**about, "verifier": verifier}}


def _grow_medusa(config: Mapping[str, Any], growth: Growth) -> dict[str, Any]:
    return {
        **_without_dtype(config),
        "hidden_size": growth.new.hidden_size,
        "base_model_name_or_path": growth.pair.name,
        "torch_dtype": growth.dtype,
    }


def _grow_kv(config: Mapping[str, Any], growth: Growth) -> dict[str, Any]:
    return {
        **config,
        **_sizes(growth.new),
        "target_hidden_size": growth.new.hidden_size,
        "kv_layers": [growth.home(layer) for layer in config["kv_layers"]],
        "rms_norm_eps": growth.eps(config["rms_norm_eps"]),
    }


LAYOUTS = {
    Family.EAGLE3: Layout("model.safetensors", _grow_eagle3),
    Family.MEDUSA: Layout(MEDUSA_WEIGHTS, _grow_medusa),
    Family.KV: Layout("model.safetensors", _grow_kv),
}


def _sizes(shape: GrownShape) -> dict[str, int]:
    return {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
    }


def _without_dtype(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
