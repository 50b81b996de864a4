"""MTP modules in their targets' own files, and in the layout of speculators."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from outrider.errors import ConfigError, ModelError, PairError
from outrider.models.heads.load import load_head
from outrider.models.heads.spec import Family, TargetSpec
from tests.models.heads.layouts import (
    DECODER,
    DEEPSEEK_PARTS,
    PROJECTED_PARTS,
    QWEN_NAMES,
    ROPE,
    TARGET,
    TARGET_CONFIG,
    H,
    L,
    V,
    mtp_names,
    random_mtp,
    random_target,
    renamed,
    without,
    write,
)

ONE = {"num_nextn_predict_layers": 1}


def equal(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return tensors.keys() == expected.keys() and all(
        torch.equal(tensors[name], expected[name]) for name in expected
    )


def native(folder: Path, modules: dict[str, Tensor], config: dict[str, Any], **kind: Any) -> Path:
    """A target whose files hold its modules too."""
    return write(folder, {**TARGET_CONFIG, **config}, random_target(**kind) | modules)


def test_frequencies_that_everybody_computes_are_passed_over(tmp_path: Path) -> None:
    """Some tools write them, in the target's layers or in the modules'."""
    made = random_mtp()
    names = mtp_names(made, "model.layers.{}.", DEEPSEEK_PARTS, first=L)
    for index in (L - 1, L):
        names[f"model.layers.{index}.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    assert equal(load_head(native(tmp_path, names, ONE), TARGET).tensors, made)


def test_deepseek_and_glm(tmp_path: Path) -> None:
    made = random_mtp(num_modules=2, own_vocabulary=True, num_experts=3)
    names = mtp_names(made, "model.layers.{}.", DEEPSEEK_PARTS, first=L)
    folder = native(tmp_path, names, {"num_nextn_predict_layers": 2}, num_experts=3)
    head = load_head(folder, TARGET)
    assert equal(head.tensors, made)
    spec = head.spec
    assert spec.family is Family.MTP
    assert spec.mtp is not None
    assert (spec.mtp.num_modules, spec.mtp.layer) == (2, L - 1)
    chosen = spec.conventions
    assert (chosen.concatenation, chosen.feedback, chosen.input_state) == (
        "embedding-first",
        "post-norm",
        "normed",
    )
    assert (chosen.lm_head, chosen.embedding, chosen.rope_origin) == ("own", "own", "target")
    assert chosen.is_first_embedding_zero
    assert spec.assumed == {"feedback"}


def test_qwen_next(tmp_path: Path) -> None:
    made = random_mtp(num_experts=3, has_qk_norm=True)
    names = renamed(made, *QWEN_NAMES)
    folder = native(tmp_path, names, {"mtp_num_hidden_layers": 1}, num_experts=3, has_qk_norm=True)
    head = load_head(folder, replace(TARGET, family="qwen3_next"))
    assert equal(head.tensors, made)
    chosen = head.spec.conventions
    assert (chosen.norm_gain, chosen.lm_head) == ("one-plus-weight", "target")
    assert not chosen.is_first_embedding_zero


def test_qwen_experts_one_by_one_beside_fused_ones_of_the_target(tmp_path: Path) -> None:
    made = random_mtp(num_experts=3)
    target = random_target(num_experts=3)
    fused = {name: t for name, t in target.items() if ".experts." not in name}
    for index in range(L):
        start = f"model.layers.{index}.mlp.experts."
        fused[f"{start}gate_up_proj"] = torch.zeros(3, 48, H)
        fused[f"{start}down_proj"] = torch.zeros(3, H, 24)
    names = renamed(made, *QWEN_NAMES)
    folder = write(tmp_path / "a", {**TARGET_CONFIG, **ONE}, fused | names)
    assert equal(load_head(folder, TARGET).tensors, made)
    absent = "mtp.layers.0.mlp.experts.2.up_proj.weight"
    folder = write(tmp_path / "b", {**TARGET_CONFIG, **ONE}, fused | without(names, absent))
    with pytest.raises(ModelError, match=r"missing tensors: modules.0.layer.mlp.experts.2.up_proj"):
        load_head(folder, TARGET)


def test_mimo(tmp_path: Path) -> None:
    made = random_mtp(has_bias=True)
    names = mtp_names(made, "model.mtp_layers.{}.", PROJECTED_PARTS)
    head = load_head(native(tmp_path, names, ONE, has_bias=True), TARGET)
    assert equal(head.tensors, made)
    assert head.spec.conventions.concatenation == "feature-first"
    assert head.spec.conventions.is_first_embedding_zero


def test_speculators(tmp_path: Path) -> None:
    made = random_mtp()
    names = mtp_names(made, "mtp_layers.{}.", PROJECTED_PARTS)
    config = {"speculators_model_type": "mtp", "transformer_layer_config": {**DECODER, **ROPE}}
    folder = write(tmp_path / "m", config, names)
    target = write(tmp_path / "t", TARGET_CONFIG, random_target())
    head = load_head(folder, replace(TARGET, folder=target))
    assert equal(head.tensors, made)
    assert head.spec.conventions.concatenation == "embedding-first"
    assert head.spec.assumed == {"feedback", "is_first_embedding_zero"}
    with pytest.raises(ConfigError, match="name the target's folder"):
        load_head(folder, TARGET)


def test_a_target_is_described_by_its_config() -> None:
    spec = TargetSpec.from_config({**TARGET_CONFIG, "num_hidden_layers": L}, name="tiny")
    assert spec == replace(TARGET, folder=None)
    nested = TargetSpec.from_config({"model_type": "vl", "text_config": TARGET_CONFIG}, name="tiny")
    assert nested == TARGET
    with pytest.raises(ConfigError, match="lacks vocab_size"):
        TargetSpec.from_config({"hidden_size": 3, "num_hidden_layers": 2}, name="tiny")


LAYER = f"model.layers.{L}."
BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "count": ({}, {"num_nextn_predict_layers": 2}, ConfigError, "layers=2, but the files hold 1"),
    "unknown": (
        {f"{LAYER}surprise.weight": torch.zeros(1)},
        {},
        ModelError,
        f"unknown tensors: {LAYER}surprise.weight",
    ),
    "missing layer tensor": (
        {f"{LAYER}mlp.up_proj.weight": None},
        {},
        ModelError,
        "missing tensors: modules.0.layer.mlp.up_proj.weight",
    ),
    "missing norm": ({f"{LAYER}hnorm.weight": None}, {}, ModelError, "modules.0.feature_norm.w"),
    "width of the layer": (
        {f"{LAYER}mlp.up_proj.weight": torch.zeros(25, H)},
        {},
        ModelError,
        rf"{LAYER}mlp.up_proj.weight is \[25, 16\], expected \[24, 16\]",
    ),
    "width of fc": (
        {f"{LAYER}eh_proj.weight": torch.zeros(H, 3 * H)},
        {},
        ModelError,
        rf"{LAYER}eh_proj.weight is \[16, 48\], expected \[16, 32\]",
    ),
    "rows": (
        {f"{LAYER}shared_head.head.weight": torch.zeros(V + 1, H)},
        {},
        ModelError,
        "shared_head.head.weight is",
    ),
    "quantised": (
        {f"{LAYER}eh_proj.weight": torch.zeros(H, 2 * H, dtype=torch.float8_e4m3fn)},
        {},
        ModelError,
        f"quantised tensors: {LAYER}eh_proj.weight",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_every_fault_has_its_own_message(tmp_path: Path, case: str) -> None:
    changes, config, kind, message = BROKEN[case]
    made = mtp_names(random_mtp(), "model.layers.{}.", DEEPSEEK_PARTS, first=L)
    tensors = {name: t for name, t in (made | changes).items() if t is not None}
    with pytest.raises(kind, match=message):
        load_head(native(tmp_path, tensors, {**ONE, **config}), TARGET)


def test_modules_of_another_target(tmp_path: Path) -> None:
    names = mtp_names(random_mtp(), "model.layers.{}.", DEEPSEEK_PARTS, first=L)
    folder = native(tmp_path, names, ONE)
    with pytest.raises(PairError, match="its first MTP module at layer 8, target 'tiny' has 9"):
        load_head(folder, replace(TARGET, num_layers=L + 1))
    with pytest.raises(PairError, match="has width 16, target 'tiny' has 32"):
        load_head(folder, replace(TARGET, hidden_size=32))


def test_an_unknown_shared_tensor_of_qwen(tmp_path: Path) -> None:
    names = renamed(random_mtp(), *QWEN_NAMES) | {"mtp.fc_hidden.weight": torch.zeros(1)}
    with pytest.raises(ModelError, match=r"unknown tensors: mtp.fc_hidden.weight"):
        load_head(native(tmp_path, names, ONE), TARGET)


def test_numbers_with_gaps(tmp_path: Path) -> None:
    made = random_mtp(num_modules=3)
    names = mtp_names(made, "model.layers.{}.", DEEPSEEK_PARTS, first=L)
    gap = {name: t for name, t in names.items() if not name.startswith(f"model.layers.{L + 1}.")}
    with pytest.raises(ModelError, match=r"numbered \[8, 10\], with gaps"):
        load_head(native(tmp_path, gap, {"num_nextn_predict_layers": 2}), TARGET)
