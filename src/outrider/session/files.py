"""Where bundles lie: named byte strings on disk or in memory, in order of use."""

import contextlib
import os
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

MARK = ".part"  # ends the names of files that are being written


class Files(Protocol):
    """A flat set of byte strings; each is there whole, or not at all.

    Attributes:
        tier: "disk" or "host".
    """

    tier: str

    def names(self) -> list[str]:
        """Least recently used first."""
        ...

    def read(self, name: str) -> bytes | None:
        """None where there is none, or none that can be read."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Replaces what had the name. OSError where there is no room; then nothing changed."""
        ...

    def touch(self, name: str) -> None:
        """It was used."""
        ...

    def remove(self, name: str) -> None: ...


class DiskFiles:
    """Files of one folder. What `write` returned from survives a crash of the machine.

    The folder is made for its owner alone: KV tells the text it was made from.
    """

    tier = "disk"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for left_behind in folder.glob(f"*{MARK}"):
            left_behind.unlink(missing_ok=True)

    def names(self) -> list[str]:
        found = []
        for path in self._folder.iterdir():
            with contextlib.suppress(OSError):  # another process may have removed it
                found.append((path.stat().st_mtime_ns, path.name))
        return [name for _, name in sorted(found)]

    def read(self, name: str) -> bytes | None:
        try:
            return (self._folder / name).read_bytes()
        except OSError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Aside, then renamed into place; the file first and the folder after it reach the disk."""
        handle, aside = tempfile.mkstemp(dir=self._folder, suffix=MARK)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self._folder / name)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
        self._sync_folder()

    def touch(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.utime(self._folder / name)

    def remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    def _sync_folder(self) -> None:
        handle = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class MemoryFiles:
    """The same in memory, gone with the process."""

    tier = "host"

    def __init__(self) -> None:
        self._data: OrderedDict[str, bytes] = OrderedDict()

    def names(self) -> list[str]:
        return list(self._data)

    def read(self, name: str) -> bytes | None:
        return self._data.get(name)

    def write(self, name: str, data: bytes) -> None:
        self._data[name] = data
        self._data.move_to_end(name)

    def touch(self, name: str) -> None:
        if name in self._data:
            self._data.move_to_end(name)

    def remove(self, name: str) -> None:
        self._data.pop(name, None)
