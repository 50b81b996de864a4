"""Tiny shapes, streams and folders that the training tests share."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from outrider.train.corpus import Document
from outrider.train.losses import CrossEntropy
from outrider.train.network import Decoder, DecoderShape
from outrider.train.packing import PackedBatches, pack
from outrider.train.trainer import Trainer, TrainerConfig
from outrider.train.vocabulary import train_tokenizer

TINY = DecoderShape(
    vocab_size=300,
    hidden_size=48,
    intermediate_size=80,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
TEXT = "The quick brown fox jumps over 12 lazy dogs; then it rests.\n" * 60


@pytest.fixture(scope="session")
def data_folder() -> Path:
    default = Path(__file__).parents[2] / "../shared/data"
    folder = Path(os.environ.get("OUTRIDER_DATA", default))
    if not (folder / "text").is_dir():
        pytest.skip(f"no training text in {folder}; set OUTRIDER_DATA")
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT], vocab_size=300)


@pytest.fixture
def tiny_decoder() -> Decoder:
    return make_decoder(seed=0)


@pytest.fixture
def make_trainer(tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., Trainer]:
    streams = {
        "docs": pack(tokenizer, [Document("fox", TEXT)]),
        "code": pack(tokenizer, [Document("xof", TEXT[::-1])]),
    }

    def make(*, num_steps: int = 6, name: str = "model.pt") -> Trainer:
        batches = PackedBatches(
            streams, {"docs": 0.5, "code": 0.5}, batch_size=2, window=33, seed=1
        )
        config = TrainerConfig(
            num_steps=num_steps, num_warmup_steps=2, num_steps_per_report=3, max_gradient_norm=1.0
        )
        model = make_decoder(seed=2)
        return Trainer(model, CrossEntropy(), batches, config, checkpoint=tmp_path / name)

    return make


def make_decoder(*, seed: int, shape: DecoderShape = TINY) -> Decoder:
    model = Decoder(shape)
    model.reset_parameters(torch.Generator().manual_seed(seed))
    return model
