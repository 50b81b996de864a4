"""Growth keeps the logits, spends real work, and blurs the function only when asked."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from outrider.errors import ConfigError
from outrider.train.export import export
from outrider.train.grow import grow
from outrider.train.network import Decoder

LARGER = {
    "hidden_size": 117,
    "num_layers": 5,
    "intermediate_size": 130,
    "num_heads": 9,
    "num_kv_heads": 3,
}


@pytest.fixture
def source(tiny_decoder: Decoder, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    for weight in tiny_decoder.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    export(tiny_decoder, tokenizer, tmp_path / "source")
    return tmp_path / "source"


def logits_of(folder: Path) -> Tensor:
    tokens_BT = torch.arange(30)[None] * 7 % 300
    with torch.no_grad():
        logits: Tensor = AutoModelForCausalLM.from_pretrained(folder).float()(tokens_BT).logits
    return logits


@pytest.mark.parametrize(
    "sizes",
    [LARGER, {"num_layers": 3}, {"hidden_size": 192}, {"num_heads": 8}, {"intermediate_size": 81}],
    ids=["all", "depth", "width", "heads", "units"],
)
def test_logits_stay(source: Path, tmp_path: Path, sizes: dict[str, int]) -> None:
    grow(source, tmp_path / "grown", **sizes, dtype="float32")
    assert (logits_of(source) - logits_of(tmp_path / "grown")).abs().max() < 1e-4


def test_bfloat16_is_exact_when_the_norm_scale_is(source: Path, tmp_path: Path) -> None:
    grow(source, tmp_path / "grown", hidden_size=4 * 48)
    assert (logits_of(source) - logits_of(tmp_path / "grown")).abs().max() < 1e-4


def test_larger_norm_epsilon_is_undone(source: Path, tmp_path: Path) -> None:
    config = source / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 0.5'))
    before = logits_of(source)
    grow(source, tmp_path / "grown", **LARGER, dtype="float32")
    assert (before - logits_of(tmp_path / "grown")).abs().max() < 1e-4


def test_noise_blurs_and_follows_the_seed(source: Path, tmp_path: Path) -> None:
    before, logits = logits_of(source), []
    for index, (noise, seed) in enumerate([(0.01, 0), (0.01, 0), (0.01, 1), (0.5, 0)]):
        out = tmp_path / str(index)
        grow(source, out, **LARGER, noise=noise, seed=seed, dtype="float32")
        logits.append(logits_of(out))
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
    small, large = ((before - after).abs().max() for after in (logits[0], logits[3]))
    assert 1e-3 < small < large


def test_reading_weights_are_real_work(source: Path, tmp_path: Path) -> None:
    grow(source, tmp_path / "grown", **LARGER)
    weights = load_file(tmp_path / "grown/model.safetensors")
    smallest = torch.finfo(torch.bfloat16).tiny
    for name, weight in weights.items():
        is_reader = not any(part in name for part in ("embed", "o_proj", "down_proj"))
        assert not is_reader or (weight != 0).float().mean() > 0.99, name
        assert not ((weight != 0) & (weight.abs() < smallest)).any(), name


def test_tokenizer_comes_along(source: Path, tmp_path: Path) -> None:
    grow(source, tmp_path / "grown", num_layers=3)
    assert AutoTokenizer.from_pretrained(tmp_path / "grown").eos_token == "<|end|>"


def test_untied_output_matrix_grows_too(source: Path, tmp_path: Path) -> None:
    config = source / "config.json"
    tied = '"tie_word_embeddings": true'
    config.write_text(config.read_text().replace(tied, tied.replace("true", "false")))
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    grow(source, tmp_path / "grown", **LARGER, dtype="float32")
    assert (logits_of(source) - logits_of(tmp_path / "grown")).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "7b"}, "7b.*135m"),
        ({"dtype": "int8"}, "int8.*float32"),
        ({"noise": -1.0}, "-1"),
        ({"num_layers": 1}, "num_layers 1 is below"),
        ({"num_heads": 6, "num_kv_heads": 3, "hidden_size": 50}, "hidden_size 50"),
        ({"num_kv_heads": 4}, "num_heads 4"),
    ],
)
def test_bad_arguments_are_refused(
    source: Path, tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        grow(source, tmp_path / "grown", **arguments)


def test_folder_without_a_llama_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no Llama checkpoint"):
        grow(tmp_path, tmp_path / "grown", num_layers=3)


def test_the_source_and_files_are_not_written_over(source: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "file").write_text("kept")
    for out in ("source", "link", "source/../source"):
        with pytest.raises(ConfigError, match=f"out='.*{out}' is the folder of the source"):
            grow(source, tmp_path / out, num_layers=3)
    for out in ("file", "file/grown"):
        with pytest.raises(ConfigError, match=f"at '.*{out}', for '.*file' is a file"):
            grow(source, tmp_path / out, num_layers=3)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
