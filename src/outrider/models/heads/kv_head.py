"""Heads that draft from the target's own KV: their published layout, and its reader.

A folder holds `config.json` with `model_type` "outrider_kv_head" and every key of `KEYS`, and
`model.safetensors` with, for H, h, V, Vd of `spec`, D and E key and value width of the target's
heads, and layers i:

    embedding_norm.weight, feature_norm.weight [H]; fc.weight [h, 2 H]
    layers.{i}.input_layernorm.weight, layers.{i}.post_attention_layernorm.weight [h]
    layers.{i}.self_attn.q_proj.weight [heads * D, h], o_proj.weight [h, heads * E]
    layers.{i}.self_attn.q_norm.weight [D] if `has_qk_norm`
    layers.{i}.self_attn.k_proj.weight [kv heads * D, h], v_proj.weight [kv heads * E, h] if
        `sees_drafts`, and k_norm.weight [D] with q_norm
    layers.{i}.mlp.{gate,up}_proj.weight [inner, h], down_proj.weight [h, inner]
    norm.weight [h]; output.weight [H, h] if h is not H
    lm_head.weight [Vd, H] if `lm_head` is "own"; target_ids int64 [Vd] if Vd < V

Keys and values of committed positions are the target's; a head that `sees_drafts` makes those of
drafted tokens, and of the token that they follow, itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from outrider.errors import ConfigError, unknown
from outrider.models.heads.given import Given, Shapes
from outrider.models.heads.pins import CHOICES, lay_down
from outrider.models.heads.spec import Conventions, Family, Head, HeadSpec, Widths
from outrider.models.heads.vocabulary import check_token_map

MODEL_TYPE = "outrider_kv_head"
COUNTS = (
    "target_hidden_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "key_width",
    "value_width",
    "vocab_size",
    "draft_vocab_size",
)
FLAGS = ("concatenation", "feedback", "input_state", "lm_head")
# What has one value in this version; it is written down because other programs may choose another.
FIXED: Mapping[str, Any] = {
    "model_type": MODEL_TYPE,
    "embedding": "target",
    "hidden_act": "silu",
    "norm_gain": "weight",
    "query_position": "own",
    "rope_origin": "target",
    "rope_style": "half-split",
}
SWITCHES = ("has_qk_norm", "sees_drafts")
KEYS = (*FIXED, *COUNTS, *FLAGS, *SWITCHES, "kv_layers", "rms_norm_eps")
FIRST = "layers.0."


@dataclass(frozen=True, kw_only=True)
class KVHeadShape:
    """Layers that attend to the target's keys and values.

    Attributes:
        kv_layers: per layer, the layer of the target whose keys and values it reads.
        num_kv_heads, key_width, value_width: of those.
        has_qk_norm: queries, and keys of its own, are normed per head before they are turned.
        sees_drafts: a row sees drafted rows above it, and itself, by keys and values of its own.
            Without, its layers have queries only.
    """

    kv_layers: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    key_width: int
    value_width: int
    intermediate_size: int
    norm_eps: float
    has_qk_norm: bool
    sees_drafts: bool

    @property
    def num_layers(self) -> int:
        return len(self.kv_layers)


@dataclass(frozen=True, kw_only=True)
class KVHeadSpec(HeadSpec):
    """A head of the family KV."""

    kv: KVHeadShape


def read_kv(given: Given) -> Head:
    """The head, checked against its target.

    Raises:
        ConfigError: a key is missing, unknown, or says what the tensors do not show.
        PairError, ModelError: see `load_head`.
    """
    _check_keys(given.config)
    shape, widths = _shape(given), _widths(given)
    is_own = given.config["lm_head"] == "own"
    has_map = widths.draft_vocab != widths.vocab
    if has_map and not is_own:
        raise ConfigError(
            f"config.json: draft_vocab_size={widths.draft_vocab} needs lm_head='own'; with the "
            f"target's it is {widths.vocab}"
        )
    given.check(tensor_shapes(shape, widths, has_lm_head=is_own))
    tensors = dict(given.tensors)
    if has_map:
        tensors["target_ids"] = check_token_map(
            tensors["target_ids"], num_draft=widths.draft_vocab, num_target=widths.vocab
        )
    spec = KVHeadSpec(
        family=Family.KV,
        widths=widths,
        conventions=_conventions(given.config, has_map),
        kv=shape,
        source=given.source,
    )
    return Head(lay_down(given, spec), tensors)


def write_config(spec: KVHeadSpec) -> dict[str, Any]:
    """The `config.json` of a head; `read_kv` gives the same description back."""
    kv, widths, chosen = spec.kv, spec.widths, spec.conventions
    return {
        **FIXED,
        "target_hidden_size": widths.target_hidden,
        "hidden_size": widths.hidden,
        "intermediate_size": kv.intermediate_size,
        "num_hidden_layers": kv.num_layers,
        "num_attention_heads": kv.num_heads,
        "num_key_value_heads": kv.num_kv_heads,
        "key_width": kv.key_width,
        "value_width": kv.value_width,
        "vocab_size": widths.vocab,
        "draft_vocab_size": widths.draft_vocab,
        "concatenation": chosen.concatenation,
        "feedback": chosen.feedback,
        "input_state": chosen.input_state,
        "lm_head": chosen.lm_head,
        "has_qk_norm": kv.has_qk_norm,
        "sees_drafts": kv.sees_drafts,
        "kv_layers": list(kv.kv_layers),
        "rms_norm_eps": kv.norm_eps,
    }


def tensor_shapes(shape: KVHeadShape, widths: Widths, *, has_lm_head: bool) -> Shapes:
    """Every tensor of such a head."""
    target, hidden = widths.target_hidden, widths.hidden
    shapes: Shapes = {
        "embedding_norm.weight": (target,),
        "feature_norm.weight": (target,),
        "fc.weight": (hidden, 2 * target),
        "norm.weight": (hidden,),
    }
    for index in range(shape.num_layers):
        shapes |= {f"layers.{index}.{name}": s for name, s in _layer(shape, hidden).items()}
    if hidden != target:
        shapes["output.weight"] = (target, hidden)
    if has_lm_head:
        shapes["lm_head.weight"] = (widths.draft_vocab, target)
    if widths.draft_vocab != widths.vocab:
        shapes["target_ids"] = (widths.draft_vocab,)
    return shapes


def _layer(shape: KVHeadShape, hidden: int) -> Shapes:
    heads, inner = shape.num_heads, shape.intermediate_size
    shapes: Shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (heads * shape.key_width, hidden),
        "self_attn.o_proj.weight": (hidden, heads * shape.value_width),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if shape.sees_drafts:
        shapes["self_attn.k_proj.weight"] = (shape.num_kv_heads * shape.key_width, hidden)
        shapes["self_attn.v_proj.weight"] = (shape.num_kv_heads * shape.value_width, hidden)
    if shape.has_qk_norm:
        shapes["self_attn.q_norm.weight"] = (shape.key_width,)
    if shape.has_qk_norm and shape.sees_drafts:
        shapes["self_attn.k_norm.weight"] = (shape.key_width,)
    return shapes


def _check_keys(config: Mapping[str, Any]) -> None:
    absent = [key for key in KEYS if key not in config]
    if absent:
        raise ConfigError(
            f"config.json of a KV head lacks {', '.join(absent)}: every key must be there, take "
            "the file that was written with the weights"
        )
    for key, value in config.items():
        if key not in KEYS:
            raise ConfigError(unknown("config.json: key", key, KEYS))
        choices = (FIXED[key],) if key in FIXED else CHOICES.get(key, (value,))
        if value not in choices:
            raise ConfigError(f"config.json: {key}={value!r} is none of {list(choices)}")
    for key in SWITCHES:
        if not isinstance(config[key], bool):
            raise ConfigError(f"config.json: {key}={config[key]!r} must be true or false")


def _shape(given: Given) -> KVHeadShape:
    query, output = f"{FIRST}self_attn.q_proj.weight", f"{FIRST}self_attn.o_proj.weight"
    counts = {key: given.count(key) or 0 for key in COUNTS}
    num_heads, num_kv_heads = counts["num_attention_heads"], counts["num_key_value_heads"]
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads={num_heads} is no multiple of "
            f"num_key_value_heads={num_kv_heads}"
        )
    given.agree_count("key_width", given.shape(query)[0] // num_heads, query)
    given.agree_count("value_width", given.shape(output)[1] // num_heads, output)
    gate = f"{FIRST}mlp.gate_proj.weight"
    return KVHeadShape(
        kv_layers=_kv_layers(given),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        key_width=counts["key_width"],
        value_width=counts["value_width"],
        intermediate_size=given.agree_count("intermediate_size", given.shape(gate)[0], gate),
        norm_eps=_eps(given.config["rms_norm_eps"]),
        has_qk_norm=_agreed(given, "has_qk_norm", "q_norm", "norms of queries"),
        sees_drafts=_agreed(given, "sees_drafts", "k_proj", "projections of keys"),
    )


def _agreed(given: Given, key: str, part: str, what: str) -> bool:
    return given.agree_flag(key, f"{FIRST}self_attn.{part}.weight" in given.tensors, what)


def _kv_layers(given: Given) -> tuple[int, ...]:
    layers, num_layers = given.config["kv_layers"], given.target.num_layers
    is_list = isinstance(layers, list) and bool(layers)
    if not is_list or not all(type(j) is int and 0 <= j < num_layers for j in layers):
        raise ConfigError(
            f"config.json: kv_layers={layers!r} must be a list of layers of target "
            f"{given.target.name!r}, 0 to {num_layers - 1}, one per layer of the head"
        )
    found = {name.split(".")[1] for name in given.tensors if name.startswith("layers.")}
    given.agree_count("num_hidden_layers", len(found), f"{FIRST}input_layernorm.weight")
    if len(layers) != len(found):
        raise ConfigError(
            f"config.json: kv_layers={layers!r} names {len(layers)} layers, the files hold "
            f"{len(found)}: there is one per layer of the head"
        )
    if given.config["sees_drafts"] and len(set(layers)) < len(layers):
        raise ConfigError(
            f"config.json: kv_layers={layers!r} names a layer twice; with sees_drafts each is read "
            "once, for keys of drafted tokens stand beside the target's while a draft lasts"
        )
    return tuple(layers)


def _eps(value: Any) -> float:
    if not isinstance(value, float) or not 0 < value < 1:
        raise ConfigError(f"config.json: rms_norm_eps={value!r} must be a small positive number")
    return value


def _widths(given: Given) -> Widths:
    config, target = given.config, given.target
    hidden, both = given.shape("fc.weight")
    given.agree_count("hidden_size", hidden, "fc.weight")
    given.agree_count("target_hidden_size", both // 2, "fc.weight")
    if config["lm_head"] == "own":
        given.agree_count("draft_vocab_size", given.shape("lm_head.weight")[0], "lm_head.weight")
    return Widths(
        target_hidden=given.agree_target("hidden size", both // 2, target.hidden_size),
        hidden=hidden,
        vocab=given.agree_target("vocabulary", config["vocab_size"], target.vocab_size),
        draft_vocab=config["draft_vocab_size"],
    )


def _conventions(config: Mapping[str, Any], has_map: bool) -> Conventions:
    return Conventions(
        **{key: config[key] for key in FLAGS},
        rope_origin="target",
        vocabulary_map="absolute" if has_map else "none",
    )
