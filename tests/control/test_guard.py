"""Guard and Purse."""

import random

import pytest

from outrider.control.guard import FIRST_PAUSE, MOST_GAINED, MOST_LOST, TRY_SHARE, Guard, Purse


def run(guard, advantage, num_steps, first=0, seed=0):
    """Steps of one sequence whose drafts bring `advantage` times plain decoding."""
    rng, shut = random.Random(seed), 0
    for step in range(first, first + num_steps):
        if guard.is_shut(step):
            shut += 1
            continue
        guard.observe(step, rng.choice([1, 2, 3]), 2.0 / advantage, 1, 1.0)
    return shut


@pytest.mark.parametrize("advantage", [1.3, 2.0])
def test_what_pays_is_left_alone(advantage):
    guard = Guard()
    assert run(guard, advantage, 2000) <= 2 * FIRST_PAUSE
    assert guard.advantage == pytest.approx(advantage, rel=0.3)


def test_what_loses_is_ended_soon_and_for_longer_each_time():
    guard = Guard()
    shut = run(guard, 0.8, 3000)
    assert shut > 0.9 * 3000
    assert guard.num_shut > 2


def test_a_hiccup_is_no_reason_to_end():
    guard = Guard()
    run(guard, 1.3, 200)
    for step in range(200, 400):
        guard.observe(step, 2, 50.0 if step % 40 == 0 else 1.5, 1, 1.0)
    assert guard.num_shut == 0


def test_it_opens_again_when_told():
    guard = Guard()
    run(guard, 0.5, 60)
    assert guard.is_shut(60)
    guard.reopen()
    assert not guard.is_shut(60)


def test_what_breaks_even_nearly_is_no_reason_to_end():
    guard = Guard()
    for step in range(2000):
        guard.observe(step, 4, 4.0 / 0.98, 4, 4.0)
    assert guard.num_shut == 0


@pytest.mark.parametrize("advantage", [0.3, 0.6, 0.9])
def test_what_it_lets_through_is_lost_within_a_few_steps(advantage):
    """However much speculation won before."""
    guard = Guard()
    run(guard, 3.0, 1000)
    lost = 0.0
    for step in range(1000, 3000):
        if guard.is_shut(step):
            break
        lost += 2.0 - 2.0 * advantage
        guard.observe(step, 2.0 * advantage, 2.0, 1, 1.0)
    assert guard.num_shut == 1
    assert MOST_LOST < lost < MOST_LOST + MOST_GAINED + 2.0


def test_unlucky_drafts_in_a_row_are_no_reason_to_end():
    guard = Guard()
    run(guard, 1.4, 300)
    for step in range(300, 308):
        guard.observe(step, 1, 1.4, 1, 1.0)
    assert guard.num_shut == 0


def test_nothing_measured_is_no_verdict():
    assert Guard().advantage is None
    assert not Guard().is_shut(0)
    told = {"advantage": None, "shut_for_steps": 0, "lost_steps": 0.0, "times_shut": 0}
    assert Guard().explain(0) == told


def test_no_more_is_spent_than_was_earned():
    purse, spent = Purse(), 0.0
    for _ in range(5000):
        purse.earn(1.0)
        if purse.pays(0.5):
            purse.settle(0.9)  # trials lose more than was expected, each time
            spent += 0.9
    assert spent <= TRY_SHARE * 5000 + 4.0
    assert spent > 0.5 * TRY_SHARE * 5000


def test_a_trial_that_wins_gives_back():
    purse = Purse()
    purse.earn(1.0)
    assert purse.pays(1.0)
    purse.settle(1.0)
    assert purse.pays(0.5)
    before = purse.seconds
    assert purse.is_open
    purse.settle(-0.2)
    assert purse.seconds == pytest.approx(before + 0.7)
    after = purse.seconds
    purse.settle(9.0)  # nothing was paid for
    assert purse.seconds == after
