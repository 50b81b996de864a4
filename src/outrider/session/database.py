"""Database: the sqlite file of the session log, written in whole transactions or not at all."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from threading import Lock

from outrider.errors import RequestError, SessionStorageError

VERSION = 1
MEMORY = ":memory:"
PRAGMAS = ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "secure_delete = ON")
PRIMARY = 0xFF  # sqlite's extended codes carry the primary one in their lowest byte
REMEDIES = {
    sqlite3.SQLITE_FULL: "nothing of this call was kept; free disk space or delete sessions",
    sqlite3.SQLITE_IOERR: "nothing of this call was kept; look at the disk, then try again",
    sqlite3.SQLITE_READONLY: "make the file and its folder writable",
    sqlite3.SQLITE_PERM: "make the file and its folder writable",
    sqlite3.SQLITE_CANTOPEN: "name a file in a folder that can be written",
    sqlite3.SQLITE_BUSY: "another process holds it; stop that one, or name another file",
    sqlite3.SQLITE_CORRUPT: "the file is damaged; move it away or bring back a copy",
    sqlite3.SQLITE_NOTADB: "this is no session log; name another file",
}


class Database:
    """One connection to one file, shared by threads under a lock; processes wait for each other.

    A transaction that has returned survives a crash of the process and of the machine (write-ahead
    log, synced at each commit). What is deleted is overwritten; copies in the write-ahead log go
    with its next checkpoint.

    Args:
        path: made, with its folder, if it is not there; `":memory:"` lives until `close`.
        busy_timeout_s: how long to wait for another process's transaction.

    Raises:
        SessionStorageError: no such place, not a session log, or one of a newer Outrider.
    """

    def __init__(self, path: Path | str, busy_timeout_s: float = 5.0) -> None:
        self.path = str(path)
        self._lock = Lock()
        with self._explained():
            make_private(self.path)
            self._connection = sqlite3.connect(
                self.path, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction that writes: kept whole, or not at all if an error leaves the block."""
        with self._transaction("BEGIN IMMEDIATE") as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A transaction whose queries all see the same state."""
        with self._transaction("BEGIN") as connection:
            yield connection

    def shrink(self) -> None:
        """Gives pages of deleted rows back to the file system; else later rows take them."""
        with self._lock, suppress(SessionStorageError), self._explained():
            # `execute` would stop after the first page: each page is a row without columns.
            self._connection.executescript("PRAGMA incremental_vacuum")

    def close(self) -> None:
        """Idempotent; later calls raise SessionStorageError."""
        with self._lock, self._explained():
            self._connection.close()

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        with self._lock, self._explained():
            self._connection.execute(begin)
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # a full disk has ended it already
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.IntegrityError:
            raise  # the schema's own rules: only a defect of this package breaks them
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & PRIMARY
            remedy = REMEDIES.get(code, "open it again")
            raise SessionStorageError(f"session log {self.path!r}: {error}; {remedy}") from error
        except UnicodeEncodeError as error:
            raise RequestError(f"{error.object!r} is not Unicode text; send valid UTF-8") from error

    def _prepare(self) -> None:
        if self._is_new():
            self._connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        for pragma in PRAGMAS:
            self._connection.execute(f"PRAGMA {pragma}")
        schema = files("outrider.session").joinpath("schema.sql").read_text(encoding="utf-8")
        self._connection.executescript(f"BEGIN IMMEDIATE;\n{schema}\nCOMMIT;")

    def _is_new(self) -> bool:
        """Whether the file is empty; one that is not ours is refused before anything is written."""
        query = "SELECT name FROM sqlite_schema WHERE type = 'table'"
        tables = {name for (name,) in self._connection.execute(query)}
        if not tables:
            return True
        if not {"version", "segment"} <= tables:
            remedy = REMEDIES[sqlite3.SQLITE_NOTADB]
            raise SessionStorageError(f"{self.path!r} holds other tables; {remedy}")
        (version,) = self._connection.execute("SELECT max(version) FROM version").fetchone()
        if version > VERSION:
            raise SessionStorageError(
                f"session log {self.path!r} has schema {version}, and this Outrider knows"
                f" {VERSION}: update Outrider, or name another file"
            )
        return False


def make_private(path: str) -> None:
    """Makes the file, for its owner only, who may write to it: it holds what users wrote.

    Raises:
        SessionStorageError: it cannot be made, or read and written.
    """
    if path == MEMORY:
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        for name in (path, f"{path}-wal", f"{path}-shm"):
            with suppress(FileNotFoundError, PermissionError):  # another owner's stays as it is
                os.chmod(name, 0o600)
    except OSError as error:
        remedy = REMEDIES[sqlite3.SQLITE_CANTOPEN]
        raise SessionStorageError(f"session log {path!r}: {error.strerror}; {remedy}") from error
