"""Medusa heads in all namings, and inside their target's own files."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.errors import ConfigError, ModelError, PairError
from outrider.models.heads.load import load_head
from outrider.models.heads.spec import Family
from tests.models.heads.layouts import (
    DRAFT_IDS,
    MEDUSA_CONFIG,
    TARGET,
    TARGET_CONFIG,
    VD,
    H,
    V,
    medusa_names,
    random_medusa,
    random_target,
    vllm_medusa_names,
    without,
    write,
)
from tests.models.heads.test_eagle3 import same

HEADS = random_medusa()
NAMINGS = {
    "medusa_lm_head.pt": (medusa_names(HEADS), "medusa_lm_head.pt"),
    "tgi": (medusa_names(HEADS), "medusa_lm_head.safetensors"),
    "modelopt": (medusa_names(HEADS, "medusa_heads."), "model.safetensors"),
    "vllm": (vllm_medusa_names(HEADS), "model.safetensors"),
    "vllm prefixed": (vllm_medusa_names(HEADS, "medusa_heads."), "model.safetensors"),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_gives_the_same_heads(tmp_path: Path, naming: str) -> None:
    tensors, file = NAMINGS[naming]
    head = load_head(write(tmp_path, MEDUSA_CONFIG, tensors, file), TARGET)
    assert head.tensors.keys() == HEADS.keys()
    assert all(torch.equal(head.tensors[name], HEADS[name]) for name in HEADS)
    shape = head.spec.medusa
    assert head.spec.family is Family.MEDUSA
    assert shape is not None
    assert (shape.num_heads, shape.num_blocks, shape.has_bias) == (3, 1, True)
    assert (head.spec.conventions.lm_head, head.spec.conventions.input_state) == ("own", "normed")
    assert head.spec.widths.draft_vocab == V


def test_heads_without_lm_heads_use_the_targets(tmp_path: Path) -> None:
    tensors = medusa_names(random_medusa(rows=0))
    spec = load_head(write(tmp_path, MEDUSA_CONFIG, tensors), TARGET).spec
    assert spec.conventions.lm_head == "target"


def test_blocks_that_share_one_module_are_repeated(tmp_path: Path) -> None:
    made = random_medusa(num_blocks=2)
    for name in list(made):
        if ".blocks.1." in name:
            made[name] = made[name.replace(".blocks.1.", ".blocks.0.")]
    names = medusa_names(made)
    full = load_head(write(tmp_path / "f", MEDUSA_CONFIG, names), TARGET)
    once = without(names, *(name for name in names if ".1.linear." in name))
    assert same(load_head(write(tmp_path / "o", MEDUSA_CONFIG, once), TARGET), full)
    assert full.spec.medusa is not None
    assert full.spec.medusa.num_blocks == 2


def test_heads_are_counted_from_the_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = medusa_names(random_medusa(num_heads=5))
    with caplog.at_level(logging.WARNING):
        spec = load_head(write(tmp_path, {"medusa_num_heads": 2}, tensors), TARGET).spec
    assert spec.medusa is not None
    assert spec.medusa.num_heads == 5
    assert "medusa_num_heads=2, the files hold 5 heads" in caplog.text


def test_heads_in_the_targets_own_files(tmp_path: Path) -> None:
    names = random_target() | medusa_names(HEADS, "medusa_head.")
    folder = write(tmp_path / "t", {**TARGET_CONFIG, **MEDUSA_CONFIG}, names)
    head = load_head(folder, replace(TARGET, folder=folder))
    assert head.tensors.keys() == HEADS.keys()
    other = write(tmp_path / "o", TARGET_CONFIG, random_target())
    for target in (TARGET, replace(TARGET, folder=other)):
        with pytest.raises(PairError, match="belong to the model in the same files"):
            load_head(folder, target)


def test_a_truncated_vocabulary(tmp_path: Path) -> None:
    made = random_medusa(rows=VD) | {"target_ids": torch.tensor(DRAFT_IDS).flip(0)}
    config = {"model_type": "medusa", "truncated_vocab_size": VD}
    head = load_head(write(tmp_path, config, vllm_medusa_names(made)), TARGET)
    assert head.tensors["target_ids"].tolist() == list(reversed(DRAFT_IDS))
    assert head.spec.widths.draft_vocab == VD
    assert head.spec.conventions.vocabulary_map == "absolute"


BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "unknown": ({"0.0.conv.weight": torch.zeros(1)}, {}, ModelError, "unknown tensors: 0.0.conv"),
    "missing": ({"1.0.linear.bias": None}, {}, ModelError, "missing tensors: heads.1.blocks.0.b"),
    "missing head": ({"1.1.weight": None}, {}, ModelError, "missing tensors: heads.1.lm_head"),
    "width": (
        {"2.0.linear.weight": torch.zeros(H, H + 1)},
        {},
        ModelError,
        r"2.0.linear.weight is \[16, 17\], expected \[16, 16\]",
    ),
    "lm_head inside": (
        {"0.1.weight": None, "0.0.weight": torch.zeros(V, H)},
        {},
        ModelError,
        r"lm_heads stand at places \[0, 1\]",
    ),
    "rows": (
        {f"{head}.1.weight": torch.zeros(9, H) for head in range(3)},
        {},
        PairError,
        "rows in its lm_heads 9",
    ),
    "map twice": (
        {f"{head}.1.weight": torch.zeros(2, H) for head in range(3)}
        | {"token_map": torch.tensor([3, 3])},
        {},
        ModelError,
        "token_map names a token twice",
    ),
    "map outside": (
        {f"{head}.1.weight": torch.zeros(2, H) for head in range(3)}
        | {"token_map": torch.tensor([3, 40])},
        {},
        ModelError,
        "token_map maps draft token 1 to 40",
    ),
    "map size": (
        {"token_map": torch.tensor([3, 5])},
        {},
        ModelError,
        r"token_map is torch.int64 \[2\], expected whole numbers \[40\]",
    ),
    "truncated": ({}, {"truncated_vocab_size": 9}, ConfigError, "truncated_vocab_size=9"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_every_fault_has_its_own_message(tmp_path: Path, case: str) -> None:
    changes, config, kind, message = BROKEN[case]
    tensors = medusa_names(HEADS) | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(kind, match=message):
        load_head(write(tmp_path, {**MEDUSA_CONFIG, **config}, tensors), TARGET)


def test_another_width_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, MEDUSA_CONFIG, medusa_names(HEADS))
    with pytest.raises(PairError, match="has width 16, target 'tiny' has 32"):
        load_head(folder, replace(TARGET, hidden_size=32))
