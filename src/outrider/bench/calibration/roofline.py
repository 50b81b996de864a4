"""Roofline: what a pass costs by rows and context, in four numbers with a meaning.

    t(rows, context) = max(weights, rows * row) + context * byte + visits * work + overhead

Shape legend: P points, F terms of the sum.
"""

import itertools
import math
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

KNEES = tuple(2 ** (i / 4) for i in range(37))  # rows: 1 to 512


class Point(NamedTuple):
    """Passes of one shape that were timed.

    Attributes:
        num_sequences: each with `rows_each` new rows over `context` tokens in the KV cache.
        seconds: of the fastest tenth of `num_timings` passes; `spread`, half of their middle half
            beside it.
    """

    num_sequences: int
    rows_each: int
    context: int
    seconds: float
    spread: float = 0.0
    num_timings: int = 1

    @property
    def num_rows(self) -> int:
        return self.num_sequences * self.rows_each

    @property
    def num_read(self) -> int:
        """Tokens of context over sequences: bytes to read."""
        return self.num_sequences * self.context

    @property
    def num_visits(self) -> int:
        """The same for every further row of a sequence: work on what was read."""
        return self.num_sequences * (self.rows_each - 1) * self.context


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """The fit.

    Attributes:
        ridge: rows from which on a pass is bound by arithmetic; None where no timed pass was bound
            by anything else or by it, so that the ridge cannot be told.
        row_s: of each row beyond it. weights_s: of a pass with fewer.
        byte_s, work_s: of a token of context, read and visited. overhead_s: of any pass.
        error: root mean square of the relative error over the points.
    """

    ridge: float | None
    row_s: float
    weights_s: float
    byte_s: float
    work_s: float
    overhead_s: float
    error: float

    def seconds(self, point: Point) -> float:
        rows_s = max(self.weights_s, point.num_rows * self.row_s)
        read_s = point.num_read * self.byte_s + point.num_visits * self.work_s
        return rows_s + read_s + self.overhead_s


def fit(points: Items[Point]) -> Roofline:
    """Least squares of relative errors; no number below zero.

    Raises:
        ValueError: fewer than three points.
    """
    if len(points) < 3:
        raise ValueError(f"{len(points)} timings say nothing of four terms: time at least 3 shapes")
    most = max(point.num_rows for point in points)
    knees = [knee for knee in KNEES if knee < most] + [float(most)]
    error, knee, terms = min(
        (_fit_with(points, knee) for knee in knees), key=lambda found: found[0]
    )
    row_s, byte_s, work_s, overhead_s = terms
    is_inside = 1.0 < knee < most and row_s > 0.0
    return Roofline(
        ridge=knee if is_inside else None,
        row_s=row_s,
        weights_s=row_s * knee,
        byte_s=byte_s,
        work_s=work_s,
        overhead_s=overhead_s,
        error=error,
    )


def monotone(seconds: Items[float]) -> list[float]:
    """The nearest sequence, in logarithms, that never falls (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []  # mean logarithm, and how many share it
    for value in seconds:
        mean, count = math.log(value), 1
        while pools and pools[-1][0] > mean:
            before, size = pools.pop()
            mean = (before * size + mean * count) / (size + count)
            count += size
        pools.append((mean, count))
    return [math.exp(mean) for mean, count in pools for _ in range(count)]


def _fit_with(points: Items[Point], knee: float) -> tuple[float, float, list[float]]:
    """Error, knee and terms, with the knee held."""
    seconds_P = np.array([point.seconds for point in points])
    terms_PF = np.array(
        [(max(knee, p.num_rows), p.num_read, p.num_visits, 1.0) for p in points], dtype=float
    )
    found = _non_negative(terms_PF / seconds_P[:, None])
    error_P = (terms_PF @ found) / seconds_P - 1.0
    return float(np.sqrt((error_P**2).mean())), knee, [float(term) for term in found]


def _non_negative(terms_PF: NDArray[np.float64]) -> NDArray[np.float64]:
    """The best non-negative combination that gives ones, by trying every set of terms."""
    best, least = np.zeros(terms_PF.shape[1]), math.inf
    indices = range(terms_PF.shape[1])
    for size in range(1, len(indices) + 1):
        for chosen in itertools.combinations(indices, size):
            found, *_ = np.linalg.lstsq(terms_PF[:, chosen], np.ones(len(terms_PF)), rcond=None)
            error = float(((terms_PF[:, chosen] @ found - 1.0) ** 2).sum())
            if (found >= 0.0).all() and error < least:
                best = np.zeros(len(indices))
                best[list(chosen)], least = found, error
    return best
