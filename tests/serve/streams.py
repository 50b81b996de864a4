"""What tests of streams need: server-sent events read, and a client that leaves when it likes."""

import asyncio
import json
from collections.abc import Awaitable
from typing import Any, NamedTuple, TypeVar

from fastapi import FastAPI

T = TypeVar("T")
SLICE_S = 0.5


class Event(NamedTuple):
    """One server-sent event."""

    id: str | None
    event: str | None
    data: Any


def parse(text: str) -> list[Event]:
    """All events of a stream's text; comments are no events."""
    return [_event(block) for block in text.split("\n\n") if block and not block.startswith(":")]


def _event(block: str) -> Event:
    lines = dict(line.split(": ", 1) for line in block.split("\n"))
    data = lines["data"]
    return Event(lines.get("id"), lines.get("event"), json.loads(data) if data[0] == "{" else data)


async def patient(awaited: Awaitable[T], seconds: float = 20) -> T:
    """Its result; TimeoutError after so many seconds of this process's own life.

    A machine that stops the process for a while, or for minutes, takes no more than a slice.
    """
    task = asyncio.ensure_future(awaited)
    try:
        for _ in range(round(seconds / SLICE_S)):
            await asyncio.wait([task], timeout=SLICE_S)
            if task.done():
                return task.result()
        raise TimeoutError(f"nothing came in {seconds:g} s")
    finally:
        task.cancel()


class Visit:
    """One request to an application, event by event; `leave` drops the connection.

    `async with Visit(app, "POST", "/v1/responses", {...}) as visit: await visit.next()`.
    """

    def __init__(self, app: FastAPI, method: str, path: str, body: Any = None, **headers: str):
        path, _, query = path.partition("?")
        self._body = b"" if body is None else json.dumps(body).encode()
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(self._body)).encode()),
                *((k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()),
            ],
            "client": ("test", 1),
            "server": ("test", 80),
            "state": {},
        }
        self._app = app
        self._gone = asyncio.Event()
        self._has_sent = False
        self._out: asyncio.Queue[str | None] = asyncio.Queue()
        self._rest = ""
        self.status = 0

    async def __aenter__(self) -> "Visit":
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.leave()

    async def leave(self) -> None:
        """The client is gone."""
        self._gone.set()
        await patient(asyncio.gather(self._task, return_exceptions=True))

    async def next(self) -> Event | None:
        """The next event; None at the end."""
        while "\n\n" not in self._rest:
            piece = await patient(self._out.get())
            if piece is None:
                return None
            self._rest += piece
        block, _, self._rest = self._rest.partition("\n\n")
        return _event(block)

    async def take(self, count: int) -> list[Event]:
        return [event for _ in range(count) if (event := await self.next()) is not None]

    async def rest(self) -> list[Event]:
        found = []
        while (event := await self.next()) is not None:
            found.append(event)
        return found

    async def _run(self) -> None:
        try:
            await self._app(self._scope, self._receive, self._send)
        finally:
            self._out.put_nowait(None)

    async def _receive(self) -> dict[str, Any]:
        if not self._has_sent:
            self._has_sent = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if self._gone.is_set():
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message.get("body"):
            self._out.put_nowait(message["body"].decode())
        await asyncio.sleep(0)
