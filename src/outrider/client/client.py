"""Client and AsyncClient: a server of `outrider serve`, as Python calls."""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable, Iterator, Mapping
from contextlib import aclosing
from typing import Any, Self

import httpx

from outrider.client.sessions import Sessions
from outrider.client.stream import Reader, Shown
from outrider.client.wire import TIMEOUT, Call, body_of, headers_of, refusal, unreachable

Input = str | Iterable[Mapping[str, Any]]


class Client:
    """`with Client("http://127.0.0.1:8000") as client: ...`; AsyncClient is the same for asyncio.

    Every failure is a ClientError.

    Args:
        base_url: without "/v1".
        transport: carries the requests; None opens connections as usual.

    Attributes:
        sessions: the calls of /v1/sessions.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(
            base_url=base_url, headers=headers_of(api_key), timeout=TIMEOUT, transport=transport
        )
        self.sessions: Sessions[dict[str, Any]] = Sessions(self._send)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def stream_response(
        self, input: Input, *, session: str | None = None, provisional: bool = True, **body: Any
    ) -> Iterator[Shown]:
        """States of one answer, each replacing the one before; the last has the final object.

        A connection that breaks is taken up once where it broke. That succeeds if the response
        goes on without its reader: with `background=True`, or in a session with detach="continue".

        Args:
            session: id of the session that the answer belongs to.
            provisional: whether tails are asked for.
            body: further fields of `POST /v1/responses`.

        Raises:
            ClientError: refused, failed, or the connection broke twice.
        """
        reader = Reader()
        call = _streamed(input, session, provisional, body)
        while not reader.is_done:
            cause: httpx.RequestError | None = None
            try:
                yield from self._read(call, reader)
            except httpx.RequestError as error:
                cause = error
            if not reader.is_done:
                call = reader.resume(cause)

    def _read(self, call: Call, reader: Reader) -> Iterator[Shown]:
        response = self._http.send(call.build(self._http), stream=True)
        try:
            if response.is_error:
                response.read()
                raise refusal(response)
            for line in response.iter_lines():
                yield from reader.take(line)
        finally:
            response.close()

    def _send(self, call: Call) -> dict[str, Any]:
        try:
            return body_of(self._http.send(call.build(self._http)))
        except httpx.RequestError as error:
            raise unreachable(error) from error


class AsyncClient:
    """`Client` for asyncio: its calls are awaited, its streams are read by `async for`."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(
            base_url=base_url, headers=headers_of(api_key), timeout=TIMEOUT, transport=transport
        )
        self.sessions: Sessions[Awaitable[dict[str, Any]]] = Sessions(self._send)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def stream_response(
        self, input: Input, *, session: str | None = None, provisional: bool = True, **body: Any
    ) -> AsyncIterator[Shown]:
        """As `Client.stream_response`."""
        reader = Reader()
        call = _streamed(input, session, provisional, body)
        while not reader.is_done:
            cause: httpx.RequestError | None = None
            try:
                async with aclosing(self._read(call, reader)) as states:
                    async for shown in states:
                        yield shown
            except httpx.RequestError as error:
                cause = error
            if not reader.is_done:
                call = reader.resume(cause)

    async def _read(self, call: Call, reader: Reader) -> AsyncGenerator[Shown, None]:
        response = await self._http.send(call.build(self._http), stream=True)
        try:
            if response.is_error:
                await response.aread()
                raise refusal(response)
            async for line in response.aiter_lines():
                for shown in reader.take(line):
                    yield shown
        finally:
            await response.aclose()

    async def _send(self, call: Call) -> dict[str, Any]:
        try:
            return body_of(await self._http.send(call.build(self._http)))
        except httpx.RequestError as error:
            raise unreachable(error) from error


def _streamed(
    input: Input, session: str | None, provisional: bool, body: Mapping[str, Any]
) -> Call:
    """The request of a streamed response; what the caller wrote into `body` is kept."""
    asked = {**body, "input": input if isinstance(input, str) else list(input), "stream": True}
    if session is not None:
        asked["outrider"] = {**(body.get("outrider") or {}), "session": session}
    if provisional:
        options = body.get("stream_options") or {}
        stream = {"visibility": "provisional", **(options.get("outrider") or {})}
        asked["stream_options"] = {**options, "outrider": stream}
    return Call(method="POST", path="/v1/responses", body=asked)
