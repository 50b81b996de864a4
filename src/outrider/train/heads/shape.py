"""The layer of a new head, after the target's own, and which states of the target it reads."""

from collections.abc import Mapping
from typing import Any

from outrider.errors import ConfigError
from outrider.models.families import FAMILIES, Family
from outrider.models.heads.spec import DecoderShape
from outrider.models.rope_scaling import RopeConfig, read_rope, rope_refusal

NUM_FEATURES = 3
RULE_FROM = 8  # layers of a target from which the published choice of features makes sense


def decoder_shape(values: Mapping[str, Any], num_layers: int) -> DecoderShape:
    """Llama-like layers of the widths in a target's config. ConfigError if it names no heads."""
    inner = {**values, **(values.get("text_config") or {})}
    num_heads, hidden = inner.get("num_attention_heads"), inner["hidden_size"]
    if not isinstance(num_heads, int):
        raise ConfigError("config.json of the target gives no num_attention_heads: no head fits it")
    head_dim = inner.get("head_dim") or hidden // num_heads
    return DecoderShape(
        family="llama",
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=inner.get("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        intermediate_size=inner.get("intermediate_size") or 4 * hidden,
        has_qkv_bias=False,
        has_output_bias=False,
        has_qk_norm=False,
        norm_eps=float(inner.get("rms_norm_eps") or 1e-6),
        rope=_rope(inner, head_dim),
        windows=(0,) * num_layers,
    )


def feature_layers(num_layers: int, chosen: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Boundaries 0 (embedding) to `num_layers` (last state): those chosen, or the usual three.

    Those are 2, L // 2 and L - 3 as published heads have them; in small targets, where they lie
    close together, an early, a middle and the last one.
    """
    if chosen is not None:
        if not all(0 <= layer <= num_layers for layer in chosen) or not chosen:
            raise ConfigError(
                f"feature_layers={list(chosen)}: the target has states 0 (embedding) to "
                f"{num_layers} (before its last norm)"
            )
        return chosen
    if num_layers >= RULE_FROM:
        return (2, num_layers // 2, num_layers - 3)
    return tuple(sorted({min(1, num_layers), (num_layers + 1) // 2, num_layers}))


def rope_values(rope: RopeConfig) -> dict[str, Any]:
    """`rope_parameters` that say what this rope does; settings of other kinds are left out."""
    values: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind == "default":
        return values
    values["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn", "dynamic", "longrope"):
        values["original_max_position_embeddings"] = rope.original_max_positions
    if rope.kind == "llama3":
        values |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
        }
    if rope.kind == "yarn":
        values |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        values["truncate"] = rope.is_truncated
    if rope.kind == "longrope":
        factors = list(rope.short_factors)
        values |= {"short_factor": factors, "long_factor": factors}
    if rope.kind in ("yarn", "longrope"):
        values["attention_factor"] = rope.attention_factor
    return values


def _rope(values: Mapping[str, Any], head_dim: int) -> RopeConfig:
    """The target's, so that the head knows as many positions; plain where it cannot be read."""
    family = FAMILIES.get(str(values.get("model_type")), Family())
    max_positions = int(values.get("max_position_embeddings") or 2048)
    is_strange = rope_refusal(values, family.rope_kinds) is not None
    return read_rope(
        {"rope_theta": values.get("rope_theta")} if is_strange else values,
        head_dim=head_dim,
        max_positions=max_positions,
        default_theta=family.default_theta,
        default_original=family.default_original,
        kinds=family.rope_kinds,
    )
