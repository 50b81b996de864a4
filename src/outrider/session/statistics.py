"""Statistics of acceptance per session and drafter: how they are kept, counted and merged."""

import json
from collections.abc import Callable, Mapping, Sequence as Items
from contextlib import AbstractContextManager
from itertools import zip_longest
from typing import Any, TypeAlias

from outrider.errors import RequestError
from outrider.session.canary import History, Tries
from outrider.session.ledger import Ledger, to_json

Counts: TypeAlias = Mapping[str, Any]
Transaction: TypeAlias = Callable[[str], AbstractContextManager[Ledger]]
BUCKETS = (0.0, 0.5, 1.0)  # upper ends; what is hotter is a bucket of its own


class StatsTable:
    """JSON per session and drafter. Forks begin with a copy; all goes with the session."""

    def __init__(self, writes: Transaction, reads: Transaction) -> None:
        self._writes = writes
        self._reads = reads

    def get(self, tenant: str, session: str) -> dict[str, Any]:
        """Drafter -> what was put last; SessionNotFound."""
        query = "SELECT drafter, json FROM stats WHERE session = ? ORDER BY drafter"
        with self._reads(tenant) as ledger:
            ledger.session(session)
            rows = ledger.db.execute(query, (session,))
            return {drafter: _read(text) for drafter, text in rows}

    def put(self, tenant: str, session: str, drafter: str, value: Counts) -> None:
        """Replaces; SessionNotFound, or RequestError for what is not JSON."""
        stored = to_json("statistics", value)
        with self._writes(tenant) as ledger:
            ledger.session(session)
            _put(ledger, session, drafter, stored)

    def add(self, tenant: str, session: str, drafter: str, counts: Counts) -> dict[str, Any]:
        """Merges with what is there; returns the sum."""
        return self.add_all(tenant, session, {drafter: counts})[drafter]

    def add_all(
        self, tenant: str, session: str, by_drafter: Mapping[str, Counts]
    ) -> dict[str, dict[str, Any]]:
        """Merges the counts of several drafters, in one transaction; returns their sums."""
        query = "SELECT json FROM stats WHERE session = ? AND drafter = ?"
        totals: dict[str, dict[str, Any]] = {}
        with self._writes(tenant) as ledger:
            ledger.session(session)
            for drafter, counts in by_drafter.items():
                row = ledger.db.execute(query, (session, drafter)).fetchone()
                totals[drafter] = merge(_read(row[0]) if row else {}, counts)
                _put(ledger, session, drafter, to_json("statistics", totals[drafter]))
        return totals


def of_turn(num_drafts: int, tried: Items[int], stood: Items[int]) -> dict[str, Any]:
    """What one turn tells of a drafter at one temperature.

    Args:
        tried: by position, the drafts that came so far and stood until there.
        stood: by position, those that stood there too.

    Returns:
        "num_drafts"; "drafted" and "accepted" by position: the former are the tries, so that
        acceptance at position i, all before it accepted, is accepted[i] / drafted[i] however deep
        each draft was; "tries" and "turns" of the canary. Sums of such counts are of the same form.
    """
    tries = Tries.of_positions(tried, stood)
    return {
        "num_drafts": num_drafts,
        "drafted": list(tried),
        "accepted": list(stood),
        "tries": tries._asdict(),
        "turns": History.of([tries]).as_dict(),
    }


def bucket_of(temperature: float) -> str:
    """Greedy, up to 0.5, up to 1, and hotter: "0", "0.5", "1", "inf"."""
    return next((f"{high:g}" for high in BUCKETS if temperature <= high), "inf")


def merge(first: Counts, second: Counts) -> dict[str, Any]:
    """The sum of two trees of counts: numbers add, lists by position, mappings by key.

    Commutative and associative, and {} changes nothing, so replicas and turns may be merged in
    any order. Neither argument is changed.

    Raises:
        RequestError: they are of different forms, or hold something that cannot be added.
    """
    keys = {**first, **second}
    return {key: _add(key, first.get(key), second.get(key)) for key in keys}


def _add(key: str, first: Any, second: Any) -> Any:
    given = [value for value in (first, second) if value is not None]
    if all(isinstance(value, Mapping) for value in given):
        return merge(first or {}, second or {})
    if all(isinstance(value, list) for value in given):
        return [_add(key, one, other) for one, other in zip_longest(first or [], second or [])]
    if all(type(value) in (int, float) for value in given):
        return sum(given)
    raise RequestError(f"statistics {key!r}: {first!r} and {second!r} cannot be added")


def _read(stored: str) -> dict[str, Any]:
    """Rows of before told of every draft at every position, which holds for the first one only."""
    found: dict[str, Any] = json.loads(stored)
    return {key: _first_only(value) if _is_old(value) else value for key, value in found.items()}


def _is_old(value: Any) -> bool:
    return isinstance(value, Mapping) and "drafted" in value and "num_drafts" not in value


def _first_only(counts: Counts) -> dict[str, Any]:
    drafted, accepted = counts["drafted"][:1], counts["accepted"][:1]
    return {**counts, "num_drafts": sum(drafted), "drafted": drafted, "accepted": accepted}


def _put(ledger: Ledger, session: str, drafter: str, stored: str) -> None:
    ledger.db.execute("INSERT OR REPLACE INTO stats VALUES (?, ?, ?)", (session, drafter, stored))
