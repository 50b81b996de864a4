"""EAGLE-1/2 heads as SafeAILab and older speculators wrote them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.errors import ConfigError, ModelError, PairError
from outrider.models.heads.load import load_head
from outrider.models.heads.spec import Family
from tests.models.heads.layouts import (
    TARGET,
    H,
    V,
    random_eagle1,
    without,
    write_eagle1,
    write_speculators_eagle1,
)
from tests.models.heads.test_eagle3 import same


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"has_bias": True},
        {"has_norms": True},
        {"has_qkv_bias": True},
        {"own_embedding": True},
        {"num_layers": 2},
    ],
    ids=str,
)
def test_both_layouts_give_the_same_head(tmp_path: Path, options: dict[str, Any]) -> None:
    tensors = random_eagle1(**options)
    layers = {"num_hidden_layers": options.get("num_layers", 1)}
    ours = load_head(write_eagle1(tmp_path / "e", tensors, **layers), TARGET)
    assert ours.tensors.keys() == tensors.keys()
    assert all(torch.equal(ours.tensors[name], tensors[name]) for name in tensors)
    if "num_layers" not in options:
        assert same(load_head(write_speculators_eagle1(tmp_path / "s", tensors), TARGET), ours)


def test_speculators_may_write_an_lm_head(tmp_path: Path) -> None:
    tensors = random_eagle1() | {"lm_head.weight": torch.ones(V, H)}
    spec = load_head(write_speculators_eagle1(tmp_path / "s", tensors), TARGET).spec
    assert spec.conventions.lm_head == "own"
    with pytest.raises(ModelError, match=r"unknown tensors: lm_head.weight"):
        load_head(write_eagle1(tmp_path / "e", tensors), TARGET)


def test_the_description(tmp_path: Path) -> None:
    spec = load_head(write_eagle1(tmp_path, random_eagle1()), TARGET).spec
    assert spec.family is Family.EAGLE
    chosen = spec.conventions
    assert (chosen.concatenation, chosen.input_state) == ("embedding-first", "normed")
    assert (chosen.lm_head, chosen.embedding) == ("target", "target")
    assert (spec.widths.hidden, spec.widths.draft_vocab, spec.widths.num_features) == (H, V, 0)


BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "input norm in layer 0": (
        {"layers.0.self_attn.q_norm.weight": torch.ones(4)},
        {},
        ModelError,
        "1 unknown tensors: layers.0.self_attn.q_norm.weight",
    ),
    "final norm": ({"norm.weight": torch.ones(H)}, {}, ModelError, "unknown tensors: norm.weight"),
    "bias said": ({}, {"bias": True}, ConfigError, "bias=True, but the files hold no tensor"),
    "bias denied": (
        {"fc.bias": torch.zeros(H)},
        {"bias": False},
        ConfigError,
        "bias=False, but the files hold tensor 'fc.bias'",
    ),
    "qkv bias said": ({}, {"qkv_bias": True}, ConfigError, "qkv_bias=True, but the files hold no"),
    "norms said": ({}, {"add_para_norm": True}, ConfigError, "add_para_norm=True, but"),
    "missing": (
        {"layers.0.mlp.down_proj.weight": None},
        {},
        ModelError,
        "missing tensors: layers.0.mlp.down_proj.weight",
    ),
    "embedding": (
        {"embed_tokens.weight": torch.zeros(V + 1, H)},
        {},
        ModelError,
        r"embed_tokens.weight is \[41, 16\], expected \[40, 16\]",
    ),
    "vocabulary": ({}, {"vocab_size": 50}, PairError, "vocab_size 50"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_every_fault_has_its_own_message(tmp_path: Path, case: str) -> None:
    changes, config, kind, message = BROKEN[case]
    tensors = random_eagle1() | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(kind, match=message):
        load_head(write_eagle1(tmp_path, tensors, **config), TARGET)


def test_a_head_of_another_width_is_refused(tmp_path: Path) -> None:
    wide = replace(TARGET, hidden_size=32)
    with pytest.raises(PairError, match="has width 16, target 'tiny' has 32"):
        load_head(write_eagle1(tmp_path, random_eagle1()), wide)


def test_a_layer_without_its_attention(tmp_path: Path) -> None:
    tensors = without(random_eagle1(), "layers.0.self_attn.k_proj.weight")
    with pytest.raises(ModelError, match=r"missing tensors: layers.0.self_attn.k_proj.weight"):
        load_head(write_eagle1(tmp_path, tensors), TARGET)
