"""Statistics of acceptance per session and drafter: how they are kept, counted and merged."""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from itertools import zip_longest
from typing import Any, TypeAlias

from outrider.errors import RequestError
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
            return {drafter: json.loads(text) for drafter, text in rows}

    def put(self, tenant: str, session: str, drafter: str, value: Counts) -> None:
        """Replaces; SessionNotFound, or RequestError for what is not JSON."""
        stored = to_json("statistics", value)
        with self._writes(tenant) as ledger:
            ledger.session(session)
            _put(ledger, session, drafter, stored)

    def add(self, tenant: str, session: str, drafter: str, counts: Counts) -> dict[str, Any]:
        """Merges with what is there, in one transaction; returns the sum."""
        query = "SELECT json FROM stats WHERE session = ? AND drafter = ?"
        with self._writes(tenant) as ledger:
            ledger.session(session)
            row = ledger.db.execute(query, (session, drafter)).fetchone()
            total = merge(json.loads(row[0]) if row else {}, counts)
            _put(ledger, session, drafter, to_json("statistics", total))
            return total


def acceptance(temperature: float, num_drafted: int, num_accepted: int) -> dict[str, Any]:
    """The counts of one draft: per position, how often it was drafted, and accepted.

    Returns:
        {bucket: {"drafted": [...], "accepted": [...]}}; sums of such counts are of the same form,
        and position i was accepted (jointly with all before it) accepted[i] / drafted[i] times.
    """
    accepted = [int(position < num_accepted) for position in range(num_drafted)]
    return {bucket_of(temperature): {"drafted": [1] * num_drafted, "accepted": accepted}}


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


def _put(ledger: Ledger, session: str, drafter: str, stored: str) -> None:
    ledger.db.execute("INSERT OR REPLACE INTO stats VALUES (?, ?, ?)", (session, drafter, stored))
