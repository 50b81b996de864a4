"""ResponseStore: responses that clients may ask for again, and events of those being made."""

import json
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from outrider.errors import SessionStorageError
from outrider.serve.ring import Numbered

MEMORY = ":memory:"
PRAGMAS = ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON")
SCHEMA = """
CREATE TABLE IF NOT EXISTS response (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, session TEXT, previous TEXT,
    updated REAL NOT NULL, num_prompt INTEGER NOT NULL, num_tokens INTEGER NOT NULL,
    is_final INTEGER NOT NULL, body TEXT NOT NULL, items TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS response_session ON response (session);
CREATE INDEX IF NOT EXISTS response_updated ON response (updated);
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
        max_responses: most that are kept; the oldest go first.

    Raises:
        SessionStorageError: from any call: the file cannot be read or written.
    """

    def __init__(self, path: Path | str = MEMORY, *, max_responses: int = 10_000) -> None:
        self._db = sqlite3.connect(str(path), isolation_level=None, check_same_thread=False)
        for pragma in PRAGMAS:
            self._execute(f"PRAGMA {pragma}")
        self._db.executescript(SCHEMA)
        self._max_responses = max_responses

    def close(self) -> None:
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

    def get(self, tenant: str, response_id: str) -> Stored | None:
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
        self._execute("DELETE FROM response WHERE id = ? AND tenant = ?", (response_id, tenant))

    def delete_of_session(self, tenant: str, session: str) -> None:
        self._execute("DELETE FROM response WHERE session = ? AND tenant = ?", (session, tenant))

    def add_event(self, response_id: str, event: Numbered) -> None:
        """Before anybody hears of it: what a client has seen is known after a crash."""
        self._execute("INSERT INTO event VALUES (?, ?, ?, ?)", (response_id, *event))

    def events(self, response_id: str) -> list[Numbered]:
        """In order, all that were added."""
        query = "SELECT number, type, data FROM event WHERE response = ? ORDER BY number"
        return [Numbered(*row) for row in self._execute(query, (response_id,))]

    def _execute(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise SessionStorageError(f"the file of responses cannot be used: {error}") from error

    def expire(self, *, responses_before: float, events_before: float) -> None:
        """Drops what has not changed since then, events of final responses, and the surplus."""
        self._execute(
            "DELETE FROM event WHERE response IN "
            "(SELECT id FROM response WHERE is_final AND updated < ?)",
            (events_before,),
        )
        self._execute("DELETE FROM response WHERE updated < ?", (responses_before,))
        self._execute(
            "DELETE FROM response WHERE is_final AND id NOT IN "
            "(SELECT id FROM response ORDER BY updated DESC LIMIT ?)",
            (self._max_responses,),
        )


def _stored(row: tuple[Any, ...]) -> Stored:
    values, (is_final, body, items) = row[:-3], row[-3:]
    return Stored._make((*values, bool(is_final), json.loads(body), json.loads(items)))


def _dumps(value: Mapping[str, Any] | list[dict[str, Any]]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
