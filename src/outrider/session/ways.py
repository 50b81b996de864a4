"""Ways: the logs that only one session's heads stand on, and what of them others need."""

import sqlite3
from array import array
from collections.abc import Iterable
from typing import NamedTuple

from outrider.session import segments
from outrider.session.ledger import LIVING, Ledger
from outrider.session.segments import Place

Parts = dict[int | None, int]


class Way(NamedTuple):
    """A log of a session.

    Attributes:
        num_shared: leading tokens that other sessions stand on.
    """

    tokens: "array[int]"
    num_shared: int


def ways_of(ledger: Ledger, session: str, keep: Place | None) -> tuple[Way, ...]:
    """The logs of all heads of a session, but for those that another one begins with.

    Args:
        keep: a place that is needed besides those of other sessions.
    """
    ways = _longest(ledger.db, _own_places(ledger, session))
    others = _other_places(ledger, session)
    if keep is not None:
        others.append(keep)
    return tuple(
        Way(segments.read(ledger.db, place), _num_shared(ledger.db, parts, others))
        for place, parts in ways
    )


def _own_places(ledger: Ledger, session: str) -> list[Place]:
    query = "SELECT DISTINCT segment, stop FROM head WHERE tenant = ? AND session = ?"
    rows = ledger.db.execute(f"{query} ORDER BY stop DESC", (ledger.tenant, session))
    return [Place(*row) for row in rows]


def _other_places(ledger: Ledger, session: str) -> list[Place]:
    """Those of sessions that come from the same one by forks, and have not expired."""
    query = f"""SELECT DISTINCT segment, stop FROM head JOIN session ON session.id = head.session
        WHERE session.tenant = :tenant AND session.id != :session AND {LIVING}
        AND root = (SELECT root FROM session WHERE id = :session)"""
    bound = {"tenant": ledger.tenant, "now": ledger.now, "session": session}
    return [Place(*row) for row in ledger.db.execute(query, bound)]


def _longest(db: sqlite3.Connection, places: Iterable[Place]) -> list[tuple[Place, Parts]]:
    """Places, the longest first, without those on the way to one before them."""
    found: list[tuple[Place, Parts]] = []
    for place in places:
        if not any(parts.get(place.segment, -1) >= place.stop for _, parts in found):
            found.append((place, segments.parts(db, place)))
    return found


def _num_shared(db: sqlite3.Connection, parts: Parts, others: Iterable[Place]) -> int:
    """How far a way goes along with that of any other place."""
    most, seen = 0, set[int | None]()
    query = "SELECT parent, start FROM segment WHERE id = ?"
    for segment, stop in others:
        while segment not in parts and segment not in seen:
            seen.add(segment)
            segment, stop = db.execute(query, (segment,)).fetchone()
        if segment in parts:
            most = max(most, min(stop, parts[segment]))
    return most
