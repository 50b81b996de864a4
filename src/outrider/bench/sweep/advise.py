"""Advice: whether speculation pays here, with which drafter, how far, to what load, how sure.

One engine per draft model. Each is calibrated, all its drafters are predicted at every load, and
those that promise most are measured against plain decoding on it. The answer is taken from what
was measured.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence as Items
from dataclasses import dataclass, replace
from typing import Any

from outrider.bench.calibration.calibrate import Calibration
from outrider.bench.inprocess import InProcess
from outrider.bench.statistics import EQUAL, FASTER, MIN_PROMPTS, SLOWER
from outrider.bench.sweep.findings import crossing
from outrider.bench.sweep.grid import Cell, SweepPlan
from outrider.bench.sweep.run import Sweep
from outrider.bench.target import Arm
from outrider.request import SpeculationParams

TOKEN_DRAFTERS = ("ngram", "suffix", "recycle")  # those that are tried where nobody names any
NUM_MEASURED = 2  # drafters of an engine that are measured; the others are predicted
YES, NO, OPEN = "yes", "no", "open"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A drafter of one engine, and its cells.

    Attributes:
        engine: what the engine was made with, as a draft model's name; "" for nothing.
    """

    engine: str
    method: str
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        return f"{self.method} ({self.engine})" if self.engine else self.method

    @property
    def worth(self) -> float:
        """Mean logarithm over loads of what its best K gains, none where that is a loss."""
        best = [cell for cell in self.best.values() if cell.ratio]
        return sum(max(math.log(cell.ratio or 1.0), 0.0) for cell in best) / max(len(best), 1)

    @property
    def best(self) -> dict[int, Cell]:
        """By concurrency the fastest fixed K that was measured, else that was predicted."""
        found: dict[int, Cell] = {}
        for cell in self.cells:
            if cell.speedup is not None and not cell.variant.is_adaptive:
                at = cell.place.concurrency
                found[at] = max(found.get(at, cell), cell, key=_rank)
        return dict(sorted(found.items()))

    @property
    def adaptive(self) -> dict[int, Cell]:
        cells = [cell for cell in self.cells if cell.variant.is_adaptive and cell.ratio]
        return {cell.place.concurrency: cell for cell in cells}

    @property
    def is_measured(self) -> bool:
        return any(cell.ratio for cell in self.cells)


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The answer.

    Attributes:
        pays: "yes", "no", or "open" where the interval does not tell.
        candidate: which drafter; of those that do not pay, the one that came closest.
        cell: where it does best. up_to: most requests at once at which it was measured to gain.
        break_even: where the gain ends, between loads that were measured; None where it does not.
        settings: what to ask for.
        answer: sentences.
    """

    pays: str
    candidate: Candidate
    cell: Cell
    up_to: int | None
    break_even: float | None
    settings: Mapping[str, Any]
    answer: str

    def to_json(self) -> dict[str, Any]:
        pair = self.cell.pair
        return {
            "answer": self.answer,
            "pays": self.pays,
            "drafter": self.candidate.method,
            "draft_model": self.candidate.engine or None,
            "num_draft_tokens": self.cell.variant.k,
            "concurrency": self.cell.place.concurrency,
            "ratio": self.cell.ratio,
            "interval": None if pair is None else pair.ratio.interval,
            **({"interval_note": pair.interval_note} if pair and pair.interval_note else {}),
            "verdict": None if pair is None else pair.verdict,
            "pays_up_to_concurrency": self.up_to,
            "break_even_concurrency": self.break_even,
            "ask_for": dict(self.settings),
        }


def usual_arms(target: InProcess, *, with_tokens: bool = True) -> list[Arm]:
    """The engine's draft model, and drafters that need none."""
    engine = target.llm.engine
    names = [engine.default_drafter] if engine.default_drafter else []
    if with_tokens:
        names += [name for name in TOKEN_DRAFTERS if name in engine.drafters]
    return [Arm(name=name, speculation=SpeculationParams(method=name)) for name in names]


def promising(plan: SweepPlan, target: InProcess, calibration: Calibration) -> tuple[Arm, ...]:
    """The arms with the highest predictions, at any load."""
    best: dict[str, float] = {arm.name: 0.0 for arm in plan.arms}
    for cell in Sweep(target, plan, calibration=calibration).predict():
        best[cell.variant.method] = max(best[cell.variant.method], cell.speedup or 0.0)
    ranked = sorted(plan.arms, key=lambda arm: -best[arm.name])
    return tuple(ranked[:NUM_MEASURED])


def only_predicted(
    plan: SweepPlan, kept: SweepPlan, target: InProcess, calibration: Calibration
) -> list[Cell]:
    """Cells of the arms that are not measured."""
    names = {arm.name for arm in kept.arms}
    cells = Sweep(target, plan, calibration=calibration).predict()
    return [cell for cell in cells if cell.variant.method not in names]


def candidates(engine: str, cells: Iterable[Cell]) -> list[Candidate]:
    by_method: dict[str, list[Cell]] = {}
    for cell in cells:
        by_method.setdefault(cell.variant.method, []).append(cell)
    return [Candidate(engine=engine, method=m, cells=tuple(c)) for m, c in by_method.items()]


def advise(found: Items[Candidate]) -> Advice:
    """One answer from all candidates.

    Raises:
        ValueError: nothing was measured.
    """
    measured = [one for one in found if one.is_measured]
    if not measured:
        raise ValueError("nothing was measured: give a larger budget")
    chosen = max(measured, key=lambda one: (one.worth, _highest(one)))
    best = {at: cell for at, cell in chosen.best.items() if cell.ratio}
    cell = max(best.values(), key=_rank)
    gaining = [at for at, one in best.items() if _verdict(one) == FASTER]
    crossed = crossing([(at, one.ratio or 0.0) for at, one in best.items()])
    pays = YES if gaining else NO if all(map(_is_settled, best.values())) else OPEN
    told = Advice(
        pays=pays,
        candidate=chosen,
        cell=cell,
        up_to=max(gaining, default=None),
        break_even=crossed,
        settings=_settings(chosen, best, pays),
        answer="",
    )
    return replace(told, answer=" ".join([*_sentences(told, best), *_trust(found)]))


def table(found: Items[Candidate]) -> list[dict[str, Any]]:
    """Every candidate's best K at every load, and the adaptive policy there."""
    return [
        {
            "drafter": one.method,
            "draft_model": one.engine or None,
            "concurrency": at,
            "num_draft_tokens": cell.variant.k,
            "ratio": cell.ratio,
            "interval": cell.pair.ratio.interval if cell.pair else None,
            "interval_note": cell.pair.interval_note if cell.pair else None,
            "verdict": _verdict(cell),
            "predicted": cell.predicted.speedup if cell.predicted else None,
            "tokens_per_pass": cell.tokens_per_pass,
            "needed_tokens_per_pass": cell.needed,
            "adaptive_ratio": one.adaptive[at].ratio if at in one.adaptive else None,
        }
        for one in found
        for at, cell in one.best.items()
    ]


def measured_pairs(found: Items[Candidate]) -> list[dict[str, Any]]:
    """Of each load the best K and the adaptive policy, as pairs of an A/B run."""
    return [
        {
            **cell.pair.to_json(),
            "arm": f"{one.name}: {_asked(cell)}, {cell.place.concurrency} at once",
        }
        for one in found
        for cell in (*one.best.values(), *one.adaptive.values())
        if cell.pair is not None
    ]


def _settings(chosen: Candidate, best: Mapping[int, Cell], pays: str) -> dict[str, Any]:
    """What to ask for: one K where it is the best of all loads, else the adaptive policy."""
    if pays == NO:
        return {"method": "off"}
    depths = {cell.variant.k for cell in best.values()}
    speculation: dict[str, Any] = {"method": chosen.method}
    if None in depths:
        return speculation
    speculation["num_speculative_tokens"] = max(k for k in depths if k is not None)
    is_fixed = len(depths) == 1 and all(_verdict(cell) == FASTER for cell in best.values())
    return speculation if is_fixed else {**speculation, "policy": "adaptive"}


def _sentences(told: Advice, best: Mapping[int, Cell]) -> Iterator[str]:
    cell, pair = told.cell, told.cell.pair
    assert pair is not None, "only measured cells are chosen"
    how = (
        f"{told.candidate.name} with {_asked(cell)} is {pair.ratio.ratio:.2f} times as fast as "
        f"plain decoding at concurrency {cell.place.concurrency} (95 % interval "
        f"{pair.interval_told})"
    )
    loads = list(best)
    if told.pays == YES:
        yield f"Yes: {how}."
        if told.break_even is not None:
            yield f"It stops paying at about {told.break_even:.0f} requests at once."
        elif told.up_to == loads[-1]:
            yield f"It pays at every load that was measured, up to {loads[-1]} requests at once."
        else:
            yield f"That is sure up to {told.up_to} requests at once."
        yield f"Ask for {_written(told.settings)}."
    elif told.pays == NO:
        yield f"No: the best that was found, {how}, gains nothing at {_listed(loads)} at once."
        yield "Leave speculation off."
    else:
        yield f"Not decided: {how}."
        yield "Measure longer (--budget), with more prompts, or on a quieter machine."
    if pair.ratio.num_clusters < MIN_PROMPTS:
        count = pair.ratio.num_clusters
        blocks = "1 block was" if count == 1 else f"{count} blocks were"
        yield f"Only {blocks} measured there: {MIN_PROMPTS} decide."


def _trust(found: Items[Candidate]) -> Iterator[str]:
    """How far predictions were off, where some stand alone and others beside a measurement."""
    cells = [cell for one in found for cell in one.cells]
    off = [abs(math.log1p(cell.residual.relative)) for cell in cells if cell.residual is not None]
    is_guessed = any(
        cell.predicted and not cell.ratio for one in found for cell in one.best.values()
    )
    if off and is_guessed:
        error = 100 * math.expm1(math.sqrt(sum(each * each for each in off) / len(off)))
        yield f"What is only predicted may be off, as predictions were by {error:.0f} % here."


def _rank(cell: Cell) -> tuple[bool, float]:
    """Measured ones first."""
    return cell.ratio is not None, cell.speedup or 0.0


def _highest(one: Candidate) -> float:
    return max(cell.ratio for cell in one.cells if cell.ratio)


def _verdict(cell: Cell) -> str | None:
    return None if cell.pair is None else cell.pair.verdict


def _is_settled(cell: Cell) -> bool:
    return _verdict(cell) in (SLOWER, EQUAL)


def _asked(cell: Cell) -> str:
    if cell.variant.is_adaptive:
        return "the adaptive policy"
    return "its own settings" if cell.variant.k is None else f"K={cell.variant.k}"


def _written(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _listed(loads: Items[int]) -> str:
    return ", ".join(map(str, loads))
