"""Every writer's counting of layers, brought to boundaries."""

from typing import Any

import pytest

from outrider.errors import ConfigError
from outrider.models.heads.feature_layers import block_layers, eagle_layers

IDS = [1, 11, 21]

EAGLE: list[tuple[dict[str, Any], tuple[int, ...], bool]] = [
    ({}, (2, 12, 21), False),
    ({"eagle_config": {}}, (2, 12, 21), False),
    ({"eagle_aux_hidden_state_layer_ids": IDS}, (1, 11, 21), True),
    ({"aux_hidden_state_layer_ids": IDS}, (1, 11, 21), True),
    ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": IDS}}, (2, 12, 22), True),
    ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [-1, 11, 23]}}, (0, 12, 24), True),
]


@pytest.mark.parametrize(("config", "layers", "is_stated"), EAGLE)
def test_eagle(config: dict[str, Any], layers: tuple[int, ...], is_stated: bool) -> None:
    assert eagle_layers(config, num_features=3, num_layers=24) == (layers, is_stated)


def test_the_published_conversion() -> None:
    """A head of Qwen3-235B (94 layers) whose nested ids, lifted unchanged, were off by one."""
    nested = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 46, 90]}}
    assert eagle_layers(nested, num_features=3, num_layers=94).layers == (2, 47, 91)


BLOCK: list[tuple[dict[str, Any], int, tuple[int, ...], bool]] = [
    ({"aux_hidden_state_layer_ids": IDS}, 5, (1, 11, 21), True),
    ({"dflash_config": {"target_layer_ids": IDS}}, 5, (2, 12, 22), True),
    ({"target_layer_ids": IDS}, 5, (2, 12, 22), True),
    ({"dspark_target_layer_ids": IDS}, 5, (2, 12, 22), True),
    ({"dspark_target_layer_ids": IDS, "model_type": "deepseek_v41"}, 5, (1, 11, 21), True),
    ({}, 3, (2, 12, 22), False),
]


@pytest.mark.parametrize(("config", "num_draft", "layers", "is_stated"), BLOCK)
def test_block(
    config: dict[str, Any], num_draft: int, layers: tuple[int, ...], is_stated: bool
) -> None:
    reading = block_layers(config, num_features=3, num_draft_layers=num_draft, num_layers=24)
    assert reading == (layers, is_stated)


def test_defaults_of_block_drafters() -> None:
    # Outputs 18 of 36 layers; then round(1 + 32 i / 4) = 1, 9, 17, 25, 33.
    assert block_layers({}, num_features=1, num_draft_layers=1, num_layers=36).layers == (19,)
    five = block_layers({}, num_features=5, num_draft_layers=5, num_layers=36)
    assert five.layers == (2, 10, 18, 26, 34)
    with pytest.raises(ConfigError, match=r"the rule for 5 draft layers gives 5"):
        block_layers({}, num_features=4, num_draft_layers=5, num_layers=36)
