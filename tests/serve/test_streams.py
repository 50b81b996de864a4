"""What tests of streams stand on: a wait that outlives a process that was stopped."""

import asyncio

import pytest

from tests.serve import streams
from tests.serve.streams import patient


async def test_a_jump_of_the_clock_costs_no_more_than_a_slice(monkeypatch):
    """As after a SIGSTOP of minutes: what was about to come still comes."""
    loop, jump = asyncio.get_running_loop(), [0.0]
    real = loop.time
    monkeypatch.setattr(loop, "time", lambda: real() + jump[0])
    queue: asyncio.Queue[int] = asyncio.Queue()
    loop.call_soon(jump.__setitem__, 0, 1000.0)
    loop.call_later(1000.05, queue.put_nowait, 5)
    assert await patient(queue.get()) == 5


async def test_what_never_comes_is_an_error_and_is_cancelled(monkeypatch):
    monkeypatch.setattr(streams, "SLICE_S", 0.01)
    task = asyncio.ensure_future(asyncio.Event().wait())
    with pytest.raises(TimeoutError, match=r"nothing came in 0\.05 s"):
        await patient(task, 0.05)
    await asyncio.sleep(0)
    assert task.cancelled()


async def test_what_fails_fails():
    async def fail():
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await patient(fail())
