"""Rings: the last committed events of each response, numbered, bounded, and replayed."""

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from outrider.serve.sse import dumps

TAIL = -1  # stands for the number of an event that has none
MAX_RINGS = 1024
MAX_TOTAL_BYTES = 64 << 20


class Numbered(NamedTuple):
    """One event as it goes over the wire: its number (`TAIL` without one), its type, its JSON."""

    number: int
    type: str
    data: str


class Listener(Protocol):
    """A connection; `outrider.stream.outbox.Outbox` is one."""

    def put_durable(self, item: Numbered) -> None: ...

    def put_tail(self, item: Numbered) -> None: ...

    def close(self) -> None: ...


class GoneError(LookupError):
    """What was asked for has left the ring: `first` is the oldest event it still holds."""

    def __init__(self, after: int, first: int) -> None:
        super().__init__(f"events after {after} are no longer held; the oldest is {first}")
        self.first = first


@dataclass(frozen=True, kw_only=True)
class RingLimits:
    """How much of one response is kept: events, bytes of JSON, seconds since an event."""

    max_events: int = 4096
    max_bytes: int = 4 << 20
    ttl_s: float = 600.0


class Ring:
    """Committed events of one response; a listener gets those it misses, then what comes.

    Numbers are given here, without gaps. Tails pass through to whoever listens and are not kept.
    The newest event is always kept, however large.

    Args:
        past: events from before a restart, which are not numbered anew.
        keep: told of each event before any listener is, to write it down; where it raises, the
            event was not put, and its number is free.
    """

    def __init__(
        self,
        limits: RingLimits = RingLimits(),
        clock: Callable[[], float] = time.monotonic,
        *,
        past: Iterable[Numbered] = (),
        keep: Callable[[Numbered], object] | None = None,
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._keep = keep
        self._events = deque((clock(), event) for event in past)
        self._listeners: list[Listener] = []
        self.num_bytes = sum(len(event.data) for _, event in self._events)
        self.last = self._events[-1][1].number if self._events else -1
        self.closed_at: float | None = None

    def __len__(self) -> int:
        return len(self._events)

    @property
    def first(self) -> int:
        """Number of the oldest event that is held."""
        return self.last + 1 - len(self._events)

    def put(self, event: Mapping[str, Any]) -> Numbered:
        """Numbers an event, keeps it, and tells all listeners."""
        assert self.closed_at is None, "nothing follows the terminal event"
        number, kind = self.last + 1, str(event["type"])
        numbered = Numbered(number, kind, dumps({"type": kind, "sequence_number": number, **event}))
        if self._keep is not None:
            self._keep(numbered)
        self.last = number
        self._events.append((self._clock(), numbered))
        self.num_bytes += len(numbered.data)
        self.trim()
        for listener in self._listeners:
            listener.put_durable(numbered)
        return numbered

    def put_tail(self, event: Mapping[str, Any]) -> None:
        """Tells all listeners what is expected after the last event; void with the next one."""
        assert self.closed_at is None, "no tail after the terminal event"
        if self._listeners:
            kind = str(event["type"])
            tail = Numbered(TAIL, kind, dumps({"type": kind, "base": self.last, **event}))
            for listener in self._listeners:
                listener.put_tail(tail)

    def close(self) -> None:
        """The terminal event has been put: listeners come to their end."""
        self.closed_at = self._clock()
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    def join(self, listener: Listener, *, after: int = -1) -> None:
        """Replays the events above `after` to a listener, which then hears what comes.

        Raises:
            GoneError: some of them have left the ring.
        """
        self.trim()
        if after + 1 < self.first:
            raise GoneError(after, self.first)
        for _, numbered in self._events:
            if numbered.number > after:
                listener.put_durable(numbered)
        if self.closed_at is None:
            self._listeners.append(listener)
        else:
            listener.close()

    def leave(self, listener: Listener) -> None:
        """A connection has gone."""
        if listener in self._listeners:
            self._listeners.remove(listener)

    @property
    def num_listeners(self) -> int:
        return len(self._listeners)

    def trim(self) -> None:
        """Lets go of the oldest events beyond the limits."""
        limits, oldest = self._limits, self._clock() - self._limits.ttl_s
        while len(self._events) > 1 and (
            len(self._events) > limits.max_events
            or self.num_bytes > limits.max_bytes
            or self._events[0][0] < oldest
        ):
            _, numbered = self._events.popleft()
            self.num_bytes -= len(numbered.data)


class Rings:
    """The rings of a server by response id. Of those that are closed the oldest go first.

    Args:
        max_rings, max_bytes: bounds over all rings; open ones stay, each within its own limits.
    """

    def __init__(
        self,
        limits: RingLimits = RingLimits(),
        clock: Callable[[], float] = time.monotonic,
        *,
        max_rings: int = MAX_RINGS,
        max_bytes: int = MAX_TOTAL_BYTES,
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._max_rings = max_rings
        self._max_bytes = max_bytes
        self._rings: OrderedDict[str, Ring] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rings)

    @property
    def num_bytes(self) -> int:
        return sum(ring.num_bytes for ring in self._rings.values())

    def open(
        self,
        response_id: str,
        *,
        past: Iterable[Numbered] = (),
        keep: Callable[[Numbered], object] | None = None,
    ) -> Ring:
        """A new ring; arguments as for `Ring`."""
        ring = Ring(self._limits, self._clock, past=past, keep=keep)
        self._rings[response_id] = ring
        self.sweep()
        return ring

    def find(self, response_id: str) -> Ring | None:
        ring = self._rings.get(response_id)
        if ring is not None and self._is_old(ring):
            del self._rings[response_id]
            return None
        return ring

    def drop(self, response_id: str) -> None:
        self._rings.pop(response_id, None)

    def sweep(self) -> None:
        """Drops closed rings that are too old, then the oldest until the bounds hold."""
        num_bytes = self.num_bytes
        for name, ring in list(self._rings.items()):
            is_over = len(self._rings) > self._max_rings or num_bytes > self._max_bytes
            if ring.closed_at is not None and (is_over or self._is_old(ring)):
                num_bytes -= ring.num_bytes
                del self._rings[name]

    def _is_old(self, ring: Ring) -> bool:
        ended = ring.closed_at
        return ended is not None and ended < self._clock() - self._limits.ttl_s
