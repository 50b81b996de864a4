"""Delivery: committed events always arrive, in order; tails only to readers who keep up."""

import asyncio

import pytest

from outrider.request import SamplingParams
from outrider.serve.delivery import delivered, frame, shown
from outrider.stream.events import Committed, Tail
from outrider.stream.options import StreamOptions

PROVISIONAL = StreamOptions(visibility="provisional", max_updates_per_s=1e6)
SMOOTH = StreamOptions(pacing="smooth")
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


async def read_into(found, events):
    async for event in events:
        found.append(event)  # what was read before a failure stays


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
