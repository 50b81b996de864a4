"""Saturation: whether requests come faster than they are served, seen before the queue is endless.

At a rate that cannot be served, waiting grows for as long as one measures: such figures tell of the
length of the run only.
"""

import math
from bisect import bisect_right, insort
from collections.abc import Sequence as Items

import numpy as np

from outrider.bench.feed import Feed
from outrider.bench.target import Ask, Reply

MIN_REPLIES = 20
EVERY = 5  # replies between two looks
DEVIATIONS = 3.5
WARMING = 0.5  # of the run: the server fills up, and more come than go
MIN_ANSWERS = 2.0  # the run must have lasted so many answers, so that half of it is one


class Watched:
    """A feed that stops asking after some time, and when its target is saturated.

    Args:
        until_s: None sets no limit.
        finds_saturation: only where arrivals keep their own pace.

    Attributes:
        is_saturated: whether that is why it stopped; is_late: whether time was up.
    """

    def __init__(
        self, feed: Feed, *, until_s: float | None = None, finds_saturation: bool = True
    ) -> None:
        self._feed = feed
        self._until_s = math.inf if until_s is None else until_s
        self._finds_saturation = finds_saturation
        self._arrived_s: list[float] = []
        self._ended_s: list[float] = []
        self._first: list[float] = []  # seconds of the first answers
        self.is_saturated = False
        self.is_late = False

    @property
    def due_s(self) -> float | None:
        due_s = self._feed.due_s
        if due_s is None or self.is_saturated or self.is_late:
            return None
        if due_s > self._until_s:
            self.is_late = True
            return None
        return due_s

    def take(self, now_s: float) -> Ask:
        self._arrived_s.append(now_s)
        return self._feed.take(now_s)

    def note(self, reply: Reply) -> None:
        end_s = reply.sent_s if reply.last_s is None else reply.last_s
        insort(self._ended_s, end_s)  # clients hand them out a little out of order
        if len(self._first) < MIN_REPLIES:
            self._first.append(end_s - reply.sent_s)
        self._feed.note(reply)
        self.is_late = self.is_late or (end_s >= self._until_s and self._feed.due_s is not None)
        if self._finds_saturation and len(self._ended_s) % EVERY == 0:
            self.is_saturated = self.is_saturated or self._is_saturated()

    def conclude(self) -> None:
        """At the end: whether the queue had grown by the time of the last arrival.

        A short list of requests is all sent before enough of them are answered to stop it.
        """
        if self._finds_saturation and len(self._arrived_s) >= MIN_REPLIES:
            last_s = self._arrived_s[-1]
            ended_s = self._ended_s[: bisect_right(self._ended_s, last_s)]
            has_grown = fall_behind(self._arrived_s, ended_s, WARMING * last_s)
            self.is_saturated = self.is_saturated or (has_grown and not self.is_short)

    @property
    def is_short(self) -> bool:
        """Whether arrivals went on for too few answers to tell what such a rate does."""
        if not self._arrived_s or not self._first:
            return True
        return self._arrived_s[-1] < MIN_ANSWERS * float(np.median(self._first))

    def _is_saturated(self) -> bool:
        lasted_s = max(self._arrived_s[-1], self._ended_s[-1])
        if len(self._first) < MIN_REPLIES or lasted_s < MIN_ANSWERS * float(np.median(self._first)):
            return False
        return fall_behind(self._arrived_s, self._ended_s, WARMING * lasted_s)


def fall_behind(arrived_s: Items[float], ended_s: Items[float], from_s: float) -> bool:
    """Whether fewer requests ended than came after `from_s`, by more than chance makes of it.

    Args:
        arrived_s, ended_s: when, rising. Counts of both are taken to spread as Poisson's do,
            arrivals by as much more as their gaps vary.
    """
    num_came = len(arrived_s) - bisect_right(arrived_s, from_s)
    num_ended = len(ended_s) - bisect_right(ended_s, from_s)
    gaps = np.diff(arrived_s)
    mean = float(gaps.mean()) if len(gaps) else 0.0
    dispersion = max(1.0, float(gaps.var()) / mean**2) if mean > 0 else 1.0
    noise = math.sqrt(dispersion * num_came + num_ended)
    return num_came - num_ended > DEVIATIONS * noise
