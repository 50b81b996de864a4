"""AdaptivePolicy: of all drafts that could be verified in a step, those that pay; perhaps none.

Speculation is priced, not assumed: the `Decider` takes what raises expected goodput. Two things
keep it honest: what is measured while it speculates is held against plain decoding (`Guard`), which
ends speculation that does not pay whatever the forecast says; and a small share of time (`Purse`)
goes to trying what is not in use (`Trials`), so that nothing is closed for good.

Source: off when utility falls below one (Cascade, Saxena et al. 2025); else see `Decider`.
"""

from collections.abc import Callable, Mapping, Sequence as Items
from typing import Any, Self

from outrider.control.base import PLAIN, Balance, Facts, Load, Room, Step
from outrider.control.deciding import Decider
from outrider.control.learning import Lessons
from outrider.control.minds import Mind, Minds
from outrider.control.schedule import Schedule
from outrider.control.targets import awaited
from outrider.control.trying import Trials
from outrider.request import Option
from outrider.step import RowPlan

THINKING_SHARE = 0.004  # of a step's time, spent on deciding, and as much on tuning
MAX_HOLD = 96  # steps that a decision is kept for
TUNE_EVERY = 4  # steps, at least
TUNE_LOSS = 1.0  # plain steps' time that drafts may lose before they are thought about again
HOPE_EVERY = 4  # thoughts


class AdaptivePolicy:
    """K by measured goodput, per request, at every load.

    Args:
        facts: the engine's clock and what is known of its model.
    """

    name = "adaptive"
    needs_clock = True
    options: Mapping[str, Option] = {
        "confidence": Option(
            False, "end chains of a draft model where it is no longer sure; for no others"
        )
    }
    lessons: Lessons
    _decider: Decider
    _trials: Trials
    _thoughts: Schedule
    _tunes: Schedule
    _num_thoughts: int
    _num_rooms: int
    _num_running: int  # in the step of the last thought, rows of other policies too
    _is_thought_new: bool
    _least_lost: float
    _is_drafting: bool

    def __init__(self, facts: Facts = Facts()) -> None:
        self._facts = facts
        self._clock: Callable[[], float] = facts.clock or (lambda: 0.0)
        self._begin(Lessons(facts))

    @classmethod
    def build(cls, facts: Facts) -> Self:
        return cls(facts)

    def rests(self, num_rows: int) -> bool:
        """Drafts do not pay at present, and it is not yet time to think or to try again."""
        return (
            not self._is_drafting
            and self.lessons.step < min(self._thoughts.due_at, self._trials.due_at)
            and not _differ(num_rows, self._num_running)
        )

    def plan(self, rooms: Items[Room], load: Callable[[], Load]) -> list[RowPlan]:
        minds = [self.lessons.minds.of(room.seq) for room in rooms]
        if self._is_due(len(rooms)):
            self._think(rooms, minds, load())
        elif self._is_drafting:
            self._tune(rooms, minds)
        if self._is_shut(minds):
            plans = [PLAIN] * len(rooms)
        else:
            plans = [mind.plan(room, mind.depth) for room, mind in zip(rooms, minds, strict=True)]
        self._trials.replace_some(rooms, minds, plans, load)
        return plans

    def observe(self, step: Step) -> None:
        purse, thought = self.lessons.purse, self._decider.thought
        self.lessons.observe(step, is_judged=thought is None or not thought.is_for_targets)
        if self._is_thought_new:
            self._num_running, self._is_thought_new = len(step.batch.rows), False
        if purse.is_open and step.times is not None and thought is not None:
            purse.settle(self.lessons.lost_s(step, step.times, thought.advantage))
        if self._is_drafting:
            lost = self.lessons.guard.lost
            self._least_lost = min(self._least_lost, lost)
            if lost > self._least_lost + TUNE_LOSS:
                self._tunes.hasten(0.25)
        if any(commit.finish_reason for commit in step.commits):  # others may follow
            self._thoughts.hasten(0.5)

    def balance(self) -> Balance:
        """Beside plain decoding: what is expected of the last decision, and what was measured."""
        thought, guard = self._decider.thought, self.lessons.guard
        return Balance(thought.advantage if thought else None, guard.advantage, guard.num_shut)

    def explain(self) -> dict[str, Any]:
        """What is in force and why, what drafts are expected to bring, and what things cost."""
        lessons, thought = self.lessons, self._decider.thought
        return {
            "step": lessons.step,
            "why": thought.why if thought else "nothing was decided yet",
            "plain_tokens_per_s": thought.plain.goodput if thought else None,
            "expected_tokens_per_s": thought.chosen.goodput if thought else None,
            "depths": _histogram(thought.chosen.depths) if thought else {},
            "guard": lessons.guard.explain(lessons.step),
            "purse_s": lessons.purse.seconds,
            "acceptance": [
                {
                    "drafter": drafter,
                    "temperature_up_to": kind,
                    "stands": [round(p, 3) for p in found.forecast(8, lessons.step).stands],
                    "num_drafts": found.num_drafts,
                }
                for (drafter, kind), found in lessons.minds.shared.items()
            ],
            "cost": lessons.cost.to_json(),
        }

    def prices(self) -> dict[str, Any]:
        """What passes and drafting cost here, and how far drafts stood, to be saved."""
        return {**self.lessons.cost.to_json(), "acceptance": self.lessons.minds.to_json()}

    def take_prices(self, saved: dict[str, Any]) -> None:
        """Starts from saved prices, and from acceptance as far as a few drafts would tell of it.

        Raises:
            ValueError: they are of another form; then nothing changed.
        """
        if not isinstance(saved, dict):
            raise ValueError(f"no prices, but a {type(saved).__name__}")
        acceptance = Minds.read(saved.get("acceptance", []))
        self.lessons.cost.load(saved)
        self.lessons.minds.shared.update(acceptance)
        self.lessons.is_priced = True

    def forget_texts(self) -> None:
        """Starts anew but for the prices."""
        lessons = Lessons(self._facts)
        lessons.cost, lessons.step = self.lessons.cost, self.lessons.step
        lessons.is_priced = lessons.cost.passes.is_known
        self._begin(lessons)

    def _begin(self, lessons: Lessons) -> None:
        self.lessons = lessons
        self._decider = Decider(lessons, self._clock)
        self._trials = Trials(self.lessons, self._decider)
        self._thoughts = Schedule(THINKING_SHARE, 1, MAX_HOLD)
        self._tunes = Schedule(THINKING_SHARE, TUNE_EVERY, MAX_HOLD)
        self._num_thoughts = self._num_rooms = self._num_running = 0
        self._is_thought_new = False
        self._least_lost = 0.0
        self._is_drafting = False

    def _is_due(self, num_rooms: int) -> bool:
        """Now and then, when many have come or gone, and at once while little is known."""
        return (
            _differ(num_rooms, self._num_rooms)
            or self.lessons.is_awaited
            or self.lessons.step >= self._thoughts.due_at
        )

    def _is_shut(self, minds: Items[Mind]) -> bool:
        """Whether the guard holds; not where all sequences are newer than what it saw."""
        guard, thought = self.lessons.guard, self._decider.thought
        if not guard.is_shut(self.lessons.step):
            return False
        if thought is not None and thought.is_for_targets:
            return False
        if all(mind.born >= guard.shut_at for mind in minds):
            guard.reopen()
            return False
        return True

    def _think(self, rooms: Items[Room], minds: Items[Mind], load: Load) -> None:
        started = self._clock()
        step = self.lessons.step
        self._num_rooms, self._is_thought_new = len(rooms), True
        self._num_thoughts += 1
        hopes = not self._num_thoughts % HOPE_EVERY or self.lessons.is_warming_up
        scene = self._decider.think(rooms, minds, load, thoroughly=hopes)
        if self._decider.thought is not None:
            self._trials.prepare(scene, self._decider.thought, hopes=hopes)
        self._is_drafting = any(mind.depth for mind in minds)
        self._thoughts.done(step, self._clock() - started, self.lessons.step_s)
        self._tunes.put_off(step)
        if awaited(load):  # with its first token that is over
            self._thoughts.put_off(step)
        self._least_lost = self.lessons.guard.lost

    def _tune(self, rooms: Items[Room], minds: Items[Mind]) -> None:
        """By what was seen since: now and then, sooner if drafts lose; a row alone if it is new."""
        new = [index for index, mind in enumerate(minds) if mind.is_new]
        if len(rooms) == self._num_rooms and (
            self.lessons.step >= self._tunes.due_at or (new and len(rooms) == 1)
        ):
            started = self._clock()
            self._decider.tune(rooms, minds)
            self._is_drafting = any(mind.depth for mind in minds)
            self._tunes.done(self.lessons.step, self._clock() - started, self.lessons.step_s)
            self._least_lost = self.lessons.guard.lost
            return
        for index in new:
            self._decider.receive(rooms[index], minds[index], len(rooms))


def _differ(num_now: int, num_then: int) -> bool:
    return abs(num_now - num_then) > num_then // 4


def _histogram(depths: Items[int]) -> dict[str, int]:
    return {str(depth): depths.count(depth) for depth in sorted(set(depths))}
