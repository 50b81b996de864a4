"""Sweep: draft length by concurrency, method and temperature; predicted first, then measured.

Prices and acceptance from a calibration predict every cell within seconds. What is then measured,
paired with plain decoding in the same run, are the cells where it matters: the best of each load,
those next to the predicted break-even, and the corners; and the adaptive policy over all of them.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence as Items
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any, NamedTuple

from outrider.bench import ab, pairs
from outrider.bench.ab import Measured
from outrider.bench.blocks import Block
from outrider.bench.calibration.calibrate import Calibration
from outrider.bench.calibration.prediction import Load, Predicted, Residual, explain
from outrider.bench.calibration.steps import Depths, StepLog, Totals
from outrider.bench.inprocess import InProcess
from outrider.bench.journal import Journal
from outrider.bench.statistics import Ratio
from outrider.bench.sweep.contexts import lengthened
from outrider.bench.sweep.grid import Cell, Place, SweepPlan, Variant
from outrider.bench.target import Question, Target
from outrider.engine.prompts import encode
from outrider.request import SamplingParams

MIN_BLOCKS = 10  # that every load should come to; fewer cells are measured where it would not
WARM_UP_BLOCKS = 2  # what warming up takes at least, in blocks


class Progressed(NamedTuple):
    """Loads that are done, of how many; the one that is measured, and its share of time spent."""

    num_done: int
    num_loads: int
    told: str
    share: float


class Sweep:
    """One run of a plan.

    Args:
        target: predictions and the terms of residuals need an engine in this process.
        calibration: without it nothing is predicted, and all is measured.
        journal: holds loads that an interrupted run finished, and takes the new ones.

    Raises:
        ConfigError: a context that the target has no room for.
    """

    def __init__(
        self,
        target: Target,
        plan: SweepPlan,
        *,
        calibration: Calibration | None = None,
        journal: Journal | None = None,
        clock: Callable[[], float] = time.perf_counter,
        tick: Callable[[Progressed], None] = lambda progressed: None,
    ) -> None:
        self.target, self.plan, self.calibration = target, plan, calibration
        self.blocks: list[dict[str, Any]] = []
        self._journal = Journal(None, {}) if journal is None else journal
        self._clock, self._tick = clock, tick
        self._questions = {context: self._asked(context) for context in plan.contexts}

    def predict(self) -> list[Cell]:
        """Every cell, unmeasured; the adaptive policy's are not among them."""
        return [
            Cell(place=place, variant=variant, predicted=self._predicted(place, variant))
            for place in self.plan.loads
            for variant in self.plan.fixed()
        ]

    def run(self) -> list[Cell]:
        """Predicts all cells, and measures what the budget allows."""
        start = self._clock()
        found: list[Cell] = []
        loads = self.plan.loads
        for number, place in enumerate(loads):
            left_s = max(self.plan.budget_s - (self._clock() - start), 0.0)
            cells = [cell for cell in self.predict() if cell.place == place]
            found += self._measure(place, cells, left_s / (len(loads) - number), number)
        return found

    def _measure(
        self, place: Place, cells: list[Cell], budget_s: float, number: int
    ) -> Iterator[Cell]:
        """The cells of one load, those measured that its budget has time for."""
        is_done = place.key in self._journal
        if is_done:
            held = self._journal[place.key]
            batch, names = held["batch"], held["arms"]
        else:
            batch, names = self._choose(place, cells, budget_s)
        cells = [
            replace(cell, predicted=self._predicted(place, cell.variant, batch)) for cell in cells
        ]
        variants = (*self.plan.fixed(), *self.plan.adaptive())
        chosen = [variant for variant in variants if variant.arm.name in names]
        plan = self._ab_plan(place, chosen, batch, budget_s)
        if not is_done:
            held = self._journal.add(place.key, self._run(place, plan, number))
        self.blocks.append({**place._asdict(), **held})
        measured = _measured(plan, held)
        steps = {name: _totals(one) for name, one in held["steps"].items()}
        by_name = {cell.variant.arm.name: cell for cell in cells}
        best = _best(measured, chosen)
        noise = pairs.null(measured) if measured.usable else None
        for at, variant in enumerate(chosen, start=1):
            cell = by_name.pop(variant.arm.name, Cell(place=place, variant=variant))
            filled = self._filled(cell, measured, at, steps, best, noise)
            yield replace(filled, residual=self._residual(filled, batch))
        yield from by_name.values()

    def _choose(self, place: Place, cells: Items[Cell], budget_s: float) -> tuple[int, list[str]]:
        """Prompts of a block, and as many arms as come to enough blocks in the time there is."""
        most, least = max(self.plan.concurrencies), min(self.plan.concurrencies)
        names = _by_interest(cells, place.concurrency in (least, most))
        adaptive = [variant.arm.name for variant in self.plan.adaptive()]
        at_once, room = place.concurrency, 0
        for batch in dict.fromkeys((self._whole_block(at_once), at_once)):
            run_s = batch * self._answer_s(place)
            runs = budget_s / (MIN_BLOCKS + WARM_UP_BLOCKS) / run_s if run_s else math.inf
            room = int(min(runs / 2, len(names) + len(adaptive) + 2)) - 2  # the base, and again
            if room >= len(adaptive) + len(self.plan.arms):
                break
        return batch, [*names[: max(room - len(adaptive), len(self.plan.arms))], *adaptive]

    def _answer_s(self, place: Place) -> float:
        """Seconds that one answer takes the engine; 0 where nobody knows."""
        if self.calibration is None:
            return 0.0
        load = self._load(place)._replace(num_prompt=place.context or self._mean_prompt)
        return self.calibration.predictor.answer_s(load)

    def _ab_plan(
        self, place: Place, chosen: Items[Variant], batch: int, budget_s: float
    ) -> ab.Plan:
        plan = self.plan
        return ab.Plan(
            arms=(plan.base, *(variant.arm for variant in chosen)),
            questions=self._questions[place.context],
            sampling=SamplingParams(
                max_tokens=plan.max_tokens,
                temperature=place.temperature,
                seed=plan.seed,
                ignore_eos=plan.ignore_eos,
            ),
            concurrency=place.concurrency,
            batch=batch,
            eps=plan.eps,
            budget_s=budget_s,
            seed=plan.seed,
        )

    def _run(self, place: Place, plan: ab.Plan, number: int) -> dict[str, Any]:
        """Blocks and steps of a load, of types that JSON has."""
        log = StepLog(self._clock)
        engine = self.target.llm.engine if isinstance(self.target, InProcess) else None

        def tick(at: ab.Progressed) -> None:
            share = min(at.seconds / plan.budget_s, 1.0) if plan.budget_s else 1.0
            self._tick(Progressed(number, len(self.plan.loads), place.key, share))

        self._tick(Progressed(number, len(self.plan.loads), place.key, 0.0))
        with nullcontext() if engine is None else log.attached(engine):
            measured = ab.measure(self.target, plan, clock=self._clock, tick=tick)
        steps = {arm.name: log.of(arm.speculation) for arm in plan.arms if arm.speculation}
        return {
            "arms": [arm.name for arm in plan.arms],
            "batch": plan.batch_size,
            "steps": {name: asdict(one) for name, one in steps.items() if one is not None},
            "stopped": measured.stopped,
            "num_warm_ups": measured.num_warm_ups,
            "is_steady": measured.is_steady,
            "blocks": measured.blocks,
        }

    def _filled(
        self,
        cell: Cell,
        measured: Measured,
        at: int,
        steps: Mapping[str, Totals],
        best: Mapping[str, int],
        noise: Ratio | None,
    ) -> Cell:
        """A cell with what its arm, the `at`-th, came to."""
        if noise is None:
            return cell
        acceptance = pairs.arms(measured)[at].get("acceptance", {})
        own, plain = steps.get(cell.variant.arm.name), steps.get(self.plan.base.name)
        found = replace(
            cell,
            pair=pairs.pair(measured, 0, at, noise),
            steps=own,
            plain_steps=plain,
            acceptance_length=acceptance.get("acceptance_length"),
            tokens_per_pass=own.tokens_per_pass if own else acceptance.get("tokens_per_step"),
        )
        if cell.variant.is_adaptive and cell.variant.method in best:
            to_best = pairs.pair(measured, best[cell.variant.method], at, noise)
            found = replace(found, to_best=to_best)
        return found

    def _residual(self, cell: Cell, block: int) -> Residual | None:
        if cell.predicted is None or not (cell.ratio and cell.steps and cell.plain_steps):
            return None
        assert self.calibration is not None, "it predicted this"
        place, variant = cell.place, cell.variant
        profile = self.calibration.profile(variant.method, place.temperature)
        if not (profile and variant.k and cell.steps.num_tokens and cell.plain_steps.num_tokens):
            return None
        return explain(
            self.calibration.predictor,
            profile,
            variant.k,
            self._load(place, block),
            cell.ratio,
            cell.plain_steps,
            cell.steps,
        )

    def _predicted(
        self, place: Place, variant: Variant, block: int | None = None
    ) -> Predicted | None:
        """`block`: prompts of one; None is as many as it may have."""
        if self.calibration is None or variant.k is None:
            return None
        profile = self.calibration.profile(variant.method, place.temperature)
        if profile is None or len(profile.forecast.stands) < variant.k:
            return None
        return self.calibration.predictor.predict(profile, variant.k, self._load(place, block))

    def _load(self, place: Place, block: int | None = None) -> Load:
        """At concurrency 1 the time per token after the first is measured: prompts are no part."""
        num_prompt = place.context or self._mean_prompt
        prices = None if self.plan.ignore_eos else self.calibration
        return Load(
            batch=place.concurrency,
            context=num_prompt + self.plan.max_tokens // 2,
            is_drawn=place.temperature > 0.0,
            num_prompt=num_prompt if place.concurrency > 1 else 0,
            num_tokens=self.plan.max_tokens,
            num_requests=block or self._whole_block(place.concurrency),
            end_rate=0.0 if prices is None else prices.end_rate(place.temperature),
        )

    def _whole_block(self, concurrency: int) -> int:
        """Prompts of a block, where there is time enough."""
        whole = ab.BATCHES_IN_FLIGHT * concurrency if concurrency > 1 else 1
        return min(whole, len(self.plan.questions))

    @cached_property
    def _mean_prompt(self) -> int:
        """Tokens of a prompt."""
        if not isinstance(self.target, InProcess):
            return 0
        tokenizer = self.target.llm.tokenizer
        lengths = [len(encode(question.prompt, tokenizer)) for question in self.plan.questions]
        return sum(lengths) // len(lengths)

    def _asked(self, context: int | None) -> tuple[Question, ...]:
        if context is None:
            return self.plan.questions
        return lengthened(self.target, self.plan.questions, context, self.plan.max_tokens)


def _by_interest(cells: Items[Cell], is_edge: bool) -> list[str]:
    """Names of arms: the best of each method, corners of the grid, then next to break-even.

    Args:
        is_edge: whether the load is the least or the most.
    """
    first = [group[0] for group in _ranked(cells)]
    if is_edge and any(cell.variant.k for cell in cells):
        depths = [cell.variant.k for cell in cells if cell.variant.k is not None]
        first += [cell for cell in cells if cell.variant.k in (min(depths), max(depths))]
    rest = sorted(cells, key=_distance)
    return list(dict.fromkeys(cell.variant.arm.name for cell in [*first, *rest]))


def _ranked(cells: Items[Cell]) -> list[list[Cell]]:
    """By method, the highest prediction first."""
    by_method: dict[str, list[Cell]] = {}
    for cell in cells:
        by_method.setdefault(cell.variant.method, []).append(cell)
    return [sorted(group, key=lambda cell: -(cell.speedup or 0.0)) for group in by_method.values()]


def _distance(cell: Cell) -> float:
    """From 1, of the logarithm of what is predicted."""
    return abs(math.log(cell.speedup)) if cell.speedup else 0.0


def _best(measured: Measured, chosen: Items[Variant]) -> dict[str, int]:
    """By method, the place of its fastest fixed arm; 0, plain decoding, where that is slower."""
    gains: dict[str, tuple[float, int]] = {}
    for at, variant in enumerate(chosen, start=1):
        if not variant.is_adaptive and measured.usable:
            logs = [block.log_ratio(0, at) for block in measured.kept]
            found = (sum(logs) / len(logs), at)
            gains[variant.method] = max(gains.get(variant.method, (0.0, 0)), found)
    return {method: at for method, (_, at) in gains.items()}


def _measured(plan: ab.Plan, held: Mapping[str, Any]) -> Measured:
    return Measured(
        plan=plan,
        blocks=tuple(map(Block.from_json, held["blocks"])),
        stopped=held["stopped"],
        num_warm_ups=held["num_warm_ups"],
        is_steady=held["is_steady"],
    )


def _totals(held: Mapping[str, Any]) -> Totals:
    return Totals(**{**held, "depths": Depths(**held["depths"])})
