"""The canary: silent on chance, loud on what shipped as a bug, and a beta-binomial underneath."""

import json

import numpy as np
import pytest

from outrider.session.canary import LEVEL, History, Tries, _at_most, judge as judged
from outrider.session.statistics import merge


def judge(turns, recent, **options):
    return judged(History.of(turns), recent, **options)


def turns(rng, rate, sizes, dispersion=0.0):
    """Turns of a session whose rate differs from turn to turn as a Beta law."""
    found = []
    for size in sizes:
        p = rate
        if dispersion:
            c = 1 / dispersion - 1
            p = rng.beta(rate * c, (1 - rate) * c)
        accepted = int(rng.binomial(size, p))
        found.append(Tries(accepted, size - accepted))
    return found


def test_tries_are_counted_up_to_the_first_rejection():
    steps = [(4, 4), (4, 2), (0, 0), (4, 0)]
    assert Tries.of_steps(steps) == (6, 2)
    assert Tries.of_positions([3, 2, 2, 1], [2, 2, 1, 1]) == (6, 2)
    assert Tries.of_positions([], []) == (0, 0)
    assert Tries(6, 2).rate == 0.75
    assert Tries(0, 0).rate == 0.0


def test_the_law_is_the_beta_binomial():
    assert _at_most(3, 9, 1.0, 1.0) == pytest.approx(0.4), "uniform for Beta(1, 1)"
    assert _at_most(9, 9, 3.0, 5.0) == pytest.approx(1.0)
    # Far-off concentration: binomial(20, 0.3), P[X <= 4] = 0.23751.
    assert _at_most(4, 20, 0.3 * 1e7, 0.7 * 1e7) == pytest.approx(0.23751, abs=1e-4)


@pytest.mark.parametrize("dispersion", [0.0, 0.02, 0.05])
@pytest.mark.parametrize("num_turns", [1, 3, 12])
def test_chance_alone_seldom_raises_it(dispersion, num_turns):
    """Half of the level is this side's; Beta laws lean, so that up to three times it is seen."""
    rng = np.random.default_rng(1)
    alarms, count = 0, 2000
    for _ in range(count):
        sizes = rng.integers(20, 200, size=num_turns + 1)
        *history, recent = turns(rng, 0.7, sizes, dispersion)
        alarms += judge(history, recent, level=0.01).is_worse
    assert alarms / count < 0.016


def test_it_is_not_silent_always():
    """At a level of 0.2 about a tenth of the restores falls below."""
    rng = np.random.default_rng(2)
    below = above = 0
    for _ in range(2000):
        *history, recent = turns(rng, 0.7, [80] * 13, 0.05)
        found = judge(history, recent, level=0.2)
        below += found.is_worse
        above += found.is_better
    assert 0.06 < below / 2000 < 0.14
    assert 0.06 < above / 2000 < 0.14


# Mean acceptance lengths of published bugs, at K = 7; the shallowest one takes more evidence.
@pytest.mark.parametrize(
    ("before", "after", "num_turns", "num_steps"),
    [(4.487, 1.589, 5, 40), (5.94, 2.87, 12, 80), (3.33, 1.90, 40, 80)],
    ids=["sglang#32176", "sglang#31600", "sglang#28771"],
)
def test_it_catches_what_shipped(before, after, num_turns, num_steps):
    rng = np.random.default_rng(3)

    def steps(length, count):
        p = conditional_rate(length, 7)
        accepted = [min(int(rng.geometric(1 - p)) - 1, 7) for _ in range(count)]
        return Tries.of_steps([(7, a) for a in accepted])

    caught = sum(
        judge([steps(before, 40) for _ in range(num_turns)], steps(after, num_steps)).is_worse
        for _ in range(50)
    )
    assert caught >= 45


def conditional_rate(acceptance_length, depth):
    """The rate of each drafted token that makes chains of this mean acceptance length."""
    low, high = 0.0, 1.0
    while high - low > 1e-6:
        p = (low + high) / 2
        is_short = sum(p**i for i in range(depth + 1)) < acceptance_length
        low, high = (p, high) if is_short else (low, p)
    return low


def test_better_is_told_but_is_no_alarm():
    found = judge([Tries(30, 70)] * 4, Tries(95, 5))
    assert found.is_better
    assert not found.is_worse
    assert found.p_value < LEVEL
    assert (round(found.expected, 2), found.seen) == (0.3, 0.95)


@pytest.mark.parametrize(
    ("history", "recent"),
    [([], Tries(0, 50)), ([Tries(0, 0)], Tries(0, 50)), ([Tries(50, 5)], Tries(0, 0))],
)
def test_without_evidence_there_is_no_alarm(history, recent):
    found = judge(history, recent)
    assert (found.is_worse, found.is_better, found.p_value) == (False, False, 1.0)


def test_certain_histories_do_not_divide_by_zero():
    assert judge([Tries(500, 0)], Tries(0, 30)).is_worse
    assert judge([Tries(0, 500)], Tries(30, 0)).is_better
    assert not judge([Tries(500, 0)] * 3, Tries(40, 0)).is_worse
    assert not judge([Tries(1, 0)], Tries(0, 1)).is_worse


def test_a_turn_more_varied_than_most_widens_what_is_allowed():
    steady = judge([Tries(70, 30)] * 10, Tries(50, 50))
    varied = judge([Tries(50, 50), Tries(90, 10)] * 5, Tries(50, 50))
    assert varied.dispersion > steady.dispersion
    assert varied.p_value > steady.p_value


def test_histories_add_up_and_come_back_from_json():
    first, second = [Tries(70, 30), Tries(0, 0), Tries(1, 9)], [Tries(50, 5)]
    parts = [History.of(turns).as_dict() for turns in (first, second)]
    total = json.loads(json.dumps(merge(*parts)))
    assert History.from_dict({**total, "drafted": [3]}) == History.of(first + second)
    assert History.from_dict({}) == History.of([]) == History()
