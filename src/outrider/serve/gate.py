"""Gate: how many requests run at once, how many may wait, and who is next."""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from outrider.serve.errors import ApiError

MAX_RETRY_S = 60
NUM_RECENT = 64
QUEUE_FULL, DRAINING = "queue_full", "draining"


class Gate:
    """Seats for running requests and a bounded queue before them, first come first served.

    Args:
        max_concurrent: most requests inside. max_waiting: most that wait for a seat.
        clock: seconds that never go back.

    Attributes:
        num_running, num_waiting: now. num_admitted: since the start.
        rejected: how many were refused since the start, by reason.
        is_draining: nobody is let in any more.
    """

    def __init__(
        self,
        max_concurrent: int,
        max_waiting: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_concurrent = max_concurrent
        self.max_waiting = max_waiting
        self.num_running = 0
        self.num_admitted = 0
        self.rejected = {QUEUE_FULL: 0, DRAINING: 0}
        self.is_draining = False
        self._clock = clock
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._recent: deque[float] = deque(maxlen=NUM_RECENT)
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def retry_after_s(self) -> int:
        """Whole seconds after which a seat may be free, by how long recent requests took."""
        recent = self._recent
        service_s = sum(recent) / len(recent) if recent else 1.0
        turns = (self.num_waiting + 1) / self.max_concurrent
        return min(max(math.ceil(service_s * turns), 1), MAX_RETRY_S)

    @asynccontextmanager
    async def seat(
        self, deadline: float | None = None, *, queued: Callable[[], object] | None = None
    ) -> AsyncIterator[None]:
        """A seat for the time of the block.

        Args:
            deadline: time of the event loop until which to wait for it.
            queued: called once it is not refused, be it that it must wait.

        Raises:
            ApiError: 429 when the queue is full, 503 when the server drains; with Retry-After.
            TimeoutError: the deadline came first.
        """
        async with asyncio.timeout_at(deadline):
            await self._enter(queued)
        start = self._clock()
        try:
            yield
        finally:
            self._recent.append(self._clock() - start)
            self._leave()

    def drain(self) -> None:
        """Lets nobody in any more; those that wait are refused at once: others may take them."""
        self.is_draining = True
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_exception(self._refusal())

    async def wait_idle(self, timeout_s: float) -> bool:
        """Waits until nobody is inside; False when the time is over first."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def _enter(self, queued: Callable[[], object] | None) -> None:
        if self.is_draining or (self._is_full and self.num_waiting >= self.max_waiting):
            raise self._refusal()
        if queued is not None:
            queued()
        if self._is_full:
            await self._wait_turn()
        else:
            self.num_running += 1
            self._idle.clear()
        self.num_admitted += 1

    @property
    def _is_full(self) -> bool:
        return self.num_running >= self.max_concurrent

    async def _wait_turn(self) -> None:
        """Waits until somebody who leaves hands over the seat."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._leave()  # the seat came in the same moment: it goes on to the next
            elif waiter in self._waiting:
                self._waiting.remove(waiter)
            raise

    def _leave(self) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self.num_running -= 1
        if not self.num_running:
            self._idle.set()

    def _refusal(self) -> ApiError:
        """Counted, for it is raised."""
        headers = {"Retry-After": str(self.retry_after_s)}
        if self.is_draining:
            self.rejected[DRAINING] += 1
            message = "the server is shutting down: try again elsewhere or later"
            return ApiError(503, message, code=DRAINING, headers=headers)
        self.rejected[QUEUE_FULL] += 1
        message = (
            f"{self.num_running} requests run and {self.num_waiting} wait, which is all that this "
            "server takes: try again later"
        )
        return ApiError(429, message, code=QUEUE_FULL, headers=headers)
