"""Journal: finished blocks of a run on disk as they come, so that an interrupted run goes on.

JSON lines: the plan first, then {"key": ..., "block": ...} per finished block. The file lies beside
the result that is to be, and goes when the result is written.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from outrider.bench.result import content_hash, plain, write_text
from outrider.errors import ConfigError

VERSION = 1
SUFFIX = ".journal"


class Journal:
    """Blocks by key. Without a path it only remembers.

    Used as a context it closes its file and leaves it there; `finish` removes it.
    """

    def __init__(
        self, path: Path | None, plan: Mapping[str, Any], done: Mapping[str, Any] | None = None
    ) -> None:
        """Begins a file anew, or goes on behind `done`; see `open_journal`."""
        self.path = path
        self.plan = plain(plan)
        self._done: dict[str, Any] = dict(done or {})
        self.num_resumed = len(self._done)
        self._file: TextIO | None = None
        if path is not None:
            write_text(path, "".join(map(_line, self._records())))
            self._file = path.open("a", encoding="utf-8")

    def __contains__(self, key: str) -> bool:
        return key in self._done

    def __getitem__(self, key: str) -> Any:
        return self._done[key]

    def __len__(self) -> int:
        return len(self._done)

    def items(self) -> Iterator[tuple[str, Any]]:
        """Keys and blocks in the order in which they were finished."""
        yield from self._done.items()

    def add(self, key: str, block: Any) -> Any:
        """Keeps a finished block; returns it as it will be read back."""
        assert key not in self._done, f"block {key!r} was measured twice"
        self._done[key] = plain(block)
        if self._file is not None:
            self._file.write(_line({"key": key, "block": self._done[key]}))
            self._file.flush()
        return self._done[key]

    def finish(self) -> None:
        """The result is written: nothing is left to go on with."""
        self.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _records(self) -> Iterator[dict[str, Any]]:
        yield {"journal": VERSION, "hash": content_hash(self.plan), "plan": self.plan}
        for key, block in self._done.items():
            yield {"key": key, "block": block}


def open_journal(result: Path | None, plan: Mapping[str, Any], *, resume: bool = False) -> Journal:
    """The journal of the run that will write `result`; None keeps no file.

    Args:
        plan: what the blocks depend on, of types that JSON has: settings, data, target. What only
            says when to stop (a budget) is no part of it, so that it may be raised.
        resume: go on with what was finished; without it the run begins anew.

    Raises:
        ConfigError: there is nothing to go on with, or the journal is of another plan; the message
            names what differs.
    """
    path = None if result is None else result.with_name(result.name + SUFFIX)
    if not resume:
        return Journal(path, plan)
    if path is None:
        raise ConfigError("--resume: a run leaves its journal beside its result; give --json FILE")
    if not path.is_file():
        raise ConfigError(f"--resume: there is no {str(path)!r} to go on with; drop --resume")
    return Journal(path, plan, _read(path, plain(plan)))


def _read(path: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Blocks of the same plan. A line that breaks off was being written when the run ended."""
    header, *rest = list(_records(path)) or [{}]
    if header.get("journal") != VERSION:
        raise ConfigError(f"--resume: {str(path)!r} is no journal of this version; drop --resume")
    if header["hash"] != content_hash(plan):
        raise ConfigError(
            f"--resume: {str(path)!r} is of another run ({_differences(header['plan'], plan)}); "
            "ask for the same, or drop --resume"
        )
    return {record["key"]: record["block"] for record in rest}


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    told = [f"{key}: {_short(old.get(key))}, now {_short(new.get(key))}" for key in differing]
    return "; ".join(told)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
