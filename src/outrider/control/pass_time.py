"""PassTime: seconds of the target's pass by its rows and the context they read.

A table over row counts in the logarithm, filtered: each timing moves the table where it was taken,
less so its neighbours, and a factor common to all of it, each by how uncertain it was. So a
machine that slows down is told from a price that was wrong at one batch size.

Source: the monotone step table of the vLLM and TurboSpec profiles, refined online by a Kalman
filter (Kalman 1960) with a diagonal covariance.

What a pass reads of the KV cache is counted twice: `context`, committed tokens over sequences (the
bytes, once each), and `visits`, the same for every further row of a sequence (the work). With short
texts neither matters; at long ones the bytes hide the draft rows or the work makes them dear,
which differs by machine.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence as Items
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

NODES = tuple(
    sorted({1, 2, 3, 4, 6} | {2**power * share // 2 for power in range(3, 15) for share in (2, 3)})
)
Floats: TypeAlias = NDArray[np.float64]
NO_CURVE: Floats = np.zeros(0)
LOG_NODES = tuple(math.log(n) for n in NODES)

PRICE_OF_ROW = 0.05  # of the first row's, where nothing was measured
COMMON_SPREAD = 10.0  # standard deviations in the logarithm, before the first timing
SHAPE_SPREAD = 0.6
SAVED_SPREAD = 0.3  # likewise of a saved table
CONTEXT_SPREAD = 1.0
WORK_SHARE = 0.3  # of the price of a visit in that of a context token, where nothing was measured
COMMON_DRIFT = 0.02  # per timing
SHAPE_DRIFT = 0.006
NOISE = 0.10  # of one timing; what is further off counts as no more than SURPRISE of them
SURPRISE = 4.0
BIAS_SHARE = 0.3  # of the last timing in how far they are off of late, in deviations
BIAS_STEP = 0.05  # that a bias of one deviation adds to what is not known
REACH = 0.7  # distance in ln(rows) at which neighbours share 1/e
FRESH_FOR = 16  # timings that a curve is kept for


class PassTime:
    """t = scale * (shape(rows) + byte_price * context + work_price * visits), from timings.

    Args:
        context_price: of a token of context, beside a pass of one row, as far as is known
            beforehand: bytes of a token's KV over bytes of the weights.
    """

    def __init__(self, context_price: float = 1e-5) -> None:
        self.num_timings = 0
        self._scale, self._scale_var = 0.0, COMMON_SPREAD**2
        self._shape = [math.log1p(PRICE_OF_ROW * (n - 1)) for n in NODES]
        self._shape_var = [SHAPE_SPREAD**2] * len(NODES)
        self._seen_at = [0] * len(NODES)
        self._reading = [math.log(context_price), math.log(WORK_SHARE * context_price)]
        self._reading_var = [CONTEXT_SPREAD**2, CONTEXT_SPREAD**2]
        self._curves: dict[bool, tuple[int, Floats]] = {}
        self._bias = 0.0

    @property
    def is_known(self) -> bool:
        return self.num_timings > 0

    def predict(self, num_rows: float, context: float = 0.0, visits: float = 0.0) -> float:
        """Seconds of a pass of `num_rows` rows."""
        shape = self._shape_at(num_rows)
        return math.exp(self._scale) * (shape + sum(self._readings(context, visits)))

    @property
    def visit_s(self) -> float:
        """Seconds that a row adds per token of its context."""
        return math.exp(self._scale + self._reading[1])

    def curve(self, num_rows: int, *, hopeful: bool = False) -> Floats:
        """Seconds without context for 0 to `num_rows` rows and on, never falling.

        It is kept for some timings, and longer than asked for.

        Args:
            hopeful: a standard deviation lower, so far as what is known of fewer rows allows.
        """
        made_at, curve = self._curves.get(hopeful, (0, NO_CURVE))
        if len(curve) <= num_rows or self.num_timings - made_at >= FRESH_FOR:
            length = max(64, 2 ** math.ceil(math.log2(num_rows + 1)))
            curve = self._rising(length, hopeful=hopeful)
            self._curves[hopeful] = self.num_timings, curve
        return curve

    def uncertainty(self, num_rows: float) -> float:
        """Standard deviation of ln(seconds) beside the common factor."""
        low, share = _place(num_rows)
        high = min(low + 1, len(NODES) - 1)
        return math.sqrt((1 - share) ** 2 * self._var(low) + share**2 * self._var(high))

    def observe(self, num_rows: float, context: int, visits: int, seconds: float) -> None:
        """One pass took this long."""
        if seconds <= 0 or num_rows < 1:
            return
        self.num_timings += 1
        self._scale_var += COMMON_DRIFT**2
        low, share = _place(num_rows)
        high = min(low + 1, len(NODES) - 1)
        shape, readings = self._shape_at(num_rows), self._readings(context, visits)
        expected = shape + sum(readings)
        by_shape = shape / expected
        local_var = (1 - share) ** 2 * self._var(low) + share**2 * self._var(high)
        spread = self._scale_var + by_shape**2 * local_var + NOISE**2
        for reading, var in zip(readings, self._reading_var, strict=True):
            spread += (reading / expected) ** 2 * var
        off = math.log(seconds) - self._scale - math.log(expected)
        deviation = math.sqrt(spread)
        off = max(-SURPRISE, min(SURPRISE, off / deviation)) / deviation
        self._scale += self._scale_var * off
        self._scale_var -= self._scale_var**2 / spread
        for index, reading in enumerate(readings):
            gain = reading / expected * self._reading_var[index]
            self._reading[index] += gain * off
            self._reading_var[index] += SHAPE_DRIFT**2 - gain**2 / spread
        self._move_shape(math.log(num_rows), by_shape, math.sqrt(local_var), off, spread)
        self._bias += BIAS_SHARE * (off * deviation - self._bias)
        if abs(self._bias) > 1.0:  # timings went the same way again and again
            self._scale_var += (BIAS_STEP * self._bias) ** 2
            for node in (low, high):
                doubted = self._shape_var[node] + (BIAS_STEP * self._bias) ** 2
                self._shape_var[node] = min(doubted, SHAPE_SPREAD**2)

    def to_json(self) -> dict[str, Any]:
        """The table in seconds; `load` takes it back."""
        scale = math.exp(self._scale)
        return {
            "rows": list(NODES),
            "seconds": [scale * math.exp(value) for value in self._shape],
            "spread": [math.sqrt(self._var(i)) for i in range(len(NODES))],
            "reading_s": [scale * math.exp(value) for value in self._reading],
            "num_timings": self.num_timings,
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Starts from a saved table, somewhat less sure of it: the machine may be busier now."""
        seconds = [float(value) for value in saved["seconds"]]
        is_whole = list(saved["rows"]) == list(NODES) and len(seconds) == len(NODES)
        if not is_whole or not all(0 < value < 1e6 for value in seconds):
            raise ValueError("the table has other rows than this version's, or no seconds")
        self._scale, self._scale_var = math.log(seconds[0]), 0.3**2
        self._shape = [math.log(value) - self._scale for value in seconds]
        self._shape_var = [max(SAVED_SPREAD, float(s)) ** 2 for s in saved["spread"]]
        self._reading = [math.log(float(value)) - self._scale for value in saved["reading_s"]]
        self._reading_var = [0.3**2, 0.3**2]
        self._seen_at = [0] * len(NODES)
        self.num_timings = 1
        self._curves = {}

    def _move_shape(
        self, at: float, by_shape: float, local: float, off: float, spread: float
    ) -> None:
        """The table's entries learn by how near they are to where the timing was taken."""
        for node, place in enumerate(LOG_NODES):
            distance = abs(place - at) / REACH
            if distance > 2.0:
                continue
            var = self._var(node)
            shared = math.exp(-distance) * math.sqrt(var) * local * by_shape
            self._shape[node] += shared * off
            self._shape_var[node] = max(var - shared * shared / spread, 1e-6)
            self._seen_at[node] = self.num_timings

    def _var(self, node: int) -> float:
        since = self.num_timings - self._seen_at[node]
        return min(self._shape_var[node] + since * SHAPE_DRIFT**2, SHAPE_SPREAD**2)

    def _readings(self, context: float, visits: float) -> tuple[float, float]:
        byte_price, work_price = self._reading
        return math.exp(byte_price) * context, math.exp(work_price) * visits

    def _shape_at(self, num_rows: float) -> float:
        low, share = _place(num_rows)
        if share == 0.0:
            return math.exp(self._shape[low])
        return math.exp((1 - share) * self._shape[low] + share * self._shape[low + 1])

    def _rising(self, length: int, *, hopeful: bool) -> Floats:
        """Seconds at 0, 1, ... rows; where noise made the shape fall, what fits both ends best."""
        low_N, share_N = _places(length)
        var = [self._var(node) for node in range(len(NODES))]
        shape = self._shape
        if hopeful:
            shape = [value - math.sqrt(v) for value, v in zip(shape, var, strict=True)]
        logs = np.array(_never_falling(shape, [1.0 / v for v in var]))
        logs_N = (1 - share_N) * logs[low_N] + share_N * logs[low_N + 1]
        return np.concatenate((np.zeros(1), np.exp(self._scale + logs_N)))


def _never_falling(values: Items[float], weights: Items[float]) -> list[float]:
    """The closest sequence that never falls (pool adjacent violators, Ayer et al. 1955)."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, count
    for value, weight in zip(values, weights, strict=True):
        count = 1
        while pools and pools[-1][0] > value:
            mean, behind, size = pools.pop()
            value = (mean * behind + value * weight) / (behind + weight)
            weight, count = weight + behind, count + size
        pools.append((value, weight, count))
    return [mean for mean, _, count in pools for _ in range(count)]


@lru_cache(maxsize=16)
def _places(length: int) -> tuple[NDArray[np.intp], Floats]:
    """`_place` for 1 to `length` rows; the entry above is always one on."""
    places = [_place(num_rows) for num_rows in range(1, length + 1)]
    low_N = np.array([min(low, len(NODES) - 2) for low, _ in places], dtype=np.intp)
    share_N = np.array([1.0 if low > len(NODES) - 2 else share for low, share in places])
    return low_N, share_N


def _place(num_rows: float) -> tuple[int, float]:
    """Entry of the table at or below, and how far to the next one in the logarithm."""
    if num_rows <= 1:
        return 0, 0.0
    if num_rows >= NODES[-1]:
        return len(NODES) - 1, 0.0
    low = bisect_right(NODES, num_rows) - 1
    if NODES[low] == num_rows:
        return low, 0.0
    step = LOG_NODES[low + 1] - LOG_NODES[low]
    return low, (math.log(num_rows) - LOG_NODES[low]) / step
