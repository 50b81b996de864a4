"""Run as a program: a log whose process dies before each of its SQL statements, one after another.

Each time a child does the same calls and kills itself before its n-th statement; what it leaves
must be what some number of whole calls leaves, and at least those that had returned.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from outrider.session.log import SessionLog

TENANT = "acme"
State: TypeAlias = tuple[object, ...]


def calls(log: SessionLog) -> list[Callable[[], object]]:
    """Calls that write, each after those before it; `create` has been done."""
    (first,) = [session.id for session in log.list(TENANT).sessions]
    return [
        lambda: log.append(TENANT, first, [3, 4], response_id="one"),
        lambda: log.fork(TENANT, first, 3, n=2),
        lambda: log.turns.begin(TENANT, first, [5, 6], response_id="two"),
        lambda: log.turns.commit(TENANT, "two", [7]),
        lambda: log.stats.add(TENANT, first, "ngram", {"drafted": [1]}),
        lambda: log.rewind(TENANT, first, 4, drop=True),
        lambda: log.append(TENANT, first, [8], if_head=None),
        lambda: log.delete(TENANT, first),
    ]


def state(log: SessionLog) -> State:
    """All that can be seen of the log, without its random names."""
    texts = []
    for session in log.list(TENANT).sessions:
        heads = log.heads(TENANT, session.id)
        texts.append(
            (
                [(log.tokens(TENANT, head).tolist(), head.response_id) for head in heads],
                log.stats.get(TENANT, session.id),
            )
        )
    turns = [(turn.response_id, turn.tokens.tolist()) for turn in log.turns.unfinished()]
    orphans = """SELECT count(*) FROM segment WHERE id NOT IN
        (SELECT segment FROM head WHERE segment NOT NULL
         UNION SELECT parent FROM segment WHERE parent NOT NULL)"""
    with log._database.read() as db:
        ((num_orphans,),) = db.execute(orphans)
    return sorted(map(repr, texts)), turns, log.usage(TENANT), num_orphans


def open_log(path: Path) -> SessionLog:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    log = SessionLog(path, lambda: 0.0)
    log.create(TENANT, "fp", [1, 2])
    return log


def expected(path: Path) -> list[State]:
    """The state before the first call, and after each."""
    with open_log(path) as log:
        states = [state(log)]
        for call in calls(log):
            call()
            states.append(state(log))
    return states


def die_at(path: Path, number: int, done: int) -> None:
    """Does the calls, writing a byte to `done` after each, up to the statement of that number."""
    log = open_log(path)
    todo = calls(log)
    seen = 0

    def count(statement: str) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    log._database._connection.set_trace_callback(count)
    for call in todo:
        call()
        os.write(done, b".")
    os._exit(0)


def main(path: Path) -> None:
    states = expected(path)
    number = 0
    while True:
        number += 1
        returned, done = os.pipe()
        child = os.fork()
        if child == 0:
            die_at(path, number, done)
        os.close(done)
        _, status = os.waitpid(child, 0)
        with os.fdopen(returned, "rb") as pipe:
            num_returned = len(pipe.read())
        if os.WIFEXITED(status):
            break
        with SessionLog(path, lambda: 0.0) as log:
            # The kill comes before a statement, COMMIT included: the call under way left nothing.
            assert state(log) == states[num_returned], f"died before statement {number}"
    assert os.WEXITSTATUS(status) == 0
    sys.stdout.write(f"{number - 1}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
