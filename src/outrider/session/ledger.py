"""Ledger: one tenant's sessions and heads, as rows, within one transaction."""

import json
import math
import secrets
import sqlite3
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from outrider.errors import QuotaExceeded, RequestError, SessionConflict, SessionNotFound
from outrider.session import segments
from outrider.session.records import Head, Quota, Session, Usage
from outrider.session.segments import Place

OnConflict: TypeAlias = Literal["error", "fork"]
ID_BYTES = 18
NO_CHANGES: Mapping[str, Any] = {}

# A session in which a response is being made does not expire.
LIVING = """(expires_at IS NULL OR expires_at > :now
    OR EXISTS (SELECT 1 FROM turn WHERE turn.session = session.id))"""
SESSION = f"""
SELECT session.id, session.tenant, root, conversation, fingerprint, created, ttl_s, expires_at,
    settings, head.id, head.session, head.stop, head.seq, head.response_id
FROM session JOIN head ON head.session = session.id
    AND head.seq = (SELECT max(seq) FROM head AS last WHERE last.session = session.id)
WHERE session.tenant = :tenant AND {LIVING}
"""
HEAD = f"""
SELECT head.id, head.session, stop, seq, response_id
FROM head JOIN session ON session.id = head.session
WHERE head.tenant = :tenant AND {LIVING}
"""
REMEDIES = {
    "tokens": "delete sessions, or let old ones expire",
    "sessions": "delete sessions, or let old ones expire",
    "heads": "delete sessions, or rewind with drop",
}


class Ledger:
    """Every query names the tenant, and a session that has expired at `now` is not there."""

    def __init__(self, db: sqlite3.Connection, tenant: str, now: float, quota: Quota) -> None:
        self.db = db
        self.tenant = tenant
        self.now = now
        self.quota = quota

    def session(self, session: str) -> Session:
        found = self.sessions("AND session.id = :id", id=session)
        if not found:
            raise SessionNotFound(f"no session {session!r}: it was deleted, expired, or never was")
        return found[0]

    def sessions(self, condition: str, **values: object) -> tuple[Session, ...]:
        """Those that meet a condition in SQL."""
        bound = {"tenant": self.tenant, "now": self.now, **values}
        return tuple(_session(row) for row in self.db.execute(SESSION + condition, bound))

    def heads(self, condition: str, **values: object) -> tuple[Head, ...]:
        """Those that meet a condition in SQL."""
        bound = {"tenant": self.tenant, "now": self.now, **values}
        return tuple(Head(*row) for row in self.db.execute(HEAD + condition, bound))

    def head(self, head: str, session: str | None = None, name: str = "head") -> Head:
        """The head of that id; with `session`, only if it is one of that session's.

        Args:
            name: what the caller calls it, for the error.
        """
        found = self.heads("AND head.id = :id", id=head)
        if not found or session not in (None, found[0].session):
            raise SessionNotFound(f"{name}={head!r}: no such head; it was dropped, or never was")
        return found[0]

    def place(self, head: Head) -> Place:
        row = self.db.execute("SELECT segment, stop FROM head WHERE id = ?", (head.id,))
        return Place(*row.fetchone())

    def resolve(self, session: Session, at: str | int | None, name: str) -> Place:
        """A head's id, a number of tokens from the session's head back, or that head itself.

        Args:
            name: what the caller calls the place, for errors.
        """
        if isinstance(at, str):
            return self.place(self.head(at, session.id, name))
        place = self.place(session.head)
        return place if at is None else segments.locate(self.db, place, at, name)

    def create(
        self,
        fingerprint: str,
        settings: str,
        ttl_s: float | None,
        *,
        conversation: str | None = None,
        root: str | None = None,
    ) -> str:
        """A session without a head, which must follow in the same transaction."""
        session = f"sess_{secrets.token_urlsafe(ID_BYTES)}"
        expires_at = None if ttl_s is None else self.now + _checked(ttl_s)
        self.db.execute(
            "INSERT INTO session VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (session, self.tenant, root or session, conversation, fingerprint, self.now, ttl_s,
             expires_at, settings),
        )  # fmt: skip
        return session

    def fork(
        self,
        session: Session,
        place: Place,
        changes: Mapping[str, Any] = NO_CHANGES,
        ttl_s: float | None = None,
        conversation: str | None = None,
    ) -> Head:
        """A session of its own that begins at `place`, with a copy of the statistics.

        Args:
            changes: settings in place of those that are copied; None takes one away.
            ttl_s: None is that of the session.
        """
        changed = {**session.settings, **changes}
        settings = to_json("settings", {k: v for k, v in changed.items() if v is not None})
        new = self.create(
            session.fingerprint,
            settings,
            session.ttl_s if ttl_s is None else ttl_s,
            conversation=conversation,
            root=session.root,
        )
        copy = "INSERT INTO stats SELECT ?, drafter, json FROM stats WHERE session = ?"
        self.db.execute(copy, (new, session.id))
        return self.add_head(new, place)

    def add_head(self, session: str, place: Place, response_id: str | None = None) -> Head:
        self.check_response(response_id)
        query = "SELECT coalesce(max(seq) + 1, 0) FROM head WHERE session = ?"
        (seq,) = self.db.execute(query, (session,)).fetchone()
        head = Head(
            f"head_{secrets.token_urlsafe(ID_BYTES)}", session, place.stop, seq, response_id
        )
        row = (head.id, self.tenant, session, *place, seq, response_id)
        self.db.execute("INSERT INTO head VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        return head

    def append(
        self, session: str, place: Place, packed: bytes, response_id: str | None = None
    ) -> Head:
        """Tokens below `place`, and a head behind them."""
        below = segments.grow(self.db, self.tenant, place, packed)
        return self.add_head(session, below, response_id)

    def writable(
        self, session: Session, if_head: str | None, on_conflict: OnConflict
    ) -> tuple[str, Place]:
        """The session and the place to go on from: a new fork if the head is stale and may fork.

        Raises:
            SessionConflict: the session's head is another one.
            SessionNotFound: it was to fork at a head that is not there.
        """
        if on_conflict not in ("error", "fork"):
            raise RequestError(f"on_conflict={on_conflict!r}: must be 'error' or 'fork'")
        if if_head in (None, session.head.id):
            return session.id, self.place(session.head)
        if on_conflict == "error":
            raise SessionConflict(
                f"session {session.id!r} is at head {session.head.id!r}, not {if_head!r}:"
                " read it and send again, or fork on conflict",
                head=session.head.id,
            )
        place = self.resolve(session, if_head, "if_head")
        return self.fork(session, place).session, place

    def touch(self, session: Session) -> None:
        """Its time to live begins anew."""
        if session.ttl_s is not None:
            update = "UPDATE session SET expires_at = ? WHERE id = ?"
            self.db.execute(update, (self.now + session.ttl_s, session.id))

    def drop(self, session: Session, place: Place) -> None:
        """Forgets all heads of the session that are not on the way to `place`."""
        way = segments.parts(self.db, place)
        query = "SELECT id, segment, stop FROM head WHERE session = ?"
        rows = self.db.execute(query, (session.id,)).fetchall()
        dropped = [(head, part) for head, part, stop in rows if stop > way.get(part, -1)]
        self.db.executemany("DELETE FROM head WHERE id = ?", [(head,) for head, _ in dropped])
        segments.prune(self.db, {part for _, part in dropped})

    def check_quota(self, before: Usage) -> None:
        """QuotaExceeded if the tenant now stores more than `before`, and more than it may.

        What has expired does not count, though it is still there: who lets it go has more to let
        go than the log knows of.
        """
        now = self.usage()
        if not self._over(before, now):
            return
        num_gone = [had - has for had, has in zip(now, self._without_expired(), strict=True)]
        left = Usage(*(count - gone for count, gone in zip(now, num_gone, strict=True)))
        old = Usage(*(count - gone for count, gone in zip(before, num_gone, strict=True)))
        for name in self._over(old, left):
            raise QuotaExceeded(
                f"{getattr(left, name)} {name} would be stored, over the limit of"
                f" {getattr(self.quota, name)} for one tenant: {REMEDIES[name]}"
            )

    def _over(self, before: Usage, now: Usage) -> list[str]:
        limits = zip(Quota._fields, before, now, self.quota, strict=True)
        return [name for name, old, new, top in limits if top is not None and new > max(old, top)]

    def _without_expired(self) -> Usage:
        self.db.execute("SAVEPOINT counting")
        remove_expired(self.db, self.now)
        found = self.usage()
        self.db.execute("ROLLBACK TO counting")
        self.db.execute("RELEASE counting")
        return found

    def free_conversation(self, conversation: str) -> None:
        """The name of a session that has expired is free again."""
        update = f"""UPDATE session SET conversation = NULL
            WHERE tenant = :tenant AND conversation = :name AND NOT {LIVING}"""
        self.db.execute(update, {"tenant": self.tenant, "now": self.now, "name": conversation})

    def usage(self) -> Usage:
        query = "SELECT tokens, sessions, heads FROM usage WHERE tenant = ?"
        row = self.db.execute(query, (self.tenant,)).fetchone()
        return Usage(*row) if row else Usage()

    def check_response(self, response_id: str | None) -> None:
        """SessionConflict if a response of that id has been stored, in a session that lives."""
        if response_id is None:
            return
        if self.heads("AND response_id = :id", id=response_id):
            raise SessionConflict(f"response {response_id!r} is stored already: name it otherwise")
        update = "UPDATE head SET response_id = NULL WHERE tenant = ? AND response_id = ?"
        self.db.execute(update, (self.tenant, response_id))


def remove(db: sqlite3.Connection, session: str) -> None:
    """Deletes a session, its heads, turns and statistics, and the segments that only it used."""
    query = "SELECT DISTINCT segment FROM head WHERE session = ?"
    used = [segment for (segment,) in db.execute(query, (session,))]
    db.execute("DELETE FROM session WHERE id = ?", (session,))
    segments.prune(db, used)


def expired(db: sqlite3.Connection, now: float) -> tuple[tuple[str, str], ...]:
    """(tenant, id) of all sessions, of any tenant, whose time is over."""
    query = f"""SELECT tenant, id FROM session WHERE expires_at <= :now AND NOT {LIVING}
        ORDER BY expires_at, id"""
    return tuple(db.execute(query, {"now": now}))


def remove_expired(db: sqlite3.Connection, now: float) -> tuple[str, ...]:
    """Deletes all sessions, of any tenant, whose time is over; returns their ids."""
    found = tuple(session for _, session in expired(db, now))
    for session in found:
        remove(db, session)
    return found


def to_json(name: str, value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{name} must be JSON: {error}") from error


def _session(row: tuple[Any, ...]) -> Session:
    return Session(
        id=row[0],
        tenant=row[1],
        root=row[2],
        conversation=row[3],
        fingerprint=row[4],
        created=row[5],
        ttl_s=row[6],
        expires_at=row[7],
        settings=json.loads(row[8]),
        head=Head(*row[9:]),
    )


def _checked(ttl_s: float) -> float:
    if not (ttl_s > 0 and math.isfinite(ttl_s)):
        raise RequestError(f"ttl_s={ttl_s}: must be positive; leave it out to keep the session")
    return ttl_s
