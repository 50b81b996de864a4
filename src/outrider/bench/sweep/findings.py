"""What the cells of a sweep say: the best K of each load, where it stops paying, regret."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence as Items
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

from outrider.bench.statistics import FASTER
from outrider.bench.sweep.grid import Cell, SweepPlan

MAX_RESIDUAL = 0.15  # beyond it a prediction is told to be off, and by what
Curve: TypeAlias = Items[tuple[int, float]]  # (concurrency, speed-up), rising in concurrency


class Line(NamedTuple):
    """The cells of one method, temperature and context."""

    method: str
    temperature: float
    context: int | None

    @property
    def told(self) -> str:
        context = "" if self.context is None else f", {self.context} tokens of context"
        return f"{self.method} at temperature {self.temperature:g}{context}"


def findings(cells: Items[Cell], plan: SweepPlan) -> dict[str, Any]:
    """For a result's file."""
    fixed = [cell for cell in cells if not cell.variant.is_adaptive]
    spots, crossings = sweet_spots(fixed), break_even(fixed)
    path = controller(cells)
    return {
        "summary": " ".join(summary(fixed, spots, crossings, path)),
        "cells": [cell.to_json() for cell in fixed],
        "sweet_spots": spots,
        "break_even": crossings,
        "controller": path,
        "prediction": agreement(fixed),
        "acceptance": list(histograms(cells)),
    }


def lines(cells: Iterable[Cell]) -> dict[Line, list[Cell]]:
    found: dict[Line, list[Cell]] = {}
    for cell in cells:
        line = Line(cell.variant.method, cell.place.temperature, cell.place.context)
        found.setdefault(line, []).append(cell)
    return found


def sweet_spots(cells: Items[Cell]) -> list[dict[str, Any]]:
    """Of each method at each load, the K that was fastest; predicted where none was measured."""
    return [
        {**line._asdict(), "concurrency": concurrency, **_spot(group)}
        for line, all_of in lines(cells).items()
        for concurrency, group in _by_concurrency(all_of).items()
        if any(cell.speedup for cell in group)
    ]


def break_even(cells: Items[Cell]) -> list[dict[str, Any]]:
    """Of each method and K, the concurrency at which nothing is gained any more.

    A prediction comes with a range: where it would lie were all predictions off by `error`, the
    root mean square of this method's residuals where any was measured. An end of None lies beyond
    the loads that were planned.
    """
    found = []
    for line, all_of in lines(cells).items():
        by_k: dict[int | None, list[Cell]] = {}
        for cell in all_of:
            by_k.setdefault(cell.variant.k, []).append(cell)
        error, term = _error(all_of)
        for k, group in by_k.items():
            measured = [(c.place.concurrency, c.ratio) for c in group if c.ratio]
            guesses = [(c.place.concurrency, c.predicted.speedup) for c in group if c.predicted]
            ends = [
                _crossing([(at, guess * factor) for at, guess in guesses])
                for factor in (1.0 / (1.0 + error), 1.0 + error)
            ]
            told: dict[str, Any] = {
                "measured": _crossing(measured),
                "predicted": _crossing(guesses),
            }
            if guesses:
                told |= {"predicted_from": ends[0], "predicted_to": ends[1]}
                told |= {"error": error, "error_term": term}
            found.append({**line._asdict(), "num_draft_tokens": k, **told})
    return found


def _error(cells: Iterable[Cell]) -> tuple[float, str | None]:
    """How far predictions of these cells were off, and what explains the most of it.

    What is usual where none was measured.
    """
    found = [cell.residual for cell in cells if cell.residual is not None]
    if not found:
        return MAX_RESIDUAL, None
    squares = [math.log1p(residual.relative) ** 2 for residual in found]
    worst = found[squares.index(max(squares))]
    return math.expm1(math.sqrt(sum(squares) / len(squares))), worst.term


def crossing(curve: Curve) -> float | None:
    """Concurrency at which a falling speed-up is 1, straight between logarithms.

    None where it never crosses: see the curve's ends.
    """
    for (low, before), (high, after) in pairwise(curve):
        if before > 1.0 >= after:
            share = math.log(before) / (math.log(before) - math.log(after))
            return float(low * (high / low) ** share)
    return None


def controller(cells: Items[Cell]) -> list[dict[str, Any]]:
    """The adaptive policy's path: how deep it drafted, and what it lost to the best fixed K."""
    return [_path_point(cell) for cell in cells if cell.variant.is_adaptive and cell.pair]


def agreement(cells: Iterable[Cell]) -> dict[str, Any]:
    """How far predictions were off, and why where that was much."""
    residuals = [cell.residual for cell in cells if cell.residual is not None]
    if not residuals:
        return {}
    off = sorted(abs(found.relative) for found in residuals)
    far = [found.term for found in residuals if abs(found.relative) > MAX_RESIDUAL]
    return {
        "num_cells": len(off),
        "median_residual": off[len(off) // 2],
        "largest_residual": off[-1],
        "num_beyond_15_percent": len(far),
        "terms_beyond": {term: far.count(term) for term in sorted(set(far))},
    }


def histograms(cells: Iterable[Cell]) -> Iterator[dict[str, Any]]:
    """Acceptance at the largest K of each method, over all loads of a temperature."""
    for line, all_of in lines(cells).items():
        deepest = max((c.variant.k or 0 for c in all_of if c.steps), default=0)
        counts = [c.steps.depths for c in all_of if c.steps and c.variant.k == deepest]
        stood = [sum(d.stood[i] for d in counts) for i in range(deepest)] if counts else []
        planned = sum(d.planned[0] for d in counts)
        if planned:
            falling = [planned, *stood, 0]
            yield {
                "name": f"{line.told}, K={deepest}",
                "histogram": [a - b for a, b in pairwise(falling)],
            }


def summary(
    cells: Items[Cell],
    spots: Items[Mapping[str, Any]],
    crossings: Items[Mapping[str, Any]],
    path: Items[Mapping[str, Any]],
) -> Iterator[str]:
    """Sentences for people."""
    for line in lines(cells):
        own = [spot for spot in spots if _is_of(spot, line)]
        if not own:
            continue
        best = max(own, key=lambda spot: float(spot["speedup"]))
        sure = [spot["concurrency"] for spot in own if spot["is_sure"]]
        yield (
            f"{line.told}: best with {_k(best)} at concurrency {best['concurrency']}, "
            f"{best['speedup']:.2f} times as fast ({_source(best)}); "
            + (f"surely faster up to {max(sure)} at once." if sure else "nowhere surely faster.")
        )
        own_k = [c for c in crossings if _is_of(c, line) and c["num_draft_tokens"] == _number(best)]
        for found in own_k:
            if told := _told_crossing(found):
                yield f"With {_k(best)} it {told}."
    behind = [point for point in path if point["regret"] is not None]
    if behind:
        worst = max(behind, key=lambda point: float(point["regret"]))
        yield (
            f"The adaptive policy is at most {100 * max(0.0, worst['regret']):.1f} % behind the "
            f"best fixed K of its load{_told_regret(worst)}."
        )


def _told_crossing(found: Mapping[str, Any]) -> str:
    """Where nothing is gained any more; a prediction never without how far it may be off."""
    measured, predicted = found["measured"], found.get("predicted")
    if predicted is None:
        return f"breaks even at about {measured:.0f} requests" if measured else ""
    low, high = found["predicted_from"], found["predicted_to"]
    ends = (f"from {low:.0f}" if low else "", f"up to {high:.0f}" if high else "")
    told = f"{predicted:.0f} was predicted" if measured else f"{predicted:.0f} requests"
    told += f" ({' '.join(filter(None, ends)) or 'anywhere'}, as predictions "
    if found["error_term"] is None:
        told += f"may be {100 * found['error']:.0f} % off)"
    else:
        told += f"were {100 * found['error']:.0f} % off here, mostly by {found['error_term']})"
    if measured:
        return f"breaks even at about {measured:.0f} requests; {told}"
    return f"should break even at about {told}; that was not measured"


def _told_regret(point: Mapping[str, Any]) -> str:
    ends = point["interval_to_best"]
    if ends is None:
        return ""
    high, low = (100 * (1.0 - end) for end in ends)
    return f" (95 % interval {low:.1f} to {high:.1f} %)"


def _spot(group: Items[Cell]) -> dict[str, Any]:
    """Measured cells come first; a prediction may not outrun them."""
    measured = [cell for cell in group if cell.ratio]
    best = max(measured or group, key=lambda cell: cell.speedup or 0.0)
    return {
        "num_draft_tokens": best.variant.k,
        "speedup": best.speedup,
        "interval": None if best.pair is None else best.pair.ratio.interval,
        "interval_note": None if best.pair is None else best.pair.interval_note,
        "verdict": None if best.pair is None else best.pair.verdict,
        "is_measured": bool(measured),
        "is_sure": best.pair is not None and best.pair.verdict == FASTER,
    }


def _path_point(cell: Cell) -> dict[str, Any]:
    assert cell.pair is not None
    best = cell.to_best
    return {
        "method": cell.variant.method,
        **cell.place._asdict(),
        "mean_draft_tokens": None if cell.steps is None else cell.steps.mean_depth,
        "ratio": cell.ratio,
        "interval": cell.pair.ratio.interval,
        "verdict": cell.pair.verdict,
        "best_fixed": None if best is None else best.base.name,
        "ratio_to_best": None if best is None else best.ratio.ratio,
        "interval_to_best": None if best is None else best.ratio.interval,
        "regret": None if best is None else 1.0 - best.ratio.ratio,
    }


def _by_concurrency(cells: Iterable[Cell]) -> dict[int, list[Cell]]:
    found: dict[int, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.place.concurrency, []).append(cell)
    return found


def _crossing(points: Iterable[tuple[int, float]]) -> float | None:
    return crossing(sorted(points))


def _is_of(row: Mapping[str, Any], line: Line) -> bool:
    return all(row[key] == value for key, value in line._asdict().items())


def _number(spot: Mapping[str, Any]) -> int | None:
    found: int | None = spot["num_draft_tokens"]
    return found


def _k(spot: Mapping[str, Any]) -> str:
    return "what the server drafts" if _number(spot) is None else f"K={_number(spot)}"


def _source(spot: Mapping[str, Any]) -> str:
    if not spot["is_measured"]:
        return "predicted"
    ends = spot["interval"]
    return f"95 % interval {spot['interval_note'] or f'{ends[0]:.2f} to {ends[1]:.2f}'}"
