"""Turns: durable while they are made, and all or nothing for the session."""

from array import array
from pathlib import Path

import pytest

from outrider.errors import QuotaExceeded, SessionConflict, SessionNotFound
from outrider.session.log import SessionLog
from outrider.session.records import Quota, Turn, Usage

A = "acme"


@pytest.fixture
def log() -> SessionLog:
    return SessionLog(":memory:", lambda: 0.0, quota=Quota(tokens=10))


def test_a_turn_is_no_part_of_the_session_before_it_is_committed(log: SessionLog) -> None:
    first = log.create(A, "fp", [1])
    turn = log.turns.begin(A, first.session, [2], response_id="r", request={"seed": 7})
    assert turn == Turn(A, "r", first.session, first.id, {"seed": 7}, array("i", [2]))
    assert log.get(A, first.session).head == first
    assert log.turns.get(A, "r").tokens == array("i", [2])
    head = log.turns.commit(A, "r", [3, 256, 5])
    assert log.tokens(A, head) == array("i", [1, 2, 3, 256, 5])
    assert log.head_of_response(A, "r") == head
    assert log.usage(A) == Usage(tokens=5, sessions=1, heads=2)
    with pytest.raises(SessionNotFound):
        log.turns.get(A, "r")


def test_an_aborted_turn_leaves_nothing(log: SessionLog) -> None:
    first = log.create(A, "fp", [1])
    before = log.usage(A)
    log.turns.begin(A, first.session, [2], response_id="r")
    log.turns.abort(A, "r")
    assert log.get(A, first.session).head == first
    assert log.usage(A) == before
    assert log.turns.unfinished() == ()
    log.turns.begin(A, first.session, [2], response_id="r")  # the name is free again


def test_the_first_to_commit_wins_and_the_other_may_fork(log: SessionLog) -> None:
    first = log.create(A, "fp", [1])
    for name, token in (("fast", 2), ("slow", 3)):
        log.turns.begin(A, first.session, [token], response_id=name)
    fast = log.turns.commit(A, "fast")
    with pytest.raises(SessionConflict) as caught:
        log.turns.commit(A, "slow")
    assert caught.value.head == fast.id
    slow = log.turns.commit(A, "slow", on_conflict="fork")
    assert slow.session != fast.session
    assert log.tokens(A, slow) == array("i", [1, 3])
    assert log.tokens(A, fast) == array("i", [1, 2])


def test_a_turn_on_a_stale_head_conflicts_or_forks_at_once(log: SessionLog) -> None:
    first = log.create(A, "fp", [1])
    log.append(A, first.session, [2])
    with pytest.raises(SessionConflict):
        log.turns.begin(A, first.session, [3], response_id="r", if_head=first.id)
    assert log.turns.unfinished() == ()
    turn = log.turns.begin(
        A, first.session, [3], response_id="r", if_head=first.id, on_conflict="fork"
    )
    assert turn.session != first.session
    assert log.tokens(A, log.turns.commit(A, "r")) == array("i", [1, 3])


def test_a_response_is_made_once(log: SessionLog) -> None:
    first = log.create(A, "fp", [1], response_id="done")
    log.turns.begin(A, first.session, response_id="made")
    for name in ("done", "made"):
        with pytest.raises(SessionConflict, match=name):
            log.turns.begin(A, first.session, response_id=name)


def test_the_quota_counts_a_turn_once(log: SessionLog) -> None:
    first = log.create(A, "fp", [1, 2])
    log.turns.begin(A, first.session, [3, 4, 5, 6], response_id="r")
    with pytest.raises(QuotaExceeded):
        log.append(A, first.session, range(5))
    with pytest.raises(QuotaExceeded):
        log.turns.commit(A, "r", range(5))
    assert log.turns.get(A, "r").tokens == array("i", [3, 4, 5, 6])
    log.turns.commit(A, "r", range(4))
    assert log.usage(A).tokens == 10


def test_a_turn_goes_with_its_session(log: SessionLog) -> None:
    first = log.create(A, "fp", [1])
    log.turns.begin(A, first.session, [2], response_id="r")
    log.delete(A, first.session)
    assert log.turns.unfinished() == ()
    assert log.usage(A) == Usage()
    with pytest.raises(SessionNotFound):
        log.turns.commit(A, "r")


def test_unfinished_turns_are_found_after_a_restart(tmp_path: Path) -> None:
    with SessionLog(tmp_path / "log.db", lambda: 0.0) as log:
        first = log.create(A, "fp", [1])
        log.turns.begin(A, first.session, [2], response_id="r", request={"seed": 7})
    with SessionLog(tmp_path / "log.db", lambda: 0.0) as log:
        (turn,) = log.turns.unfinished()
        assert turn == Turn(A, "r", first.session, first.id, {"seed": 7}, array("i", [2]))
        assert log.tokens(A, log.turns.commit(A, "r", [3, 4])) == array("i", [1, 2, 3, 4])
