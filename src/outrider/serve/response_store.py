"""ResponseStore: responses that clients may ask for again, and events of those being made."""

import json
import logging
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from outrider.errors import SessionStorageError
from outrider.serve.ring import Numbered
from outrider.session.database import make_private

MEMORY = ":memory:"
logger = logging.getLogger(__name__)
PRAGMAS = ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON")
CONVERSATION = "json_extract(body, '$.conversation.id')"
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS response (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, session TEXT, previous TEXT,
    updated REAL NOT NULL, num_prompt INTEGER NOT NULL, num_tokens INTEGER NOT NULL,
    is_final INTEGER NOT NULL, body TEXT NOT NULL, items TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS response_session ON response (session);
CREATE INDEX IF NOT EXISTS response_updated ON response (updated);
CREATE INDEX IF NOT EXISTS response_conversation ON response ({CONVERSATION})
    WHERE session IS NULL;
CREATE TABLE IF NOT EXISTS event (
    response TEXT NOT NULL REFERENCES response (id) ON DELETE CASCADE,
    number INTEGER NOT NULL, type TEXT NOT NULL, data TEXT NOT NULL,
    PRIMARY KEY (response, number)) WITHOUT ROWID;
"""
COLUMNS = "id, tenant, session, previous, updated, num_prompt, num_tokens, is_final, body, items"


class Stored(NamedTuple):
    """A response as it is kept.

    Attributes:
        session: whose log holds it. previous: the response that it went on from.
        num_prompt, num_tokens: the log's length where the answer begins, and where it ends.
        is_final: no more will come.
        body: the response object. items: the input that came with it.
    """

    id: str
    tenant: str
    session: str | None
    previous: str | None
    updated: float
    num_prompt: int
    num_tokens: int
    is_final: bool
    body: dict[str, Any]
    items: list[dict[str, Any]]


class ResponseStore:
    """Small rows in sqlite; what has been written survives a killed process.

    Calls are short and come from one thread, the event loop's. A response of another tenant reads
    as one that is not there.

    Args:
        path: the file, or ":memory:".
        max_responses: most that are kept of each tenant; the oldest go first.

    Raises:
        SessionStorageError: from any call: the file cannot be read or written.
    """

    def __init__(self, path: Path | str = MEMORY, *, max_responses: int = 10_000) -> None:
        make_private(str(path))
        self._db = sqlite3.connect(str(path), isolation_level=None, check_same_thread=False)
        for pragma in PRAGMAS:
            self._execute(f"PRAGMA {pragma}")
        self._db.executescript(SCHEMA)
        self._max_responses = max_responses
        self._late: dict[str, Stored] = {}  # what could not be written yet

    def close(self) -> None:
        """What could not be written by now is lost."""
        self.put_late()
        self._db.close()

    def put(self, stored: Stored) -> None:
        """Adds or replaces; events stay."""
        row = (*stored[:-2], _dumps(stored.body), _dumps(stored.items))
        marks = ", ".join("?" * len(row))
        update = ", ".join(f"{name} = excluded.{name}" for name in COLUMNS.split(", ")[1:])
        self._execute(
            f"INSERT INTO response ({COLUMNS}) VALUES ({marks}) "
            f"ON CONFLICT (id) DO UPDATE SET {update}",
            row,
        )

    def put_at_last(self, stored: Stored) -> None:
        """As `put`; where it cannot be written now, it is held in memory and tried again."""
        try:
            self.put(stored)
        except SessionStorageError as error:
            logger.error("response %s is not written down yet: %s", stored.id, error)
            self._late[stored.id] = stored
            while len(self._late) > self._max_responses:
                del self._late[next(iter(self._late))]

    def put_late(self) -> None:
        """Tries again to write what could not be written; what still cannot stays."""
        for response_id, stored in list(self._late.items()):
            with suppress(SessionStorageError):
                self.put(stored)
                del self._late[response_id]

    def get(self, tenant: str, response_id: str) -> Stored | None:
        late = self._late.get(response_id)
        if late is not None:
            return late if late.tenant == tenant else None
        query = f"SELECT {COLUMNS} FROM response WHERE id = ? AND tenant = ?"
        row = self._execute(query, (response_id, tenant)).fetchone()
        return _stored(row) if row else None

    def of_sessions(self, tenant: str, sessions: Iterable[str]) -> list[Stored]:
        """Final responses whose tokens are in the logs of these sessions."""
        names = list(sessions)
        marks = ", ".join("?" * len(names))
        query = f"""SELECT {COLUMNS} FROM response
            WHERE tenant = ? AND is_final AND session IN ({marks}) ORDER BY updated DESC"""
        return [_stored(row) for row in self._execute(query, (tenant, *names))]

    def unfinished(self) -> list[Stored]:
        """Of all tenants, those that were being made when the process ended."""
        query = f"SELECT {COLUMNS} FROM response WHERE NOT is_final"
        return [_stored(row) for row in self._execute(query)]

    def delete(self, tenant: str, response_id: str) -> None:
        if (late := self._late.get(response_id)) is not None and late.tenant == tenant:
            del self._late[response_id]
        self._execute("DELETE FROM response WHERE id = ? AND tenant = ?", (response_id, tenant))

    def delete_of_session(self, tenant: str, session: str) -> None:
        """Those whose tokens it holds or was to hold; one that failed names it in its body."""
        for stored in list(self._late.values()):
            if (stored.tenant, stored.session) == (tenant, session):
                del self._late[stored.id]
        self._execute(
            f"DELETE FROM response WHERE tenant = :tenant AND (session = :session "
            f"OR session IS NULL AND {CONVERSATION} = :session)",
            {"tenant": tenant, "session": session},
        )

    def add_event(self, response_id: str, event: Numbered) -> None:
        """Before anybody hears of it: what a client has seen is known after a crash."""
        self._execute("INSERT INTO event VALUES (?, ?, ?, ?)", (response_id, *event))

    def events(self, response_id: str) -> list[Numbered]:
        """In order, all that were added."""
        query = "SELECT number, type, data FROM event WHERE response = ? ORDER BY number"
        return [Numbered(*row) for row in self._execute(query, (response_id,))]

    def _execute(
        self, statement: str, values: tuple[Any, ...] | Mapping[str, Any] = ()
    ) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise SessionStorageError(f"the file of responses cannot be used: {error}") from error

    def expire(self, *, responses_before: float, events_before: float) -> None:
        """Drops what has not changed since then, events of final responses, and the surplus."""
        self.put_late()
        self._execute(
            "DELETE FROM event WHERE response IN "
            "(SELECT id FROM response WHERE is_final AND updated < ?)",
            (events_before,),
        )
        self._execute("DELETE FROM response WHERE updated < ?", (responses_before,))
        self._execute(
            "DELETE FROM response WHERE is_final AND id IN (SELECT id FROM (SELECT id, "
            "row_number() OVER (PARTITION BY tenant ORDER BY updated DESC) AS place "
            "FROM response) WHERE place > ?)",
            (self._max_responses,),
        )


def _stored(row: tuple[Any, ...]) -> Stored:
    values, (is_final, body, items) = row[:-3], row[-3:]
    return Stored._make((*values, bool(is_final), json.loads(body), json.loads(items)))


def _dumps(value: Mapping[str, Any] | list[dict[str, Any]]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
