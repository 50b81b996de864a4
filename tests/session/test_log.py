"""SessionLog: what a session's text is after appends, forks, rewinds, deletions and expiry."""

import re
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

from outrider.errors import QuotaExceeded, RequestError, SessionConflict, SessionNotFound
from outrider.session.log import SessionLog
from outrider.session.records import Quota, Usage

A, B = "acme", "bell"


class Clock:
    """Time that stands until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock) -> SessionLog:
    return SessionLog(":memory:", clock)


def text(log: SessionLog, session: str, tenant: str = A) -> list[int]:
    return log.tokens(tenant, log.get(tenant, session).head).tolist()


def test_an_append_continues_the_text_and_leaves_earlier_heads_alone(log: SessionLog) -> None:
    first = log.create(A, "fp", [1, 2])
    second = log.append(A, first.session, [3])
    assert log.tokens(A, second) == array("i", [1, 2, 3])
    assert log.tokens(A, first.id) == array("i", [1, 2])
    assert (first.num_tokens, second.num_tokens) == (2, 3)
    assert log.heads(A, first.session) == (first, second)
    assert second.seq > first.seq


def test_a_session_may_begin_empty_and_an_append_may_add_nothing(log: SessionLog) -> None:
    empty = log.create(A, "fp")
    assert log.tokens(A, empty) == array("i")
    still = log.append(A, empty.session, response_id="r")
    assert (still.num_tokens, still.response_id) == (0, "r")
    assert text(log, log.append(A, empty.session, [5]).session) == [5]


def test_what_is_stored_with_a_session_comes_back(log: SessionLog) -> None:
    head = log.create(A, "fp", [1], {"speculation": {"policy": "auto"}}, 60.0, conversation="chat")
    session = log.get(A, head.session)
    assert (session.tenant, session.fingerprint, session.head) == (A, "fp", head)
    assert session.settings == {"speculation": {"policy": "auto"}}
    assert (session.created, session.expires_at) == (1000.0, 1060.0)
    assert log.of_conversation(A, "chat") == session
    changed = log.update(A, head.session, settings={"k": 2}, fingerprint="fp2")
    assert (changed.settings, changed.fingerprint) == ({"k": 2}, "fp2")
    assert log.update(A, head.session).settings == {"k": 2}


@pytest.mark.parametrize(
    ("at", "expected"),
    [(None, [1, 2, 3, 4, 5]), (5, [1, 2, 3, 4, 5]), (4, [1, 2, 3, 4]), (3, [1, 2, 3]), (0, [])],
)
def test_a_fork_shares_the_text_and_then_goes_its_own_way(
    log: SessionLog, at: int | None, expected: list[int]
) -> None:
    parent = log.append(A, log.create(A, "fp", [1, 2, 3], {"k": 1}, 9.0).session, [4, 5])
    one, two = log.fork(A, parent.session, at, n=2)
    assert len({one.session, two.session, parent.session}) == 3
    log.append(A, one.session, [8])
    log.append(A, two.session, [9])
    log.append(A, parent.session, [7])
    assert text(log, one.session) == [*expected, 8]
    assert text(log, two.session) == [*expected, 9]
    assert text(log, parent.session) == [1, 2, 3, 4, 5, 7]
    assert log.get(A, one.session).settings == {"k": 1}
    assert log.get(A, one.session).expires_at == 1009.0
    assert set(log.branches(A, one.session)) == {parent.session, one.session, two.session}


def test_forks_and_rewinds_copy_no_tokens(log: SessionLog) -> None:
    head = log.create(A, "fp", range(100))
    log.fork(A, head.session, 50, n=10)
    log.rewind(A, head.session, 70)
    assert log.usage(A) == Usage(tokens=100, sessions=11, heads=12)


def test_a_fork_of_a_fork_walks_through_all_of_them(log: SessionLog) -> None:
    head = log.create(A, "fp", [0])
    for depth in range(1, 40):
        (fork,) = log.fork(A, head.session)
        head = log.append(A, fork.session, [2 * depth, 2 * depth + 1])
        (fork,) = log.fork(A, fork.session, head.num_tokens - 1)
        head = log.get(A, fork.session).head
    assert log.tokens(A, head).tolist() == [0, *range(2, 79, 2)]


def test_a_rewind_keeps_the_way_back(log: SessionLog) -> None:
    first = log.create(A, "fp", [1, 2])
    later = log.append(A, first.session, [3, 4], response_id="r")
    back = log.rewind(A, first.session, 3)
    assert log.tokens(A, back) == array("i", [1, 2, 3])
    assert log.append(A, first.session, [9]).seq > back.seq > later.seq
    assert text(log, first.session) == [1, 2, 3, 9]
    assert log.head_of_response(A, "r") == later
    log.rewind(A, first.session, later.id)
    assert text(log, first.session) == [1, 2, 3, 4]


def test_a_rewind_with_drop_forgets_all_that_is_not_on_the_way(log: SessionLog) -> None:
    first = log.create(A, "fp", [1, 2])
    later = log.append(A, first.session, [3, 4], response_id="r")
    log.rewind(A, first.session, first.id)
    log.append(A, first.session, [5, 6, 7])
    back = log.rewind(A, first.session, first.id, drop=True)
    assert log.heads(A, first.session)[0] == first
    assert text(log, first.session) == [1, 2]
    assert log.usage(A).tokens == 2
    assert back.seq > later.seq
    for lost in (lambda: log.tokens(A, later), lambda: log.head_of_response(A, "r")):
        with pytest.raises(SessionNotFound):
            lost()


def test_a_drop_frees_nothing_that_a_fork_uses(log: SessionLog) -> None:
    first = log.create(A, "fp", [1, 2])
    later = log.append(A, first.session, [3, 4])
    (fork,) = log.fork(A, first.session, 3)
    log.rewind(A, first.session, 1, drop=True)
    assert log.tokens(A, fork) == array("i", [1, 2, 3])
    assert log.usage(A).tokens == 4, "segments go whole or stay whole"
    log.delete(A, fork.session)
    assert log.usage(A).tokens == 2
    with pytest.raises(SessionNotFound, match=re.escape(later.id)):
        log.tokens(A, later)


def test_deleting_frees_what_no_fork_uses(log: SessionLog) -> None:
    trunk = log.create(A, "fp", [1, 2, 3])
    (fork,) = log.fork(A, trunk.session)
    log.append(A, trunk.session, [4, 5])
    log.append(A, fork.session, [6])
    log.delete(A, trunk.session)
    assert text(log, fork.session) == [1, 2, 3, 6]
    assert log.usage(A) == Usage(tokens=4, sessions=1, heads=2)
    assert log.branches(A, fork.session) == (fork.session,)
    log.delete(A, fork.session)
    assert log.usage(A) == Usage()


def test_a_stale_head_conflicts_and_names_the_present_one(log: SessionLog) -> None:
    first = log.create(A, "fp", [1])
    second = log.append(A, first.session, [2], if_head=first.id)
    with pytest.raises(SessionConflict, match="fork on conflict") as caught:
        log.append(A, first.session, [3], if_head=first.id)
    assert caught.value.head == second.id
    with pytest.raises(SessionConflict):
        log.rewind(A, first.session, 0, if_head=first.id)
    assert text(log, first.session) == [1, 2]


def test_a_stale_head_may_fork_instead(log: SessionLog) -> None:
    first = log.create(A, "fp", [1])
    log.stats.put(A, first.session, "ngram", {"drafted": [4]})
    log.append(A, first.session, [2])
    other = log.append(A, first.session, [3], if_head=first.id, on_conflict="fork", response_id="r")
    assert other.session != first.session
    assert text(log, other.session) == [1, 3]
    assert text(log, first.session) == [1, 2]
    assert log.head_of_response(A, "r") == other
    assert log.stats.get(A, other.session) == {"ngram": {"drafted": [4]}}
    same = log.append(A, other.session, [4], if_head=other.id, on_conflict="fork")
    assert same.session == other.session


def test_an_unknown_head_cannot_be_forked(log: SessionLog) -> None:
    mine = log.create(A, "fp", [1])
    neighbour = log.create(A, "fp", [2])
    for head in ("head_none", neighbour.id):
        with pytest.raises(SessionNotFound):
            log.append(A, mine.session, [3], if_head=head, on_conflict="fork")
        with pytest.raises(SessionNotFound):
            log.fork(A, mine.session, head)
        with pytest.raises(SessionNotFound):
            log.rewind(A, mine.session, head)


def test_a_response_and_a_conversation_have_one_owner(log: SessionLog, clock: Clock) -> None:
    head = log.create(A, "fp", [1], ttl_s=10, conversation="chat", response_id="r")
    with pytest.raises(SessionConflict, match="'r'"):
        log.append(A, head.session, [2], response_id="r")
    with pytest.raises(SessionConflict, match="'chat'") as caught:
        log.create(A, "fp", conversation="chat")
    assert caught.value.head == head.id
    assert text(log, head.session) == [1]
    clock.now += 10
    again = log.create(A, "fp", [3], conversation="chat", response_id="r")
    assert log.of_conversation(A, "chat").id == again.session


def test_tenants_do_not_see_each_other(log: SessionLog) -> None:
    head = log.create(A, "fp", [1], conversation="chat", response_id="r")
    log.turns.begin(A, head.session, [2], response_id="made")
    other = log.create(B, "fp", [9], conversation="chat", response_id="r")
    calls: list[Callable[[], object]] = [
        lambda: log.get(B, head.session),
        lambda: log.tokens(B, head),
        lambda: log.tokens(B, head.id),
        lambda: log.head(B, head.id),
        lambda: log.heads(B, head.session),
        lambda: log.branches(B, head.session),
        lambda: log.append(B, head.session, [1]),
        lambda: log.append(B, other.session, [1], if_head=head.id, on_conflict="fork"),
        lambda: log.fork(B, head.session),
        lambda: log.fork(B, other.session, head.id),
        lambda: log.rewind(B, head.session, 0),
        lambda: log.rewind(B, other.session, head.id),
        lambda: log.update(B, head.session, settings={}),
        lambda: log.delete(B, head.session),
        lambda: log.stats.get(B, head.session),
        lambda: log.stats.put(B, head.session, "ngram", {}),
        lambda: log.stats.add(B, head.session, "ngram", {}),
        lambda: log.turns.begin(B, head.session, response_id="r2"),
        lambda: log.turns.get(B, "made"),
        lambda: log.turns.commit(B, "made"),
        lambda: log.turns.abort(B, "made"),
    ]
    for call in calls:
        with pytest.raises(SessionNotFound):
            call()
    assert log.of_conversation(B, "chat").id == log.head_of_response(B, "r").session
    assert log.of_conversation(B, "chat").id == other.session
    assert [session.id for session in log.list(B).sessions] == [other.session]
    assert log.usage(B) == Usage(tokens=1, sessions=1, heads=1)
    assert text(log, head.session) == [1]


def test_the_same_call_reads_the_same_for_a_foreign_and_a_missing_session(log: SessionLog) -> None:
    foreign = log.create(A, "fp").session
    messages = []
    for session in (foreign, "sess_missing"):
        with pytest.raises(SessionNotFound) as caught:
            log.get(B, session)
        messages.append(str(caught.value).replace(session, "?"))
    assert messages[0] == messages[1]


def test_ids_are_long_and_never_repeat(log: SessionLog) -> None:
    heads = [log.create(A, "fp") for _ in range(200)]
    ids = {name for head in heads for name in (head.id, head.session)}
    assert len(ids) == 400
    assert all(re.fullmatch(r"(sess|head)_[\w-]{24}", name) for name in ids), "144 random bits"


def test_a_session_expires_and_is_not_there_before_it_is_swept(
    log: SessionLog, clock: Clock
) -> None:
    short = log.create(A, "fp", [1, 2], ttl_s=10, response_id="r")
    kept = log.create(A, "fp", [3])
    clock.now += 9.9
    log.append(A, short.session, [4])  # its time begins anew
    clock.now += 9.9
    assert text(log, short.session) == [1, 2, 4]
    clock.now += 0.1
    for call in (
        lambda: log.get(A, short.session),
        lambda: log.tokens(A, short),
        lambda: log.head_of_response(A, "r"),
        lambda: log.append(A, short.session),
    ):
        with pytest.raises(SessionNotFound):
            call()
    assert [session.id for session in log.list(A).sessions] == [kept.session]
    assert log.usage(A).sessions == 2
    assert log.expire(clock.now) == (short.session,)
    assert log.expire(clock.now) == ()
    assert log.usage(A) == Usage(tokens=1, sessions=1, heads=1)


def test_expiry_frees_nothing_that_a_living_fork_uses(log: SessionLog, clock: Clock) -> None:
    parent = log.create(A, "fp", [1, 2, 3], ttl_s=10)
    clock.now += 5
    (fork,) = log.fork(A, parent.session, 2)
    clock.now += 6
    log.append(A, fork.session, [7])
    clock.now += 5
    assert log.expire(clock.now) == (parent.session,)
    assert text(log, fork.session) == [1, 2, 7]


@pytest.mark.parametrize(
    ("quota", "call", "match"),
    [
        (
            Quota(tokens=5),
            lambda log, s: log.append(A, s, [4, 5, 6]),
            "6 tokens .* limit of 5 .*: delete sessions",
        ),
        (
            Quota(sessions=3),
            lambda log, s: log.fork(A, s, n=3),
            "4 sessions .* limit of 3 .*: delete sessions",
        ),
        (
            Quota(heads=4),
            lambda log, s: log.fork(A, s, n=3),
            "5 heads .* limit of 4 .*: .* rewind with drop",
        ),
    ],
)
def test_over_the_quota_nothing_is_kept(
    clock: Clock, quota: Quota, call: Callable[[SessionLog, str], object], match: str
) -> None:
    log = SessionLog(":memory:", clock, quota=quota)
    head = log.append(A, log.create(A, "fp", [1, 2]).session, [3])
    before = log.usage(A)
    with pytest.raises(QuotaExceeded, match=match):
        call(log, head.session)
    assert log.usage(A) == before
    assert log.tokens(A, head) == array("i", [1, 2, 3])
    log.create(B, "fp", [1, 2, 3])  # another tenant has a quota of its own


def test_a_drop_is_allowed_where_the_quota_is_full(clock: Clock) -> None:
    log = SessionLog(":memory:", clock, quota=Quota(heads=3))
    head = log.create(A, "fp", [1])
    for token in (2, 3):
        log.append(A, head.session, [token])
    with pytest.raises(QuotaExceeded):
        log.rewind(A, head.session, 1)
    log.rewind(A, head.session, 1, drop=True)
    assert log.usage(A) == Usage(tokens=1, sessions=1, heads=2)
    log.append(A, head.session, [4])


def test_what_has_expired_does_not_count_for_the_quota(clock: Clock) -> None:
    log = SessionLog(":memory:", clock, quota=Quota(tokens=5))
    log.create(A, "fp", [1, 2, 3], ttl_s=1)
    with pytest.raises(QuotaExceeded):
        log.create(A, "fp", [1, 2, 3])
    clock.now += 1
    log.create(A, "fp", [1, 2, 3])
    with pytest.raises(QuotaExceeded, match="6 tokens"):
        log.create(A, "fp", [1, 2, 3])
    assert len(log.expire(clock.now)) == 1, "who lets it go does so"
    assert log.usage(A) == Usage(tokens=3, sessions=1, heads=1)


def test_a_list_comes_in_pages_newest_first(log: SessionLog, clock: Clock) -> None:
    made = []
    for index in range(7):
        clock.now += index % 2  # pairs of the same age
        made.append(log.create(A, "fp").session)
    log.create(B, "fp")
    seen: list[str] = []
    page = log.list(A, limit=3)
    while page.after:
        seen += [session.id for session in page.sessions]
        log.delete(A, seen[-1])  # the place in the list outlives its session
        page = log.list(A, limit=3, after=page.after)
    seen += [session.id for session in page.sessions]
    ages = [made.index(session) for session in seen]
    assert sorted(ages) == list(range(7))
    assert [(age + 1) // 2 for age in ages] == sorted(
        ((age + 1) // 2 for age in ages), reverse=True
    )
    assert log.list("nobody") == ((), None)


@pytest.mark.parametrize(
    "call",
    [
        lambda log, s: log.append(A, s, [2**31]),
        lambda log, s: log.append(A, s, [-1]),
        lambda log, s: log.append(A, s, ["x"]),
        lambda log, s: log.append(A, s, [1], if_head="x", on_conflict="merge"),
        lambda log, s: log.fork(A, s, 3),
        lambda log, s: log.fork(A, s, -1),
        lambda log, s: log.fork(A, s, n=0),
        lambda log, s: log.fork(A, s, n=2**70),
        lambda log, s: log.rewind(A, s, 2**70),
        lambda log, s: log.list(A, limit=0),
        lambda log, s: log.list(A, limit=2**70),
        lambda log, s: log.list(A, after="nonsense"),
        lambda log, s: log.create(A, "fp", ttl_s=0),
        lambda log, s: log.create(A, "fp", ttl_s=float("nan")),
        lambda log, s: log.create(A, "fp", ttl_s=float("inf")),
        lambda log, s: log.create(A, "fp", settings={"x": object()}),
        lambda log, s: log.create(A, "fp", settings={"x": float("nan")}),
        lambda log, s: log.create(A, "fp", conversation="\ud800"),
        lambda log, s: log.get(A, "\udfff"),
        lambda log, s: log.turns.begin(A, s, response_id="r", request={"x": {1}}),
    ],
)
def test_what_cannot_be_stored_is_refused_and_changes_nothing(
    log: SessionLog, call: Callable[[SessionLog, str], object]
) -> None:
    head = log.create(A, "fp", [1, 2])
    with pytest.raises(RequestError):
        call(log, head.session)
    assert log.usage(A) == Usage(tokens=2, sessions=1, heads=1)
    assert text(log, head.session) == [1, 2]


def test_names_are_data(log: SessionLog) -> None:
    for name in ("'; DROP TABLE session; --", "a\0b", "", "ü" * 500):
        head = log.create(name, name, [1], {name: name}, conversation=name, response_id=name)
        assert log.head_of_response(name, name) == head
        assert log.of_conversation(name, name).settings == {name: name}


def test_142k_tokens_cost_0_57_mb(tmp_path: Path, clock: Clock) -> None:
    """A long agent session: 43 turns, four bytes per token and little else."""
    sizes = []
    for num_turns in (0, 43):
        path = tmp_path / f"{num_turns}.db"
        with SessionLog(path, clock) as log:
            session = log.create(A, "fp").session
            for turn in range(num_turns):
                log.append(A, session, range(turn * 3302, (turn + 1) * 3302))
        sizes.append(path.stat().st_size)
    assert 43 * 3302 * 4 <= sizes[1] - sizes[0] < 0.6e6


def test_a_note_holds_where_its_tokens_are(log: SessionLog) -> None:
    head = log.append(A, log.create(A, "fp", [1]).session, [2, 3], note={"told": 1})
    log.turns.begin(A, head.session, [4, 5], response_id="r")
    answer = log.turns.commit(A, "r", [6, 7], note={"told": 2})
    assert log.notes(A, answer) == [{"told": 1}, {"told": 2}]
    places = [(7, [1, 2]), (6, [1, 2]), (5, [1, 2]), (4, [1]), (3, [1]), (2, []), (0, [])]
    for at, told in places:
        (fork,) = log.fork(A, head.session, at)
        assert [note["told"] for note in log.notes(A, fork)] == told, at
    log.turns.begin(A, head.session, [8], response_id="broken")
    log.turns.abort(A, "broken")
    assert len(log.notes(A, log.get(A, head.session).head)) == 2
    for session in log.list(A).sessions:
        log.delete(A, session.id)
    (count,) = log._database._connection.execute("SELECT count(*) FROM note").fetchone()
    assert count == 0


def test_a_session_in_which_a_response_is_made_does_not_expire(
    log: SessionLog, clock: Clock
) -> None:
    head = log.create(A, "fp", [1], ttl_s=10)
    log.turns.begin(A, head.session, [2], response_id="r")
    clock.now += 11
    assert log.expired(clock.now) == log.expire(clock.now) == ()
    log.turns.commit(A, "r", [3])
    assert log.get(A, head.session).expires_at == clock.now + 10
    log.turns.begin(A, head.session, [2], response_id="r2")
    clock.now += 11
    log.turns.abort(A, "r2")
    assert log.expire(clock.now) == (head.session,)


def test_a_fork_may_be_changed(log: SessionLog) -> None:
    head = log.create(A, "fp", [1], {"k": 1, "gone": True}, 60.0, conversation="chat")
    (fork,) = log.fork(
        A, head.session, changes={"k": 2, "gone": None}, ttl_s=5.0, conversation="other"
    )
    found = log.get(A, fork.session)
    assert (found.settings, found.ttl_s, found.conversation) == ({"k": 2}, 5.0, "other")
    with pytest.raises(SessionConflict, match="'other'"):
        log.fork(A, head.session, conversation="other")
    with pytest.raises(SessionConflict):
        log.fork(A, head.session, if_head="head_of_nothing")


def test_the_response_in_a_place(log: SessionLog) -> None:
    first = log.create(A, "fp", [1, 2], response_id="r")
    log.append(A, first.session, [3])
    back = log.rewind(A, first.session, first.id)
    (fork,) = log.fork(A, first.session)
    assert {log.response_at(A, head) for head in (first, back, fork)} == {"r"}
    assert log.response_at(A, log.rewind(A, first.session, 1)) is None
