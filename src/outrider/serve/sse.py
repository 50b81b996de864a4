"""event_stream: frames as server-sent events, kept alive while nothing happens."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from outrider.serve.errors import ApiError, as_api_error
from outrider.stream.pad import pad

KEEP_ALIVE_S = 15.0
KEEP_ALIVE = b": keep-alive\n\n"
DONE = "[DONE]"
_BREAK = re.compile(r"\r\n|\r|\n")  # what ends a line of an event stream, and nothing else
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One event on the wire: a mapping goes as JSON, a text as it is."""

    data: Mapping[str, Any] | str
    event: str | None = None
    id: str | None = None

    def encode(self, *, pads: bool = False) -> bytes:
        """The bytes of the event; with `pads` those of a mapping are of few sizes."""
        head = f"id: {self.id}\n" if self.id is not None else ""
        head += f"event: {self.event}\n" if self.event is not None else ""
        if isinstance(self.data, str):
            lines = "".join(f"data: {line}\n" for line in _BREAK.split(self.data))
            return f"{head}{lines}\n".encode()
        data = dumps(self.data)
        if pads and self.data:
            data = pad(data, num_other=len(head) + len("data: \n\n"))
        return f"{head}data: {data}\n\n".encode()


ErrorFrames = Callable[[ApiError], Iterable[Frame]]


def openai_error(error: ApiError) -> list[Frame]:
    """How a stream of Chat Completions or Completions ends that has failed."""
    return [Frame(data=error.body()), Frame(data=DONE)]


def anthropic_error(error: ApiError) -> list[Frame]:
    """How a stream of Messages ends that has failed."""
    return [Frame(data=error.anthropic_body(), event="error")]


def event_stream(
    frames: AsyncIterator[Frame],
    *,
    on_error: ErrorFrames = openai_error,
    pads: bool = False,
    keep_alive_s: float = KEEP_ALIVE_S,
    headers: Mapping[str, str] | None = None,
) -> StreamingResponse:
    """A response of these frames; the iterator is closed when they end or the client leaves.

    What fails before the first frame gets a status of its own, as if nothing were streamed: so
    yield no frame before the engine's first event (see `generation.started`). What fails later
    ends the stream with the frames of `on_error`. After `keep_alive_s` without a frame a comment
    is sent, which clients ignore and proxies count as life. With `pads` the size of a frame does
    not tell how many tokens it carries.
    """
    return _EventStream(frames, on_error, pads, keep_alive_s, {**HEADERS, **(headers or {})})


def dumps(value: Any) -> str:
    """JSON in ASCII, on one line: half a surrogate pair goes through, and no reader splits it."""
    return json.dumps(value, separators=(",", ":"))


class _EventStream(StreamingResponse):
    """Says 200 no sooner than the first frame is there, or the first keep-alive is due."""

    def __init__(
        self,
        frames: AsyncIterator[Frame],
        on_error: ErrorFrames,
        pads: bool,
        keep_alive_s: float,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(iter(()), media_type="text/event-stream", headers=headers)
        self._frames = frames
        self._on_error = on_error
        self._pads = pads
        self._keep_alive_s = keep_alive_s
        self._is_started = False
        self._last = 0.0  # when something was sent
        self._door = asyncio.Lock()  # one writer at a time: frames, or the keep-alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        living = asyncio.create_task(self._keep_alive(send))
        try:
            await self._write_all(send)
        finally:
            living.cancel()
            await asyncio.gather(living, return_exceptions=True)
            aclose = getattr(self._frames, "aclose", None)
            if aclose is not None:
                await aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write_all(self, send: Send) -> None:
        try:
            async for frame in self._frames:
                await self._write(frame.encode(pads=self._pads), send)
            await self._write(b"", send)  # a stream of nothing has a head too
        except Exception as error:
            told = as_api_error(error)
            if not self._is_started:
                raise told from error
            for frame in self._on_error(told):
                await self._write(frame.encode(pads=self._pads), send)

    async def _write(self, body: bytes, send: Send) -> None:
        async with self._door:
            if not self._is_started:
                self._is_started = True
                head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(head)
            self._last = asyncio.get_running_loop().time()
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})

    async def _keep_alive(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._last = loop.time()
        while True:
            wait_s = self._last + self._keep_alive_s - loop.time()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            else:
                await self._write(KEEP_ALIVE, send)
