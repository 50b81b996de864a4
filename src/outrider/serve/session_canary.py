"""SessionCanary: watches the drafters of restored sessions, and makes anew what does worse."""

from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from outrider.errors import EngineError
from outrider.serve.session_counters import Counters
from outrider.serve.session_warmth import Warm, Warmer
from outrider.session.canary import LEVEL, History, Judgement, Tries, judge

MIN_TRIES = 20  # before the first look; each further look takes twice as many
MAX_TRIES = 320  # a drafter that did well for so long has been restored well
MAX_SESSIONS = 4096


class Alarm(NamedTuple):
    """A drafter that did worse after a restore than chance allows.

    Attributes:
        num_rebuilt: tokens whose draft KV was computed anew; 0 where it has none of its own.
    """

    drafter: str
    judgement: Judgement
    num_rebuilt: int

    def as_dict(self) -> dict[str, Any]:
        """As a response tells it."""
        return {
            "drafter": self.drafter,
            "expected": round(self.judgement.expected, 4),
            "seen": round(self.judgement.seen, 4),
            "p_value": self.judgement.p_value,
            "ready_upto": 0,
            "rebuilt_tokens": self.num_rebuilt,
        }


@dataclass
class Watch:
    """One drafter, at one temperature, since a restore.

    Attributes:
        history: how it fared before. next_look: tries by which it is looked at again.
    """

    history: History
    tries: Tries = Tries(0, 0)
    num_looks: int = 0
    next_look: int = MIN_TRIES

    def look(self, tries: Tries) -> Judgement | None:
        """Adds a turn's tries; None until there are enough to look at.

        Each look spends half of the level that is left, so that all of them together raise a
        false alarm no more often than one look would.
        """
        accepted, rejected = self.tries
        self.tries = Tries(accepted + tries.accepted, rejected + tries.rejected)
        if self.tries.total < self.next_look:
            return None
        self.num_looks += 1
        self.next_look = 2 * self.tries.total
        return judge(self.history, self.tries, level=LEVEL / 2**self.num_looks)


@dataclass
class Watched:
    """A session since a restore.

    Attributes:
        watches: by drafter and bucket of the temperature.
        settled: drafters of which enough is known.
    """

    watches: dict[tuple[str, str], Watch] = field(default_factory=dict)
    settled: set[str] = field(default_factory=set)


class SessionCanary:
    """Drafters whose state is more than tokens, over the turns that follow a restore.

    Wrong draft KV changes no text, so nothing but acceptance tells of it. Drafters of class R0
    are left alone: the log is all that they are made of. Where a method drafts by several, each is
    watched by itself.
    """

    def __init__(self, warmer: Warmer, counters: Counters) -> None:
        self._warmer = warmer
        self._counters = counters
        self._watched: OrderedDict[str, Watched] = OrderedDict()

    def heed(self, session: str, warm: Warm) -> None:
        """A session that was warmed up is watched if state of it was loaded."""
        if warm.restored_from is None:
            return
        self._watched[session] = Watched()
        self._watched.move_to_end(session)
        if len(self._watched) > MAX_SESSIONS:
            self._watched.popitem(last=False)

    def drop(self, session: str) -> None:
        """The session is gone."""
        self._watched.pop(session, None)

    def look(
        self, session: str, drafter: str, heat: str, stats: Mapping[str, Any], tries: Tries
    ) -> Judgement | None:
        """What is wrong with a drafter after one more turn; None if nothing is known to be.

        Args:
            heat: the bucket of the temperature. stats: class S before the turn. tries: the turn's,
                counted as those of class S.
        """
        watched = self._watched.get(session)
        if watched is None or drafter in watched.settled:
            return None
        if self._warmer.kind(drafter) in (None, "R0"):
            return None
        if (drafter, heat) not in watched.watches:
            known = stats.get(drafter, {}).get(heat, {})
            watched.watches[drafter, heat] = Watch(History.from_dict(known.get("turns", {})))
        watch = watched.watches[drafter, heat]
        found = watch.look(tries)
        is_worse = found is not None and found.is_worse
        if is_worse or watch.tries.total >= MAX_TRIES:
            watched.settled.add(drafter)
        return found if is_worse else None

    async def act(
        self, tenant: str, tokens: tuple[int, ...], drafter: str, judgement: Judgement
    ) -> Alarm:
        """Forgets what was kept for a drafter of this log, and computes it anew."""
        self._counters.warmth_regressions += 1
        num_rebuilt = 0
        with suppress(EngineError):  # a broken engine has no drafters to mend
            num_rebuilt = await self._warmer.rebuild(tenant, tokens, drafter)
        self._counters.rebuilt_tokens += num_rebuilt
        return Alarm(drafter, judgement, num_rebuilt)
