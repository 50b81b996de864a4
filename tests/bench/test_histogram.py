"""Histogram: rates derived from counts are those that counting steps gives, with varying K too."""

import random

import pytest
from hypothesis import given, strategies as st

from outrider.bench.histogram import acceptance_length, fixed_depth, joint, rates, since, total
from outrider.bench.target import Acceptance

STEPS = st.lists(
    st.integers(0, 6).flatmap(lambda d: st.tuples(st.just(d), st.integers(0, d))), max_size=60
)


def counted(steps):
    found = {}
    for step in steps:
        found[step] = found.get(step, 0) + 1
    return found


def share(these, of):
    return len(these) / len(of) if of else 0.0


@given(STEPS)
def test_rates_are_those_counted_step_by_step(steps):
    found = rates(counted(steps))
    drafted = [(d, a) for d, a in steps if d]
    for i in range(1, max((d for d, _ in drafted), default=0) + 1):
        reached = [a for _, a in drafted if a >= i]
        able = [a for d, a in drafted if d >= i]
        after = [a for d, a in drafted if d >= i and a >= i - 1]
        assert found.joint[i - 1].value == pytest.approx(share(reached, drafted))
        assert found.eligible[i - 1].value == pytest.approx(share(reached, able))
        assert found.conditional[i - 1].value == pytest.approx(share(reached, after))


@given(st.lists(st.integers(0, 20), min_size=2, max_size=8))
def test_with_a_fixed_depth_everything_derives_from_the_histogram(histogram):
    found = rates(fixed_depth(histogram, len(histogram) - 1))
    alone = joint(histogram)
    assert found.joint == alone == found.eligible
    assert acceptance_length(histogram) == pytest.approx(1 + sum(one.value for one in alone))
    for i in range(1, len(alone)):
        assert found.joint[i].value == pytest.approx(
            found.joint[i - 1].value * found.conditional[i].value
        )


def test_a_deep_position_that_few_steps_drafted_is_read_by_its_eligible_rate():
    """Every draft of 3 is accepted whole; drafts of 1 are not its fault."""
    found = rates({(1, 0): 90, (3, 3): 10})
    assert found.joint[2].value == pytest.approx(0.1)
    assert found.eligible[2].value == pytest.approx(1.0)


def test_nothing_drafted_has_no_rates():
    assert rates({(0, 0): 5}) == ((), (), ())
    assert joint(()) == ()
    assert acceptance_length(()) == 1.0


def test_sums_and_differences_of_counts():
    rng = random.Random(0)
    parts = [Acceptance(*(rng.randrange(9) for _ in range(4)), (1,) * i) for i in range(4)]
    summed = total(parts)
    assert summed.num_draft_tokens == sum(part.num_draft_tokens for part in parts)
    assert summed.histogram == (3, 2, 1)
    assert since(parts[3], total(parts[2:])) == parts[2]._replace(histogram=(1, 1, 0))
    assert total([]) is None
    assert total([parts[0], None]) is None
    assert since(None, summed) is None
