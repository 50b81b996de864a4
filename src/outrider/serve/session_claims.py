"""Claims: one writer per session, and who that is."""

from collections.abc import Iterator
from contextlib import contextmanager

from outrider.errors import SessionConflict


class Claims:
    """Sessions that somebody writes to: a response, or a call such as "rewind"."""

    def __init__(self) -> None:
        self._holders: dict[str, str] = {}

    def holder(self, session: str) -> str | None:
        """Who writes to a session; None if nobody does."""
        return self._holders.get(session)

    def hold(self, session: str, name: str) -> str:
        """From now on, until `release`; returns the session. SessionConflict if it is taken."""
        if session in self._holders:
            raise SessionConflict(
                f"session {session!r} is busy with {self._holders[session]!r}: wait for it, "
                "cancel it, or fork"
            )
        self._holders[session] = name
        return session

    def release(self, session: str) -> None:
        self._holders.pop(session, None)

    @contextmanager
    def during(self, session: str, name: str) -> Iterator[None]:
        """For the time of a block; SessionConflict if it is taken."""
        self.hold(session, name)
        try:
            yield
        finally:
            self.release(session)
