"""Statistics: they add up in any order, live with the session, and are copied by forks."""

from functools import reduce

import pytest
from hypothesis import given, strategies as st

from outrider.errors import RequestError, SessionNotFound
from outrider.session.canary import Tries
from outrider.session.log import SessionLog
from outrider.session.statistics import bucket_of, merge, of_turn

A = "acme"
drafts = st.builds(
    lambda drafted, rejected: (drafted, max(0, drafted - rejected)),
    st.integers(1, 5),
    st.integers(0, 5),
)


def turn(drafted: int, accepted: int) -> dict:
    """The counts of one draft of so many tokens."""
    tried = min(drafted, accepted + 1)
    return of_turn(1, [1] * tried, [int(i < accepted) for i in range(tried)])


@given(st.lists(drafts, min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_sums_of_counts_are_the_same_in_any_order(
    seen: list[tuple[int, int]], random: object
) -> None:
    counts = [turn(*draft) for draft in seen]
    total = reduce(merge, counts, {})
    assert total["num_drafts"] == len(seen)
    for position, tried in enumerate(total["drafted"]):
        here = [draft for draft in seen if draft[0] > position and draft[1] >= position]
        assert tried == len(here)
        assert total["accepted"][position] == sum(draft[1] > position for draft in here)
    assert Tries(**total["tries"]) == Tries.of_steps(seen)
    assert total["turns"]["accepted"] == total["tries"]["accepted"]
    shuffled = counts.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    half = len(shuffled) // 2
    halves = [reduce(merge, part, {}) for part in (shuffled[:half], shuffled[half:])]
    merged = merge(*halves)
    assert merged.pop("turns") == pytest.approx(total.pop("turns"))  # squares are no integers
    assert merged == total


@pytest.mark.parametrize(
    ("temperature", "bucket"),
    [(0.0, "0"), (0.01, "0.5"), (0.5, "0.5"), (0.7, "1"), (1.0, "1"), (1.01, "inf")],
)
def test_buckets_hold_their_upper_end(temperature: float, bucket: str) -> None:
    assert bucket_of(temperature) == bucket


def test_a_merge_changes_neither_argument() -> None:
    first, second = {"0": {"drafted": [1]}}, {"0": {"drafted": [1, 1]}, "n": 2}
    assert merge(first, second) == {"0": {"drafted": [2, 1]}, "n": 2}
    assert (first, second) == ({"0": {"drafted": [1]}}, {"0": {"drafted": [1, 1]}, "n": 2})


@pytest.mark.parametrize(
    ("first", "second"),
    [({"x": 1}, {"x": [1]}), ({"x": {}}, {"x": 1}), ({"x": "a"}, {"x": "b"}), ({"x": True}, {})],
)
def test_what_cannot_be_added_is_refused(first: dict, second: dict) -> None:
    with pytest.raises(RequestError, match="'x'"):
        merge(first, second)


def test_statistics_live_with_the_session() -> None:
    log = SessionLog(":memory:", lambda: 0.0)
    session = log.create(A, "fp").session
    assert log.stats.get(A, session) == {}
    log.stats.put(A, session, "ngram", {"k": [1, 2]})
    assert log.stats.add(A, session, "ngram", {"k": [1]}) == {"k": [2, 2]}
    log.stats.add_all(A, session, {"suffix": {"0": turn(3, 1)}, "rest": {"0": turn(1, 1)}})
    kept = {
        "ngram": {"k": [2, 2]},
        "rest": {"0": turn(1, 1)},
        "suffix": {"0": {**turn(3, 1), "drafted": [1, 1], "accepted": [1, 0]}},
    }
    assert log.stats.get(A, session) == kept
    (fork,) = log.fork(A, session)
    log.stats.put(A, session, "ngram", {"k": 0.5})
    assert log.stats.get(A, fork.session) == kept
    log.delete(A, session)
    with pytest.raises(SessionNotFound):
        log.stats.get(A, session)
    assert log.stats.get(A, fork.session) == kept


OLD = {
    "drafted": [10, 10, 10],
    "accepted": [8, 3, 1],
    "tries": {"accepted": 12, "rejected": 9},
    "turns": {"num_turns": 1, "accepted": 12, "rejected": 9, "squares": 144 / 21},
}


def test_of_rows_that_told_of_every_draft_at_every_position_the_first_is_true() -> None:
    log = SessionLog(":memory:", lambda: 0.0)
    session = log.create(A, "fp").session
    log.stats.put(A, session, "ngram", {"0": OLD, "note": 1})
    read = log.stats.get(A, session)["ngram"]
    assert read["note"] == 1
    assert (read["0"]["drafted"], read["0"]["accepted"]) == ([10], [8])
    assert read["0"]["tries"] == OLD["tries"]
    total = log.stats.add(A, session, "ngram", {"0": turn(3, 2)})["0"]
    assert (total["num_drafts"], total["drafted"], total["accepted"]) == (11, [11, 1, 1], [9, 1, 0])
    assert total["turns"]["num_turns"] == 2
    assert log.stats.get(A, session)["ngram"]["0"] == total, "what is new is not cut again"


def test_several_drafters_are_told_of_together_or_not_at_all() -> None:
    log = SessionLog(":memory:", lambda: 0.0)
    session = log.create(A, "fp").session
    with pytest.raises(RequestError):
        log.stats.add_all(A, session, {"ngram": turn(1, 1), "suffix": {"x": object()}})
    assert log.stats.get(A, session) == {}
