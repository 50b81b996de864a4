"""BundleIndex: found by fingerprint and hash, listed by last use, rebuilt from what is there."""

import pytest

from outrider.session.index import BundleRow
from outrider.session.log import SessionLog


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def log() -> SessionLog:
    return SessionLog(":memory:", Clock())


def bundle(hash: str, start: int = 0, tier: str = "disk", fingerprint: str = "fp") -> BundleRow:
    return BundleRow(fingerprint, hash, tier, start, start + 16, f"{hash}.kv", 100)


def hashes(bundles: tuple[BundleRow, ...]) -> list[str]:
    return [each.hash for each in bundles]


def test_a_bundle_is_found_under_its_own_fingerprint_only(log: SessionLog) -> None:
    log.bundles.put([bundle("a"), bundle("a", tier="host")])
    assert [each.tier for each in log.bundles.find("fp", "a")] == ["disk", "host"]
    assert log.bundles.find("other", "a") == ()
    log.bundles.remove([bundle("a"), bundle("unknown")])
    assert [each.tier for each in log.bundles.find("fp", "a")] == ["host"]


def test_the_least_recently_used_go_first_and_leaves_before_their_parents(log: SessionLog) -> None:
    log.bundles.put([bundle("a", 0), bundle("b", 16), bundle("c", 32)])
    log.bundles.put([bundle("d", 0), bundle("e", 0, tier="host")])
    assert hashes(log.bundles.all("disk")) == ["c", "b", "a", "d"]
    log.bundles.touch("fp", ["b", "unknown"])
    assert hashes(log.bundles.all("disk")) == ["c", "a", "d", "b"]
    assert hashes(log.bundles.least_recent("disk", 101)) == ["c", "a"]
    assert hashes(log.bundles.least_recent("disk", 10**9)) == ["c", "a", "d", "b"]
    assert log.bundles.least_recent("disk", 0) == ()
    assert log.bundles.num_bytes("disk") == 400
    assert log.bundles.num_bytes("tape") == 0


def test_a_bundle_put_again_replaces_its_row(log: SessionLog) -> None:
    log.bundles.put([bundle("a")])
    log.bundles.put([bundle("a")._replace(file="new.kv")])
    assert [each.file for each in log.bundles.all("disk")] == ["new.kv"]


def test_a_rebuild_replaces_one_tier(log: SessionLog) -> None:
    log.bundles.put([bundle("a"), bundle("b", tier="host")])
    log.bundles.rebuild("disk", [bundle("c")._replace(used=5.0), bundle("d")._replace(used=4.0)])
    assert hashes(log.bundles.all("disk")) == ["d", "c"]
    assert hashes(log.bundles.all("host")) == ["b"]
