"""Statistics: they add up in any order, live with the session, and are copied by forks."""

from functools import reduce

import pytest
from hypothesis import given, strategies as st

from outrider.errors import RequestError, SessionNotFound
from outrider.session.log import SessionLog
from outrider.session.statistics import acceptance, bucket_of, merge

A = "acme"
drafts = st.builds(
    lambda temperature, drafted, rejected: (temperature, drafted, max(0, drafted - rejected)),
    st.sampled_from([0.0, 0.3, 0.7, 1.0, 2.0]),
    st.integers(0, 5),
    st.integers(0, 5),
)


@given(st.lists(drafts, max_size=20), st.randoms(use_true_random=False))
def test_a_sum_of_counts_is_the_histogram_in_any_order(
    seen: list[tuple[float, int, int]], random: object
) -> None:
    counts = [acceptance(*draft) for draft in seen]
    total = reduce(merge, counts, {})
    for bucket in {bucket_of(temperature) for temperature, _, _ in seen}:
        here = [draft for draft in seen if bucket_of(draft[0]) == bucket]
        for position in range(max(drafted for _, drafted, _ in here)):
            drafted = sum(draft[1] > position for draft in here)
            accepted = sum(draft[2] > position for draft in here)
            assert total[bucket]["drafted"][position] == drafted
            assert total[bucket]["accepted"][position] == accepted
    shuffled = counts.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    half = len(shuffled) // 2
    halves = [reduce(merge, part, {}) for part in (shuffled[:half], shuffled[half:])]
    assert merge(*halves) == total


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
    log.stats.add(A, session, "suffix", acceptance(0.0, 2, 1))
    kept = {"ngram": {"k": [2, 2]}, "suffix": {"0": {"drafted": [1, 1], "accepted": [1, 0]}}}
    assert log.stats.get(A, session) == kept
    (fork,) = log.fork(A, session)
    log.stats.put(A, session, "ngram", {"k": 0.5})
    assert log.stats.get(A, fork.session) == kept
    log.delete(A, session)
    with pytest.raises(SessionNotFound):
        log.stats.get(A, session)
    assert log.stats.get(A, fork.session) == kept
