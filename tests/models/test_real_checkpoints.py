"""The lean decoder on the two small trained models that stand beside the project."""

from pathlib import Path

import pytest
import torch
import transformers

from outrider.models.loader import load_decoder
from outrider.ops.base import Span
from outrider.ops.torch import TorchOps
from outrider.tokenizer import load_tokenizer
from tests.models.tiny import Passes, difference, reference_logits

STORY = ", there was a little girl named Lily. She loved to play outside in the park."


@pytest.fixture(params=["stories260K", "chars940K"])
def folder(request: pytest.FixtureRequest, shared_data: Path) -> Path:
    folder = shared_data / "weights" / str(request.param)
    if not folder.is_dir():
        pytest.skip(f"no checkpoint at {folder}")
    return folder


def test_logits_agree_with_transformers(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    prompt = load_tokenizer(folder).encode("Once upon a time, there was a little girl")
    (ours,) = Passes(load_decoder(folder, ops=TorchOps()))(
        (Span(list(range(len(prompt))), 0, len(prompt)), prompt)
    )
    assert difference(ours, reference_logits(model, prompt)) < 2e-5


def test_greedy_story(shared_data: Path) -> None:
    folder = shared_data / "weights" / "stories260K"
    tokenizer = load_tokenizer(folder)
    prompt = tokenizer.encode("Once upon a time")
    run, tokens, num_cached = Passes(load_decoder(folder, ops=TorchOps())), list(prompt), 0
    for _ in range(30):
        span = Span(list(range(len(tokens))), num_cached, len(tokens) - num_cached)
        (logits_NV,) = run((span, tokens[num_cached:]))
        num_cached = len(tokens)
        tokens.append(int(torch.argmax(logits_NV[-1])))
    assert tokenizer.decode(tokens).removeprefix("Once upon a time").startswith(STORY)
