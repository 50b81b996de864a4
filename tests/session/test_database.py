"""The session log's file: crashes, a full disk, other processes, other files, other versions."""

import json
import random
import resource
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from outrider.errors import SessionConflict, SessionError, SessionStorageError
from outrider.session.log import SessionLog
from outrider.session.records import Usage

A = "acme"
MOST = 50  # tokens of one write

# The text is 0, 1, 2, ...: whatever is lost or doubled shows. Each acknowledgement is the length.
WRITER = """
import random, sys, time
from outrider.session.log import SessionLog

path, session, seed = sys.argv[1:]
log, draw = SessionLog(path, time.time), random.Random(seed)
count = log.get("acme", session).head.num_tokens
for turn in log.turns.unfinished():
    log.turns.abort("acme", turn.response_id)

def more():
    global count
    start, count = count, count + draw.randint(1, MOST)
    return range(start, count)

def acknowledge():
    print(count, flush=True)

for number in range(10**9):
    if draw.random() < 0.3:
        name = f"{seed}.{number}"
        log.turns.begin("acme", session, more(), response_id=name)
        acknowledge()
        log.turns.commit("acme", name, more())
    else:
        log.append("acme", session, more())
    acknowledge()
    if draw.random() < 0.1:
        log.fork("acme", session, draw.randint(0, count))
""".replace("MOST", str(MOST))


def open_log(path: Path, **settings: float) -> SessionLog:
    return SessionLog(path, time.time, **settings)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "sessions.db"


def write_and_kill(path: Path, session: str, seed: int) -> int:
    """Runs a writer, kills it in the middle of its work; returns the last length acknowledged."""
    command = [sys.executable, "-c", WRITER, str(path), session, str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        first = writer.stdout.readline()
        assert first, "the writer died by itself"
        time.sleep(random.Random(seed).uniform(0.0, 0.1))
        writer.kill()
        return int([first, *writer.stdout.read().split()][-1])


def test_a_killed_writer_loses_and_doubles_nothing(path: Path) -> None:
    with open_log(path) as log:
        session = log.create(A, "fp").session
    for seed in range(2):
        acknowledged = write_and_kill(path, session, seed)
        with open_log(path) as log:
            head = log.get(A, session).head
            text = log.tokens(A, head).tolist()
            turns = log.turns.unfinished()
            if turns and turns[0].head == head.id:
                text += turns[0].tokens.tolist()
            assert text == list(range(len(text)))
            assert acknowledged <= len(text) <= acknowledged + MOST
            assert len(turns) <= 1
            check_integrity(path)


def test_a_death_before_any_statement_leaves_whole_calls(path: Path) -> None:
    path.parent.mkdir()
    command = [sys.executable, str(Path(__file__).with_name("crash.py")), str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 50, "statements at which it died"


def check_integrity(path: Path) -> None:
    """What sqlite says of the file, and whether the counters of use count what is there."""
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert db.execute("PRAGMA foreign_key_check").fetchall() == []
    counted = """SELECT (SELECT sum(length(tokens)) / 4 FROM segment)
        + (SELECT coalesce(sum(length(tokens)) / 4, 0) FROM turn),
        (SELECT count(*) FROM session), (SELECT count(*) FROM head)"""
    stored = "SELECT tokens, sessions, heads FROM usage"
    assert db.execute(stored).fetchall() == db.execute(counted).fetchall()
    db.close()


@contextmanager
def full_disk(log: SessionLog) -> Iterator[None]:
    """The database may not grow by a page."""
    db = log._database._connection
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count = {pages}")
    yield
    db.execute("PRAGMA max_page_count = 1000000")


@contextmanager
def file_limit(log: SessionLog) -> Iterator[None]:
    """The operating system refuses to make any file larger than these 64 KB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def read_only(log: SessionLog) -> Iterator[None]:
    log._database._connection.execute("PRAGMA query_only = ON")
    yield
    log._database._connection.execute("PRAGMA query_only = OFF")


@pytest.mark.parametrize(
    ("trouble", "match"),
    [
        (full_disk, "full.*free disk space"),
        (file_limit, "look at the disk|free disk space"),
        (read_only, "readonly.*writable"),
    ],
)
def test_in_trouble_nothing_is_half_written_and_later_calls_work(
    path: Path, trouble: object, match: str
) -> None:
    with open_log(path) as log:
        head = log.create(A, "fp", range(100))
        log.turns.begin(A, head.session, [100], response_id="r")
        before = log.usage(A)
        with trouble(log):  # type: ignore[operator]
            for call in (
                lambda: log.append(A, head.session, range(200_000)),
                lambda: log.create(A, "fp", range(200_000), conversation="chat"),
                lambda: log.turns.commit(A, "r", range(200_000)),
            ):
                with pytest.raises(SessionStorageError, match=match):
                    call()
                assert log.tokens(A, head).tolist() == list(range(100)), "reads go on"
                assert log.usage(A) == before
        log.turns.commit(A, "r", range(101, 200_000))
        assert log.tokens(A, log.get(A, head.session).head).tolist() == list(range(200_000))
    check_integrity(path)


def test_two_connections_see_each_other_and_one_wins(path: Path) -> None:
    with open_log(path) as one, open_log(path) as two:
        head = one.create(A, "fp", [1])
        first = two.append(A, head.session, [2], if_head=head.id)
        with pytest.raises(SessionConflict):
            one.append(A, head.session, [3], if_head=head.id)
        assert one.tokens(A, first).tolist() == [1, 2]


def test_writers_on_two_connections_and_many_threads_lose_nothing(path: Path) -> None:
    """Each thread appends with `if_head` and tries again on a conflict."""

    def work(log: SessionLog, mark: int) -> None:
        for _ in range(20):
            while True:
                head = log.get(A, session).head
                try:
                    log.append(A, session, [mark] * 3, if_head=head.id)
                except SessionConflict:
                    continue
                break

    with open_log(path, busy_timeout_s=30.0) as one, open_log(path, busy_timeout_s=30.0) as two:
        session = one.create(A, "fp").session
        threads = [
            threading.Thread(target=work, args=(log, mark))
            for mark, log in enumerate([one, one, two, two])
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        text = one.tokens(A, one.get(A, session).head).tolist()
        assert sorted(text) == sorted([mark for mark in range(4) for _ in range(60)])
        runs = [text[at : at + 3] for at in range(0, len(text), 3)]
        assert all(len(set(run)) == 1 for run in runs), "appends came whole"
        assert len(one.heads(A, session)) == 81


def test_another_writer_that_does_not_end_is_an_error_and_not_a_hang(path: Path) -> None:
    with open_log(path) as holder, open_log(path, busy_timeout_s=0.05) as log:
        head = log.create(A, "fp", [1])
        with holder._database.write():
            with pytest.raises(SessionStorageError, match="another process holds it"):
                log.append(A, head.session, [2])
            assert log.tokens(A, head).tolist() == [1], "readers do not wait for writers"
        log.append(A, head.session, [2])


def test_an_error_in_the_middle_of_a_write_undoes_it(path: Path) -> None:
    def stop_halfway(error: type[BaseException]) -> None:
        with log._writes(A) as ledger:
            ledger.append(head.session, ledger.place(head), b"\1\0\0\0")
            raise error

    with open_log(path) as log:
        head = log.create(A, "fp", [1])
        for error in (ValueError, KeyboardInterrupt):
            with pytest.raises(error):
                stop_halfway(error)
        assert log.usage(A) == Usage(tokens=1, sessions=1, heads=1)


def test_a_commit_is_synced(path: Path) -> None:
    with open_log(path) as log:
        db = log._database._connection
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA synchronous").fetchone() == (2,), "FULL"
        assert db.execute("PRAGMA foreign_keys").fetchone() == (1,)


def test_deleted_text_is_overwritten_and_the_file_shrinks(path: Path) -> None:
    with open_log(path) as log:
        log.create(A, "fp", [0x0BADCAFE] * 50_000, ttl_s=1e-9)
        db = log._database._connection
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        size = path.stat().st_size
        assert b"\xfe\xca\xad\x0b" in path.read_bytes()
        log.expire(time.time() + 1)
    assert b"\xfe\xca\xad\x0b" not in path.read_bytes()
    assert path.stat().st_size < size / 2


def test_the_file_is_its_owners_alone(path: Path) -> None:
    with open_log(path) as log:
        log.create(A, "fp", [1])
        assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}


def test_a_newer_schema_is_refused_and_left_alone(path: Path) -> None:
    with open_log(path) as log:
        head = log.create(A, "fp", [1])
    db = sqlite3.connect(path)
    db.execute("UPDATE version SET version = 2")
    db.commit()
    db.close()
    before = path.read_bytes()
    with pytest.raises(SessionStorageError, match=r"schema 2.*knows 1: update Outrider"):
        open_log(path)
    assert path.read_bytes() == before
    db = sqlite3.connect(path)
    db.execute("UPDATE version SET version = 1")
    db.commit()
    db.close()
    with open_log(path) as log:
        assert log.tokens(A, head).tolist() == [1]


def test_another_programs_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    foreign, noise = tmp_path / "foreign.db", tmp_path / "noise.db"
    db = sqlite3.connect(foreign)
    db.execute("CREATE TABLE session (mine)")
    db.commit()
    db.close()
    noise.write_bytes(b"not a database, but long enough to look like a page " * 100)
    for file in (foreign, noise):
        before = file.read_bytes()
        with pytest.raises(SessionStorageError, match="name another file"):
            open_log(file)
        assert file.read_bytes() == before


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "log.db"):
        with pytest.raises(SessionStorageError, match="name a file in a folder"):
            open_log(place)


def test_a_damaged_file_is_an_error(path: Path) -> None:
    with open_log(path) as log:
        head = log.create(A, "fp", range(100_000))
    content = bytearray(path.read_bytes())
    content[4096:-4096] = b"\xa5" * (len(content) - 8192)
    path.write_bytes(content)
    with pytest.raises(SessionStorageError, match=r"damaged|malformed"), open_log(path) as log:
        log.tokens(A, head)


def test_a_closed_log_says_so() -> None:
    log = SessionLog(":memory:", time.time)
    log.close()
    log.close()
    with pytest.raises(SessionError, match="closed"):
        log.create(A, "fp")


def test_tokens_are_stored_as_little_endian_int32(path: Path) -> None:
    with open_log(path) as log:
        log.create(A, "fp", [1, 0x01020304], json.loads('{"x": 1}'))
        rows = log._database._connection.execute("SELECT tokens FROM segment").fetchall()
    assert rows == [(b"\1\0\0\0\4\3\2\1",)]
