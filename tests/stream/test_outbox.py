"""Outbox: durable items are never lost, tails never void; against a model, with slow readers."""

import asyncio
import time

import pytest
from hypothesis import given, settings, strategies as st

from outrider.stream.outbox import Outbox

ACTIONS = st.lists(
    st.one_of(
        st.sampled_from([("durable", 0), ("tail", 0), ("read", 0), ("read", 0)]),
        st.tuples(st.just("wait"), st.sampled_from([0.01, 0.05, 0.1, 0.3])),
    ),
    min_size=10,
    max_size=60,
)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def drain(outbox):
    return list(iter(outbox.ready, None))


@settings(max_examples=300)
@given(ACTIONS, st.sampled_from([2.0, 12.0, 100.0]))
def test_random_readers_get_every_durable_item_and_only_tails_that_hold(actions, rate):
    """Model: `last` tail put since the last durable item, and when a tail was read last."""
    clock = Clock()
    outbox = Outbox(rate, clock)
    put, read, tail, last_read = [], [], None, float("-inf")
    for count, (action, seconds) in enumerate(actions):
        if action == "durable":
            put.append(count)
            outbox.put_durable(("durable", count))
            tail = None
        elif action == "tail":
            tail = ("tail", count)
            outbox.put_tail(tail)
        elif action == "wait":
            clock.now += seconds
        else:
            is_due = clock.now >= last_read + 1 / rate
            expected = ("durable", put[len(read)]) if len(read) < len(put) else None
            if expected is None and tail is not None and is_due:
                expected, tail, last_read = tail, None, clock.now
            item = outbox.ready()
            assert item == expected
            read += [item[1]] if item is not None and item[0] == "durable" else []
    outbox.close()
    assert [item[1] for item in drain(outbox)] == put[len(read) :], "no tail after the end"


def test_a_durable_item_makes_the_tail_void():
    outbox = Outbox(12.0, Clock())
    outbox.put_tail("t")
    outbox.put_durable(1)
    assert drain(outbox) == [1]
    outbox.put_tail("u")
    assert drain(outbox) == ["u"]


def test_the_latest_tail_wins_and_waits_for_its_time():
    clock = Clock()
    outbox = Outbox(10.0, clock)
    outbox.put_tail("a")
    assert outbox.ready() == "a"
    outbox.put_tail("b")
    outbox.put_tail("c")
    assert outbox.ready() is None
    clock.now += 0.11
    assert drain(outbox) == ["c"]


def test_a_slow_reader_costs_one_slot():
    outbox = Outbox(12.0, Clock())
    for count in range(1000):
        outbox.put_tail(count)
    assert drain(outbox) == [999]


def test_what_is_put_after_the_end():
    outbox = Outbox(12.0, Clock())
    outbox.put_durable(1)
    outbox.put_tail("t")
    outbox.close()
    outbox.put_tail("u")
    assert drain(outbox) == [1]
    with pytest.raises(AssertionError):
        outbox.put_durable(2)


def test_a_pace_gathers_what_came_and_sends_it_together():
    clock = Clock()
    outbox = Outbox(12.0, clock, pace_s=0.1)
    outbox.put_durable(1)
    assert drain(outbox) == [1]
    outbox.put_durable(2)
    outbox.put_durable(3)
    assert drain(outbox) == []
    outbox.put_tail("t")
    assert drain(outbox) == [], "a tail does not overtake what it continues"
    clock.now += 0.11
    assert outbox.ready() == 2
    outbox.put_durable(4)
    assert drain(outbox) == [3], "what came meanwhile belongs to the next batch"
    outbox.close()
    assert drain(outbox) == [4], "the end does not wait"


async def test_iteration_waits_for_what_is_put_and_ends_with_the_outbox():
    outbox = Outbox(12.0, time.monotonic)
    seen = []

    async def read():
        seen.extend([item async for item in outbox])

    reader = asyncio.create_task(read())
    for count in range(3):
        await asyncio.sleep(0.001)
        outbox.put_durable(count)
    outbox.put_tail("void")
    outbox.put_durable(3)
    outbox.close()
    await asyncio.wait_for(reader, 5)
    assert seen == [0, 1, 2, 3]


async def test_a_waiting_tail_comes_when_it_is_due():
    outbox = Outbox(20.0, time.monotonic)
    items = aiter(outbox)
    outbox.put_tail("a")
    assert await anext(items) == "a"
    start = time.monotonic()
    outbox.put_tail("b")
    assert await asyncio.wait_for(anext(items), 5) == "b"
    assert time.monotonic() - start > 0.04
    outbox.put_durable(1)
    assert await asyncio.wait_for(anext(items), 5) == 1
    outbox.close()
    assert [item async for item in items] == []
