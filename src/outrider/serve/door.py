"""Door: what happens to every request before a route sees it, and when its client leaves.

Plain ASGI, outermost first: an id for the request, a look at the name that the server is called
by, a bound on the body, an end to the work when the client is gone, and a closed mouth about what
we did not foresee.
"""

import asyncio
import re
import uuid
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from outrider.serve.config import ServeConfig
from outrider.serve.errors import ApiError, error_response
from outrider.serve.hosts import Hosts

_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class Door:
    """One per application.

    Of `config` it heeds `allowed_hosts`: a request by another name is refused with 403; and
    `max_body_bytes`: a longer body is refused with 413, whether it says its length or not.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self._app = app
        self._config = config
        self._hosts = Hosts(config.allowed_hosts, is_loopback=config.is_loopback)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = _Visit(scope, receive, send, self._config)
        try:
            visit.begin(self._hosts)
            await self._app(scope, visit.receive, visit.send)
        except asyncio.CancelledError:
            if not visit.has_cancelled():
                raise
        except Exception as error:
            response = error_response(error, scope)  # logs what was not foreseen
            if not visit.is_answered:
                await response(scope, receive, visit.send)
        finally:
            await visit.close()


class _Visit:
    """One request; the task that serves it is cancelled when the client is gone."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, config: ServeConfig) -> None:
        self._headers = Headers(scope=scope)
        self.id = _request_id(self._headers.get("x-request-id", ""))
        scope.setdefault("state", {})["request_id"] = self.id
        self._receive = receive
        self._send = send
        self._max_body_bytes = config.max_body_bytes
        self._num_bytes = 0
        self._task = asyncio.current_task()
        self._gone = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._is_cancelled = False
        self._is_read = False  # the body, by the routes
        self.is_answered = False
        self._is_over = False

    def begin(self, hosts: Hosts) -> None:
        """ApiError 403 for a name that is not ours, 413 where the announced length is too much."""
        host = self._headers.get("host", "")
        if not hosts.allows(host):
            raise _not_here(host)
        length = self._headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length) > self._max_body_bytes:
            raise self._too_long()
        if length == "0" and "transfer-encoding" not in self._headers:
            self._watch()  # there is no body, and routes without one never ask for it

    async def receive(self) -> Message:
        if self._is_read:
            await self._gone.wait()
            return {"type": "http.disconnect"}
        if self._watcher is not None:
            self._is_read = True
            return {"type": "http.request", "body": b"", "more_body": False}
        message = await self._receive()
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            if self._num_bytes > self._max_body_bytes:
                # FastAPI hides other exceptions that come from reading a body.
                raise HTTPException(413, self._too_long().message)
            if not message.get("more_body", False):
                self._is_read = True
                self._watch()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.is_answered = True
            MutableHeaders(scope=message)["X-Request-Id"] = self.id
            if self._watcher is None:
                self._watch()  # nobody will read the body any more
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._is_over = True
        await self._send(message)

    def has_cancelled(self) -> bool:
        """Whether it was the client's leaving that cancelled the task; then it is as if not."""
        if self._is_cancelled and self._task is not None:
            self._task.uncancel()
        return self._is_cancelled

    async def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            with suppress(asyncio.CancelledError):
                await self._watcher

    def _watch(self) -> None:
        self._watcher = asyncio.create_task(self._until_gone())

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone.set()
        if not self._is_over and self._task is not None:
            self._is_cancelled = True
            self._task.cancel()

    def _too_long(self) -> ApiError:
        return ApiError(
            413,
            f"the body is longer than {self._max_body_bytes} bytes: send less",
            code="body_too_long",
            headers={"Connection": "close"},
        )


def _not_here(host: str) -> ApiError:
    return ApiError(
        403,
        f"Host: {host!r} is no name of this server: call it by its address, or start it with "
        "--allowed-host for that name",
        code="host_not_allowed",
    )


def _request_id(given: str) -> str:
    """The client's own if it is harmless in a header and a log, else a new one."""
    return given if _ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
