"""A/B on a tiny engine: real answers and real drafts, on a clock that the test winds."""

import random

import pytest

from outrider.bench.ab import Plan, measure
from outrider.bench.inprocess import InProcess
from outrider.bench.pairs import arms, pairs
from outrider.bench.target import Arm, Question
from outrider.engine.llm import LLM
from outrider.request import SamplingParams, SpeculationParams
from tests.engine.tiny_checkpoint import write_checkpoint

OFF = SpeculationParams(method="off")


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    target = str(write_checkpoint(tmp_path_factory.mktemp("target")))
    return LLM(target, draft_model=target)


@pytest.fixture
def wound(llm, monkeypatch):
    """A target whose steps take a second each, times `slower` for that arm, times some noise.

    What a step does is the engine's affair; only what it takes is made up.
    """

    def make(slower, noise=0.02, seed=0):
        rng, now, factor = random.Random(seed), [0.0], [1.0]
        target = InProcess(llm, clock=lambda: now[0])
        step, run = type(llm.engine).step, target.run

        def timed(engine):
            now[0] += factor[0] * rng.lognormvariate(0.0, noise)
            return step(engine)

        def chosen(asks, **options):
            factor[0] = slower.get(asks[0].arm.name, 1.0)
            return run(asks, **options)

        monkeypatch.setattr(type(llm.engine), "step", timed)
        monkeypatch.setattr(target, "run", chosen)
        return target, lambda: now[0]

    return make


def measured(wound, names, slower, *, concurrency=1, temperature=0.0, **fields):
    target, clock = wound(slower)
    plan = Plan(
        arms=tuple(Arm(name=name, speculation=speculation) for name, speculation in names.items()),
        questions=tuple(Question(id=str(i), prompt=list(range(4, 9 + i))) for i in range(12)),
        sampling=SamplingParams(max_tokens=12, ignore_eos=True, temperature=temperature),
        budget_s=1e9,
        concurrency=concurrency,
        **fields,
    )
    return measure(target, plan, clock=clock)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_equal_arms_are_equal(wound, concurrency):
    found = measured(wound, {"off": OFF, "again": OFF}, {}, concurrency=concurrency, batch=None)
    (pair,) = pairs(found)
    assert pair.verdict == "equal"
    assert pair.num_identical == pair.num_prompts == 12


@pytest.mark.parametrize("concurrency", [1, 3])
def test_an_injected_slow_down_of_5_percent_is_found(wound, concurrency):
    found = measured(wound, {"off": OFF, "slow": OFF}, {"slow": 1.05}, concurrency=concurrency)
    (pair,) = pairs(found)
    assert pair.verdict == "slower"
    assert pair.ratio.ratio == pytest.approx(1 / 1.05, abs=0.015)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_of_the_engine_are_paid_for_by_steps(wound, temperature):
    """Each step costs the same, so the ratio is the tokens per step that the drafts brought."""
    drafted = SpeculationParams(method="draft_model", num_draft_tokens=3)
    arms_asked = {"off": OFF, "drafted": drafted}
    found = measured(wound, arms_asked, {}, temperature=temperature, num_rounds=2)
    (pair,) = pairs(found)
    off, on = arms(found)
    assert on["tokens_per_second"] / off["tokens_per_second"] == pytest.approx(
        on["acceptance"]["tokens_per_step"], rel=0.1
    )
    assert pair.ratio.ratio > 2
    assert pair.num_identical == 12, "the same tokens with and without drafts"
