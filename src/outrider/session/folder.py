"""Folder: where a server keeps its state; for its owner alone, and for one process at a time."""

import fcntl
import logging
import os
from pathlib import Path

from outrider.errors import ConfigError

LOCK = "lock"
logger = logging.getLogger(__name__)


class Folder:
    """A folder that is this process's until `release`, or until the process ends, however it does.

    Two servers over one folder would take up each other's turns in the making, and evict each
    other's bundles.

    Args:
        path: made if it is not there, with its parents.

    Raises:
        ConfigError: another process has it, or it cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock: int | None = os.open(path / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise ConfigError(
                f"state_dir={str(path)!r} cannot be used ({error.strerror or error}): "
                "name a folder that can be written"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.release()
            raise ConfigError(
                f"state_dir={str(path)!r} is in use by another server: stop that one, or name "
                "another folder"
            ) from None
        _close_to_others(path)

    def release(self) -> None:
        """Idempotent."""
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)


def _close_to_others(path: Path) -> None:
    try:
        path.chmod(0o700)
    except OSError as error:  # somebody else's: the files in it are private all the same
        logger.warning("folder %s stays open to others: %s", path, error)
