"""What the lean decoder must know about a checkpoint, read from its Hugging Face config."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from outrider.errors import ModelError
from outrider.models.families import FAMILIES, Family
from outrider.models.rope_scaling import RopeConfig, partial_factor, read_rope, rope_refusal
from outrider.ops.base import Window

ACTIVATIONS = ("silu", "swish")
REMEDY = "the transformers adapter may run it"


class LayerConfig(NamedTuple):
    """What may differ from layer to layer."""

    window: Window
    has_rope: bool


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A dense decoder of the Llama family; all differences between families are fields.

    Attributes:
        family: `model_type` of the Hugging Face config.
        attention_scale: multiplies query-key products.
        is_tied: the LM head is the embedding matrix.
        is_fused: the files hold q, k, v (and gate, up) as one matrix.
        mask_token_id: `pard_token` of a PARD draft model.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    attention_scale: float
    rope: RopeConfig
    layers: tuple[LayerConfig, ...]
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    has_qk_norm: bool = False
    is_tied: bool = False
    is_fused: bool = False
    mask_token_id: int | None = None

    @property
    def max_positions(self) -> int:
        """Longest context; LongRoPE counts only up to where its long factors would begin."""
        return self.rope.max_positions

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From the mapping in `config.json`.

        Raises:
            ModelError: the family or a setting is beyond this decoder (see `is_lean`), or a
                value is missing or impossible.
        """
        refusal = _refusal(values)
        if refusal:
            raise ModelError(f"{refusal}; {REMEDY}")
        return cls(**_fields(values))


def is_lean(values: Mapping[str, Any]) -> bool:
    """Whether the lean decoder runs a model with this config; otherwise the adapter may."""
    return _refusal(values) is None


def _refusal(values: Mapping[str, Any]) -> str | None:
    """What in this config is beyond the lean decoder, or None."""
    name = values.get("model_type")
    if name not in FAMILIES:
        return f"model_type {name!r} is not of the lean decoder ({', '.join(FAMILIES)})"
    family = FAMILIES[name]
    activation = values.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        return f"hidden_act {activation!r} is not known (known: {', '.join(ACTIVATIONS)})"
    if values.get("quantization_config"):
        return "the weights are quantised (quantization_config)"
    partial = partial_factor(values)
    if partial != 1.0 and not family.is_partial_rotary:
        return f"partial_rotary_factor={partial} is not a setting of {name}"
    return _sliding_refusal(family, values) or rope_refusal(values, family.rope_kinds)


def _sliding_refusal(family: Family, values: Mapping[str, Any]) -> str | None:
    window = _window(family, values)
    kinds = set(values.get("layer_types") or ())
    strange = sorted(kinds - {"full_attention", "sliding_attention"})
    if strange:
        return f"layer type {strange[0]!r} is not known (known: full_attention, sliding_attention)"
    if "sliding_attention" in kinds and not window:
        return "layer_types names sliding attention, but no sliding_window is in use"
    if family.sliding == "none" and window:
        return f"sliding_window={window} is not a setting of {values['model_type']}"
    if family.sliding == "all" and window and "full_attention" in kinds:
        return f"layer_types of {values['model_type']} mixes full and sliding attention"
    return None


def _window(family: Family, values: Mapping[str, Any]) -> int:
    """Width of the sliding window in use; 0 is none."""
    if family.is_sliding_optional and not values.get("use_sliding_window", False):
        return 0
    return int(values.get("sliding_window", family.default_window) or 0)


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    family = FAMILIES[values["model_type"]]
    hidden_size, num_heads = _count(values, "hidden_size"), _count(values, "num_attention_heads")
    num_kv_heads = values.get("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise ModelError(
            f"num_attention_heads={num_heads} is no multiple of num_key_value_heads={num_kv_heads}"
        )
    head_dim = values.get("head_dim") or family.head_dim or hidden_size // num_heads
    rope = read_rope(
        values,
        head_dim=head_dim,
        max_positions=_count(values, "max_position_embeddings"),
        default_theta=family.default_theta,
        default_original=family.default_original,
        kinds=family.rope_kinds,
    )
    if rope.width % 2 or not 0 < rope.width <= head_dim:
        raise ModelError(f"rope turns {rope.width} of {head_dim} dimensions: it must be even")
    return {
        "family": values["model_type"],
        "vocab_size": _count(values, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": _count(values, "intermediate_size"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "norm_eps": float(values.get("rms_norm_eps", 1e-5 if family.is_fused else 1e-6)),
        "attention_scale": head_dim**-0.5,
        "rope": rope,
        "layers": _layers(family, values),
        "has_qkv_bias": _flag(family.has_qkv_bias, values, "attention_bias"),
        "has_output_bias": _flag(family.has_output_bias, values, "attention_bias"),
        "has_mlp_bias": _flag(family.has_mlp_bias, values, "mlp_bias"),
        "has_qk_norm": family.has_qk_norm,
        "is_tied": bool(values.get("tie_word_embeddings", family.is_tied)),
        "is_fused": family.is_fused,
        "mask_token_id": _mask_token(values),
    }


def _mask_token(values: Mapping[str, Any]) -> int | None:
    token = values.get("pard_token")
    if token is None:
        return None
    size = _count(values, "vocab_size")
    if not isinstance(token, int) or not 0 <= token < size:
        raise ModelError(f"pard_token={token!r} must be a token id below vocab_size={size}")
    return token


def _count(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"config.json must give {key} as a positive integer, got {value!r}")
    return value


def _flag(fixed: bool | None, values: Mapping[str, Any], key: str) -> bool:
    return bool(values.get(key, False)) if fixed is None else fixed


def _layers(family: Family, values: Mapping[str, Any]) -> tuple[LayerConfig, ...]:
    num_layers = _count(values, "num_hidden_layers")
    ropes = _ropes(family, values, num_layers)
    kinds = values.get("layer_types")
    if kinds and len(kinds) != num_layers:
        raise ModelError(f"layer_types names {len(kinds)} layers, num_hidden_layers={num_layers}")
    sliding = [
        kinds[i] == "sliding_attention" if kinds else _slides(family, values, i, ropes[i])
        for i in range(num_layers)
    ]
    window = Window(sliding=_window(family, values))
    return tuple(
        LayerConfig(window if slides else Window(), has_rope)
        for slides, has_rope in zip(sliding, ropes, strict=True)
    )


def _slides(family: Family, values: Mapping[str, Any], layer: int, has_rope: bool) -> bool:
    """Whether the family's rule gives this layer the window, where `layer_types` is silent."""
    if family.sliding == "late":
        return layer >= int(values.get("max_window_layers", 28))
    return family.sliding == "all" or (family.sliding == "no-rope" and not has_rope)


def _ropes(family: Family, values: Mapping[str, Any], num_layers: int) -> list[bool]:
    if not family.has_no_rope_layers:
        return [True] * num_layers
    given = values.get("no_rope_layers")
    if given is None:
        interval = int(values.get("no_rope_layer_interval", 4))
        return [(layer + 1) % interval != 0 for layer in range(num_layers)]
    if len(given) < num_layers:
        raise ModelError(f"no_rope_layers names {len(given)} layers, the model has {num_layers}")
    return [bool(has_rope) for has_rope in given[:num_layers]]
