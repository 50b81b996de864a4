"""Erasure: how much of its tails a response took back, and how much earlier they told."""

import statistics
from collections.abc import Callable, Sequence as Items
from dataclasses import dataclass, field

from outrider.stream.events import Committed, Event, Tail


@dataclass(eq=False)
class _Shown:
    """One completion: the tail on show, and what was taken back last.

    Attributes:
        num_committed: the place of the tail's first token.
        tokens, since: the tail, and when each of its tokens appeared.
        lost: place -> token taken back since the last tail.
    """

    num_committed: int = 0
    tokens: list[int] = field(default_factory=list)
    since: list[float] = field(default_factory=list)
    lost: dict[int, int] = field(default_factory=dict)


class Erasure:
    """Metrics of one response, from the events that were really sent, in order.

    A shown token is taken back when a later tail, or the commit of its place or of one before
    it, does not go on showing it. Time runs from the making of this object.

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._start = clock()
        self._shown: dict[int, _Shown] = {}
        self._num_erased = 0
        self._num_returned = 0
        self._num_flickers = 0
        self._num_tails = 0
        self._max_erased = 0
        self._first_tail: float | None = None
        self._leads: list[float] = []  # per final token, seconds

    def observe(self, event: Event) -> None:
        shown = self._shown.setdefault(event.index, _Shown())
        if isinstance(event, Tail):
            self._take_tail(shown, event)
        else:
            self._take_commit(shown, event)

    def summary(self) -> dict[str, float | None]:
        """Of the response so far.

        `ne_gross`: tokens taken back per final token (an end token is none of the text's).
        `ne_net` leaves out those that the update in their place, or the next tail, brought back
        at the same place. `flickers`: updates that took tokens back; `max_retract_tokens`: most at
        once. `lead_ms_p50`: median over final tokens of the time each was on show before it was
        committed, 0 for those that were not. None where there was no token or no tail.
        """
        num_final = max(1, len(self._leads))
        first = self._first_tail
        return {
            "ne_gross": self._num_erased / num_final,
            "ne_net": (self._num_erased - self._num_returned) / num_final,
            "flickers": self._num_flickers,
            "tail_updates": self._num_tails,
            "max_retract_tokens": self._max_erased,
            "lead_ms_p50": 1e3 * statistics.median(self._leads) if self._leads else None,
            "time_to_first_tail_ms": None if first is None else 1e3 * (first - self._start),
        }

    def _take_tail(self, shown: _Shown, tail: Tail) -> None:
        now, tokens = self._clock(), tail.token_ids
        kept = _num_equal(shown.tokens, tokens)
        self._return(shown, tokens)
        shown.lost.clear()
        self._erase(shown, kept, tokens)
        shown.since = shown.since[:kept] + [now] * (len(tokens) - kept)
        shown.tokens = list(tokens)
        self._num_tails += 1
        if tokens and self._first_tail is None:
            self._first_tail = now

    def _take_commit(self, shown: _Shown, event: Committed) -> None:
        now, tokens = self._clock(), event.token_ids
        kept = _num_equal(shown.tokens, tokens)
        shown.num_committed = event.offset
        self._return(shown, tokens)
        if event.finish_reason is not None or kept < len(tokens):
            self._erase(shown, kept, tokens)
            del shown.tokens[kept:], shown.since[kept:]
        leads = [now - since for since in shown.since[:kept]]
        self._leads += leads + [0.0] * (len(tokens) - kept)
        if event.finish_reason == "stop" and tokens and not isinstance(event.stop_reason, str):
            del self._leads[-1]
        del shown.tokens[:kept], shown.since[:kept]
        shown.num_committed += len(tokens)

    def _erase(self, shown: _Shown, kept: int, tokens: Items[int]) -> None:
        """The tail from its token `kept` on is taken back; `tokens` stand in its place."""
        gone = shown.tokens[kept:]
        if not gone:
            return
        self._num_erased += len(gone)
        self._num_flickers += 1
        self._max_erased = max(self._max_erased, len(gone))
        first = shown.num_committed + kept
        shown.lost.update(enumerate(gone, start=first))
        self._return(shown, tokens)

    def _return(self, shown: _Shown, tokens: Items[int]) -> None:
        """Counts what was taken back and stands again where it stood."""
        for place, token in enumerate(tokens, start=shown.num_committed):
            if shown.lost.get(place) == token:
                del shown.lost[place]
                self._num_returned += 1


def _num_equal(shown: Items[int], tokens: Items[int]) -> int:
    """How many leading tokens are the same."""
    pairs = enumerate(zip(shown, tokens, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(shown), len(tokens)))
