"""generate and whole: one request through the gate and the engine, as events or as answers."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import cast

from outrider.engine.outputs import Completion
from outrider.errors import RequestError
from outrider.request import PastDrafts, SamplingParams, SpeculationParams
from outrider.sampling.shaper import DEAD_END
from outrider.serve.base import Server
from outrider.serve.delivery import delivered
from outrider.serve.errors import ApiError
from outrider.serve.gate import DRAINING
from outrider.stream.events import Committed, Event, RequestMetrics, TokenLogprob
from outrider.stream.options import StreamOptions
from outrider.verify.base import Exactness
from outrider.verify.verifiers import verifier


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a dialect made of a request's body.

    Attributes:
        prompt: token ids. speculation: None is the engine's default.
        stream: what the client may see, and when.
        priority: smaller runs first. tenant: shares no cache with others.
        experience: how drafts for such text fared before, by drafter.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams
    stream: StreamOptions = field(default_factory=StreamOptions)
    speculation: SpeculationParams | None = None
    tenant: str = ""
    priority: int = 0
    experience: PastDrafts = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One completion as a whole.

    Attributes:
        finish_reason: "stop" or "length".
        stop_reason: the stop text or token that ended it.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str
    stop_reason: str | int | None
    metrics: RequestMetrics


async def generate(
    server: Server, ask: Ask, request_id: str, *, queued: Callable[[], object] | None = None
) -> AsyncGenerator[Event]:
    """Events of one request as a client can take them; closing the iterator aborts it.

    Pacing is done here, a slow reader of tails gets the latest one only (`delivered`), and the
    place in the engine is free once it is done, however much is still to be read.

    Args:
        request_id: unique among those in flight; not the client's X-Request-Id.
        queued: called once the gate has not refused it, before any event.

    Raises:
        ApiError: 429 or 503 at the gate, 503 when a drain took too long, 504 out of time, 400
            where the settings leave no token to go on with, 500 where it failed otherwise.
        RequestError: it cannot be served as asked. EngineError: the engine broke down.
        FellBehindError: far more is unread than is kept for one reader.
    """
    _check(server, ask)
    admitted = _admitted(server, ask, request_id, queued)
    events = delivered(admitted, ask.stream, server.unread)
    async with aclosing(events):
        async for event in events:
            yield event


async def started(events: AsyncGenerator[Event]) -> AsyncGenerator[Event]:
    """The same events once the first has come: refusals are raised here, before any frame."""
    first = await anext(events)
    all_of_them = _from(first, events)
    await anext(all_of_them)  # a generator that never began would not close what it reads
    return all_of_them


async def _from(first: Event, events: AsyncGenerator[Event]) -> AsyncGenerator[Event]:
    """A word that nobody reads, then all events."""
    async with aclosing(events):
        yield first
        yield first
        async for event in events:
            yield event


async def whole(server: Server, ask: Ask, request_id: str) -> list[Answer]:
    """All completions of one request, in order. Raises as `generate`."""
    made = [Completion(index=index) for index in range(ask.sampling.n)]
    _check(server, ask)
    async with aclosing(_admitted(server, ask, request_id)) as events:
        async for event in events:
            if isinstance(event, Committed):
                made[event.index].take(event)
    return [_answer(completion) for completion in made]


async def _admitted(
    server: Server, ask: Ask, request_id: str, queued: Callable[[], object] | None = None
) -> AsyncGenerator[Event]:
    """Through the gate and the engine, in time, and counted."""
    deadline = asyncio.get_running_loop().time() + server.config.request_timeout_s
    watch = server.metrics.watch(len(ask.prompt), ask.sampling.n)
    try:
        async with (
            server.gate.seat(deadline, queued=queued),
            aclosing(_submit(server, ask, request_id)) as events,
        ):
            watch.admit()
            server.open_requests.add(request_id)
            while True:
                async with asyncio.timeout_at(deadline):
                    event = await anext(events, None)
                if event is None:
                    return
                watch.take(event)
                _raise_if_broken_off(event)
                yield event
    except TimeoutError:
        raise _too_late(server) from None
    finally:
        server.open_requests.discard(request_id)
        watch.close()


def _raise_if_broken_off(event: Event) -> None:
    """A completion that failed, or that a drain aborted, is no answer."""
    reason = event.finish_reason if isinstance(event, Committed) else None
    if isinstance(event, Committed) and reason == "error":
        status = 400 if event.error.startswith(DEAD_END) else 500
        raise ApiError(status, event.error, code="generation_failed")
    if reason == "abort":
        message = "the server shut down before the answer was complete: ask again"
        raise ApiError(503, message, code=DRAINING, headers={"Retry-After": "1"})


def _submit(server: Server, ask: Ask, request_id: str) -> AsyncGenerator[Event]:
    events = server.engine.generate(
        ask.prompt,
        ask.sampling,
        ask.speculation,
        stream=ask.stream.params,
        request_id=request_id,
        priority=ask.priority,
        tenant=ask.tenant,
        experience=ask.experience,
    )
    return cast(AsyncGenerator[Event], events)


def _check(server: Server, ask: Ask) -> None:
    """RequestError for a rule that the operator does not allow."""
    asked = ask.speculation and ask.speculation.verifier
    if not asked:
        return
    exactness = verifier(asked).exactness
    for kind, is_allowed in (
        (Exactness.LOSSY, server.config.allow_lossy),
        (Exactness.SYNTHETIC, server.config.allow_synthetic),
    ):
        if exactness is kind and not is_allowed:
            raise RequestError(
                f"verifier={asked!r}: this server does not allow {kind.value} rules; drop it, or "
                f"start the server with --allow-{kind.value}"
            )


def _answer(made: Completion) -> Answer:
    return Answer(
        index=made.index,
        text=made.text,
        token_ids=tuple(made.token_ids),
        logprobs=tuple(made.logprobs),
        finish_reason=made.finish_reason or "",
        stop_reason=made.stop_reason,
        metrics=made.metrics,
    )


def _too_late(server: Server) -> ApiError:
    limit = server.config.request_timeout_s
    message = f"the request took longer than {limit:g} s: ask for fewer tokens or try again later"
    return ApiError(504, message, code="timeout")
