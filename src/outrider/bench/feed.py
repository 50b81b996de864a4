"""Feeds: where a target's next ask comes from. A list, or something that answers to replies."""

from collections import deque
from collections.abc import Iterable
from typing import Protocol

from outrider.bench.target import Ask, Reply


class Feed(Protocol):
    """What is asked, and when; told of every reply, so that it can go on from it, or stop.

    It has ended when `due_s` is None while no ask is in flight.
    """

    @property
    def due_s(self) -> float | None:
        """When the next ask is to be sent; None while there is none, unless a reply brings one."""
        ...

    def take(self, now_s: float) -> Ask:
        """The next ask, which is due."""
        ...

    def note(self, reply: Reply) -> None:
        """A reply has come."""
        ...


class Listed:
    """Asks that are known beforehand; those that are due earlier are sent earlier."""

    def __init__(self, asks: Iterable[Ask]) -> None:
        self._waiting = deque(sorted(asks, key=lambda ask: ask.at_s))  # stable: in their order

    @property
    def due_s(self) -> float | None:
        return self._waiting[0].at_s if self._waiting else None

    def take(self, now_s: float) -> Ask:
        return self._waiting.popleft()

    def note(self, reply: Reply) -> None:
        """Nothing depends on it."""


def in_order_of(asks: Iterable[Ask], replies: Iterable[Reply]) -> list[Reply]:
    """The replies in the order of the asks; an ask that is given twice has two of them."""
    by_ask: dict[int, deque[Reply]] = {}
    for reply in replies:
        by_ask.setdefault(id(reply.ask), deque()).append(reply)
    return [by_ask[id(ask)].popleft() for ask in asks]


def due_of(ask: Ask, sent_s: float) -> float:
    """When an ask was to be sent: at its time, or as soon as there was room for it."""
    return ask.at_s or sent_s
