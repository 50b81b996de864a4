"""What the adapter refuses, what it reports about a model, and its linear kernels."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from outrider.errors import ModelError
from outrider.models import adapter as adapter_module
from outrider.models.adapter_probe import read_window
from outrider.models.base import KVShape
from outrider.ops.base import Window
from outrider.ops.torch import TorchOps
from tests.kernels import make_ops
from tests.models.test_adapter import (
    BASE,
    CASES,
    LLAMA4,
    MLA,
    SHARING,
    TREE,
    VOCAB,
    Case,
    Pool,
    Row,
    assert_same,
    load_tiny,
    one_thread,
    path_of,
    save_tiny,
    tokens_of,
)

HYBRID = {
    **BASE,
    "layer_types": ["linear_attention", "full_attention"],
    "num_experts": 4,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
}
ENCODER_DECODER = {"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
__all__ = ["one_thread"]  # a fixture of this module too
FAST = TorchOps(batch_invariant=False)


def save_config(name: str, options: dict[str, Any], folder: Path) -> Path:
    """A folder without weights: what is refused is refused before they are read."""
    getattr(transformers, name)(**options).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("MambaConfig", {"vocab_size": VOCAB}, "more than keys and values"),
        ("RwkvConfig", {"vocab_size": VOCAB}, "more than keys and values"),
        ("Qwen3NextConfig", HYBRID, "linear_attention"),
        ("Lfm2Config", {**BASE, "layer_types": ["conv", "full_attention"]}, "conv"),
        ("RecurrentGemmaConfig", {"vocab_size": VOCAB}, "recurrent"),
        ("T5Config", {"vocab_size": VOCAB}, "encoder-decoder"),
        ("BartConfig", ENCODER_DECODER, "encoder-decoder"),
        ("CLIPConfig", {}, "no causal LM"),
        ("BloomConfig", {"vocab_size": VOCAB}, "attention interface"),
        ("StableLmConfig", BASE, "attention interface"),
        ("FalconConfig", {"vocab_size": VOCAB}, "attention interface"),
    ],
)
def test_refused_before_weights_are_read(
    name: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        load_tiny(save_config(name, options, tmp_path), FAST)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_not_causal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="mask that is neither causal"):
        load_tiny(save_tiny("BertConfig", BASE, tmp_path), FAST)


def test_a_model_that_drops_keyword_arguments_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not hand keyword arguments"):
        load_tiny(save_tiny("NemotronConfig", BASE, tmp_path), FAST)


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no folder"):
        load_tiny(tmp_path / "nowhere", FAST)


def test_a_folder_without_weights_is_refused_in_one_line(tmp_path: Path) -> None:
    save_config("LlamaConfig", BASE, tmp_path)
    with pytest.raises(ModelError, match="transformers cannot load") as caught:
        load_tiny(tmp_path, FAST)
    assert "\n" not in str(caught.value)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    folder = save_tiny("LlamaConfig", BASE, tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing keys \(model.norm.weight\)"):
        load_tiny(folder, FAST)


def test_unused_weights_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_tiny("LlamaConfig", BASE, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.extra.weight"] = torch.zeros(2)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.WARNING, "outrider"):
        load_tiny(folder, FAST)
    assert "model.extra.weight" in caplog.text


def test_logits_that_disagree_with_the_model_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = TorchOps.attend

    def without_softcap(*args: Any, softcap: float, **kwargs: Any) -> torch.Tensor:
        return attend(*args, **kwargs)

    monkeypatch.setattr(TorchOps, "attend", without_softcap)
    with pytest.raises(ModelError, match="other logits over our KV"):
        load_tiny(save_tiny(*CASES["gemma2"], tmp_path), FAST)


def test_spec(tmp_path: Path) -> None:
    folder = save_tiny("LlamaConfig", BASE, tmp_path)
    spec = load_tiny(folder, FAST, name="tiny", eos_token_ids=(2,), fingerprint="f").spec
    assert (spec.name, spec.family, spec.fingerprint) == ("tiny", "llama", "f")
    assert (spec.vocab_size, spec.max_positions, spec.eos_token_ids) == (VOCAB, 128, (2,))
    assert spec.kv_shapes == (KVShape(2, 8, 8),) * 2
    assert (spec.dtype, spec.device) == (torch.float32, torch.device("cpu"))
    weights = load_file(folder / "model.safetensors")
    assert spec.num_parameters == sum(weight.numel() for weight in weights.values())


def test_layers_that_share_kv_own_none(tmp_path: Path) -> None:
    adapter = load_tiny(save_tiny("Gemma4TextConfig", SHARING, tmp_path), FAST)
    assert len(adapter.spec.kv_shapes) == 2


def test_keys_and_values_of_different_widths(tmp_path: Path) -> None:
    adapter = load_tiny(save_tiny("DeepseekV3Config", MLA, tmp_path), FAST)
    assert set(adapter.spec.kv_shapes) == {KVShape(4, 12, 6)}


def test_context_ends_where_longrope_would_turn_all_tokens(tmp_path: Path) -> None:
    adapter = load_tiny(save_tiny(*CASES["phi3-longrope"], tmp_path), FAST)
    assert adapter.spec.max_positions == 64


def test_only_wanted_rows_come_back(tmp_path: Path) -> None:
    adapter = load_tiny(save_tiny("LlamaConfig", BASE, tmp_path), FAST)
    tokens_N = torch.tensor(tokens_of(0, 9))
    pool = Pool(adapter)
    every_NV = pool.run(Row("a", tokens_N.tolist()))["a"]
    layout = FAST.layout([pool.span("a", 0, 9)], torch.device("cpu"))
    for wanted in ([8], [5, 2], []):
        wanted_R = torch.tensor(wanted, dtype=torch.long)
        logits_RV = adapter.forward(tokens_N, layout, pool.kv, wanted_R)
        assert logits_RV.shape == (len(wanted), VOCAB)
        assert torch.allclose(logits_RV, every_NV[wanted_R], atol=1e-5)


def test_a_loaded_model_can_be_handed_in() -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**BASE)).eval()
    adapter = adapter_module.Adapter(model, FAST, name="mine")
    tokens = tokens_of(0, 20)
    with torch.inference_mode():
        model.set_attn_implementation("sdpa")
        expected_NV = model(input_ids=torch.tensor([tokens])).logits[0]
        model.set_attn_implementation(adapter_module.ATTENTION)
    assert_same(Pool(adapter).run(Row("a", tokens))["a"], expected_NV)


def test_llama4_scales_by_position_and_not_by_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny("Llama4TextConfig", LLAMA4, tmp_path)
    monkeypatch.setattr(adapter_module, "_reads_cache_length", lambda module: False)
    with pytest.raises(ModelError, match="other logits"):
        load_tiny(folder, FAST)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("gemma3", torch.bfloat16),
        ("qwen3-moe", torch.bfloat16),
        ("deepseek-v3", torch.float16),
        ("gpt-oss", torch.float16),
    ],
)
def test_half_precision_passes_its_own_check(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = load_tiny(save_tiny(*CASES[name], tmp_path), FAST, dtype=dtype)
    assert adapter.spec.dtype == dtype


WIDE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
WIDER: dict[str, dict[str, Any]] = {"gpt-oss": {"num_local_experts": 32}}
WIDER["deepseek-v3"] = {
    "n_routed_experts": 32,
    "num_key_value_heads": 2,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}


@pytest.mark.parametrize("kernels", ["torch", "cpu"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral", "gpt-oss", "deepseek-v3"])
def test_rows_do_not_depend_on_their_company(name: str, kernels: str, tmp_path: Path) -> None:
    """Verified next to other sequences in a tree, or decoded alone: the same bits.

    Widths are multiples of 32: element-wise torch kernels treat the last values of a tensor apart.
    """
    config, options = CASES[name]
    options = options | WIDE | WIDER.get(name, {})
    adapter = load_tiny(save_tiny(config, options, tmp_path), make_ops(kernels))
    together, a, b = Pool(adapter), tokens_of(1, 30), tokens_of(2, 11)
    together.run(Row("b", b[:5]), Row("a", a[:-1]))
    tree_NV = together.run(Row("b", b[5:], TREE), Row("a", a[-1:], TREE))["a"]
    for node in (7, 3):
        alone, at = Pool(adapter), path_of(node)
        alone.run(Row("a", a[:20]))
        alone.run(Row("a", a[20:-1]))
        tokens = [a[-1], *(TREE[n][0] for n in at)]
        plain = [alone.run(Row("a", [token]))["a"][0] for token in tokens]
        for row, logits_V in zip([0, *(n + 1 for n in at)], plain, strict=True):
            assert torch.equal(tree_NV[row], logits_V)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-oss", "qwen3-moe"])
def test_linear_kernels_can_be_left_alone(name: str, tmp_path: Path) -> None:
    folder = save_tiny(*CASES[name], tmp_path)
    adapter = load_tiny(folder, FAST, swap_linear=False)
    assert not any("forward" in vars(module) for module in adapter.model.modules())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokens = tokens_of(0, 20)
    ours_NV = Pool(adapter).run(Row("a", tokens))["a"]
    assert_same(ours_NV, Case(adapter, model.eval()).expected(tokens))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-oss", "mixtral", "deepseek-v3", "llama4"])
def test_every_product_goes_through_our_kernels(name: str, tmp_path: Path) -> None:
    """With kernels that answer zero nothing is left of the logits."""

    class Zero(TorchOps):
        def linear(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> Any:
            counted.append(weight_OI.shape)
            return lambda x_NI: x_NI.new_zeros(len(x_NI), len(weight_OI))

    counted: list[torch.Size] = []
    adapter = load_tiny(save_tiny(*CASES[name], tmp_path), Zero())
    assert Pool(adapter).run(Row("a", tokens_of(0, 8)))["a"].abs().max() == 0
    assert len(counted) >= 9


@pytest.mark.parametrize(
    ("mask", "size", "window"),
    [
        (lambda b, h, q, k: k <= q, 0, Window()),
        (lambda b, h, q, k: (k <= q) & (k > q - 5), 5, Window(sliding=5)),
        (lambda b, h, q, k: (k <= q) & (k // 5 == q // 5), 5, Window(chunk=5)),
        (lambda b, h, q, k: (k <= q) & (k >= q - 5), 5, None),
        (lambda b, h, q, k: (k - q).abs() <= 5, 5, None),
        (lambda b, h, q, k: q >= 0, 0, None),
        (lambda b, h, q, k: (k <= q) & torch.ones(4, 4, dtype=torch.bool)[q, k], 0, None),
    ],
)
def test_read_window(mask: Any, size: int, window: Window | None) -> None:
    assert read_window(mask, size) == window
