"""Which layers of the target a head reads, from every writer's counting to boundaries.

Boundary j is the residual stream before layer j: 0 is the embedding, L the state before the final
norm. Some writers count so; others name the layer whose output they took, which is boundary + 1.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from outrider.errors import ConfigError

logger = logging.getLogger(__name__)

BOUNDARY_KEYS = ("eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids")
NESTED_KEY = "eagle_aux_hidden_state_layer_ids"
OUTPUT_KEYS = ("target_layer_ids", "dspark_target_layer_ids")
# Counts the input of a layer under the key by which others name its output.
WRITES_INPUTS = "deepseek_v41"


class Reading(NamedTuple):
    """Boundaries, and whether the config states them."""

    layers: tuple[int, ...]
    is_stated: bool


def eagle_layers(config: Mapping[str, Any], *, num_features: int, num_layers: int) -> Reading:
    """Of EAGLE-3 and P-EAGLE.

    Raises:
        ConfigError: the ids are not as many as `fc` reads, lie outside the target, or are absent
            where `num_features` is not the 3 that have a rule.
    """
    key, top = _top_level(config)
    nested = (config.get("eagle_config") or {}).get(NESTED_KEY)
    if nested is not None:
        nested = _shifted(f"eagle_config.{NESTED_KEY}", nested, 1)
    if top is not None and nested is not None:
        logger.warning(
            "config.json has %s at the top (layers %s) and in eagle_config (layers %s): the top "
            "one counts; remove the other",
            *(key, list(top), list(nested)),
        )
    given = top if top is not None else nested
    if given is not None:
        return Reading(_checked(given, num_features, num_layers), True)
    if num_features != 3:
        raise ConfigError(
            f"fc reads {num_features} features, but config.json names no layers: give "
            f"{BOUNDARY_KEYS[0]} (0 is the embedding, {num_layers} the last layer's output)"
        )
    return Reading(_checked((2, num_layers // 2, num_layers - 3), 3, num_layers), False)


def block_layers(
    config: Mapping[str, Any], *, num_features: int, num_draft_layers: int, num_layers: int
) -> Reading:
    """Of block drafters. ConfigError as for `eagle_layers`."""
    given = _top_level(config)[1]
    if given is None:
        given = _outputs(config)
    if given is not None:
        return Reading(_checked(given, num_features, num_layers), True)
    default = _block_default(num_draft_layers, num_layers)
    if len(default) != num_features:
        raise ConfigError(
            f"fc reads {num_features} features, but config.json names no layers, and the rule "
            f"for {num_draft_layers} draft layers gives {len(default)}: "
            "give dflash_config.target_layer_ids"
        )
    return Reading(_checked(default, num_features, num_layers), False)


def _top_level(config: Mapping[str, Any]) -> tuple[str, tuple[int, ...] | None]:
    for key in BOUNDARY_KEYS:
        if config.get(key) is not None:
            return key, _shifted(key, config[key], 0)
    return "", None


def _outputs(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    nested = (config.get("dflash_config") or {}).get("target_layer_ids")
    if nested is not None:
        return _shifted("dflash_config.target_layer_ids", nested, 1)
    for key in OUTPUT_KEYS:
        if config.get(key) is not None:
            is_input = key.startswith("dspark") and config.get("model_type") == WRITES_INPUTS
            return _shifted(key, config[key], 0 if is_input else 1)
    return None


def _block_default(num_draft_layers: int, num_layers: int) -> tuple[int, ...]:
    """As outputs of layers: the middle one, or spread evenly from 1 to L - 3."""
    if num_draft_layers == 1:
        return (num_layers // 2 + 1,)
    last = num_draft_layers - 1
    return tuple(round(1 + i * (num_layers - 4) / last) + 1 for i in range(num_draft_layers))


def _shifted(key: str, ids: Any, shift: int) -> tuple[int, ...]:
    if not isinstance(ids, Sequence) or not all(type(layer) is int for layer in ids):
        raise ConfigError(f"config.json: {key}={ids!r} must be a list of layer numbers")
    return tuple(layer + shift for layer in ids)


def _checked(layers: tuple[int, ...], num_features: int, num_layers: int) -> tuple[int, ...]:
    if len(layers) != num_features:
        raise ConfigError(
            f"config.json names {len(layers)} feature layers, but fc reads {num_features}: "
            "config and weights must be of one head"
        )
    outside = [layer for layer in layers if not 0 <= layer <= num_layers]
    if outside:
        raise ConfigError(
            f"config.json names the state before layer {outside[0]}, but the target has "
            f"{num_layers} layers: the head was made for another model"
        )
    return layers
