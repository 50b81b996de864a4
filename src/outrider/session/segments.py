"""The tree of segments: places in it, the tokens on the way to a place, and what nobody needs."""

import sqlite3
import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from outrider.errors import RequestError

TOKEN_BYTES = 4

# From the place up to the root: each segment with its part [start, stop) of the way.
PATH = """
WITH RECURSIVE path (id, parent, start, stop) AS (
    SELECT id, parent, start, :stop FROM segment WHERE id = :segment
    UNION ALL
    SELECT segment.id, segment.parent, segment.start, path.start
    FROM path JOIN segment ON segment.id = path.parent
)
"""


class Place(NamedTuple):
    """The first `stop` tokens of a way from the root; the last of them is in `segment`.

    root                         segment 1 [0, 5)      1 2 3 4 5
      a place (1, 3): 1 2 3      segment 2 [3, 5)            8 9    its parent is 1
      a place (2, 5): 1 2 3 8 9
    """

    segment: int | None
    stop: int


EMPTY = Place(None, 0)


def pack(tokens: Sequence[int]) -> bytes:
    """Little-endian int32; RequestError for an id that no vocabulary has."""
    try:
        packed = array("i", tokens)
    except (OverflowError, TypeError) as error:
        raise RequestError(f"token ids must be in [0, 2**31): {error}") from error
    if packed and min(packed) < 0:
        raise RequestError(f"token id {min(packed)}: token ids must be in [0, 2**31)")
    return _little_endian(packed).tobytes()


def unpack(blob: bytes) -> "array[int]":
    tokens = array("i")
    tokens.frombytes(blob)
    return _little_endian(tokens)


def grow(db: sqlite3.Connection, tenant: str, place: Place, packed: bytes) -> Place:
    """Writes a segment below `place`; none for no tokens."""
    if not packed:
        return place
    row = (tenant, place.segment, place.stop, packed)
    insert = "INSERT INTO segment (tenant, parent, start, tokens) VALUES (?, ?, ?, ?)"
    segment = db.execute(insert, row).lastrowid
    return Place(segment, place.stop + len(packed) // TOKEN_BYTES)


def read(db: sqlite3.Connection, place: Place) -> "array[int]":
    """The tokens on the way to `place`."""
    query = f"""{PATH}
        SELECT substr(segment.tokens, 1, (path.stop - path.start) * {TOKEN_BYTES})
        FROM path JOIN segment USING (id) ORDER BY path.start"""
    return unpack(b"".join(blob for (blob,) in db.execute(query, place._asdict())))


def locate(db: sqlite3.Connection, place: Place, num_tokens: int, name: str) -> Place:
    """The place of the first `num_tokens` tokens of `place`.

    Raises:
        RequestError: there are not as many.
    """
    if not 0 <= num_tokens <= place.stop:
        raise RequestError(
            f"{name}={num_tokens}: the session has {place.stop} tokens, give no more"
        )
    if num_tokens == 0:
        return EMPTY
    query = f"{PATH} SELECT id FROM path WHERE start < :num_tokens AND :num_tokens <= stop"
    ((segment,),) = db.execute(query, {**place._asdict(), "num_tokens": num_tokens})
    return Place(segment, num_tokens)


def parts(db: sqlite3.Connection, place: Place) -> dict[int | None, int]:
    """Each segment on the way to `place`, and where the way leaves it."""
    found = db.execute(f"{PATH} SELECT id, stop FROM path", place._asdict())
    return {EMPTY.segment: EMPTY.stop, **dict(found)}


def put_note(db: sqlite3.Connection, place: Place, note: str) -> None:
    """Keeps JSON with the segment in which a place is; it goes with the segment."""
    if place.segment is not None:
        row = (place.segment, place.stop, note)
        db.execute("INSERT OR REPLACE INTO note VALUES (?, ?, ?)", row)


def notes(db: sqlite3.Connection, place: Place) -> list[str]:
    """What was put on the way to `place`, in its order."""
    query = f"""{PATH} SELECT json FROM path JOIN note ON note.segment = path.id
        WHERE note.stop <= path.stop ORDER BY note.stop"""
    return [note for (note,) in db.execute(query, place._asdict())]


def prune(db: sqlite3.Connection, segments: Iterable[int | None]) -> None:
    """Deletes those of `segments`, and of their ancestors, on which nothing stands any more."""
    for segment in segments:
        while segment is not None:
            row = db.execute("SELECT parent FROM segment WHERE id = ?", (segment,)).fetchone()
            if row is None or _is_needed(db, segment):
                break
            db.execute("DELETE FROM segment WHERE id = ?", (segment,))
            (segment,) = row


def _is_needed(db: sqlite3.Connection, segment: int) -> bool:
    query = """SELECT EXISTS (SELECT 1 FROM head WHERE segment = :id)
        OR EXISTS (SELECT 1 FROM segment WHERE parent = :id)"""
    return bool(db.execute(query, {"id": segment}).fetchone()[0])


def _little_endian(tokens: "array[int]") -> "array[int]":
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens
