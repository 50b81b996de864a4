"""Remote: any OpenAI-compatible server as a target, by its URL."""

import asyncio
import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Sequence as Items
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from outrider.bench.feed import Feed, Listed, due_of, in_order_of
from outrider.bench.remote_body import body_of, isolates_tenants
from outrider.bench.remote_reading import Lines, Reading, message_of
from outrider.bench.remote_server import ServerFacts, counters, look
from outrider.bench.target import Acceptance, Ask, Reply
from outrider.errors import ConfigError, OutriderError

T = TypeVar("T")
KEEP_ALIVE_S = 2.0  # less than servers wait before they close an idle connection


class Remote:
    """A server that speaks OpenAI's chat and completions: ours, vLLM, SGLang, llama.cpp, others.

    Nothing is sent twice: a request that failed is a reply with its error. Answers are streamed;
    a chunk's time is when its bytes were read.

    Args:
        url: with or without "/v1".
        model: as the server names it; None takes the first that it lists.
        api_key: None takes OPENAI_API_KEY from the environment, if it is set.
        timeout_s: longest silence within an answer.
        count_tokens: of a text, for servers that do not count.
        transport: carries the requests; None opens connections as usual.
    """

    has_chat_template = True

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        count_tokens: Callable[[str], int] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.name = _root(url)
        self._model = model
        self._count_tokens = count_tokens
        self._facts: ServerFacts | None = None
        key = os.environ.get("OPENAI_API_KEY") if api_key is None else api_key
        self._http = httpx.AsyncClient(
            base_url=self.name,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout_s, connect=10.0, pool=None),
            limits=httpx.Limits(
                max_connections=None,
                max_keepalive_connections=None,
                keepalive_expiry=KEEP_ALIVE_S,
            ),
            transport=transport,
        )
        # One loop for all runs, so that connections outlive a run.
        self._runner = asyncio.Runner()
        self._close = weakref.finalize(self, _close, self._runner, self._http)

    def close(self) -> None:
        """Closes the connections; otherwise the end of the program does."""
        self._close()

    @property
    def facts(self) -> ServerFacts:
        """Who is there; asked once. Raises ConfigError as `run`."""
        if self._facts is None:
            self._facts = self._wait(look(self._http, self._model))
        return self._facts

    def describe(self) -> dict[str, Any]:
        facts = self.facts
        return {
            "kind": "remote",
            "name": self.name,
            "model": facts.model,
            "root": facts.root or None,
            "engine": facts.kind or "unknown",
            "engine_version": facts.version or None,
            "max_model_len": facts.max_model_len,
            "isolates_tenants": isolates_tenants(facts.kind),
            **({"speculation_gauges": dict(facts.gauges)} if facts.gauges else {}),
        }

    def run(
        self,
        asks: Items[Ask],
        *,
        concurrency: int,
        tick: Callable[[Reply], None] = lambda reply: None,
    ) -> list[Reply]:
        """As `Target.run`.

        Raises:
            ConfigError: no server there, a wrong key, a model that it does not have.
        """
        return in_order_of(asks, self.serve(Listed(asks), concurrency=concurrency, tick=tick))

    def serve(
        self,
        feed: Feed,
        *,
        concurrency: int,
        tick: Callable[[Reply], None] = lambda reply: None,
    ) -> list[Reply]:
        """Answers what a feed asks, until it ends; replies in the order in which they came."""
        if concurrency < 1:
            raise ConfigError(f"concurrency={concurrency}: must be at least 1")
        run = _Run(self._http, self.facts, feed, concurrency, tick, self._count_tokens)
        return self._wait(run.to_the_end())

    def counters(self) -> Acceptance | None:
        """As the server's /metrics has them; None where it counts no drafts."""
        self.facts  # noqa: B018  # raises where nobody is there
        return self._wait(counters(self._http))

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(coroutine)


class _Run:
    """One call of `serve`: sends what is due, and gathers what comes."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        facts: ServerFacts,
        feed: Feed,
        concurrency: int,
        tick: Callable[[Reply], None],
        count_tokens: Callable[[str], int] | None,
    ) -> None:
        self._http = http
        self._facts = facts
        self._feed = feed
        self._concurrency = concurrency
        self._tick = tick
        self._count_tokens = count_tokens
        self._flights: set[asyncio.Task[Reply]] = set()
        self._replies: list[Reply] = []
        self._has_landed = asyncio.Event()
        self._start_s = time.perf_counter()

    async def to_the_end(self) -> list[Reply]:
        try:
            while True:
                self._send_due()
                due_s = self._feed.due_s
                if not self._flights and due_s is None:
                    return self._replies
                is_full = len(self._flights) >= self._concurrency
                await self._sleep(None if is_full or due_s is None else due_s)
        finally:
            for task in self._flights:
                task.cancel()
            await asyncio.gather(*self._flights, return_exceptions=True)

    def _now(self) -> float:
        return time.perf_counter() - self._start_s

    def _send_due(self) -> None:
        while len(self._flights) < self._concurrency:
            due_s, now_s = self._feed.due_s, self._now()
            if due_s is None or due_s > now_s:
                return
            self._flights.add(asyncio.create_task(self._answer(self._feed.take(now_s))))

    async def _sleep(self, until_s: float | None) -> None:
        """Until then, or until an answer is complete; those are handed out."""
        timeout = None if until_s is None else max(0.0, until_s - self._now())
        with suppress(TimeoutError):
            await asyncio.wait_for(self._has_landed.wait(), timeout)
        self._has_landed.clear()
        for task in [task for task in self._flights if task.done()]:
            self._flights.discard(task)
            reply = task.result()
            self._replies.append(reply)
            self._feed.note(reply)
            self._tick(reply)

    async def _answer(self, ask: Ask) -> Reply:
        try:
            return await self._read(ask)
        finally:
            self._has_landed.set()

    async def _read(self, ask: Ask) -> Reply:
        try:
            path, body = body_of(ask, self._facts)
            content = json.dumps(body).encode()
        except (OutriderError, TypeError, ValueError) as error:
            now_s = self._now()
            return Reply(ask=ask, due_s=due_of(ask, now_s), sent_s=now_s, error=str(error))
        request = self._http.build_request(
            "POST", path, content=content, headers={"Content-Type": "application/json"}
        )
        sent_s = self._now()
        reading = Reading(ask, due_of(ask, sent_s), sent_s, self._count_tokens)
        try:
            await self._stream(request, reading)
        except httpx.HTTPError as error:
            reading.fail(f"{type(error).__name__}: {error}".rstrip(": "))
        return reading.reply()

    async def _stream(self, request: httpx.Request, reading: Reading) -> None:
        response = await self._http.send(request, stream=True)
        try:
            if response.is_error:
                await response.aread()
                reading.fail(_refusal(response))
                return
            lines = Lines()
            async for piece in response.aiter_bytes():
                now_s = self._now()
                for data in lines.take(piece):
                    reading.take(data, now_s)
        finally:
            await response.aclose()


def _root(url: str) -> str:
    """Scheme, host, port and prefix, without "/v1" and without a password in it."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"url={url!r}: give one like http://127.0.0.1:8000")
    if parts.username or parts.password:
        raise ConfigError("url: holds a password; give the key as OPENAI_API_KEY instead")
    path = parts.path.rstrip("/").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc}{path}"


def _refusal(response: httpx.Response) -> str:
    try:
        told = message_of(response.json())
    except ValueError:
        told = response.text[:300]
    return f"status {response.status_code}: {told or response.reason_phrase}"


def _close(runner: asyncio.Runner, http: httpx.AsyncClient) -> None:
    """Wherever the last reference goes: a thread in which a loop runs can run no other."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        _end(runner, http)
        return
    thread = threading.Thread(target=_end, args=(runner, http))
    thread.start()
    thread.join()


def _end(runner: asyncio.Runner, http: httpx.AsyncClient) -> None:
    with suppress(RuntimeError):  # the loop is gone already
        runner.run(http.aclose())
    runner.close()
