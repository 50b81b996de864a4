"""Conventions pinned from outside, in `outrider.json` or by a caller, over what files say."""

import json
import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError, unknown
from outrider.models.heads.given import Given
from outrider.models.heads.spec import Conventions, Family, HeadSpec

logger = logging.getLogger(__name__)

SIDECAR = "outrider.json"
SECTION = "conventions"
ORIGINS = ("own", "target")
MASKS = ("bidirectional", "causal")
# What each convention may be; a doctor tries these. Layers are numbers.
CHOICES: Mapping[str, tuple[Any, ...]] = {
    "norm_before_residual": (False, True),
    "input_norm": ("none", "all", "each"),
    "feedback": ("pre-norm", "post-norm"),
    "input_state": ("normed", "raw"),
    "concatenation": ("embedding-first", "feature-first"),
    "rope_style": ("half-split", "interleaved"),
    "rope_origin": ORIGINS,
    "norm_gain": ("weight", "one-plus-weight"),
    "lm_head": ORIGINS,
    "embedding": ORIGINS,
    "vocabulary_map": ("offset", "absolute"),
    "sample_from_anchor": (False, True),
    "is_first_embedding_zero": (False, True),
}
NAMES = tuple(field.name for field in fields(Conventions))
OF_PARTS = ("lm_head", "embedding")
OF_LAYERS = ("rope_style", "rope_origin", "norm_gain", *OF_PARTS)
OF_FEATURES = ("feature_layers", "norm_before_residual", "input_norm", "vocabulary_map")
# What a family's forward honours; any other convention would be laid down for nothing.
APPLIES: Mapping[Family, tuple[str, ...]] = {
    Family.EAGLE: ("input_state", "concatenation", *OF_LAYERS),
    Family.EAGLE3: ("feedback", *OF_FEATURES, *OF_LAYERS),
    Family.PEAGLE: (*OF_FEATURES, *OF_LAYERS),
    Family.BLOCK: (
        "feature_layers",
        "block_masks",
        "sample_from_anchor",
        "vocabulary_map",
        *OF_LAYERS,
    ),
    Family.MEDUSA: ("input_state", "lm_head"),
    Family.MTP: (
        "feedback",
        "input_state",
        "concatenation",
        "is_first_embedding_zero",
        *OF_LAYERS,
    ),
    Family.KV: ("feedback", "input_state", "concatenation", "lm_head"),
}


def read_pins(folder: Path) -> dict[str, Any]:
    """The section "conventions" of the folder's `outrider.json`; empty if there is none.

    Raises:
        ConfigError: the file is not such JSON, or names a convention or value that does not exist.
    """
    path = folder / SIDECAR
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} is not JSON ({error}): mend or delete it") from error
    pins = values.get(SECTION, {}) if isinstance(values, dict) else None
    if not isinstance(pins, dict):
        raise ConfigError(f"{str(path)!r} must hold a mapping with a mapping {SECTION!r}")
    if pins:
        logger.info("%s lays down %s", path, ", ".join(f"{k}={v!r}" for k, v in pins.items()))
    return check_pins(pins)


def check_pins(pins: Mapping[str, Any]) -> dict[str, Any]:
    """The pins with lists as tuples. ConfigError for a name or value that does not exist."""
    return {name: _checked(name, value) for name, value in pins.items()}


def lay_down(given: Given, spec: HeadSpec) -> HeadSpec:
    """The head with the pinned conventions. ConfigError if it cannot be run so."""
    pinned = dict(given.pinned)
    _check_family(spec, pinned)
    _check_layers(given, spec, pinned.get("feature_layers"))
    _check_masks(spec, pinned.get("block_masks"))
    _check_tensors(given, spec, pinned)
    return replace(
        spec,
        conventions=replace(spec.conventions, **pinned),
        assumed=spec.assumed - pinned.keys(),
        pinned=frozenset(pinned),
    )


def _check_family(spec: HeadSpec, pinned: Mapping[str, Any]) -> None:
    """ConfigError for a convention that heads of this family do not follow."""
    known = APPLIES[spec.family]
    if spec.family is Family.EAGLE3 and not spec.widths.num_features:
        known = ("input_state", *known)  # it reads the last state, as EAGLE-1 does
    for name, value in pinned.items():
        if name not in known:
            raise ConfigError(
                f"convention {name}={value!r}: means nothing to a head of the family "
                f"{spec.family}, which follows {', '.join(known)}: drop it"
            )


def _checked(name: str, value: Any) -> Any:
    if name not in NAMES:
        raise ConfigError(unknown("convention", name, NAMES))
    if name in CHOICES:
        if not any(type(value) is type(choice) and value == choice for choice in CHOICES[name]):
            raise ConfigError(f"convention {name}={value!r} is none of {list(CHOICES[name])}")
        return value
    kind = int if name == "feature_layers" else str
    if not isinstance(value, list | tuple) or not all(type(item) is kind for item in value):
        raise ConfigError(f"convention {name}={value!r} must be a list of {kind.__name__}")
    if kind is str and not set(value) <= set(MASKS):
        raise ConfigError(f"convention {name}={value!r}: each must be one of {list(MASKS)}")
    return tuple(value)


def _check_layers(given: Given, spec: HeadSpec, layers: tuple[int, ...] | None) -> None:
    if layers is None:
        return
    num_layers, num_features = given.target.num_layers, spec.widths.num_features
    if len(layers) != num_features or not all(0 <= layer <= num_layers for layer in layers):
        raise ConfigError(
            f"convention feature_layers={list(layers)}: the head reads {num_features} features "
            f"of boundaries 0 to {num_layers}"
        )


def _check_masks(spec: HeadSpec, masks: tuple[str, ...] | None) -> None:
    num_layers = len(spec.conventions.block_masks)
    if masks is not None and len(masks) != num_layers:
        raise ConfigError(
            f"convention block_masks={list(masks)}: the head has {num_layers} layers with masks"
        )


def _check_tensors(given: Given, spec: HeadSpec, pinned: Mapping[str, Any]) -> None:
    """What is pinned to the head's own must be in its files."""
    for name in ("lm_head", "embedding"):
        if pinned.get(name) == "own" and getattr(spec.conventions, name) != "own":
            raise ConfigError(f"convention {name}='own': the head's files hold none")
    wanted, held = pinned.get("input_norm", "none"), spec.conventions.input_norm
    if wanted not in ("none", held):
        raise ConfigError(f"convention input_norm={wanted!r}: the files hold norms for {held!r}")
    if "vocabulary_map" in pinned and spec.conventions.vocabulary_map == "none":
        raise ConfigError("convention vocabulary_map: the head drafts the target's own vocabulary")
