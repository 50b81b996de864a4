"""The Llama-like layers inside heads: their shape, and the tensors they are made of."""

import re

from outrider.errors import ConfigError
from outrider.models.families import FAMILIES, Family as DecoderFamily
from outrider.models.heads.given import Given, Shapes
from outrider.models.heads.spec import DecoderShape
from outrider.models.rope_scaling import RopeConfig, read_rope

FIRST = "layers.0.self_attn."
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
ACTIVATIONS = ("silu", "swish")
_LAYER = re.compile(r"layers\.(\d+)\.")


def read_decoder(given: Given) -> DecoderShape:
    """Widths and counts as the tensors have them, where the config agrees.

    Raises:
        ConfigError: the config says something else, or layers that are not served.
        ModelError: a projection is missing.
    """
    _refuse_strange(given)
    hidden = hidden_size(given)
    given.agree_count("hidden_size", hidden, f"{FIRST}o_proj.weight")
    head_dim = _head_dim(given, hidden)
    gate = "layers.0.mlp.gate_proj.weight"
    has_bias = all(f"{FIRST}{name}.bias" in given.tensors for name in PROJECTIONS)
    num_layers = _num_layers(given)
    return DecoderShape(
        family=str(given.values.get("model_type", "llama")),
        num_layers=num_layers,
        num_heads=_num_heads(given, "q_proj", "num_attention_heads", head_dim),
        num_kv_heads=_num_heads(given, "k_proj", "num_key_value_heads", head_dim),
        head_dim=head_dim,
        intermediate_size=given.agree_count("intermediate_size", given.shape(gate)[0], gate),
        has_qkv_bias=_qkv_bias(given, has_bias),
        has_output_bias=f"{FIRST}o_proj.bias" in given.tensors,
        has_qk_norm=_qk_norm(given),
        norm_eps=float(given.values.get("rms_norm_eps", 1e-6)),
        rope=_rope(given, head_dim),
        windows=(0,) * num_layers,
    )


def hidden_size(given: Given) -> int:
    """h, the width of the head."""
    return given.shape(f"{FIRST}o_proj.weight")[0]


def layer_shapes(
    shape: DecoderShape, index: int, hidden: int, *, reads: int, norms: tuple[str, ...]
) -> Shapes:
    """The tensors of one layer.

    Args:
        reads: input width of query, key and value.
        norms: names of its norms over `hidden` values.
    """
    query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    inner = shape.intermediate_size
    linear = {
        "self_attn.q_proj": (query, reads, shape.has_qkv_bias),
        "self_attn.k_proj": (key, reads, shape.has_qkv_bias),
        "self_attn.v_proj": (key, reads, shape.has_qkv_bias),
        "self_attn.o_proj": (hidden, query, shape.has_output_bias),
        "mlp.gate_proj": (inner, hidden, False),
        "mlp.up_proj": (inner, hidden, False),
        "mlp.down_proj": (hidden, inner, False),
    }
    shapes: Shapes = {f"{name}.weight": (hidden,) for name in norms}
    for name, (num_outputs, num_inputs, has_bias) in linear.items():
        shapes[f"{name}.weight"] = (num_outputs, num_inputs)
        if has_bias:
            shapes[f"{name}.bias"] = (num_outputs,)
    if shape.has_qk_norm:
        shapes |= {f"self_attn.{name}_norm.weight": (shape.head_dim,) for name in ("q", "k")}
    return {f"layers.{index}.{name}": size for name, size in shapes.items()}


def _refuse_strange(given: Given) -> None:
    if f"{FIRST}q_a_proj.weight" in given.tensors or f"{FIRST}kv_a_proj_with_mqa.weight" in (
        given.tensors
    ):
        raise ConfigError(
            f"the head {given.source!r} has DeepSeek's latent attention (MLA), which is not served "
            "in heads: use one with ordinary attention, or another drafter"
        )
    activation = given.values.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise ConfigError(f"config.json: hidden_act={activation!r} is not served (silu is)")


def _num_layers(given: Given) -> int:
    found = {int(match[1]) for name in given.tensors if (match := _LAYER.match(name))}
    return given.agree_count("num_hidden_layers", max(found) + 1, f"{FIRST}o_proj.weight")


def _head_dim(given: Given, hidden: int) -> int:
    said = given.count("head_dim")
    if f"{FIRST}q_norm.weight" in given.tensors:
        (width,) = given.shape(f"{FIRST}q_norm.weight")
        return given.agree_count("head_dim", width, f"{FIRST}q_norm.weight")
    num_heads = given.count("num_attention_heads")
    if said is None and num_heads is None:
        raise ConfigError("config.json gives neither head_dim nor num_attention_heads")
    return said or hidden // (num_heads or 1)


def _num_heads(given: Given, projection: str, key: str, head_dim: int) -> int:
    name = f"{FIRST}{projection}.weight"
    rows = given.shape(name)[0]
    if rows % head_dim:
        raise ConfigError(
            f"config.json says heads of {head_dim} values, but {given.name(name)} has {rows} "
            "rows, which is no multiple: config and weights must be of one head"
        )
    return given.agree_count(key, rows // head_dim, name)


def _qkv_bias(given: Given, has_bias: bool) -> bool:
    for key in ("qkv_bias", "attention_bias"):
        given.agree_flag(key, has_bias, "bias of query, key and value")
    return has_bias


def _qk_norm(given: Given) -> bool:
    """As the head's `model_type` has it; the tensors decide where that is not known."""
    family = FAMILIES.get(str(given.values.get("model_type", "llama")))
    return family.has_qk_norm if family else f"{FIRST}q_norm.weight" in given.tensors


def _rope(given: Given, head_dim: int) -> RopeConfig:
    max_positions = given.count("max_position_embeddings")
    if max_positions is None:
        raise ConfigError(
            "config.json of the head gives no max_position_embeddings: its rope cannot be built"
        )
    family = FAMILIES.get(str(given.values.get("model_type")), DecoderFamily())
    return read_rope(
        given.values,
        head_dim=head_dim,
        max_positions=max_positions,
        default_theta=family.default_theta,
        default_original=family.default_original,
        kinds=family.rope_kinds,
    )
