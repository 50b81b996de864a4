"""BundleIndex: which warm state is stored where, and what of it was used least recently."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from outrider.session.database import Database

COLUMNS = "fingerprint, hash, tier, start, stop, file, bytes, used"


class BundleRow(NamedTuple):
    """Warm state of positions [start, stop) that is stored as one file.

    Attributes:
        fingerprint: of all that its content depends on; no other fingerprint finds it.
        hash: names the tokens up to `stop`, tenant included.
        tier: `"host"`, `"disk"`, ...; a bundle may be in several.
        num_bytes: size of the file.
        used: seconds of the log's clock; the index sets it.
    """

    fingerprint: str
    hash: str
    tier: str
    start: int
    stop: int
    file: str
    num_bytes: int
    used: float = 0.0


class BundleIndex:
    """Rows beside the log; a lost one makes blocks cold, never wrong, and files rebuild it."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    def put(self, bundles: Iterable[BundleRow]) -> None:
        """Enters bundles as used now; one of the same fingerprint, hash and tier is replaced."""
        now = self._clock()
        rows = [bundle._replace(used=now) for bundle in bundles]
        insert = f"INSERT OR REPLACE INTO bundle ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
        with self._database.write() as db:
            db.executemany(insert, rows)

    def find(self, fingerprint: str, hash: str) -> tuple[BundleRow, ...]:
        """Where a bundle is, one entry per tier; () if nowhere."""
        return self._select("WHERE fingerprint = ? AND hash = ? ORDER BY tier", fingerprint, hash)

    def all(self, tier: str) -> tuple[BundleRow, ...]:
        """What a tier holds, the least recently used first; of equal use the later positions."""
        return self._select("WHERE tier = ? ORDER BY used, start DESC, hash", tier)

    def least_recent(self, tier: str, num_bytes: int) -> tuple[BundleRow, ...]:
        """Whose files to delete, in order, to free at least `num_bytes`; all if that is short."""
        chosen: list[BundleRow] = []
        for bundle in self.all(tier):
            if num_bytes <= 0:
                break
            chosen.append(bundle)
            num_bytes -= bundle.num_bytes
        return tuple(chosen)

    def touch(self, fingerprint: str, hashes: Iterable[str]) -> None:
        """They were used now, in every tier; unknown ones are passed over."""
        now = self._clock()
        update = "UPDATE bundle SET used = ? WHERE fingerprint = ? AND hash = ?"
        with self._database.write() as db:
            db.executemany(update, [(now, fingerprint, name) for name in hashes])

    def remove(self, bundles: Iterable[BundleRow]) -> None:
        """Forgets entries; unknown ones are passed over. Deleting the files is the caller's."""
        keys = [(bundle.fingerprint, bundle.hash, bundle.tier) for bundle in bundles]
        delete = "DELETE FROM bundle WHERE fingerprint = ? AND hash = ? AND tier = ?"
        with self._database.write() as db:
            db.executemany(delete, keys)

    def rebuild(self, tier: str, bundles: Iterable[BundleRow]) -> None:
        """Replaces all entries of a tier, `used` as given: what was found there at the start."""
        insert = f"INSERT OR REPLACE INTO bundle ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
        rows = list(bundles)
        with self._database.write() as db:
            db.execute("DELETE FROM bundle WHERE tier = ?", (tier,))
            db.executemany(insert, rows)

    def num_bytes(self, tier: str) -> int:
        """Size of what a tier holds."""
        query = "SELECT coalesce(sum(bytes), 0) FROM bundle WHERE tier = ?"
        with self._database.read() as db:
            (total,) = db.execute(query, (tier,)).fetchone()
            return int(total)

    def _select(self, condition: str, *values: str) -> tuple[BundleRow, ...]:
        with self._database.read() as db:
            rows = db.execute(f"SELECT {COLUMNS} FROM bundle {condition}", values)
            return tuple(BundleRow(*row) for row in rows)
