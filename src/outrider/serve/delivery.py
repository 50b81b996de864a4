"""delivered: a request's events as one client can take them, and what its stream looks like."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from outrider.request import SamplingParams
from outrider.serve.base import Server
from outrider.serve.schemas_generation import OutriderStream
from outrider.serve.sse import Frame, dumps
from outrider.stream.events import Event, Tail
from outrider.stream.options import StreamOptions
from outrider.stream.outbox import Outbox, Unread
from outrider.stream.pad import pad

HEADER = "X-Outrider-Stream"


def stream_options(server: Server, asked: OutriderStream | None, header: str) -> StreamOptions:
    """What is in force: the body says it, else the header, else the usual.

    Where others than this machine could watch, frames are padded and sent at a pace, so that their
    sizes and times do not tell what was accepted in each step, unless the client says no.

    Raises:
        RequestError: an option that is not known, or a value out of its range.
    """
    is_padded = not server.config.is_loopback
    if asked is not None and asked.include_obfuscation is not None:
        is_padded = asked.include_obfuscation
    pacing = "smooth" if is_padded else "burst"
    if asked is not None and asked.outrider is not None:
        return StreamOptions.from_body(asked.outrider, pad=is_padded, pacing=pacing)
    if header:
        return StreamOptions.from_header(header, pad=is_padded, pacing=pacing)
    return StreamOptions(pad=is_padded, pacing=pacing)


def without_tails(options: StreamOptions) -> StreamOptions:
    """For answers whose drafts are not to be shown: calls of tools, structured outputs (I6)."""
    return replace(options, visibility="verified")


def shown(options: StreamOptions, sampling: SamplingParams, *, has_tools: bool) -> StreamOptions:
    """The options that are in force for such an answer."""
    return without_tails(options) if has_tools or sampling.is_constrained else options


async def delivered(
    events: AsyncIterator[Event], options: StreamOptions, unread: Unread | None = None
) -> AsyncGenerator[Event]:
    """The same events at the client's pace; a slow reader loses tails and nothing else.

    They are taken from `events` as they come, whether they are read or not: a slow reader holds
    no place in the engine. Smooth pacing holds events together. Closing it closes `events`.

    Args:
        unread: bounds of what may wait to be read; FellBehindError beyond them.
    """
    outbox: Outbox[Event] = Outbox(
        options.max_updates_per_s, time.monotonic, pace_s=options.pace_s, unread=unread
    )
    filling = asyncio.create_task(_fill(outbox, events))
    try:
        async for event in outbox:
            yield event
        await filling  # raises what ended it
    finally:
        filling.cancel()
        await asyncio.gather(filling, return_exceptions=True)
        outbox.abandon()


def frame(data: dict[str, Any], options: StreamOptions, event: str | None = None) -> Frame:
    """A frame of this JSON, padded if the options say so."""
    if not options.pad:
        return Frame(data=data, event=event)
    return Frame(data=pad(dumps(data), num_other=_num_other(event)), event=event)


async def _fill(outbox: Outbox[Event], events: AsyncIterator[Event]) -> None:
    try:
        async with aclosing(events):  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, Tail):
                    outbox.put_tail(event)
                else:
                    outbox.put_durable(event)
                if outbox.has_fallen_behind:
                    return  # which aborts the request
    finally:
        outbox.close()


def _num_other(event: str | None) -> int:
    """Bytes of the line that names the event."""
    return 0 if event is None else len(f"event: {event}\n")
