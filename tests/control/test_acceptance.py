"""Experience: estimates against what is known, and how they age."""

import random

import pytest

from outrider.control.acceptance import FIRST_REACH, FIRST_STAND, Experience


def feed(experience, acceptance, num_drafts, depth=6, coverage=1.0, seed=0, first=0):
    rng = random.Random(seed)
    for step in range(first, first + num_drafts):
        drafted = depth if rng.random() < coverage else 0
        accepted = 0
        while accepted < drafted and rng.random() < acceptance:
            accepted += 1
        experience.observe(depth, drafted, accepted, step)


def test_nobody_known_is_given_a_chance():
    forecast = Experience().forecast(3, 0)
    assert forecast.reached[0] == FIRST_REACH
    assert forecast.stands[0] == pytest.approx(FIRST_REACH * FIRST_STAND)


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.6, 0.9])
def test_joint_acceptance_is_learned(acceptance):
    experience = Experience()
    feed(experience, acceptance, 400)
    stands = experience.forecast(4, 400).stands
    for depth, found in enumerate(stands, start=1):
        assert found == pytest.approx(acceptance**depth, abs=0.09)


def test_what_is_not_drafted_costs_and_brings_nothing():
    experience = Experience()
    feed(experience, 0.8, 600, coverage=0.25)
    forecast = experience.forecast(2, 600)
    assert forecast.reached[0] == pytest.approx(0.25, abs=0.08)
    assert forecast.stands[0] == pytest.approx(0.2, abs=0.08)


def test_a_refused_token_says_nothing_of_those_behind_it():
    experience = Experience()
    for step in range(100):
        experience.observe(4, 4, 1, step)  # the first stands, the second falls, always
    one = Experience()
    for step in range(100):
        one.observe(2, 2, 1, step)
    assert experience.forecast(2, 100).stands == pytest.approx(one.forecast(2, 100).stands)


def test_one_sequence_starts_from_all_and_goes_its_own_way():
    shared = Experience()
    feed(shared, 0.8, 300)
    own = Experience(shared)
    assert own.forecast(3, 300).stands == pytest.approx(shared.forecast(3, 300).stands)
    feed(own, 0.0, 40, first=300)
    assert own.forecast(1, 340).stands[0] < 0.3 < shared.forecast(1, 340).stands[0]


def test_old_experience_of_a_sequence_gives_way_to_that_of_all():
    shared = Experience()
    own = Experience(shared)
    feed(own, 0.0, 30)
    feed(shared, 0.9, 400, first=30)
    assert own.forecast(1, 40).stands[0] < own.forecast(1, 400).stands[0]
    assert own.forecast(1, 2000).stands[0] == pytest.approx(
        shared.forecast(1, 2000).stands[0], abs=0.02
    )


def test_a_drift_is_followed():
    experience = Experience()
    feed(experience, 0.9, 500)
    feed(experience, 0.1, 500, first=500)
    assert experience.forecast(1, 1000).stands[0] < 0.25


def test_hope_is_higher_where_less_is_known():
    few, many = Experience(), Experience()
    feed(few, 0.5, 6)
    feed(many, 0.5, 400)
    gains = [
        e.forecast(1, 400, hopeful=True).stands[0] - e.forecast(1, 400).stands[0]
        for e in (few, many)
    ]
    assert gains[0] > 2 * gains[1] > 0.0


def test_counts_from_elsewhere_weigh_what_they_are_allowed_to():
    experience = Experience()
    experience.expect([1000, 900], [900, 450], weight=20.0)
    stands = experience.forecast(2, 0).stands
    assert stands[0] == pytest.approx(0.9 * 0.88, abs=0.05)
    assert stands[1] / stands[0] == pytest.approx(0.5 * 0.9, abs=0.08)
    feed(experience, 0.0, 100)
    assert experience.forecast(1, 100).stands[0] < 0.2
    each = Experience()
    each.expect([1000, 10], [500, 9], weight=20.0)
    half, nine = each.forecast(2, 0).stands
    assert half == pytest.approx(0.9 * (10 + 5 * FIRST_STAND) / 25)
    assert nine / half == pytest.approx(0.9 * (9 + 5 * half / 0.9) / 15), "few count as they are"
    nothing = Experience()
    nothing.expect([], [], weight=20.0)
    assert nothing.forecast(2, 0) == Experience().forecast(2, 0)


def test_a_depth_that_few_drafts_came_to_is_not_held_against_the_drafter():
    """A hundred drafts of one token, and ten of two: all of them stood."""
    experience = Experience()
    experience.expect([110, 10], [110, 10], weight=12.0)
    alone = Experience()
    alone.expect([10, 10], [10, 10], weight=12.0)
    assert experience.forecast(2, 0).stands[1] >= alone.forecast(2, 0).stands[1]


def test_counts_that_cannot_be_end_what_is_taken_over():
    experience, first = Experience(), Experience()
    experience.expect([10, 10, 10], [8, 3, 1], weight=12.0)  # each draft at every depth
    first.expect([10], [8], weight=12.0)
    assert experience.forecast(3, 0) == first.forecast(3, 0)


def test_saved_and_loaded_it_forecasts_alike():
    experience, other = Experience(), Experience()
    feed(experience, 0.6, 10)
    other.load(experience.to_json())
    assert other.forecast(4, 10).stands == pytest.approx(experience.forecast(4, 10).stands)


def test_what_was_loaded_keeps_its_rate_and_is_soon_outweighed():
    experience, other = Experience(), Experience()
    feed(experience, 0.6, 400)
    other.load(experience.to_json())
    rate = experience.forecast(1, 400).stands[0]
    assert other.forecast(1, 0).stands[0] == pytest.approx(rate, abs=0.03)
    for step in range(60):
        other.observe(1, 1, 0, step)
    assert other.forecast(1, 60).stands[0] < 0.3
