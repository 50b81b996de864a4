"""Calibration against laws that are known: it finds them, follows them, and forgets the old."""

import json
import math

import numpy as np
import pytest

from outrider.control.confidence import BATCH, INTERCEPT, SLOPE, Calibration
from outrider.step import StopRule, logit


def told(slope, intercept, count, gain=0.0, seed=0):
    """(confidence, stood, depth) where a token stands as a rule of these three says."""
    rng = np.random.default_rng(seed)
    logits, depths = rng.normal(2.5, 2.0, count), rng.integers(1, 9, count)
    confidence = 1.0 / (1.0 + np.exp(-logits))
    rule = np.vectorize(StopRule(0.0, slope, intercept, gain).acceptance)
    stood = rng.random(count) < rule(confidence, depths)
    return list(zip(confidence.tolist(), stood.tolist(), depths.tolist(), strict=True))


def taught(observed, calibration=None):
    calibration = calibration or Calibration()
    for confidence, stood, depth in observed:
        calibration.observe(confidence, stood, depth)
    return calibration


@pytest.mark.parametrize(
    ("slope", "intercept", "gain"),
    [(0.5, -0.2, 0.0), (1.0, 0.0, 0.9), (0.8, 1.2, -0.5), (0.0, -1.5, 0.0)],
)
def test_the_law_is_found(slope, intercept, gain):
    found = taught(told(slope, intercept, 8000, gain))
    assert found.slope == pytest.approx(slope, abs=0.12)
    assert found.intercept == pytest.approx(intercept, abs=0.25)
    assert found.gain == pytest.approx(gain, abs=0.2)
    assert found.num_observations == 8000


def test_nothing_is_believed_before_the_first_hundred():
    calibration = taught(told(2.0, 3.0, BATCH - 1))
    assert (calibration.slope, calibration.intercept) == (SLOPE, INTERCEPT)
    assert taught(told(2.0, 3.0, 1), calibration).num_observations == BATCH
    assert calibration.slope != SLOPE


def test_a_change_is_followed():
    calibration = taught(told(0.9, 1.0, 6000))
    assert calibration.acceptance(0.9) > 0.9
    taught(told(0.4, -1.5, 6000, seed=1), calibration)
    expected = StopRule(0.0, 0.4, -1.5)
    for confidence in (0.3, 0.6, 0.9):
        assert calibration.acceptance(confidence) == pytest.approx(
            expected.acceptance(confidence), abs=0.08
        )


def test_what_is_expected_is_what_comes_to_pass():
    """The reliability curve, each prediction made before its outcome is told: by fifths."""
    calibration = taught(told(0.7, 0.3, 1000, 0.4, seed=2))
    pairs = []
    for confidence, stood, depth in told(0.7, 0.3, 10_000, 0.4):
        pairs.append((calibration.acceptance(confidence, depth), stood))
        calibration.observe(confidence, stood, depth)
    pairs.sort()
    for first in range(0, 10_000, 2000):
        fifth = np.array(pairs[first : first + 2000], dtype=float)
        assert fifth[:, 0].mean() == pytest.approx(fifth[:, 1].mean(), abs=0.05)


def test_where_deep_tokens_stand_more_often_depth_tells():
    """Text of two kinds, as sure of both: deep tokens are mostly of the easy one."""
    rng, calibration, seen = np.random.default_rng(3), Calibration(), []
    for _ in range(2000):
        stands = rng.random(6) < (0.95 if rng.random() < 0.5 else 0.3)
        num_accepted = next((i for i, stood in enumerate(stands) if not stood), 6)
        calibration.observe_draft((0.7,) * 6, num_accepted)
        seen += [(depth, depth < num_accepted) for depth in range(min(num_accepted + 1, 6))]
    assert calibration.gain > 0.5
    for depth in (0, 1, 3, 5):
        stood = [outcome for at, outcome in seen if at == depth]
        measured = sum(stood) / len(stood)
        assert calibration.acceptance(0.7, depth + 1) == pytest.approx(measured, abs=0.06)


@pytest.mark.parametrize("stands", [True, False])
@pytest.mark.parametrize("confidence", [0.0, 0.3, 1.0])
def test_what_always_stands_or_never_does_leaves_numbers(confidence, stands):
    calibration = taught([(confidence, stands, 1)] * 5000)
    assert math.isfinite(calibration.slope)
    assert math.isfinite(calibration.intercept)
    assert abs(calibration.acceptance(confidence) - stands) < 0.05


def test_of_a_draft_the_tokens_down_to_the_refused_one_count():
    one_by_one, drafts = Calibration(), Calibration()
    observed = told(0.8, 0.5, 3000)
    for at in range(0, 3000, 5):
        draft = [(c, stood, depth + 1) for depth, (c, stood, _) in enumerate(observed[at : at + 5])]
        num_accepted = next((i for i, (_, stood, _) in enumerate(draft) if not stood), 5)
        drafts.observe_draft(tuple(confidence for confidence, *_ in draft), num_accepted)
        taught(draft[: num_accepted + 1], one_by_one)
    drafts.observe_draft((), 0)
    assert drafts.slope == pytest.approx(one_by_one.slope, abs=0.03)
    assert drafts.intercept == pytest.approx(one_by_one.intercept, abs=0.06)
    assert drafts.gain == pytest.approx(one_by_one.gain, abs=0.06)
    assert abs(drafts.num_observations - one_by_one.num_observations) < BATCH + 5


def test_a_rule_says_what_was_learned():
    calibration = taught(told(0.8, 0.5, 2000, 0.3))
    rule = calibration.rule(0.3)
    assert rule == StopRule(0.3, calibration.slope, calibration.intercept, calibration.gain)
    for confidence, depth in ((0.0, 1), (0.2, 3), (0.95, 8), (1.0, 2)):
        by_hand = rule.slope * logit(confidence) + rule.intercept + rule.gain * math.log(depth)
        expected = 1.0 / (1.0 + math.exp(-by_hand))
        assert rule.acceptance(confidence, depth) == pytest.approx(expected)
        assert calibration.acceptance(confidence, depth) == rule.acceptance(confidence, depth)
    assert rule.acceptance(0.5, 99) == rule.acceptance(0.5, 16)
    assert StopRule(0.0, 1e3, -1e3).acceptance(1.0) == 1.0
    assert StopRule(0.0, 1e3, -1e3).acceptance(0.0) == 0.0


def test_what_was_saved_is_taken_up_and_soon_outweighed():
    first = taught(told(0.9, 1.0, 4000))
    again = Calibration()
    again.load(json.loads(json.dumps(first.to_json())))
    assert again.rule(0.1) == first.rule(0.1)
    new = told(0.4, -1.5, 1500, seed=1)
    taught(new, first)
    taught(new, again)
    goal = StopRule(0.0, 0.4, -1.5).acceptance(0.7)
    assert abs(again.acceptance(0.7) - goal) < abs(first.acceptance(0.7) - goal)


@pytest.mark.parametrize(
    "change",
    [
        {"bins": {"3": [1.0]}},
        {"bins": {"3": [-1.0, 0.0, 0.0]}},
        {"bins": {"512": [1.0, 0.0, 0.0]}},
        {"slope": math.nan},
    ],
)
def test_junk_is_refused(change):
    calibration = Calibration()
    with pytest.raises(ValueError, match=r"bins|slope"):
        calibration.load({**calibration.to_json(), **change})
    assert calibration.rule(0.1) == Calibration().rule(0.1)
