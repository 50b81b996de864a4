"""What a step is said to have taken: its parts, and what its caller did since the last one."""

from typing import Any

import pytest

from outrider.control.base import Step
from outrider.control.controller import Controller
from outrider.control.fixed import FixedPolicy
from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.step import RowPlan
from outrider.testing.tiny import tiny_engine
from tests.draft.heads import kv_draft, loud_target


class Clock:
    """Seconds that only a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Watching(FixedPolicy):
    """Keeps the times of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def observe(self, step: Step) -> None:
        self.seen.append(step.times)


def engine_with(clock: Clock, watching: Watching) -> Any:
    engine = tiny_engine(clock=clock, controller=Controller(256, [watching]))
    run = engine.runner.run

    def slow(*args: Any) -> Any:
        clock.now += 1.0
        return run(*args)

    engine.runner.run = slow
    return engine


def ask(engine: Any, name: str, max_tokens: int = 8) -> None:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    engine.add(Request(id=name, prompt_token_ids=(5, 6, 7), sampling=sampling))


def test_what_is_done_between_steps_belongs_to_the_next() -> None:
    clock, watching = Clock(), Watching()
    engine = engine_with(clock, watching)
    ask(engine, "a")
    engine.step()
    clock.now += 0.25
    engine.step()
    clock.now += 50.0  # somebody slept: no more counts than the pass itself
    engine.step()
    assert [times.forward for times in watching.seen] == [1.0, 1.0, 1.0]
    assert [times.rest for times in watching.seen] == pytest.approx([0.0, 0.25, 1.0])


def test_idle_time_belongs_to_nobody() -> None:
    clock, watching = Clock(), Watching()
    engine = engine_with(clock, watching)
    ask(engine, "a", max_tokens=1)
    while engine.has_work():
        engine.step()
    clock.now += 0.5
    ask(engine, "b", max_tokens=1)
    engine.step()
    assert [times.rest for times in watching.seen] == [0.0, 0.0]


def test_a_head_is_not_said_to_draft_before_a_pass_has_shown_it_states() -> None:
    """In the step that reads a prompt there is nothing for it: that is no price of a draft."""
    plans: list[RowPlan] = []

    class Noting(FixedPolicy):
        def observe(self, step: Step) -> None:
            plans.extend(step.plan)

    target = loud_target()
    engine = tiny_engine(
        target=target,
        draft_seed=None,
        heads={"kv_draft": kv_draft(target)},
        drafters=["kv_draft"],
        default_drafter="kv_draft",
        controller=Controller(64, [Noting()]),
    )
    speculation = SpeculationParams(num_draft_tokens=2, policy="fixed")
    sampling = SamplingParams(max_tokens=6, ignore_eos=True)
    prompt = (5, 6, 7)
    engine.add(Request(id="a", prompt_token_ids=prompt, sampling=sampling, speculation=speculation))
    while engine.has_work():
        engine.step()
    assert plans[0].num_nodes == 0
    assert plans[1].num_nodes == 2
