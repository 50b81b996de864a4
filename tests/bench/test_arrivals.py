"""Arrivals: rates and spreads are those asked for, and a seed gives the same times again."""

import math

import numpy as np
import pytest

from outrider.bench.arrivals import closed, constant, gamma, ramp
from outrider.errors import ConfigError


def test_closed_and_constant() -> None:
    assert closed(3) == [0.0, 0.0, 0.0]
    assert constant(4.0, 4) == pytest.approx([0.0, 0.25, 0.5, 0.75], abs=1e-6)
    assert constant(4.0, 1)[0] > 0.0, "0 would be a closed loop"


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_spread_of_their_law(burstiness: float) -> None:
    times = gamma(5.0, 20_000, burstiness=burstiness, seed=3)
    gaps = np.diff(times)
    assert gaps.min() >= 0.0
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    # A Gamma law of shape k has deviation mean / sqrt(k).
    assert gaps.std() == pytest.approx(0.2 / math.sqrt(burstiness), rel=0.05)


def test_poisson_counts_vary_as_much_as_their_mean() -> None:
    counts = np.histogram(gamma(10.0, 20_000, seed=1), bins=np.arange(0, 1900))[0]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.1)


def test_a_seed_gives_the_same_times() -> None:
    assert gamma(2.0, 50, seed=7) == gamma(2.0, 50, seed=7)
    assert gamma(2.0, 50, seed=7) != gamma(2.0, 50, seed=8)


@pytest.mark.parametrize(("first", "last"), [(0.0, 20.0), (20.0, 0.0), (10.0, 10.0), (5.0, 15.0)])
def test_a_ramp_has_the_expected_counts(first: float, last: float) -> None:
    """Expected number up to t: first t + (last - first) t^2 / (2 T)."""
    seconds = 1000.0
    times = np.asarray(ramp(first, last, seconds, seed=2))
    assert times.max() <= seconds
    for t in (250.0, 500.0, 1000.0):
        expected = first * t + (last - first) * t * t / (2 * seconds)
        assert abs((times <= t).sum() - expected) < 4 * math.sqrt(expected)


def test_a_ramp_without_chance() -> None:
    assert ramp(2.0, 2.0, 3.0, burstiness=None) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.5, 3.0])
    assert ramp(0.0, 2.0, 2.0, burstiness=None) == pytest.approx([math.sqrt(2), 2.0])


@pytest.mark.parametrize(
    "draw",
    [
        lambda: gamma(0.0, 5),
        lambda: gamma(1.0, 5, burstiness=0.0),
        lambda: constant(-1.0, 5),
        lambda: constant(math.inf, 5),
        lambda: ramp(-1.0, 5.0, 3.0),
        lambda: ramp(1.0, 5.0, 0.0),
    ],
)
def test_what_is_no_rate_is_refused(draw) -> None:
    with pytest.raises(ConfigError, match="="):
        draw()
