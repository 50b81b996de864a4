"""Turns: responses in the making, durable while they are made, no part of the session before."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

from outrider.errors import SessionConflict, SessionNotFound
from outrider.session.database import Database
from outrider.session.ledger import Ledger, OnConflict, to_json
from outrider.session.records import Head, Turn
from outrider.session.segments import pack, put_note, unpack

Transaction: TypeAlias = Callable[[str], AbstractContextManager[Ledger]]
NO_REQUEST: Mapping[str, Any] = {}
TURN = "SELECT tenant, response_id, session, head, request, tokens FROM turn"


class Turns:
    """Begin, then commit or abort; after a crash `unfinished` lists those left between.

    A turn leaves its session alone until it is committed as one segment and one head, so an
    aborted one leaves nothing behind. Several may be made at once; the first to commit moves
    the head, and the others find a conflict or fork. Tokens of a turn count for the quota.

    Its answer comes with the commit: one that a crash has cut off is made again from the request.
    """

    def __init__(self, database: Database, writes: Transaction, reads: Transaction) -> None:
        self._database = database
        self._writes = writes
        self._reads = reads

    def begin(
        self,
        tenant: str,
        session: str,
        tokens: Sequence[int] = (),
        *,
        response_id: str,
        request: Mapping[str, Any] = NO_REQUEST,
        if_head: str | None = None,
        on_conflict: OnConflict = "error",
    ) -> Turn:
        """Opens a turn at the session's head; arguments are those of `SessionLog.append`.

        Args:
            tokens: the new input.
            request: JSON that is needed to take the turn up again.

        Raises:
            SessionNotFound, SessionConflict, QuotaExceeded, RequestError.
        """
        packed, stored = pack(tokens), to_json("request", request)
        with self._writes(tenant) as ledger:
            found = ledger.session(session)
            target, _ = ledger.writable(found, if_head, on_conflict)
            ledger.touch(found)
            ledger.check_response(response_id)
            _check_free(ledger, response_id)
            head = ledger.session(target).head.id
            row = (tenant, response_id, target, head, stored, packed)
            ledger.db.execute("INSERT INTO turn VALUES (?, ?, ?, ?, ?, ?)", row)
            return _turn(row)

    def commit(
        self,
        tenant: str,
        response_id: str,
        tokens: Sequence[int] = (),
        *,
        on_conflict: OnConflict = "error",
        note: Mapping[str, Any] | None = None,
    ) -> Head:
        """Makes the turn, with the tokens of its answer, part of its session.

        Args:
            note: JSON that holds of every log with the turn's input.

        Raises:
            SessionNotFound: no such turn, or its session is gone.
            SessionConflict: the session has gone on; the turn stays open.
            QuotaExceeded, RequestError: the turn stays open.
        """
        packed, stored = pack(tokens), to_json("note", note or {})
        with self._writes(tenant) as ledger:
            turn = _find(ledger, response_id)
            found = ledger.session(turn.session)
            target, place = ledger.writable(found, turn.head, on_conflict)
            ledger.touch(found)
            _delete(ledger, response_id)
            head = ledger.append(target, place, pack(turn.tokens) + packed, response_id)
            if note:
                noted = place.stop + len(turn.tokens)
                put_note(ledger.db, ledger.place(head)._replace(stop=noted), stored)
            return head

    def abort(self, tenant: str, response_id: str) -> None:
        """Forgets the turn; SessionNotFound if there is none."""
        with self._writes(tenant) as ledger:
            _find(ledger, response_id)
            _delete(ledger, response_id)

    def get(self, tenant: str, response_id: str) -> Turn:
        with self._reads(tenant) as ledger:
            return _find(ledger, response_id)

    def unfinished(self) -> tuple[Turn, ...]:
        """The turns of all tenants that are neither committed nor aborted."""
        with self._database.read() as db:
            return tuple(_turn(row) for row in db.execute(f"{TURN} ORDER BY response_id"))


def _find(ledger: Ledger, response_id: str) -> Turn:
    query = f"{TURN} WHERE tenant = ? AND response_id = ?"
    row = ledger.db.execute(query, (ledger.tenant, response_id)).fetchone()
    if row is None:
        raise SessionNotFound(f"no turn {response_id!r}: it was committed, aborted, or never was")
    return _turn(row)


def _delete(ledger: Ledger, response_id: str) -> None:
    delete = "DELETE FROM turn WHERE tenant = ? AND response_id = ?"
    ledger.db.execute(delete, (ledger.tenant, response_id))


def _check_free(ledger: Ledger, response_id: str) -> None:
    query = "SELECT 1 FROM turn WHERE tenant = ? AND response_id = ?"
    if ledger.db.execute(query, (ledger.tenant, response_id)).fetchone():
        raise SessionConflict(f"response {response_id!r} is being made: name it otherwise")


def _turn(row: tuple[Any, ...]) -> Turn:
    tenant, response_id, session, head, request, tokens = row
    return Turn(tenant, response_id, session, head, json.loads(request), unpack(tokens))
