"""LinearCost: seconds as a sum of prices times counts, learned from timings.

For what has no knees: drafting (passes, rows, nodes, tokens to catch up with) and the host's work
after a pass. Prices wander slowly; a Kalman filter (Kalman 1960) follows them and knows which of
them the timings so far could not tell apart.
"""

import math
from collections.abc import Mapping, Sequence as Items
from typing import Any

NOISE = 0.15  # standard deviation of a timing, relative
DRIFT = 0.004  # of a price per timing, relative to what it may be
SURPRISE = 4.0  # a timing counts as no further off than so many deviations
FAR_OFF = 2.0  # deviations, of late, at which prices may be larger than was thought possible
BIAS_SHARE = 0.3  # of the last timing in how far they are off of late, in deviations


class LinearCost:
    """Prices per count, none below zero when they are used.

    Args:
        sizes: how large each price may be beside the others, before anything was timed (a token to
            catch up with is far cheaper than a pass).
    """

    def __init__(self, sizes: Items[float]) -> None:
        self.num_timings = 0
        self._prices = [0.0] * len(sizes)
        self._used: list[float] | None = None
        self._sizes = tuple(sizes)
        self._unit = 0.0  # seconds that a price of size 1 may be
        self._covariance: list[list[float]] = []
        self._bias = 0.0

    @property
    def prices(self) -> list[float]:
        """Per count, none negative.

        Counts that always came together leave their prices free to trade with one another; where
        one is below zero it is taken to be zero and the others what they are then expected to be.
        """
        if self._used is None:
            self._used = self._not_negative()
        return self._used

    def predict(self, counts: Items[float]) -> float:
        """Seconds; never negative."""
        return sum(price * count for price, count in zip(self.prices, counts, strict=True))

    def lowest(self) -> list[float]:
        """Prices that would still be no surprise, at the lower end; never negative."""
        if not self._covariance:
            return [0.0] * len(self.prices)
        spreads = (math.sqrt(max(row[i], 0.0)) for i, row in enumerate(self._covariance))
        return [max(price - s, 0.0) for price, s in zip(self.prices, spreads, strict=True)]

    def observe(self, counts: Items[float], seconds: float) -> None:
        """`counts` took this long together."""
        if not self._covariance:
            if seconds <= 0.0:
                return
            self._begin(seconds / max(counts[0], 1.0))
        self.num_timings += 1
        self._used = None
        for index, size in enumerate(self._sizes):
            self._covariance[index][index] += (DRIFT * size * self._unit) ** 2
        moved = [sum(c * x for c, x in zip(row, counts, strict=True)) for row in self._covariance]
        expected = sum(p * x for p, x in zip(self._prices, counts, strict=True))
        known = sum(m * x for m, x in zip(moved, counts, strict=True))
        spread = max(known, 0.0) + (NOISE * max(seconds, expected, 1e-7)) ** 2
        deviation = math.sqrt(spread)
        off = max(-SURPRISE, min(SURPRISE, (seconds - expected) / deviation)) * deviation
        for row, gain in enumerate(moved):
            share = gain / spread
            self._prices[row] += share * off
            line = self._covariance[row]
            for column, other in enumerate(moved):
                line[column] -= share * other
        if any(line[index] <= 0.0 for index, line in enumerate(self._covariance)):
            self._begin(self._unit, DRIFT)  # rounding has made it surer than sure
        self._bias += BIAS_SHARE * (off / deviation - self._bias)
        if abs(self._bias) > 1.0:
            self._doubt(1.0 + abs(self._bias))

    def _not_negative(self) -> list[float]:
        prices = list(self._prices)
        covariance = [list(line) for line in self._covariance]
        for _ in range(len(prices)):
            lowest = min(prices)
            if lowest >= 0.0 or not covariance:
                break
            index = prices.index(lowest)
            line = covariance[index]
            if line[index] > 0.0:
                shares = [value / line[index] for value in line]
                prices = [
                    price - share * lowest for price, share in zip(prices, shares, strict=True)
                ]
                for other, share in zip(covariance, shares, strict=True):
                    for column, value in enumerate(line):
                        other[column] -= share * value
            prices[index] = 0.0
        return [max(price, 0.0) for price in prices]

    def _doubt(self, factor: float) -> None:
        """All prices are less sure than was thought: timings went the same way again and again.

        Where they are as unsure as at the start and yet too low, the first timing was of next to
        nothing, as of a draft that came to nought: prices may be larger than it let them be.
        """
        for index, (line, size) in enumerate(zip(self._covariance, self._sizes, strict=True)):
            if factor * line[index] > (size * self._unit) ** 2:
                if self._bias > FAR_OFF:
                    self._begin(2.0 * self._unit)
                return
        for line in self._covariance:
            for column, value in enumerate(line):
                line[column] = factor * value

    def to_json(self) -> dict[str, Any]:
        return {"prices": list(self._prices), "unit": self._unit, "num_timings": self.num_timings}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Starts from saved prices; ValueError if they are of something else."""
        prices = [float(price) for price in saved["prices"]]
        if len(prices) != len(self._prices) or float(saved["unit"]) < 0:
            raise ValueError(f"{len(prices)} prices instead of {len(self._prices)}")
        self.num_timings = int(saved["num_timings"])
        if self.num_timings:
            self._begin(float(saved["unit"]), 0.1)
        self._prices, self._used = prices, None

    def _begin(self, unit: float, share: float = 1.0) -> None:
        self._unit = unit
        self._covariance = [
            [
                (share * size * unit) ** 2 if row == column else 0.0
                for column in range(len(self._sizes))
            ]
            for row, size in enumerate(self._sizes)
        ]
