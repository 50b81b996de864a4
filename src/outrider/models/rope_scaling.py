"""Rope settings of a checkpoint: the scalings it may name, and the frequencies they mean.

The formulas and their float32 order are those of `transformers`, so that tables agree with it.

Shape legend: W rotated width of a head, F = W / 2 frequencies.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outrider.errors import ModelError

KINDS = ("default", "dynamic", "linear", "llama3", "longrope", "yarn")
REQUIRED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
    "yarn": ("factor",),
}
KNOWN_KEYS = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "attention_factor"),
    *("original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "truncate"),
    *("short_factor", "long_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
}


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """How positions turn queries and keys.

    Attributes:
        kind: one of `KINDS`; within `max_positions`, "dynamic" is "default".
        width: W, the leading part of each head that turns.
        max_positions: longest context these frequencies are right for.
        original_max_positions: context of the pretraining that a scaling started from.
        short_factors: LongRoPE's divisors of the frequencies, one per pair.
        attention_factor: multiplies cosine and sine.
    """

    kind: str
    theta: float
    width: int
    max_positions: int
    original_max_positions: int
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    is_truncated: bool = True
    short_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0


def read_rope(
    values: Mapping[str, Any],
    *,
    head_dim: int,
    max_positions: int,
    default_theta: float = 10000.0,
    default_original: int | None = None,
    kinds: Mapping[str, str] | None = None,
) -> RopeConfig:
    """From a config's `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`.

    Args:
        default_original: pretraining context where the config names none.
        kinds: the family's own names of a scaling ("su" is LongRoPE in Phi-3).

    Raises:
        ModelError: as `rope_refusal` says, or a parameter is missing or of the wrong kind.
    """
    refusal = rope_refusal(values, kinds)
    if refusal:
        raise ModelError(refusal)
    given = rope_parameters(values)
    kind = _kind(given, kinds)
    for key in REQUIRED.get(kind, ()):
        if given.get(key) is None:
            raise ModelError(f"rope parameters of type {kind!r} lack {key!r}: {dict(given)}")
    original = (
        values.get("original_max_position_embeddings")
        or given.get("original_max_position_embeddings")
        or default_original
        or max_positions
    )
    theta = given.get("rope_theta") or values.get("rope_theta") or default_theta
    return _build(
        kind,
        given,
        float(theta),
        int(head_dim * partial_factor(values)),
        max_positions,
        int(original),
    )


def rope_refusal(values: Mapping[str, Any], kinds: Mapping[str, str] | None = None) -> str | None:
    """Why these rope settings are beyond the table, or None."""
    given = rope_parameters(values)
    if any(isinstance(value, Mapping) for value in given.values()):
        return "rope parameters differ by layer type"
    if _kind(given, kinds) not in KINDS:
        return f"rope type {_kind(given, kinds)!r} is not known (known: {', '.join(KINDS)})"
    strange = sorted(set(given) - KNOWN_KEYS)
    if strange:
        return (
            f"rope parameter {strange[0]!r} is not known (known: {', '.join(sorted(KNOWN_KEYS))})"
        )
    return None


def rope_parameters(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rope settings of a config, whichever of the two styles it is written in."""
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise ModelError(f"rope parameters must be a mapping, got {given!r}")
    return given


def partial_factor(values: Mapping[str, Any]) -> float:
    """The share of each head that turns."""
    own = rope_parameters(values).get("partial_rotary_factor")
    return float(own or values.get("partial_rotary_factor") or 1.0)


def inverse_frequencies(config: RopeConfig) -> Tensor:
    """float32 frequencies_F: radians per position of each pair."""
    exponents_F = torch.arange(0, config.width, 2).float() / config.width
    frequencies_F = 1.0 / config.theta**exponents_F
    if config.kind == "linear":
        return frequencies_F / config.factor
    if config.kind == "llama3":
        return _llama3(frequencies_F, config)
    if config.kind == "yarn":
        return _yarn(config.theta**exponents_F, config)
    if config.kind == "longrope":
        return 1.0 / (torch.tensor(config.short_factors) * config.theta**exponents_F)
    return frequencies_F


def _kind(given: Mapping[str, Any], kinds: Mapping[str, str] | None) -> str:
    name = str(given.get("rope_type") or given.get("type") or "default")
    return (kinds or {}).get(name, name)


def _build(
    kind: str, given: Mapping[str, Any], theta: float, width: int, max_positions: int, original: int
) -> RopeConfig:
    factor = float(given.get("factor") or max_positions / original)
    short = tuple(float(value) for value in given.get("short_factor") or ())
    attention_factor = given.get("attention_factor")
    if attention_factor is None:
        attention_factor = _attention_factor(kind, factor, original, given)
    if kind == "longrope":
        if len(short) != width // 2:
            raise ModelError(f"short_factor has {len(short)} values, the rope needs {width // 2}")
        if tuple(given["long_factor"]) != tuple(given["short_factor"]):
            max_positions = min(max_positions, original)
    if kind == "yarn":
        max_positions = max(max_positions, int(original * factor))
    return RopeConfig(
        kind=kind,
        theta=theta,
        width=width,
        max_positions=max_positions,
        original_max_positions=original,
        factor=factor,
        low_freq_factor=float(given.get("low_freq_factor") or 1.0),
        high_freq_factor=float(given.get("high_freq_factor") or 4.0),
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        is_truncated=bool(given.get("truncate", True)),
        short_factors=short,
        attention_factor=float(attention_factor),
    )


def _attention_factor(kind: str, factor: float, original: int, given: Mapping[str, Any]) -> float:
    """The scale of cosine and sine that the papers recommend for a stretched context."""
    if kind == "longrope" and factor > 1:
        return math.sqrt(1 + math.log(factor) / math.log(original))
    if kind == "yarn":
        scale, all_dim = given.get("mscale"), given.get("mscale_all_dim")
        if scale and all_dim:
            return _yarn_scale(factor, scale) / _yarn_scale(factor, all_dim)
        return _yarn_scale(factor)
    return 1.0


def _yarn_scale(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _llama3(frequencies_F: Tensor, config: RopeConfig) -> Tensor:
    """Llama 3.1: slow pairs are stretched by the factor, fast ones kept, those between blended."""
    context = config.original_max_positions
    wavelengths_F = 2 * math.pi / frequencies_F
    low, high = config.low_freq_factor, config.high_freq_factor
    share_F = (context / wavelengths_F - low) / (high - low)
    blended_F = (1 - share_F) * frequencies_F / config.factor + share_F * frequencies_F
    is_slow_F = wavelengths_F > context / low
    is_fast_F = wavelengths_F < context / high
    stretched_F = torch.where(is_slow_F, frequencies_F / config.factor, frequencies_F)
    return torch.where(is_slow_F | is_fast_F, stretched_F, blended_F)


def _yarn(wavelengths_F: Tensor, config: RopeConfig) -> Tensor:
    """YaRN (Peng et al. 2023, section 3.2): extrapolate fast pairs, interpolate slow ones."""

    def pair_with(num_rotations: float) -> float:
        context = config.original_max_positions
        turns = math.log(context / (num_rotations * 2 * math.pi))
        return config.width * turns / (2 * math.log(config.theta))

    low, high = pair_with(config.beta_fast), pair_with(config.beta_slow)
    if config.is_truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.width - 1)
    span = high - low if high != low else 0.001
    kept_F = 1 - ((torch.arange(config.width // 2).float() - low) / span).clamp(0, 1)
    return 1.0 / (config.factor * wavelengths_F) * (1 - kept_F) + 1.0 / wavelengths_F * kept_F
