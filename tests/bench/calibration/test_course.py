"""Course: a block played step by step, against closed forms and against what raggedness does."""

import math

import pytest

from outrider.bench.calibration.course import Block, play

FLAT = 1e-3


def flat(num_in_flight, num_prompts):
    """A step costs the same, however many are in it."""
    return FLAT


def by_row(num_in_flight, num_prompts):
    """A step costs by the request."""
    return FLAT * num_in_flight


def test_alone_with_drafts_that_always_stand_it_is_tokens_per_pass():
    """40 tokens behind the first step's 5, five at a time: 8 steps for 44."""
    found = play(Block(1, 1, 45), [1.0] * 4, flat, flat)
    assert found.speedup == pytest.approx(44 / 8)
    assert found.decoding == pytest.approx(1 / 5)
    assert found.in_flight == 1.0


def test_drafts_that_never_stand_cost_what_they_cost():
    found = play(Block(8, 4, 32), [0.0] * 3, flat, lambda *step: 1.25 * flat(*step))
    assert found.speedup == pytest.approx(0.8)
    assert found.in_flight == 4.0


def test_tokens_per_step_are_those_of_the_forecast():
    stands = [0.7, 0.5, 0.2]
    found = play(Block(64, 8, 200), stands, by_row, by_row)
    assert found.decoding == pytest.approx(1 / (1 + sum(stands)), rel=0.02)


def test_prompts_dilute_the_gain():
    """Seven further steps for each of a block's four answers, and a dear one for its prompt."""

    def with_prompts(num_in_flight, num_prompts):
        return FLAT * (1 + 9 * num_prompts)

    found = play(Block(4, 2, 8), [1.0], with_prompts, with_prompts)
    plain, drafted = 2 * (19 + 7), 2 * (19 + 3)
    assert found.speedup == pytest.approx(plain / drafted)
    assert found.decoding == pytest.approx(0.5)


def test_ends_that_scatter_leave_fewer_in_flight():
    """Plain answers of one length end together; drafted ones do not, and the rest runs on alone."""
    stands = [0.8, 0.64, 0.5]
    found = play(Block(16, 16, 64), stands, flat, flat)
    assert found.in_flight < 14
    assert found.speedup < 0.9 * (1 + sum(stands))


def test_answers_that_end_early_leave_plain_decoding_ragged_too():
    even = play(Block(16, 16, 64), [0.5], flat, flat)
    ragged = play(Block(16, 16, 64, end_rate=0.05), [0.5], flat, flat)
    assert ragged.in_flight < 0.7 * even.in_flight
    assert math.log(ragged.speedup) == pytest.approx(math.log(1.5), abs=0.15)


def test_it_is_the_same_each_time():
    block = Block(8, 4, 32, end_rate=0.02)
    assert play(block, [0.6, 0.3], flat, by_row) == play(block, [0.6, 0.3], flat, by_row)
