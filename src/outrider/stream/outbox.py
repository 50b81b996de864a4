"""Outbox: what waits for one connection; durable items in order, and one slot for the tail."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

T = TypeVar("T")
MAX_UNREAD = 8192
MAX_UNREAD_OF_ALL = 1 << 17
FAIR_SHARE = 64


class FellBehindError(Exception):
    """A reader has left more unread than is kept for it; what it had not read is gone."""


class Unread:
    """How many items readers may leave unread, one of them and all together.

    Args:
        most: of one reader.
        most_of_all: of all that share this object; beyond it, those lose their stream who have
            more than `FAIR_SHARE` unread, as they come to get more.
    """

    def __init__(self, most: int = MAX_UNREAD, most_of_all: int = MAX_UNREAD_OF_ALL) -> None:
        self._most = most
        self._most_of_all = most_of_all
        self.total = 0

    def is_too_much(self, num_of_one: int) -> bool:
        """Whether a reader with so many cannot be given one more."""
        is_over = self.total >= self._most_of_all and num_of_one >= FAIR_SHARE
        return is_over or num_of_one >= self._most


class Outbox(Generic[T]):
    """A queue that a slow reader cannot make lose anything but tails.

    A durable item empties the tail's slot, for it makes the tail void; a new tail overwrites it.
    For one event loop and one reader, which iterates over it; the iteration ends once the
    outbox is closed and its durable items are read. A reader that is too far behind gets a
    FellBehindError instead of them all, so that a stalled connection cannot fill the memory.

    Args:
        max_updates_per_s: most tails a second.
        clock: seconds, never going back (such as `time.monotonic`).
        pace_s: seconds between batches of durable items, so that their times do not show the
            engine's steps; 0 sends them as they come, and so does a closed outbox.
        unread: bounds, to be shared among outboxes.

    Attributes:
        has_fallen_behind: nothing more will be read.
    """

    def __init__(
        self,
        max_updates_per_s: float,
        clock: Callable[[], float],
        *,
        pace_s: float = 0.0,
        unread: Unread | None = None,
    ) -> None:
        self._tail_pause_s = 1.0 / max_updates_per_s
        self._pace_s = pace_s
        self._clock = clock
        self._unread = unread or Unread()
        self._durable: deque[T] = deque()
        self._num_released = 0  # durable items of the batch that is going out
        self._tail: T | None = None
        self._next_tail = self._next_batch = float("-inf")
        self._is_closed = False
        self.has_fallen_behind = False
        self._changed = asyncio.Event()

    def put_durable(self, item: T) -> None:
        """Will be read, in order, whatever happens; nobody is told what follows a fall behind."""
        if self.has_fallen_behind:
            return
        assert not self._is_closed, "nothing follows the terminal event"
        if self._unread.is_too_much(len(self._durable)):
            self.has_fallen_behind = True
            self.abandon()
            return
        self._durable.append(item)
        self._unread.total += 1
        self._tail = None
        self._changed.set()

    def put_tail(self, tail: T) -> None:
        """Will be read if nothing comes before its time; a closed outbox ignores it."""
        if not self._is_closed:
            self._tail = tail
            self._changed.set()

    def close(self) -> None:
        """Nothing more will come."""
        self._is_closed, self._tail = True, None
        self._changed.set()

    def abandon(self) -> None:
        """Nobody reads on: closes it and lets go of what is unread."""
        self._unread.total -= len(self._durable)
        self._durable.clear()
        self._num_released = 0
        self.close()

    def ready(self) -> T | None:
        """The item to send now, taken out; None if none is due."""
        now = self._clock()
        if self._durable:
            return self._next_durable(now)
        tail = self._tail
        if tail is None or now < self._next_tail:
            return None
        self._tail = None
        self._next_tail = now + self._tail_pause_s
        return tail

    async def __aiter__(self) -> AsyncIterator[T]:
        while True:
            item = self.ready()
            if item is not None:
                yield item
            elif self.has_fallen_behind:
                raise FellBehindError
            elif self._is_closed:
                return
            else:
                await self._wait()

    def _next_durable(self, now: float) -> T | None:
        if not self._num_released and (self._is_closed or now >= self._next_batch):
            self._num_released = len(self._durable)
            self._next_batch = now + self._pace_s
        if not self._num_released:
            return None
        self._num_released -= 1
        self._unread.total -= 1
        return self._durable.popleft()

    async def _wait(self) -> None:
        """Until something is put, or what waits is due."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._seconds_left()):
                await self._changed.wait()

    def _seconds_left(self) -> float | None:
        """Until the first item is due; None if there is none."""
        if not self._durable and self._tail is None:
            return None
        due = self._next_batch if self._durable else self._next_tail
        return max(0.0, due - self._clock())
