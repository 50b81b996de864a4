"""Statistics: the interval covers what it promises, verdicts say no more than they may."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, strategies as st

from outrider.bench import statistics
from outrider.bench.statistics import (
    Ratio,
    half_width,
    is_stationary,
    marked,
    noise,
    paired_ratio,
    sign_test,
    student,
    verdict,
    wilson,
)


def simulated(rng, count, blocks, between, within, truth=1.2):
    """Log ratios of prompts that differ by `between`, in blocks that differ by `within`."""
    centres = rng.normal(math.log(truth), between, count)
    return [rng.normal(centre, within, blocks) for centre in centres]


def told(low, high, count=30):
    ratio = math.sqrt(low * high)
    return Ratio(ratio=ratio, low=low, high=high, num_clusters=count, num_blocks=count)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Few prompts and many, with and without repetition, differing by prompt, by noise, by both."""
    settings = [(12, 1, 0.3, 0.0), (30, 1, 0.3, 0.0), (25, 4, 0.2, 0.1), (40, 3, 0.05, 0.1)]
    rng, covered = np.random.default_rng(1), {}
    for setting in [*settings, (60, 2, 0.0, 0.1)]:
        found = (
            paired_ratio(simulated(rng, *setting), seed=seed, num_resamples=24000 // setting[0])
            for seed in range(400)
        )
        covered[setting] = sum(one.low <= 1.2 <= one.high for one in found) / 400
    assert 0.94 <= np.mean(list(covered.values())) <= 0.97
    assert all(0.915 <= share <= 0.985 for share in covered.values()), covered


def test_the_noise_of_blocks_is_counted_once():
    """Resampling blocks of resampled prompts as they are would give 1.2 times the width."""
    rng = np.random.default_rng(2)
    widths = [
        paired_ratio(simulated(rng, 60, 2, 0.05, 0.3), num_resamples=400).half_width
        for _ in range(40)
    ]
    truth = student(0.975, 59) * math.sqrt((0.05**2 + 0.3**2 / 2) / 60)
    assert np.mean(widths) == pytest.approx(truth, rel=0.07)


def test_prompts_measured_unequally_often_weigh_the_same_and_are_covered():
    found = paired_ratio([[math.log(2)] * 9, [math.log(8)]])
    assert found.ratio == pytest.approx(4.0)
    rng, hits = np.random.default_rng(3), 0
    for seed in range(400):
        data = simulated(rng, 30, 3, 0.1, 0.1)
        ragged = [one[: 1 + i % 3] for i, one in enumerate(data)]
        found = paired_ratio(ragged, seed=seed, num_resamples=400)
        hits += found.low <= 1.2 <= found.high
    assert 0.93 <= hits / 400 <= 0.98


def test_ratio_counts_and_reproducible():
    values = [[0.1 * i] for i in range(12)]
    found = paired_ratio(values)
    assert (found.num_clusters, found.num_blocks) == (12, 12)
    assert found == paired_ratio(values)
    assert found != paired_ratio(values, seed=1)
    assert found.low < found.ratio < found.high
    assert found.ratio == pytest.approx(math.exp(0.55))
    deviation = np.std([0.1 * i for i in range(12)], ddof=1)
    assert found.detectable == pytest.approx(math.expm1(2.8 * deviation / math.sqrt(12)))


def test_one_prompt_has_no_interval_and_none_is_an_error():
    alone = paired_ratio([[math.log(2)] * 40])
    assert alone.ratio == pytest.approx(2.0)
    assert alone.interval is None
    assert not alone.is_known
    assert alone.half_width == alone.reach == alone.detectable == math.inf
    assert verdict(alone) == "undecided"
    assert verdict(told(1.4, 1.6), alone) == "undecided", "noise that nobody knows"
    assert half_width([[1.0]]) == math.inf
    with pytest.raises(ValueError, match="no prompt was measured"):
        paired_ratio([[], []])


def test_the_quick_half_width_is_that_of_the_interval():
    data = simulated(np.random.default_rng(4), 40, 3, 0.1, 0.2)
    assert half_width(data) == pytest.approx(paired_ratio(data).half_width, rel=0.06)


def test_noise_is_what_more_blocks_would_narrow():
    rng = np.random.default_rng(5)
    few, many = (simulated(rng, 200, blocks, 0.5, 0.2) for blocks in (2, 8))
    assert noise(few) == pytest.approx(1.96 * 0.2 / math.sqrt(400), rel=0.15)
    assert noise(many) == pytest.approx(1.96 * 0.2 / math.sqrt(1600), rel=0.15)
    assert noise([one[:1] for one in few]) == math.inf, "nothing was measured twice"
    assert noise(few[:9]) == math.inf, "nine repetitions say too little"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.03, 1.2, "faster"), (0.8, 0.97, "slower"), (0.99, 1.3, "undecided"),
        (0.7, 1.01, "undecided"), (1.0, 1.2, "undecided"), (0.98, 1.02, "equal"),
        (1.005, 1.015, "equal"), (0.979, 1.0, "undecided"), (1.005, 1.03, "faster"),
    ],
)  # fmt: skip
def test_verdicts(low, high, expected):
    assert verdict(told(low, high)) == expected


def test_eps_is_what_equal_means():
    assert verdict(told(0.96, 1.04), eps=0.05) == "equal"
    assert verdict(told(1.001, 1.004), eps=0.002) == "faster"


@pytest.mark.parametrize(
    ("null", "expected"),
    [((0.99, 1.01), "faster"), ((0.95, 1.06), "undecided"), ((0.9, 0.95), "undecided")],
)
def test_no_claim_is_smaller_than_the_noise(null, expected):
    """A null arm that is off by itself speaks against small claims too."""
    assert verdict(told(1.03, 1.07), told(*null)) == expected


@pytest.mark.parametrize(
    ("count", "expected"), [(1, "undecided"), (9, "undecided"), (10, "faster")]
)
def test_few_prompts_decide_nothing_however_clear_they_look(count, expected):
    assert verdict(paired_ratio([[math.log(2)]] * count)) == expected
    assert verdict(paired_ratio([[0.0]] * count)) == ("equal" if count == 10 else "undecided")


def test_equal_arms_are_told_apart_no_oftener_than_the_interval_says():
    rng = random.Random(6)
    found = [
        verdict(paired_ratio([[rng.gauss(0, 0.1)] for _ in range(20)], num_resamples=300))
        for _ in range(300)
    ]
    assert sum(one in ("faster", "slower") for one in found) <= 24


@pytest.mark.parametrize(
    ("values", "p"),
    [([1.0] * 5, 2 / 32), ([1, 1, -1], 1.0), ([1] * 9 + [-1], 22 / 1024), ([0.0, 0.0], 1.0)],
)
def test_sign_test(values, p):
    assert sign_test(values) == pytest.approx(p)


def test_a_disturbed_block_is_marked_and_others_are_not():
    rng = random.Random(7)
    null = [rng.gauss(0, 0.01) for _ in range(40)]
    calm = sum(marked(null))
    null[11], null[30] = 0.2, -0.4
    found = marked(null)
    assert found[11]
    assert found[30]
    assert sum(found) - 2 <= calm <= 2


def test_of_few_blocks_none_is_marked():
    assert marked([0.0] * 18 + [5.0]) == [False] * 19
    assert marked([0.001 * (-1) ** i for i in range(19)] + [5.0])[-1]


def test_a_slope_is_seen_through_noise():
    rng = random.Random(8)
    flat = [rng.gauss(0, 0.01) for _ in range(8)]
    assert is_stationary(flat)
    assert is_stationary([1.0] * 4)
    assert not is_stationary([y - 0.02 * x for x, y in enumerate(flat)])
    assert not is_stationary([0.0] * 3), "too few to tell"


@pytest.mark.parametrize(
    ("p", "freedom", "expected"),
    [
        (0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 3, 3.18245), (0.975, 4, 2.77645),
        (0.975, 9, 2.26216), (0.9, 5, 1.47588), (0.995, 12, 3.05454), (0.975, 120, 1.97993),
    ],
)  # fmt: skip
def test_students_quantiles_are_those_of_the_tables(p, freedom, expected):
    assert student(p, freedom) == pytest.approx(expected, rel=1e-5)


def test_wilson_is_the_textbooks_and_covers():
    share = wilson(8, 10)
    assert (share.value, share.low, share.high) == (
        0.8,
        pytest.approx(0.4902, abs=1e-4),
        pytest.approx(0.9433, abs=1e-4),
    )
    assert wilson(0, 0) == (0.0, 0.0, 1.0)
    rng, hits = random.Random(9), 0
    for _ in range(1000):
        share = wilson(sum(rng.random() < 0.3 for _ in range(50)), 50)
        hits += share.low <= 0.3 <= share.high
    assert 0.93 <= hits / 1000 <= 0.97


@given(st.integers(0, 200), st.integers(0, 200))
def test_wilson_holds_the_share(count, more):
    share = wilson(count, count + more)
    assert 0.0 <= share.low <= share.value + 1e-12
    assert share.value - 1e-12 <= share.high <= 1.0


def test_the_constants_are_those_of_the_docs():
    assert (statistics.NUM_RESAMPLES, statistics.INTERVAL, statistics.MIN_PROMPTS) == (
        2000,
        0.95,
        10,
    )
