"""An exported folder is what transformers loads, without a warning, and what training was."""

import logging
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from outrider.train.export import export, load_decoder
from outrider.train.network import Decoder
from tests.train.conftest import TINY


@pytest.fixture
def folder(tiny_decoder: Decoder, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    export(tiny_decoder, tokenizer, tmp_path / "model")
    return tmp_path / "model"


def test_transformers_loads_without_warnings(
    folder: Path, tiny_decoder: Decoder, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("transformers").addHandler(caplog.handler)
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records
    tokens_BT = torch.randint(0, TINY.vocab_size, (1, 20))
    with torch.no_grad():
        stored = load_decoder(folder)(tokens_BT)
        assert (model(tokens_BT).logits - stored).abs().max() < 1e-5
        assert (tiny_decoder(tokens_BT) - stored).abs().max() < 0.02


def test_config_names_the_stored_type_and_end(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    assert (config.dtype, config.tie_word_embeddings) == (torch.bfloat16, True)
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == config.eos_token_id == 0


def test_old_readers_find_rope_theta(folder: Path) -> None:
    assert '"rope_theta": 10000.0,' in (folder / "config.json").read_text()
