"""Minds: a sequence starts from what its kind has seen, and from its own request's past."""

import pytest

from outrider.control.adaptive import AdaptivePolicy
from outrider.control.controller import Controller
from outrider.control.cost import DraftCounts, PassCounts
from outrider.control.minds import PAST_WEIGHT, Minds
from outrider.request import Candidate, Request, SamplingParams, Speculation
from outrider.sequence import Sequence
from outrider.step import Batch, Row

DRAFTER = "draft_model"
MOST = 8


def past(acceptance, num_drafts=200):
    """What a session's statistics would say after so many drafts of full length."""
    stood = [num_drafts * acceptance**depth for depth in range(MOST + 1)]
    return {DRAFTER: {"drafted": stood[:-1], "accepted": stood[1:]}}


def sequence(experience, temperature=0.0):
    request = Request(
        id="r",
        prompt_token_ids=(1, 2, 3, 4),
        sampling=SamplingParams(temperature=temperature),
        experience=experience,
    )
    spec = Speculation(
        drafter=DRAFTER,
        num_draft_tokens=MOST,
        policy="adaptive",
        candidates=(Candidate(DRAFTER, MOST, 1, MOST),),
    )
    seq = Sequence(
        id="r#0", request=request, index=0, tokens=[1, 2, 3, 4, 5], seed=0, arrival=1,
        speculation=spec, shaper=None, grammar=None,
    )  # fmt: skip
    seq.num_cached = 4
    return seq


def priced(draft_s):
    """A pass takes 10 ms and each further row 0.5 ms; a draft token what is given."""
    policy = AdaptivePolicy()
    for _ in range(60):
        for num_rows in (1, 2, 3, 4, 6, 8, 9):
            counts = PassCounts(num_rows, 4, 0, 1, 0)
            policy.lessons.cost.observe_pass(counts, 0.0095 + 0.0005 * num_rows, 0.0002)
        for depth in (1, 4, 8):
            counts = DraftCounts(depth, 1, depth, 0)
            policy.lessons.cost.observe_draft(DRAFTER, counts, draft_s * depth)
    return policy


def first_depth(experience, step=0, draft_s=0.003):
    """How far the first draft of a fresh request goes."""
    policy = priced(draft_s)
    policy.lessons.step = step
    batch = Batch([Row(sequence(experience), 1, MOST)], [])
    (part,) = Controller(1 << 20, [policy]).plan(batch)
    return part.depth


@pytest.mark.parametrize("step", [0, 5000])
def test_a_past_decides_how_far_the_first_draft_goes(step):
    assert first_depth(past(0.05), step) == 0
    assert first_depth({}, step) > 0
    cheap = 0.001
    assert first_depth(past(0.95), step, cheap) >= 4
    assert first_depth(past(0.95), step, cheap) > first_depth({}, step, cheap)


def test_a_past_counts_for_little_beside_what_is_seen():
    mind = Minds().of(sequence(past(0.95, num_drafts=100_000)))
    found = mind.experience[DRAFTER]
    before = found.forecast(1, 0).stands[0]
    for step in range(4 * int(PAST_WEIGHT)):
        found.observe(1, 1, 0, step)
    assert before > 0.7
    assert found.forecast(1, 50).stands[0] < 0.2


def test_a_past_tells_nobody_else():
    minds = Minds()
    minds.of(sequence(past(0.0)))
    other = minds.of(sequence({}))
    assert other.experience[DRAFTER].forecast(1, 0).stands[0] > 0.5


def test_a_past_of_other_drafters_is_left_alone():
    mind = Minds().of(sequence({"suffix": {"drafted": [4], "accepted": [0]}}))
    assert list(mind.experience) == [DRAFTER]


@pytest.mark.parametrize(
    "counts", [([], []), ([0], [0]), ([3], [5]), ([2, 2], [0, 0]), ([2, 0], [2, 0]), ([2], [])]
)
def test_counts_that_say_nothing_do_no_harm(counts):
    drafted, accepted = counts
    mind = Minds().of(sequence({DRAFTER: {"drafted": drafted, "accepted": accepted}}))
    stands = mind.experience[DRAFTER].forecast(3, 0).stands
    assert all(0.0 < one < 1.0 for one in stands)
