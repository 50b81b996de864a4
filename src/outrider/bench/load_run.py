"""Runner: loads under several arms, one after the other, until a budget is over."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence as Items
from dataclasses import replace
from typing import Any, TypeAlias

from outrider.bench.journal import Journal
from outrider.bench.load import Level, Server, closed_loop, measure
from outrider.bench.load_summary import blocks, summary
from outrider.bench.target import Arm
from outrider.errors import ConfigError
from outrider.request import SamplingParams

LATE = "the budget was over"
Tell: TypeAlias = Callable[[float, float, str], None]  # done, of how many, of what


class Runner:
    """All loads under all arms, those of an interrupted run left as they are.

    Args:
        targets: by the arm's name.
        budget_s: no load is begun after it.

    Attributes:
        left_out: loads that were not measured, each with the reason.
    """

    def __init__(
        self,
        targets: Mapping[str, Server],
        levels: Items[Level],
        arms: Items[Arm],
        sampling: SamplingParams,
        slo: Mapping[str, float],
        budget_s: float,
    ) -> None:
        self.targets, self.loads, self.arms = targets, levels, arms
        self.sampling, self.slo = sampling, slo
        self._journal = Journal(None, {})
        self._budget_s, self._end_s = budget_s, 0.0
        self._is_warm: set[str] = set()
        self._saturated: dict[str, str] = {}  # arm -> load
        self.left_out: list[str] = []

    @property
    def levels(self) -> list[dict[str, Any]]:
        """Figures, in the order of the loads."""
        return [self._journal[key]["figures"] for key in self._keys() if key in self._journal]

    @property
    def blocks(self) -> list[dict[str, Any]]:
        return [
            {"level": key, "requests": self._journal[key]["requests"]}
            for key in self._keys()
            if key in self._journal
        ]

    def to_the_end(self, journal: Journal, tell: Tell) -> None:
        """Measures whatever the journal does not hold."""
        self._journal = journal
        self._end_s = time.perf_counter() + self._budget_s
        for place, level in enumerate(self.loads):
            # There and back, so that a drift of the machine is nobody's.
            for arm in self.arms if place % 2 == 0 else reversed(self.arms):
                self._run(level, arm, tell)

    def _run(self, level: Level, arm: Arm, tell: Tell) -> None:
        key = key_of(level, arm)
        if key not in self._journal:
            reason = self._why_not(level, arm)
            if reason:
                self.left_out.append(f"{key}: {reason}")
                return
            self._warm_up(level, arm)
            self._measure(level, arm, tell)
        if self._journal[key]["figures"]["saturated"]:
            self._saturated[arm.name] = level.name

    def _why_not(self, level: Level, arm: Arm) -> str:
        if time.perf_counter() > self._end_s:
            return LATE
        if level.rate is not None and arm.name in self._saturated:
            return f"already saturated at {self._saturated[arm.name]}"
        return ""

    def _warm_up(self, level: Level, arm: Arm) -> None:
        """A few requests that nobody counts, once per arm; ConfigError where none is answered."""
        if arm.name in self._is_warm:
            return
        self._is_warm.add(arm.name)
        first = replace(
            closed_loop(level.questions[:2], 2, 4), name="warm-up", is_filler=level.is_filler
        )
        replies = measure(self.targets[arm.name], first, arm, self.sampling).replies
        if all(reply.error for reply in replies):
            raise ConfigError(f"arm {arm.name!r}: no request is answered ({replies[0].error})")

    def _measure(self, level: Level, arm: Arm, tell: Tell) -> None:
        num, key = len(level.questions), key_of(level, arm)
        done = 0

        def tick(_: object) -> None:
            nonlocal done
            done += 1
            tell(done, num, key)

        tell(0, num, key)
        measured = measure(self.targets[arm.name], level, arm, self.sampling, tick=tick)
        figures = summary(measured, self.slo)
        self._journal.add(key, {"figures": figures, "requests": blocks(measured)})

    def num_rounds(self, num_prompts: int) -> int:
        """How often a prompt is asked in one load, at the most."""
        real = [len(level.questions) for level in self.loads if not level.is_filler]
        return -(-max(real, default=0) // num_prompts)

    def finish(self) -> bool:
        """The result is written; whether nothing is left to go on with by `--resume`."""
        is_whole = not any(told.endswith(LATE) for told in self.left_out)
        if is_whole:
            self._journal.finish()
        return is_whole

    def _keys(self) -> Iterator[str]:
        return (key_of(level, arm) for level in self.loads for arm in self.arms)


def best(levels: Items[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By arm, the load with the most good answers per second; () without limits."""
    found: dict[str, Mapping[str, Any]] = {}
    for level in levels:
        known = found.get(level["arm"])
        if "request_goodput" in level and (
            known is None or level["request_goodput"] > known["request_goodput"]
        ):
            found[level["arm"]] = level
    keys = ("arm", "name", "request_goodput", "output_goodput", "slo_attainment", "slo_met")
    return [{key: level[key] for key in keys} for level in found.values()]


def key_of(level: Level, arm: Arm) -> str:
    """What a load under an arm is called."""
    return f"{level.name}, {arm.name}"


def described(targets: Mapping[str, Server]) -> dict[str, Any]:
    """The first arm's target, and by arm where there are several."""
    first, *_ = targets.values()
    told = {arm: target.describe() for arm, target in targets.items()}
    alone = len({id(target) for target in targets.values()}) == 1
    return first.describe() if alone else {**first.describe(), "by_arm": told}
