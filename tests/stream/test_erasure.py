"""Erasure: what counts as taken back, as brought back, and as told early."""

import pytest

from outrider.stream.erasure import Erasure
from outrider.stream.events import Committed, Tail


class Clock:
    now = 5.0

    def __call__(self):
        return self.now


def measure(*steps, index=0):
    """Steps a second apart: a list is a tail, a tuple a commit; the summary at the end."""
    clock = Clock()
    erasure = Erasure(clock)
    offset = 0
    for step in steps:
        clock.now += 1.0
        if isinstance(step, list):
            erasure.observe(tail(step, index))
        else:
            event = step if isinstance(step, Committed) else Committed("r", index, offset, step)
            event = event._replace(offset=offset)
            erasure.observe(event)
            offset += len(event.token_ids)
    return erasure.summary()


def tail(tokens, index=0):
    return Tail(
        request_id="r", index=index, token_ids=tuple(tokens), text="x" * len(tokens),
        committed_chars=0, stability=1.0, source="draft", version=1,
    )  # fmt: skip


def test_nothing_said_nothing_measured():
    assert Erasure(Clock()).summary() == {
        "ne_gross": 0.0,
        "ne_net": 0.0,
        "flickers": 0,
        "tail_updates": 0,
        "max_retract_tokens": 0,
        "lead_ms_p50": None,
        "time_to_first_tail_ms": None,
    }


def test_a_tail_that_stands_costs_nothing_and_leads():
    found = measure((1,), [2, 3, 4], (2, 3, 4, 5))
    assert (found["ne_gross"], found["flickers"], found["tail_updates"]) == (0.0, 0, 1)
    assert found["time_to_first_tail_ms"] == 2000.0
    assert found["lead_ms_p50"] == 1000.0, "three of five tokens came a second early"


def test_what_follows_the_first_mismatch_is_taken_back():
    found = measure((1,), [2, 3, 4, 5], (2, 9), [6], (7, 8, 8, 8, 8))
    assert found["ne_gross"] == pytest.approx((3 + 1) / 8)
    assert found["ne_net"] == found["ne_gross"]
    assert (found["flickers"], found["max_retract_tokens"]) == (2, 3)


def test_the_net_figure_leaves_out_what_the_next_draft_brings_back():
    """4 and 5 stood at places 3 and 4; the next tail has the 4 again, but another instead of 5."""
    found = measure((1,), [2, 3, 4, 5], (2, 9), [4, 6], (4, 6))
    assert found["ne_gross"] == pytest.approx(3 / 5)
    assert found["ne_net"] == pytest.approx(2 / 5)


def test_what_comes_back_at_another_place_or_later_is_taken_back_for_good():
    assert measure((1,), [2, 3], (9,), [9, 3], (9, 3))["ne_net"] == pytest.approx(2 / 4)
    later = measure((1,), [2, 3, 4], (9,), [5], [5, 4], (5, 4))
    assert later["ne_net"] == pytest.approx(3 / 4)


def test_a_commit_may_bring_back_what_it_took():
    """A tree went another way and met the tail again."""
    found = measure((1,), [2, 3, 4], (2, 9, 4))
    assert (found["ne_gross"], found["ne_net"]) == (pytest.approx(2 / 4), pytest.approx(1 / 4))


def test_a_tail_may_be_replaced_without_a_commit():
    found = measure((1,), [2, 3], [2, 3, 4], [2], (2, 5))
    assert found["ne_gross"] == pytest.approx(2 / 3)
    assert found["flickers"] == 1
    assert found["lead_ms_p50"] == 0.0
    assert measure([1, 2], [], (1, 2))["max_retract_tokens"] == 2, "cleared"


def test_a_token_leads_from_when_it_was_shown_for_good():
    found = measure([1], [1], [2], (2,))
    assert found["lead_ms_p50"] == 1000.0
    assert measure([1], [1], (1,))["lead_ms_p50"] == 2000.0


def test_what_a_commit_does_not_reach_stays_on_show():
    found = measure([1, 2, 3], (1,), [2, 3], (2, 3))
    assert (found["ne_gross"], found["lead_ms_p50"]) == (0.0, 3000.0)
    unreached = measure([1, 2, 3], Committed("r", token_ids=(1,), finish_reason="length"))
    assert unreached["ne_gross"] == 2.0


def test_text_without_tokens_takes_nothing_back():
    found = measure([1, 2], Committed("r", text="a"), (1, 2))
    assert found["ne_gross"] == 0.0


@pytest.mark.parametrize(("reason", "count"), [(None, 4), (7, 4), ("stop text", 5)])
def test_an_end_token_is_none_of_the_texts(reason, count):
    last = Committed("r", token_ids=(5, 6), finish_reason="stop", stop_reason=reason)
    assert measure((1,), [2, 3], (9, 8), last)["ne_gross"] == pytest.approx(2 / count)


def test_completions_do_not_mix():
    clock = Clock()
    erasure = Erasure(clock)
    erasure.observe(tail([1, 2], index=0))
    erasure.observe(Committed("r", 1, 0, (9, 9)))
    erasure.observe(Committed("r", 0, 0, (1, 2)))
    assert erasure.summary()["ne_gross"] == 0.0
