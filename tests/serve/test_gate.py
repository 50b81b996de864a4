"""Gate: seats in order of arrival, a bounded queue, honest Retry-After, and a drain."""

import asyncio

import pytest

from outrider.serve.errors import ApiError
from outrider.serve.gate import Gate


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


async def visit(gate, name, log, leave):
    async with gate.seat():
        log.append(name)
        await leave.wait()


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_seats_go_in_order_of_arrival():
    gate, log = Gate(1, 8), []
    exits = [asyncio.Event() for _ in range(4)]
    visits = [asyncio.create_task(visit(gate, i, log, exits[i])) for i in range(4)]
    await settle()
    assert (log, gate.num_running, gate.num_waiting) == ([0], 1, 3)
    for i in range(4):
        assert log == list(range(i + 1))
        exits[i].set()
        await settle()
    await asyncio.gather(*visits)
    assert (gate.num_running, gate.num_waiting, gate.num_admitted) == (0, 0, 4)


async def test_nobody_overtakes_the_queue():
    """A seat that falls free belongs to whoever waits, not to who comes in that moment."""
    gate, log, leave = Gate(1, 8), [], asyncio.Event()
    leave.set()
    go = asyncio.Event()
    first = asyncio.create_task(visit(gate, "first", log, go))
    await settle()
    second = asyncio.create_task(visit(gate, "second", log, leave))
    await settle()
    go.set()
    third = asyncio.create_task(visit(gate, "third", log, leave))
    await asyncio.gather(first, second, third)
    assert log == ["first", "second", "third"]


async def test_a_full_queue_refuses_with_an_estimate():
    clock = Clock()
    gate = Gate(2, 1, clock)
    async with gate.seat():
        clock.now = 10.0  # requests take ten seconds here
    leave, log = asyncio.Event(), []
    visits = [asyncio.create_task(visit(gate, i, log, leave)) for i in range(3)]
    await settle()
    with pytest.raises(ApiError) as refusal:
        async with gate.seat():
            raise AssertionError("let in")
    assert refusal.value.status == 429
    assert refusal.value.headers == {"Retry-After": "10"}  # one waits already, two seats: 2 / 2
    assert gate.rejected == {"queue_full": 1, "draining": 0}
    leave.set()
    await asyncio.gather(*visits)
    assert gate.num_running == 0


async def test_the_estimate_has_bounds():
    clock = Clock()
    gate = Gate(1, 0, clock)
    assert gate.retry_after_s == 1
    async with gate.seat():
        clock.now = 0.01
    assert gate.retry_after_s == 1
    async with gate.seat():
        clock.now = 1e6
    assert gate.retry_after_s == 60


async def test_who_leaves_the_queue_takes_no_seat():
    gate, log, leave = Gate(1, 8), [], asyncio.Event()
    visits = [asyncio.create_task(visit(gate, i, log, leave)) for i in range(3)]
    await settle()
    visits[1].cancel()
    await settle()
    assert gate.num_waiting == 1
    leave.set()
    await asyncio.gather(*visits, return_exceptions=True)
    assert (log, gate.num_running) == ([0, 2], 0)


async def test_a_seat_handed_to_somebody_cancelled_goes_on():
    gate, log = Gate(1, 8), []
    go, leave = asyncio.Event(), asyncio.Event()
    first = asyncio.create_task(visit(gate, 0, log, go))
    await settle()
    second = asyncio.create_task(visit(gate, 1, log, leave))
    third = asyncio.create_task(visit(gate, 2, log, leave))
    await settle()
    gate._leave()  # the seat is handed over, and in the same moment ...
    second.cancel()  # ... its new owner is gone
    await settle()
    assert log == [0, 2]
    gate.num_running += 1  # of the first, which has not left in truth
    go.set()
    leave.set()
    await asyncio.gather(first, second, third, return_exceptions=True)
    assert gate.num_running == 0


async def test_waiting_ends_at_the_deadline():
    gate, log, leave = Gate(1, 8), [], asyncio.Event()
    first = asyncio.create_task(visit(gate, 0, log, leave))
    await settle()
    with pytest.raises(TimeoutError):
        async with gate.seat(asyncio.get_running_loop().time() + 0.01):
            raise AssertionError("let in")
    assert gate.num_waiting == 0
    leave.set()
    await first


async def test_draining_refuses_new_and_waiting_and_waits_for_the_rest():
    gate, log, leave = Gate(1, 8), [], asyncio.Event()
    running = asyncio.create_task(visit(gate, "running", log, leave))
    await settle()
    waiting = asyncio.create_task(visit(gate, "waiting", log, leave))
    await settle()
    gate.drain()
    with pytest.raises(ApiError) as refusal:
        await waiting
    assert (refusal.value.status, refusal.value.code) == (503, "draining")
    assert "Retry-After" in refusal.value.headers
    with pytest.raises(ApiError):
        async with gate.seat():
            raise AssertionError("let in")
    assert not await gate.wait_idle(0.01)
    leave.set()
    await running
    assert await gate.wait_idle(0.01)
    assert gate.rejected == {"queue_full": 0, "draining": 2}


async def test_failures_give_the_seat_back():
    gate = Gate(1, 0)
    with pytest.raises(ZeroDivisionError):
        async with gate.seat():
            raise ZeroDivisionError
    async with gate.seat():
        assert gate.num_running == 1
