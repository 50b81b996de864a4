"""A tiny engine as a target, and wrong rules that requests can name."""

import itertools
from importlib.metadata import EntryPoint

import pytest

from outrider.bench.inprocess import InProcess
from outrider.bench.target import Question
from outrider.engine.llm import LLM
from outrider.registry import VERIFIERS
from outrider.request import SpeculationParams
from outrider.testing import ByteTokenizer, tiny_engine
from outrider.testing.tiny import VOCAB_SIZE
from outrider.verify.verifiers import comes_to_argmax

WRONG = {
    "other_temperature": "OtherTemperature",
    "softmax_of_pick": "SoftmaxOfPick",
    "one_too_many": "OneTooMany",
    "other_noise": "OtherNoise",
}


class Tiny(LLM):
    """An LLM around an engine that is there."""

    def __init__(self, engine):
        self.engine, self.tokenizer = engine, ByteTokenizer()
        self.speculation = SpeculationParams(method="off")
        self._ids = itertools.count()
        self._inboxes = {}


@pytest.fixture
def target():
    """Makes an in-process target; its draft model is right about half of the time."""

    def make(**engine):
        given = {"draft_noise": 0.05, "num_blocks": 1024, **engine}
        options = {"check_integrity": False, "max_num_seqs": 64, **given.pop("options", {})}
        return InProcess(Tiny(tiny_engine(options=options, **given)))

    return make


@pytest.fixture
def questions():
    return tuple(
        Question(id=f"q{i}", prompt=tuple((7 * i + 3 * j * j) % 60 + 60 for j in range(9 + i)))
        for i in range(6)
    )


@pytest.fixture
def wrong_rules(monkeypatch):
    """Plug-ins, as a stranger would bring them: of those every verdict is taken as it is."""
    points = [
        EntryPoint(name, f"tests.bench.lossless.wrong:{attribute}", VERIFIERS.group)
        for name, attribute in WRONG.items()
    ]
    monkeypatch.setattr(
        "outrider.registry.entry_points",
        lambda group: points if group == VERIFIERS.group else [],
    )
    comes_to_argmax.cache_clear()
    yield
    comes_to_argmax.cache_clear()


@pytest.fixture
def drafting(target):
    """Makes a target whose drafter "mine" is of a class in `wrong`."""

    def make(drafter, **engine):
        class Mine(drafter):
            name = "mine"

            @classmethod
            def build(cls, around):
                return cls(around.draft.runner, around.draft.manager, VOCAB_SIZE)

        return target(drafters=[Mine], **engine)

    return make
