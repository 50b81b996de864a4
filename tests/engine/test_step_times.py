"""What a step is said to have taken: its parts, and what its caller did since the last one."""

from typing import Any

import pytest

from outrider.control.base import Step
from outrider.control.controller import Controller
from outrider.control.fixed import FixedPolicy
from outrider.request import Request, SamplingParams
from outrider.testing.tiny import tiny_engine


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
