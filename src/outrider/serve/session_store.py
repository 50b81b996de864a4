"""SessionStore: the files of the sessions, and the one thread that writes to the log."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

from outrider.engine.warmth import Warmth
from outrider.errors import SessionNotFound
from outrider.serve.base import Server
from outrider.serve.response_store import MEMORY, ResponseStore
from outrider.serve.session_maker import Maker
from outrider.session.folder import Folder
from outrider.session.log import SessionLog
from outrider.session.records import Quota, Session

T = TypeVar("T")


class SessionStore:
    """What sessions are kept in: the log, the responses, and bundles of warm state.

    Calls of the log go through `call`, those of the warm state through `AsyncLLM.call`.

    Raises:
        ConfigError: another process uses the folder. SessionStorageError: a file cannot be opened.
    """

    def __init__(self, server: Server) -> None:
        config = server.config
        quota = Quota(tokens=config.max_session_tokens, sessions=config.max_sessions)
        with ExitStack() as opened:
            folder = config.state_dir
            self.folder = None if folder is None else Folder(folder)
            if self.folder is not None:
                opened.callback(self.folder.release)
            self.log = SessionLog(_file(folder, "sessions.sqlite"), server.clock, quota=quota)
            opened.callback(self.log.close)
            self.responses = ResponseStore(_file(folder, "responses.sqlite"))
            opened.callback(self.responses.close)
            warm_folder = None if folder is None else folder / "warm"
            self.maker = Maker.here(server)
            self.warmth = Warmth(server.llm.engine, warm_folder, tokenizer=server.tokenizer)
            # One thread: calls are in order, and the event loop never waits for the disk.
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="outrider-sessions")
            opened.callback(self._worker.shutdown)
            self._opened = opened.pop_all()

    async def call(self, function: Callable[..., T], *args: Any, **named: Any) -> T:
        """A call of the log, in its thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, lambda: function(*args, **named))

    async def find(self, tenant: str, name: str) -> Session:
        """A session by its id, or by the client's own name for it. SessionNotFound."""
        try:
            return await self.call(self.log.get, tenant, name)
        except SessionNotFound:
            with suppress(SessionNotFound):
                return await self.call(self.log.of_conversation, tenant, name)
            raise

    def close(self) -> None:
        """Closes the files; nothing is lost by it."""
        self._opened.close()


def _file(folder: Path | None, name: str) -> Path | str:
    return MEMORY if folder is None else folder / name
