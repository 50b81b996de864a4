"""Process: uvicorn around the application; a first SIGTERM drains, a second one ends at once."""

import asyncio
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from outrider.errors import ConfigError, OutriderError
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
        self._life = _Life(app)
        super().__init__(
            uvicorn.Config(
                self._life,
                http=_connections(self._served.config.write_timeout_s),
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(GOODBYE_S),
            )
        )

    def serve_until_told(self) -> None:
        """Listens and serves; returns after a drain.

        Raises:
            ConfigError: the address or the folder of the state is not free.
            SessionStorageError: a file of the state cannot be opened.
        """
        with self._listen() as listener:
            self.run(sockets=[listener])

    async def serve_in_loop(self) -> None:
        """The same in the event loop that runs."""
        with self._listen() as listener:
            await self.serve(sockets=[listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            await super().startup(sockets)
        except SystemExit:  # uvicorn has logged that it failed, and ends the process
            if self._life.refusal is not None:
                raise self._life.refusal from None
            raise
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
        # With protocol 0 asyncio would not know that this is TCP, and leave Nagle's algorithm on.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
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


class _Life:
    """An application, and the reason why it could not begin, which uvicorn would only log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.refusal: OutriderError | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return

        async def send_quietly(message: Message) -> None:
            if message["type"] == "lifespan.startup.failed":
                error = sys.exc_info()[1]
                if isinstance(error, OutriderError):
                    self.refusal = error
                    message = {"type": message["type"]}  # without the traceback
            await send(message)

        await self._app(scope, receive, send_quietly)


def _connections(write_timeout_s: float) -> type[asyncio.Protocol]:
    """uvicorn's connections, cut off where the client takes nothing of what it is sent.

    Nothing is buffered here beyond what one write leaves over, so a slow reader costs the memory
    of one frame, and what its generation makes meanwhile waits where it is counted (`Unread`).
    """

    class Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        _check: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._unwatch()

        def connection_lost(self, error: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(error)

        def _watch(self) -> None:
            num_left = self.transport.get_write_buffer_size()
            self._check = self.loop.call_later(write_timeout_s, self._abort_if_stalled, num_left)

        def _unwatch(self) -> None:
            if self._check is not None:
                self._check.cancel()

        def _abort_if_stalled(self, num_left: int) -> None:
            if self.transport.get_write_buffer_size() < num_left:
                self._watch()  # it is slow, but it reads
            else:
                self.transport.abort()

    return Connection
