"""SessionStore: the files of the sessions, and the one thread that writes to the log."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from outrider.engine.warmth import Warmth
from outrider.serve.base import Server
from outrider.serve.response_store import MEMORY, ResponseStore
from outrider.session.log import SessionLog

T = TypeVar("T")


class SessionStore:
    """What sessions are kept in: the log, the responses, and bundles of warm state.

    Calls of the log go through `call`, those of the warm state through `AsyncLLM.call`.
    """

    def __init__(self, server: Server) -> None:
        folder = server.config.state_dir
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.log = SessionLog(_file(folder, "sessions.sqlite"), server.clock)
        self.responses = ResponseStore(_file(folder, "responses.sqlite"))
        warm_folder = None if folder is None else folder / "warm"
        self.warmth = Warmth(server.llm.engine, warm_folder, tokenizer=server.tokenizer)
        # One thread: calls are in order, and the event loop never waits for the disk.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="outrider-sessions")

    async def call(self, function: Callable[..., T], *args: Any, **named: Any) -> T:
        """A call of the log, in its thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, lambda: function(*args, **named))

    def close(self) -> None:
        """Closes the files; nothing is lost by it."""
        self._worker.shutdown()
        self.log.close()
        self.responses.close()


def _file(folder: Path | None, name: str) -> Path | str:
    return MEMORY if folder is None else folder / name
