"""Process: uvicorn around the application; a first SIGTERM drains, a second one ends at once."""

import asyncio
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from outrider.errors import ConfigError
from outrider.serve.app import GOODBYE_S, drain
from outrider.serve.base import Server


class Process(uvicorn.Server):
    """One server of one application.

    Args:
        tell: called with the URL once requests are let in.
    """

    def __init__(self, app: FastAPI, tell: Callable[[str], None]) -> None:
        self._served: Server = app.state.server
        self._tell = tell
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        super().__init__(
            uvicorn.Config(
                app,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(GOODBYE_S),
            )
        )

    def serve_until_told(self) -> None:
        """Listens and serves; returns after a drain. ConfigError where the address is not free."""
        with self._listen() as listener:
            self.run(sockets=[listener])

    async def serve_in_loop(self) -> None:
        """The same in the event loop that runs."""
        with self._listen() as listener:
            await self.serve(sockets=[listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            self._tell(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """In place of uvicorn's, which closes the door at once and so cannot say 503."""
        if self._draining is not None or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        try:
            await drain(self._served)
        finally:
            self.should_exit = True

    def _listen(self) -> socket.socket:
        host, port = self._served.config.host, self._served.config.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
        except OSError as error:
            listener.close()
            raise ConfigError(
                f"host={host!r}, port={port}: cannot listen there ({error.strerror or error}); "
                "choose another, or port 0 for a free one"
            ) from None
        return listener
