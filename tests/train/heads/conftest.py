"""A tiny random target with fast drawing, and texts of its own making."""

import pytest
import torch
from torch import Tensor

from outrider.testing import tiny_decoder
from outrider.testing.tiny import TINY
from outrider.train.heads.pieces import Packed, Piece, digest_of
from outrider.train.heads.settings import DraftTraining
from outrider.train.heads.teacher import Teacher
from outrider.train.heads.texts import Text

LAYERS = 4
VALUES = {**TINY, "num_hidden_layers": LAYERS, "architectures": ["LlamaForCausalLM"]}


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return make_teacher()


def make_teacher(**config: object) -> Teacher:
    given = {"num_hidden_layers": LAYERS, **config}
    return Teacher(tiny_decoder(**given), {**VALUES, **given}, name="tiny")


def settings(kind: str, **options: object) -> DraftTraining:
    given = {"target": "tiny", "data": ("data",), "out": "out", **options}
    return DraftTraining(kind=kind, **given)  # type: ignore[arg-type]


def piece(tokens: list[int], name: str = "", learned: list[bool] | None = None) -> Piece:
    text = Text(name or digest_of(tokens), tokens, learned or [True] * len(tokens), 2)
    return Piece(text, text.name, digest_of(tokens))


def random_pieces(*lengths: int, seed: int = 0) -> list[Piece]:
    generator = torch.Generator().manual_seed(seed)
    return [piece(torch.randint(4, 256, (n,), generator=generator).tolist()) for n in lengths]


def written(teacher: Teacher, num_tokens: int, *, seed: int = 0, greedy: bool = True) -> list[int]:
    """What the target says after some tokens, drawn or its likeliest."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, 256, (3,), generator=generator).tolist()
    while len(tokens) < num_tokens:
        law_V = law(teacher, tokens)[-1].softmax(-1)
        drawn = torch.multinomial(law_V, 1, generator=generator)
        tokens.append(int(law_V.argmax() if greedy else drawn))
    return tokens


def law(teacher: Teacher, tokens: list[int]) -> Tensor:
    """Logits after every token of one text, run alone."""
    taught = teacher.teach(Packed([piece(tokens)]), ())
    return teacher.logits(taught.final_NH)
