"""SessionLog: the durable tree of tokens that a session is, with its forks, heads and owners."""

import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from outrider.errors import RequestError, SessionConflict, SessionNotFound
from outrider.request import MAX_N
from outrider.session import segments
from outrider.session.database import Database
from outrider.session.ledger import (
    NO_CHANGES,
    Ledger,
    OnConflict,
    expired,
    remove,
    remove_expired,
    to_json,
)
from outrider.session.records import Head, Page, Quota, Session, Usage
from outrider.session.segments import EMPTY, pack
from outrider.session.statistics import StatsTable
from outrider.session.turns import Turns
from outrider.session.ways import Way, ways_of

MAX_PAGE = 1000
NO_SETTINGS: Mapping[str, Any] = {}


class SessionLog:
    """What each session's text is, in token ids; all else that a session has is rebuilt from it.

    A log is a tree of segments that never change. A head is a place in the tree; an append adds a
    segment and a head, a fork or a rewind a head alone. Every call is one transaction: once it has
    returned, what it did survives a crash, and if it raises, nothing of it was done. Calls may
    come from any thread, one at a time goes on; other processes may have the file open too.

    Sessions belong to tenants. To one tenant those of another do not exist: each call that
    names a session, a head or a response begins with the tenant and finds only its own.

    Args:
        path: the file, made if it is not there; `":memory:"` lives until `close`.
        clock: seconds, for times to live.
        quota: most that each tenant may store.
        busy_timeout_s: how long to wait for another process.

    Attributes:
        turns: responses in the making, durable before they are committed.
        stats: acceptance statistics per session and drafter.

    Raises:
        SessionStorageError: from any call: the file cannot be read or written.
    """

    def __init__(
        self,
        path: Path | str,
        clock: Callable[[], float],
        *,
        quota: Quota = Quota(),
        busy_timeout_s: float = 5.0,
    ) -> None:
        self.quota = quota
        self._clock = clock
        self._database = Database(path, busy_timeout_s)
        self.turns = Turns(self._database, self._writes, self._reads)
        self.stats = StatsTable(self._writes, self._reads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Later calls raise SessionStorageError."""
        self._database.close()

    def create(
        self,
        tenant: str,
        fingerprint: str,
        tokens: Sequence[int] = (),
        settings: Mapping[str, Any] = NO_SETTINGS,
        ttl_s: float | None = None,
        *,
        conversation: str | None = None,
        response_id: str | None = None,
    ) -> Head:
        """A new session.

        Args:
            fingerprint: of the model whose tokens these are.
            settings: JSON to keep with it.
            ttl_s: how long it is kept after the last change; None until it is deleted.
            conversation: a name of the client's own, found again by `of_conversation`.

        Raises:
            QuotaExceeded, SessionConflict: the conversation or the response is there already.
            RequestError: a value that cannot be stored.
        """
        packed, stored = pack(tokens), to_json("settings", settings)
        with self._writes(tenant) as ledger:
            self._check_conversation(ledger, conversation)
            session = ledger.create(fingerprint, stored, ttl_s, conversation=conversation)
            return ledger.append(session, EMPTY, packed, response_id)

    def append(
        self,
        tenant: str,
        session: str,
        tokens: Sequence[int] = (),
        *,
        if_head: str | None = None,
        on_conflict: OnConflict = "error",
        response_id: str | None = None,
        note: Mapping[str, Any] | None = None,
    ) -> Head:
        """Tokens behind the session's head, and a new head.

        Args:
            if_head: the head that the tokens follow; None is whatever the session is at.
            on_conflict: if the session is at another head: `"error"`, or `"fork"` to make a new
                session that goes on from `if_head`; the result then names that one.
            note: JSON that holds of every log with these tokens; `notes` finds it.

        Raises:
            SessionNotFound, SessionConflict, QuotaExceeded, RequestError.
        """
        packed, stored = pack(tokens), to_json("note", note or {})
        with self._writes(tenant) as ledger:
            found = ledger.session(session)
            target, place = ledger.writable(found, if_head, on_conflict)
            ledger.touch(found)
            head = ledger.append(target, place, packed, response_id)
            if note:
                segments.put_note(ledger.db, ledger.place(head), stored)
            return head

    def fork(
        self,
        tenant: str,
        session: str,
        at: str | int | None = None,
        n: int = 1,
        *,
        if_head: str | None = None,
        changes: Mapping[str, Any] = NO_CHANGES,
        ttl_s: float | None = None,
        conversation: str | None = None,
    ) -> tuple[Head, ...]:
        """`n` sessions that share this one's tokens up to a place, and copies of its statistics.

        Args:
            at: a head's id, or a number of tokens; None is the session's head.
            if_head: the head that the session must be at.
            changes: settings in place of those that are copied; None takes one away.
            ttl_s: None is that of the session.
            conversation: the client's own name for the fork, which must be one.

        Raises:
            SessionNotFound, SessionConflict, QuotaExceeded, RequestError: no such place, or `n`
                outside [1, 1024].
        """
        _check_range("n", n, MAX_N)
        with self._writes(tenant) as ledger:
            found = ledger.session(session)
            ledger.writable(found, if_head, "error")
            self._check_conversation(ledger, conversation)
            place = ledger.resolve(found, at, "at")
            ledger.touch(found)
            forks = (ledger.fork(found, place, changes, ttl_s, conversation) for _ in range(n))
            return tuple(forks)

    def rewind(
        self,
        tenant: str,
        session: str,
        to: str | int,
        drop: bool = False,
        *,
        if_head: str | None = None,
    ) -> Head:
        """A new head at an earlier place, or at any other head of the session.

        Args:
            to: a head's id, or a number of tokens.
            drop: forget what is not on the way there: those heads and responses are gone, and
                so are tokens that no fork uses.

        Raises:
            SessionNotFound, SessionConflict, QuotaExceeded, RequestError.
        """
        with self._writes(tenant) as ledger:
            found = ledger.session(session)
            ledger.writable(found, if_head, "error")
            place = ledger.resolve(found, to, "to")
            ledger.touch(found)
            head = ledger.add_head(session, place)
            if drop:
                ledger.drop(found, place)
            return head

    def tokens(self, tenant: str, head: Head | str) -> "array[int]":
        """All tokens up to a head."""
        with self._reads(tenant) as ledger:
            found = ledger.head(head if isinstance(head, str) else head.id)
            return segments.read(ledger.db, ledger.place(found))

    def notes(self, tenant: str, head: Head | str) -> list[dict[str, Any]]:
        """What was noted on the way to a head, in that order."""
        with self._reads(tenant) as ledger:
            found = ledger.head(head if isinstance(head, str) else head.id)
            return [json.loads(note) for note in segments.notes(ledger.db, ledger.place(found))]

    def ways(self, tenant: str, session: str, keep: str | int | None = None) -> tuple[Way, ...]:
        """The logs of a session that none of its others begins with, one that expired too.

        Args:
            keep: a place in it that counts as another session's.
        """
        with self._reads(tenant) as ledger:
            kept = None if keep is None else ledger.resolve(ledger.session(session), keep, "to")
            return ways_of(ledger, session, kept)

    def get(self, tenant: str, session: str) -> Session:
        with self._reads(tenant) as ledger:
            return ledger.session(session)

    def head(self, tenant: str, head: str, name: str = "head") -> Head:
        """The head of that id; SessionNotFound says what the caller calls it."""
        with self._reads(tenant) as ledger:
            return ledger.head(head, name=name)

    def heads(self, tenant: str, session: str) -> tuple[Head, ...]:
        """All heads of a session, the oldest first; it is at the last."""
        with self._reads(tenant) as ledger:
            ledger.session(session)
            return ledger.heads("AND head.session = :id ORDER BY seq", id=session)

    def head_of_response(self, tenant: str, response_id: str) -> Head:
        """Where a response ended, for whoever goes on from it."""
        with self._reads(tenant) as ledger:
            found = ledger.heads("AND response_id = :id", id=response_id)
            if not found:
                raise SessionNotFound(f"no response {response_id!r}: it was not stored, or is gone")
            return found[0]

    def response_at(self, tenant: str, head: Head) -> str | None:
        """The response that ends in the place of a head, whose head and session may be others."""
        with self._reads(tenant) as ledger:
            segment, stop = ledger.place(ledger.head(head.id))
            ends = "AND segment = :segment AND stop = :stop AND response_id IS NOT NULL"
            found = ledger.heads(ends, segment=segment, stop=stop)
            return found[0].response_id if found else None

    def of_conversation(self, tenant: str, conversation: str) -> Session:
        """The session that the client named so."""
        with self._reads(tenant) as ledger:
            found = ledger.sessions("AND conversation = :name", name=conversation)
            if not found:
                raise SessionNotFound(f"no conversation {conversation!r}: create a session for it")
            return found[0]

    def branches(self, tenant: str, session: str) -> tuple[str, ...]:
        """Sessions that come from the same one by forks, this one among them, by age."""
        with self._reads(tenant) as ledger:
            root = ledger.session(session).root
            found = ledger.sessions("AND root = :root ORDER BY created, session.id", root=root)
            return tuple(each.id for each in found)

    def list(
        self, tenant: str, limit: int = 20, after: str | None = None, *, without: str = ""
    ) -> Page:
        """The tenant's sessions, newest first.

        Args:
            limit: most of them in one page, in [1, 1000].
            after: `after` of the page before.
            without: name of a setting; sessions in which it is true are left out.
        """
        _check_range("limit", limit, MAX_PAGE)
        created, session = _cursor(after)
        condition = """AND (created, session.id) < (:created, :session)
            AND json_extract(settings, :path) IS NOT 1
            ORDER BY created DESC, session.id DESC LIMIT :limit"""
        values = {"created": created, "session": session, "limit": limit + 1}
        with self._reads(tenant) as ledger:
            found = ledger.sessions(condition, path=f'$."{without}"', **values)
        page = found[:limit]
        is_last = len(found) == len(page)
        return Page(page, None if is_last else f"{page[-1].created!r}~{page[-1].id}")

    def update(
        self,
        tenant: str,
        session: str,
        *,
        settings: Mapping[str, Any] | None = None,
        fingerprint: str | None = None,
    ) -> Session:
        """Replaces what is given; its time to live begins anew in any case."""
        stored = None if settings is None else to_json("settings", settings)
        statement = """UPDATE session SET settings = coalesce(?, settings),
            fingerprint = coalesce(?, fingerprint) WHERE id = ?"""
        with self._writes(tenant) as ledger:
            ledger.touch(ledger.session(session))
            ledger.db.execute(statement, (stored, fingerprint, session))
            return ledger.session(session)

    def delete(self, tenant: str, session: str) -> None:
        """The session, its heads, responses and statistics, and tokens that no fork uses."""
        with self._writes(tenant) as ledger:
            ledger.session(session)
            remove(ledger.db, session)

    def expired(self, now: float) -> tuple[tuple[str, str], ...]:
        """(tenant, session) of those of all tenants whose time is over, and that are still there.

        One in which a response is being made waits until that has ended.
        """
        with self._database.read() as db:
            return expired(db, now)

    def expire(self, now: float) -> tuple[str, ...]:
        """Deletes the sessions of all tenants whose time is over; returns their ids."""
        with self._database.write() as db:
            expired = remove_expired(db, now)
        if expired:
            self._database.shrink()
        return expired

    def usage(self, tenant: str) -> Usage:
        """What the tenant stores, as the quota counts it."""
        with self._reads(tenant) as ledger:
            return ledger.usage()

    @contextmanager
    def _writes(self, tenant: str) -> Iterator[Ledger]:
        with self._database.write() as db:
            ledger = Ledger(db, tenant, self._clock(), self.quota)
            before = ledger.usage()
            yield ledger
            ledger.check_quota(before)

    @contextmanager
    def _reads(self, tenant: str) -> Iterator[Ledger]:
        with self._database.read() as db:
            yield Ledger(db, tenant, self._clock(), self.quota)

    def _check_conversation(self, ledger: Ledger, conversation: str | None) -> None:
        if conversation is None:
            return
        ledger.free_conversation(conversation)
        if found := ledger.sessions("AND conversation = :name", name=conversation):
            raise SessionConflict(
                f"conversation {conversation!r} is session {found[0].id!r}: append to it",
                head=found[0].head.id,
            )


def _cursor(after: str | None) -> tuple[float, str]:
    if after is None:
        return float("inf"), ""
    created, _, session = after.partition("~")
    try:
        return float(created), session
    except ValueError as error:
        raise RequestError(f"after={after!r}: send `after` of the page before") from error


def _check_range(name: str, value: int, high: int) -> None:
    if not 1 <= value <= high:
        raise RequestError(f"{name}={value}: must be in [1, {high}]")
