"""LinearCost: prices are told apart as far as the timings allow, and doubt is known."""

import math
import random

import pytest

from outrider.control.linear_cost import LinearCost

SIZES = (1.0, 1.0, 0.1, 0.1, 0.005)
TRUE = (2e-4, 8e-4, 5e-5, 1e-5, 2e-6)


def taken(counts, prices=TRUE):
    return sum(price * count for price, count in zip(prices, counts, strict=True))


def learned(num_timings, seed=0):
    cost, rng = LinearCost(SIZES), random.Random(seed)
    for _ in range(num_timings):
        depth, rows = rng.randint(1, 8), rng.choice([1, 2, 4, 16])
        counts = (1.0, depth, rows, depth * rows, rng.choice([0, 0, 0, 200]))
        cost.observe(counts, taken(counts) * rng.gauss(1, 0.05))
    return cost


def test_a_first_timing_is_believed():
    cost = LinearCost(SIZES)
    cost.observe((1.0, 4, 1, 4, 250), 0.004)
    assert cost.predict((1.0, 4, 1, 4, 250)) == pytest.approx(0.004, rel=0.1)
    assert cost.predict((1.0, 4, 1, 4, 0)) > 0.002, "not all of it was catching up"


def test_prices_are_told_apart():
    cost = learned(400)
    for counts in [(1.0, 1, 1, 1, 0), (1.0, 8, 16, 128, 0), (1.0, 4, 4, 16, 200)]:
        assert cost.predict(counts) == pytest.approx(taken(counts), rel=0.15)


def test_nothing_costs_less_than_nothing():
    cost = LinearCost((1.0, 1.0))
    for _ in range(50):
        cost.observe((1.0, 10.0), 1e-3)
        cost.observe((1.0, 0.0), 2e-3)
    assert cost.predict((0.0, 5.0)) == 0.0
    assert cost.predict((1.0, 1.0)) > 0.0


def test_the_lowest_price_is_zero_until_timings_say_otherwise():
    cost = LinearCost(SIZES)
    assert cost.lowest() == [0.0] * 5
    assert learned(400).lowest()[1] > 0.5 * TRUE[1]


def test_a_hiccup_changes_little_and_a_change_is_followed():
    cost = learned(300)
    counts = (1.0, 4, 1, 4, 0)
    before = cost.predict(counts)
    cost.observe(counts, 100 * before)
    assert cost.predict(counts) < 2 * before
    for _ in range(150):
        cost.observe(counts, 3 * before)
    assert cost.predict(counts) == pytest.approx(3 * before, rel=0.15)


def test_a_first_timing_of_next_to_nothing_is_forgotten():
    """It says how large prices may be; a draft that came to nought would freeze them there."""
    cost = LinearCost(SIZES)
    cost.observe((1.0, 4, 1, 0, 20), 5e-5)
    for _ in range(10):
        cost.observe((1.0, 4, 1, 4, 0), 4e-3)
    assert cost.predict((1.0, 4, 1, 4, 0)) == pytest.approx(4e-3, rel=0.1)


def test_saved_and_loaded_it_predicts_the_same():
    cost, other = learned(100), LinearCost(SIZES)
    other.load(cost.to_json())
    assert other.predict((1.0, 3, 2, 6, 10)) == cost.predict((1.0, 3, 2, 6, 10))
    with pytest.raises(ValueError, match="prices"):
        LinearCost((1.0,)).load(cost.to_json())


def test_wild_timings_leave_it_sane():
    """Rounding does not make it surer than sure, whatever it is told."""
    rng, cost = random.Random(1), LinearCost((1.0, 0.3, 0.3, 0.1))
    for _ in range(4000):
        size = rng.choice([1, 2, 4, 8, 32, 300])
        factor = 10 ** rng.uniform(-6, 1) if rng.random() < 0.05 else 1.0
        seconds = max(0.0, 1e-5 * factor * (1 + size) * rng.gauss(1, 0.5))
        cost.observe((1.0, size, rng.choice([0, size]), rng.choice([0, 3 * size])), seconds)
        assert all(math.isfinite(price) and price >= 0.0 for price in cost.prices + cost.lowest())


def test_prices_that_trade_with_each_other_still_tell_the_sum():
    """After a hiccup one of call and depth would be negative; what they cost together is known."""
    cost = LinearCost(SIZES)
    for depth, seconds in ((2, 0.0012), (3, 0.0005), (8, 0.0054)):
        cost.observe((1.0, depth, 4, 4 * depth, 0), seconds)
    for _ in range(12):
        cost.observe((1.0, 1, 1, 1, 0), 1.9e-4)
    assert min(cost._prices) < 0.0
    assert cost.predict((1.0, 1, 1, 1, 0)) == pytest.approx(1.9e-4, rel=0.5)
    assert min(cost.prices) >= 0.0
