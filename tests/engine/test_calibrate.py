"""What a calibration times first, for a large model's budget is soon used up."""

import pytest

from outrider.control.adaptive import AdaptivePolicy
from outrider.control.base import Facts
from outrider.control.controller import Controller
from outrider.control.fixed import FixedPolicy, OffPolicy
from outrider.engine import calibrate as calibration
from outrider.engine.calibrate import calibrate
from outrider.testing.tiny import tiny_engine


class Clock:
    """Moves by a second whenever it is looked at."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def engine_with_prices():
    clock = Clock()
    policy = AdaptivePolicy(Facts(clock))
    options = {"max_num_seqs": 8}
    return tiny_engine(
        clock=clock,
        controller=Controller(256, [policy, FixedPolicy(), OffPolicy()]),
        options=options,
        default_drafter="draft_model",
    ), policy


def test_a_draft_and_passes_of_all_sizes_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = engine_with_prices()
    groups = []
    monkeypatch.setattr(calibration, "_run", lambda engine, group, *_: groups.append(group))
    assert calibrate(engine, 60.0) == len(groups)
    first = [(group.size, group.depth) for group in groups[:5]]
    assert first == [(1, 0), (1, 4), (2, 0), (4, 0), (8, 0)]
    assert len(set(groups)) == len(groups), "nothing is timed twice"
    assert {(size, depth) for size, depth, *_ in groups} >= {(1, 1), (1, 8), (4, 4), (8, 8)}


def test_prices_are_known_afterwards_and_texts_are_not() -> None:
    engine, policy = engine_with_prices()
    assert calibrate(engine, 60.0) > 5
    assert policy.lessons.cost.passes.is_known
    assert policy.explain()["acceptance"] == []
    assert not engine.has_work()


def test_nobody_is_timed_deeper_than_it_can_go(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = engine_with_prices()
    engine.drafters["draft_model"].max_draft_tokens = 3
    groups = []
    monkeypatch.setattr(calibration, "_run", lambda engine, group, *_: groups.append(group))
    calibrate(engine, 60.0)
    assert {group.depth for group in groups} == {0, 1, 3}
    assert len(set(groups)) == len(groups), "nothing is timed twice"
