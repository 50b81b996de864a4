"""Delivery: committed events always arrive, in order; tails only to readers who keep up."""

import asyncio
from types import SimpleNamespace

import pytest

from outrider.request import SamplingParams
from outrider.serve.config import ServeConfig
from outrider.serve.delivery import delivered, frame, shown, stream_options
from outrider.serve.schemas_generation import OutriderStream
from outrider.stream.events import Committed, Tail
from outrider.stream.options import StreamOptions
from outrider.stream.outbox import FAIR_SHARE, FellBehindError, Unread

PROVISIONAL = StreamOptions(visibility="provisional", max_updates_per_s=1e6)
SMOOTH = StreamOptions(pacing="smooth")


@pytest.mark.parametrize(
    ("host", "asked", "header", "expected"),
    [
        ("127.0.0.1", None, "", (False, "burst")),
        ("0.0.0.0", None, "", (True, "smooth")),
        ("0.0.0.0", None, "provisional", (True, "smooth")),
        ("0.0.0.0", None, "pacing=burst", (True, "burst")),
        ("0.0.0.0", {"outrider": {"visibility": "provisional"}}, "", (True, "smooth")),
        ("0.0.0.0", {"outrider": {"pacing": "burst"}}, "", (True, "burst")),
        ("0.0.0.0", {"include_obfuscation": False}, "", (False, "burst")),
    ],
)
def test_where_others_may_watch_frames_tell_no_counts(host, asked, header, expected):
    """I12: by their sizes or times."""
    server = SimpleNamespace(config=ServeConfig(host=host))
    made = None if asked is None else OutriderStream(**asked)
    found = stream_options(server, made, header)
    assert (found.pad, found.pacing) == expected


ALL = [StreamOptions(), PROVISIONAL, SMOOTH]


def tail(version):
    return Tail(
        request_id="r", index=0, token_ids=(1,), text="t", committed_chars=0, stability=1.0,
        source="draft", version=version,
    )  # fmt: skip


def commit(number):
    return Committed("r", text=str(number))


async def source(items, closed, error=None):
    try:
        for item in items:
            await asyncio.sleep(0)
            yield item
        if error is not None:
            raise error
    finally:
        closed.append(True)


async def read_into(found, events, num_pauses=0):
    async for event in events:
        found.append(event)  # what was read before a failure stays
        await pause(num_pauses)


async def pause(number):
    for _ in range(number):
        await asyncio.sleep(0)


@pytest.mark.parametrize("options", ALL, ids=["plain", "provisional", "smooth"])
async def test_commits_arrive_in_order(options):
    closed = []
    items = [commit(number) for number in range(20)]
    assert [event async for event in delivered(source(items, closed), options)] == items
    assert closed == [True]


async def test_readers_who_keep_up_see_tails():
    items = [commit(0), tail(1), commit(1), tail(2), commit(2)]
    found = [event async for event in delivered(source(items, []), PROVISIONAL)]
    assert [event for event in found if isinstance(event, Committed)] == [items[0], *items[2::2]]
    assert any(isinstance(event, Tail) for event in found)


async def test_slow_readers_lose_tails_only():
    items = [event for n in range(20) for event in (commit(n), tail(n))] + [commit(99)]
    found = []
    async for event in delivered(source(items, []), PROVISIONAL):
        found.append(event)
        await asyncio.sleep(0.001)
    commits = [event for event in found if isinstance(event, Committed)]
    assert commits == [event for event in items if isinstance(event, Committed)]
    assert len(found) - len(commits) < 20


@pytest.mark.parametrize("options", ALL, ids=["plain", "provisional", "smooth"])
async def test_failures_come_after_what_was_committed(options):
    found = []
    events = delivered(source([commit(0)], [], ValueError("broken")), options)
    with pytest.raises(ValueError, match="broken"):
        await read_into(found, events)
    assert found == [commit(0)]


@pytest.mark.parametrize("options", ALL, ids=["plain", "provisional", "smooth"])
async def test_leaving_early_closes_the_source(options):
    closed = []
    events = delivered(source([commit(number) for number in range(1000)], closed), options)
    await anext(events)
    await events.aclose()
    assert closed == [True]


async def test_a_reader_that_falls_behind_loses_its_stream():
    """Others keep theirs, and the source is closed at once, not when the reader comes back."""
    unread, closed, found = Unread(most=5), [], []
    items = [commit(number) for number in range(1000)]
    events = delivered(source(items, closed), StreamOptions(), unread)
    found.append(await anext(events))
    async with asyncio.timeout(5):
        while not closed:
            await asyncio.sleep(0)
    assert unread.total == 0
    with pytest.raises(FellBehindError):
        await read_into(found, events)
    assert found == items[:1]
    other = delivered(source(items, []), StreamOptions(), unread)
    assert [event async for event in other] == items


async def test_all_together_have_a_bound_and_a_fair_share():
    unread = Unread(most=10**6, most_of_all=2 * FAIR_SHARE)
    items = [commit(number) for number in range(FAIR_SHARE - 1)]
    streams = [delivered(source(items, []), StreamOptions(), unread) for _ in range(8)]
    for stream in streams:
        await anext(stream)
    await pause(3 * FAIR_SHARE)
    assert unread.total == 8 * (FAIR_SHARE - 2), "whoever has no more than its share keeps it"
    long = delivered(source([commit(n) for n in range(1000)], []), StreamOptions(), unread)
    with pytest.raises(FellBehindError):
        await read_into([], long, num_pauses=2 * FAIR_SHARE)
    for stream in streams:
        assert len([event async for event in stream]) == FAIR_SHARE - 2
    assert unread.total == 0


def test_tails_are_for_free_text_only():
    schema = SamplingParams(json_schema={"type": "object"})
    assert shown(PROVISIONAL, SamplingParams(), has_tools=False) == PROVISIONAL
    assert shown(PROVISIONAL, SamplingParams(), has_tools=True).visibility == "verified"
    assert shown(PROVISIONAL, schema, has_tools=False).visibility == "verified"


@pytest.mark.parametrize("event", [None, "message_start"])
def test_padded_frames_have_the_size_of_a_bucket(event):
    sizes = set()
    for length in (1, 5, 100):
        made = frame({"text": "x" * length}, StreamOptions(pad=True), event)
        sizes.add(len(made.encode()))
    assert len(sizes) == 1
    assert frame({"text": "x"}, StreamOptions(), event).data == {"text": "x"}
