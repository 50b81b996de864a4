"""Arrivals: when requests come, at rates that are drawn from a seed.

Times are seconds from the start, rising, never 0: an ask at 0 is one of a closed loop.
"""

import math
from collections.abc import Sequence as Items

import numpy as np
from numpy.typing import NDArray

from outrider.errors import ConfigError

EARLIEST_S = 1e-9
Times = NDArray[np.float64]


def closed(num: int) -> list[float]:
    """As soon as there is room: the concurrency sets the pace."""
    return [0.0] * num


def constant(rate: float, num: int) -> list[float]:
    """One every 1 / rate seconds, the first at once."""
    _check(rate)
    return opened(np.arange(num) / rate)


def gamma(rate: float, num: int, *, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """Gaps from a Gamma law of mean 1 / rate and shape `burstiness`, as vLLM's clients draw them.

    1 is a Poisson process; less comes in bursts, more comes more evenly.
    """
    _check(rate)
    return opened(np.cumsum(_gaps(num, burstiness, seed)) / rate)


def ramp(
    first: float, last: float, seconds: float, *, burstiness: float | None = 1.0, seed: int = 0
) -> list[float]:
    """A rate that goes evenly from `first` to `last` requests per second, then ends.

    Burstiness as in `gamma`; None has no chance in it.

    Arrivals of rate 1 are mapped through the inverse of the expected number up to t,
    first t + (last - first) t^2 / (2 seconds).
    """
    _check(max(first, last))
    if min(first, last) < 0 or seconds <= 0:
        raise ConfigError(f"ramp={first}:{last}:{seconds}: give rates >= 0 and seconds > 0")
    mean = (first + last) / 2 * seconds
    num = math.ceil(mean + 6 * math.sqrt(mean / (burstiness or 1.0)) + 6)  # surely beyond the end
    numbers = np.cumsum(_gaps(num, burstiness, seed))
    slope = (last - first) / seconds
    inside = np.maximum(first**2 + 2 * slope * numbers, 0.0)
    # The root without cancellation, which also holds for slope 0.
    times = 2 * numbers / (first + np.sqrt(inside))
    return opened(times[numbers <= mean])


def opened(times: Times | Items[float]) -> list[float]:
    """These times, none of them 0."""
    return [max(EARLIEST_S, float(time)) for time in times]


def _gaps(num: int, burstiness: float | None, seed: int) -> Times:
    """Of mean 1."""
    if burstiness is None:
        return np.ones(num)
    if not 0 < burstiness < math.inf:
        raise ConfigError(f"burstiness={burstiness}: give a number above 0; 1 is Poisson")
    return np.random.default_rng(seed).gamma(burstiness, 1 / burstiness, num)


def _check(rate: float) -> None:
    if not 0 < rate < math.inf:
        raise ConfigError(f"rate={rate}: give requests per second, above 0")
