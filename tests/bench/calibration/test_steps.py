"""Sums of steps are those of the answers, and seconds are those of a clock that is known."""

import itertools

import pytest

from outrider.bench.calibration.steps import Depths, StepLog
from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.step import Commit, DraftTree, RowPlan
from outrider.testing.tiny import events, tiny_engine

OFF = SpeculationParams(method="off")
ON = SpeculationParams(method="draft_model", num_draft_tokens=3)


def ticking():
    """A clock that moves by a second whenever it is looked at."""
    return itertools.count(0.0, 1.0).__next__


def serve(engine, speculation, count=2, name="r"):
    requests = [
        Request(
            id=f"{name}{i}",
            prompt_token_ids=(5 + i, 6, 7),
            sampling=SamplingParams(max_tokens=12, ignore_eos=True),
            speculation=speculation,
        )
        for i in range(count)
    ]
    told = events(engine, requests)
    return [stream[-1].metrics for stream in told.values()]


@pytest.fixture
def engine():
    return tiny_engine(draft_noise=0.04, clock=ticking())


def test_plain_steps_are_summed(engine) -> None:
    log = StepLog(ticking())
    with log.attached(engine):
        serve(engine, OFF)
    found = log.of(OFF)
    assert (found.num_steps, found.num_sequences, found.num_tokens) == (11, 22, 22)
    assert found.num_prompt_steps == 1  # it gave the first token of both
    assert found.tokens_per_pass == 1.0
    assert found.mean_batch == 2.0
    assert found.mean_context == pytest.approx(3 + 6)
    assert (found.num_drafts, found.mean_depth, found.depths.deepest) == (0, 0.0, 0)


def test_seconds_are_those_of_the_engines_clock(engine) -> None:
    log = StepLog(lambda: 0.0)
    with log.attached(engine):
        serve(engine, OFF)
    found = log.of(OFF)
    # Each part of a step lies between two looks at the clock; the rest is before, after, and
    # between it and the step before.
    assert (found.draft_s, found.pass_s, found.rest_s) == (11.0, 11.0, 33.0)
    assert found.between_s == 0.0


def test_drafted_steps_agree_with_what_requests_are_told(engine) -> None:
    log = StepLog(ticking())
    with log.attached(engine):
        metrics = serve(engine, ON)
    found = log.of(ON)
    first = sum(one.num_drafts for one in metrics) - found.num_drafts  # beside the prompt
    assert 0 <= first <= 2
    assert found.num_draft_tokens <= sum(one.num_draft_tokens for one in metrics)
    forecast = found.depths.forecast()
    assert forecast.reached[0] == 1.0
    assert forecast.stands == sorted(forecast.stands, reverse=True)
    assert 0.0 < forecast.stands[0] < 1.0


def test_arms_are_told_apart_and_equal_ones_are_one(engine) -> None:
    log = StepLog(ticking())
    again = SpeculationParams(method="off")
    with log.attached(engine):
        serve(engine, OFF, name="a")
        serve(engine, ON, name="b")
        serve(engine, again, name="c")
    assert log.of(OFF) is log.of(again)
    assert log.of(OFF).num_tokens == 44
    assert log.of(SpeculationParams(method="ngram")) is None


def test_it_leaves_the_engine_as_it_was(engine) -> None:
    before = list(engine.controller.policies)
    log = StepLog(ticking())
    with pytest.raises(ZeroDivisionError), log.attached(engine):
        1 / 0  # noqa: B018
    assert list(engine.controller.policies) == before
    serve(engine, OFF)
    assert log.of(OFF) is None


def test_depths_count_shares_of_plans() -> None:
    found = Depths()
    tree = DraftTree.chain((1, 2, 3), "x")
    for drafted, accepted in ((3, 3), (3, 1), (0, 0), (2, 2)):
        part = RowPlan("x", 3, 1, 3)
        short = DraftTree.chain(tree.tokens[:drafted], "x")
        found.add(part, Commit(None, short, (0,), drafted, accepted))
    assert found.planned == [4, 4, 4]
    assert found.forecast().reached == [0.75, 0.75, 0.5]
    assert found.forecast().stands == [0.75, 0.5, 0.25]
    assert found.nodes_per_depth == 1.0
