"""Request metrics: what is derived from the counts."""

import pytest

from outrider.stream.events import RequestMetrics


def test_nothing_drafted():
    plain = RequestMetrics(num_steps=4, num_generated_tokens=4)
    assert plain.acceptance_length == 1.0
    assert plain.acceptance_rate == 0.0
    assert plain.tokens_per_step == 1.0
    assert plain.joint_acceptance == ()
    assert RequestMetrics().tokens_per_step == 0.0


def test_derived_from_a_histogram():
    """Ten drafted steps of K = 3, two plain ones: 4 x 0, 3 x 1, 1 x 2, 2 x 3 accepted."""
    metrics = RequestMetrics(
        num_steps=12,
        num_generated_tokens=23,
        num_drafts=10,
        num_draft_tokens=30,
        num_accepted_tokens=11,
        accepted_histogram=(4, 3, 1, 2),
    )
    assert metrics.acceptance_length == pytest.approx(2.1)
    assert metrics.acceptance_rate == pytest.approx(11 / 30)
    assert metrics.tokens_per_step == pytest.approx(23 / 12)
    assert metrics.joint_acceptance == pytest.approx((0.6, 0.3, 0.2))
    assert metrics.acceptance_length == pytest.approx(1 + sum(metrics.joint_acceptance))
