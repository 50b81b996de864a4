"""Bundles: found by hash, within a budget, over crashes; a damaged one is cold, never wrong."""

import json
import os
import time

import pytest
import torch

from outrider.session.bundle import MANIFEST, TENSORS, BundleStore
from outrider.session.files import DiskFiles, MemoryFiles
from outrider.session.fingerprint import Fingerprint
from outrider.session.sealed import seal, unseal
from outrider.session.snapshot import Kept, Manifest, Snapshots, head_of, heads

MINE = Fingerprint(part="target", fields={"weights": "abc", "dtype": "float32"})
OTHER = Fingerprint(part="target", fields={"weights": "abd", "dtype": "float32"})
PLENTY = 1 << 20


def tensors(seed=0, count=64):
    generator = torch.Generator().manual_seed(seed)
    return {"keys.0": torch.randn(count, generator=generator)}


def put_chain(store, *names, fingerprint=MINE, parent="", seed=0):
    """One bundle per name, of two blocks called name0 and name1, each continuing the one before."""
    for number, name in enumerate(names):
        bundle = store.put(
            fingerprint,
            [f"{name}0", f"{name}1"],
            tensors(seed + number),
            start=8 * number,
            stop=8 * number + 8,
            parent=parent,
        )
        if bundle is None:
            return False
        parent = f"{name}1"
    return True


def chain(*names):
    return [f"{name}{index}" for name in names for index in range(2)]


def num_found(store, *names, fingerprint=MINE):
    return sum(place.num_blocks for place in store.find(fingerprint, chain(*names)))


@pytest.fixture(params=["disk", "host"])
def files(request, tmp_path):
    return DiskFiles(tmp_path / "kept") if request.param == "disk" else MemoryFiles()


@pytest.fixture
def store(files):
    return BundleStore(files, PLENTY)


def test_a_bundle_is_found_by_any_of_its_blocks_and_reads_back(store):
    assert put_chain(store, "a", "b")
    (first, second) = store.find(MINE, chain("a", "b"))
    assert (first.at, first.num_blocks, first.bundle.start, first.bundle.stop) == (0, 2, 0, 8)
    assert torch.equal(store.read(second.bundle)["keys.0"], tensors(1)["keys.0"])
    assert num_found(store, "a", "c") == 2
    (half,) = store.find(MINE, ["a0", "x"])
    assert half.num_blocks == 1
    assert store.find(MINE, ["x", "a0"]) == []


def test_another_fingerprint_finds_nothing(store):
    put_chain(store, "a")
    assert num_found(store, "a", fingerprint=OTHER) == 0
    put_chain(store, "a", fingerprint=OTHER, seed=5)
    (place,) = store.find(OTHER, chain("a"))
    assert torch.equal(store.read(place.bundle)["keys.0"], tensors(5)["keys.0"])
    assert len(store) == 2


def test_the_difference_names_the_field_and_both_values():
    told = MINE.difference(Fingerprint(part="target", fields={"weights": "abd"}))
    assert told == "weights was abd and is abc; dtype was unknown and is float32"
    assert MINE.difference(MINE) == ""
    assert "not of target" in MINE.difference(Fingerprint(part="draft", fields={}))
    assert MINE.digest != OTHER.digest
    assert MINE.digest == Fingerprint(part="target", fields=dict(MINE.fields)).digest


def test_the_index_is_rebuilt_from_the_manifests(files):
    put_chain(BundleStore(files, PLENTY), "a", "b")
    again = BundleStore(files, PLENTY)
    assert num_found(again, "a", "b") == 4
    assert torch.equal(
        again.read(again.find(MINE, chain("a", "b"))[1].bundle)["keys.0"], tensors(1)["keys.0"]
    )
    assert again.num_bytes == BundleStore(files, PLENTY).num_bytes > 0


def test_storing_the_same_again_writes_nothing(store):
    put_chain(store, "a")
    before = store.num_bytes, store.files.names()
    put_chain(store, "a")
    assert (store.num_bytes, store.files.names()) == before


def test_other_content_under_the_same_name_replaces(store):
    put_chain(store, "a")
    put_chain(store, "a", seed=9)
    (place,) = store.find(MINE, chain("a"))
    assert torch.equal(store.read(place.bundle)["keys.0"], tensors(9)["keys.0"])
    assert len(store) == 1
    assert sum(name.endswith(TENSORS) for name in store.files.names()) == 1


def test_num_bytes_is_what_lies_there(store):
    put_chain(store, "a", "b", "c")
    assert store.num_bytes == sum(len(store.files.read(name)) for name in store.files.names())
    store.drop(next(iter(store)).name)
    assert store.num_bytes == sum(len(store.files.read(name)) for name in store.files.names())


def budget_for(count):
    probe = BundleStore(MemoryFiles(), PLENTY)
    put_chain(probe, "a")
    return int(probe.num_bytes * (count + 0.5))


def test_the_leaf_not_used_for_longest_goes_first(files):
    store = BundleStore(files, budget_for(4))
    put_chain(store, "a", "b")
    put_chain(store, "c", seed=5)
    put_chain(store, "d", seed=6)
    store.read(store.find(MINE, chain("c"))[0].bundle)
    put_chain(store, "e", seed=7)
    assert num_found(store, "a", "b") == 2, "b is the oldest leaf; a is older, but b continued it"
    put_chain(store, "f", seed=8)
    assert num_found(store, "a", "b") == 0
    assert [num_found(store, name) for name in "cdef"] == [2, 2, 2, 2]
    put_chain(store, "g", seed=9)
    assert [num_found(store, name) for name in "cdefg"] == [2, 0, 2, 2, 2]
    assert store.num_bytes <= store.max_bytes


def test_a_new_bundle_does_not_evict_what_it_continues(files):
    store = BundleStore(files, budget_for(2))
    assert put_chain(store, "a", "b")
    assert not put_chain(store, "c", parent="b1"), "a and b are its own beginning"
    assert num_found(store, "a", "b") == 4


def test_what_is_larger_than_the_budget_is_not_stored(files):
    store = BundleStore(files, 100)
    assert not put_chain(store, "a")
    assert (len(store), store.num_bytes, files.names()) == (0, 0, [])


def test_order_of_use_survives_a_restart(tmp_path):
    store = BundleStore(DiskFiles(tmp_path), budget_for(3))
    for name in "abc":
        put_chain(store, name)
        time.sleep(0.02)  # the file system's clock is coarse
    store.read(store.find(MINE, chain("a"))[0].bundle)
    again = BundleStore(DiskFiles(tmp_path), budget_for(3))
    put_chain(again, "d")
    assert [num_found(again, name) for name in "abcd"] == [2, 0, 2, 2]


def test_a_smaller_budget_after_a_restart_holds_from_the_next_bundle_on(tmp_path):
    put_chain(BundleStore(DiskFiles(tmp_path), PLENTY), "a", "b", "c", "d")
    again = BundleStore(DiskFiles(tmp_path), budget_for(2))
    assert num_found(again, "a", "b", "c", "d") == 8
    put_chain(again, "x", seed=9)
    assert num_found(again, "a", "b", "c", "d") == 2
    assert again.num_bytes <= again.max_bytes


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def swap(path):
    path.write_bytes(b"PK not tensors at all")


@pytest.mark.parametrize("harm", [cut, flip, swap, os.unlink])
@pytest.mark.parametrize("when", ["while open", "before a restart"])
def test_a_damaged_file_is_cold_and_stored_anew_later(tmp_path, harm, when):
    store = BundleStore(DiskFiles(tmp_path), PLENTY)
    put_chain(store, "a", "b", "c")
    middle = store.find(MINE, chain("a", "b"))[1].bundle
    harm(tmp_path / middle.file)
    if when == "before a restart":
        store = BundleStore(DiskFiles(tmp_path), PLENTY)
    for place in store.find(MINE, chain("a", "b", "c")):
        read = store.read(place.bundle)
        assert (read is None) == (place.bundle.name == middle.name)
    assert num_found(store, "a", "b", "c") == 2, "what lies behind the gap is out of reach"
    assert store.put(MINE, chain("b"), tensors(1), start=8, stop=16, parent="a1")
    assert num_found(store, "a", "b", "c") == 6, "and at hand again when the gap is closed"
    assert store.read(store.find(MINE, chain("a", "b"))[1].bundle) is not None


@pytest.mark.parametrize("harm", [cut, flip, swap, os.unlink])
def test_a_damaged_manifest_is_no_bundle(tmp_path, harm):
    put_chain(BundleStore(DiskFiles(tmp_path), PLENTY), "a", "b")
    store = BundleStore(DiskFiles(tmp_path), PLENTY)
    name = store.find(MINE, chain("a", "b"))[1].bundle.name
    harm(tmp_path / (name + MANIFEST))
    again = BundleStore(DiskFiles(tmp_path), PLENTY)
    assert num_found(again, "a", "b") == 2
    assert len(list(tmp_path.iterdir())) == 2, "nothing of it is left behind"


def test_a_manifest_that_was_edited_is_no_bundle(tmp_path):
    put_chain(BundleStore(DiskFiles(tmp_path), PLENTY), "a")
    (path,) = tmp_path.glob(f"*{MANIFEST}")
    record = json.loads(path.read_text())
    record["hashes"] = ["x0", "x1"]
    path.write_text(json.dumps(record))
    assert len(BundleStore(DiskFiles(tmp_path), PLENTY)) == 0


@pytest.mark.parametrize("survivors", [0, 1, 2])
def test_a_crash_between_any_two_writes_leaves_old_or_new(tmp_path, monkeypatch, survivors):
    """Killed after `survivors` renames, the first content is read, or the second."""
    store = BundleStore(DiskFiles(tmp_path), PLENTY)
    put_chain(store, "a")
    replace, done = os.replace, []

    def killed(*paths):
        if len(done) == survivors:
            raise KeyboardInterrupt
        done.append(paths)
        replace(*paths)

    monkeypatch.setattr("outrider.session.files.os.replace", killed)
    if survivors < 2:
        with pytest.raises(KeyboardInterrupt):
            put_chain(store, "a", seed=9)
    else:
        put_chain(store, "a", seed=9)
    monkeypatch.undo()
    again = BundleStore(DiskFiles(tmp_path), PLENTY)
    (place,) = again.find(MINE, chain("a"))
    wanted = tensors(9 if survivors == 2 else 0)
    assert torch.equal(again.read(place.bundle)["keys.0"], wanted["keys.0"])
    assert len(list(tmp_path.iterdir())) == 2


def test_files_that_were_being_written_are_swept_away(tmp_path):
    files = DiskFiles(tmp_path)
    files.write("whole", b"1")
    (tmp_path / "abc.part").write_bytes(b"2")
    assert DiskFiles(tmp_path).names() == ["whole"]


def test_a_full_disk_stores_nothing_and_harms_nothing(tmp_path, monkeypatch, caplog):
    store = BundleStore(DiskFiles(tmp_path), PLENTY)
    put_chain(store, "a")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("outrider.session.files.os.fsync", full)
    assert not put_chain(store, "b", parent="a1")
    assert "No space left" in caplog.text
    monkeypatch.undo()
    assert num_found(store, "a", "b") == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_the_folder_is_for_its_owner_alone(tmp_path):
    DiskFiles(tmp_path / "kept")
    assert (tmp_path / "kept").stat().st_mode & 0o077 == 0


def test_half_width_tensors_come_back_bit_by_bit(store):
    given = {"keys.0": torch.randn(8, 2, 3).bfloat16(), "ids": torch.arange(5, dtype=torch.int32)}
    bundle = store.put(MINE, ["h"], given)
    read = store.read(bundle)
    assert all(torch.equal(read[name], given[name]) for name in given)
    assert {name: tensor.dtype for name, tensor in read.items()} == {
        "keys.0": torch.bfloat16,
        "ids": torch.int32,
    }


def test_leaves_are_dropped_but_not_what_others_continue(store):
    put_chain(store, "a", "b", "c")
    put_chain(store, "d", parent="a1", seed=5)
    names = [place.bundle.name for place in store.find(MINE, chain("a", "b", "c"))]
    assert store.drop_leaves(names) == 2
    assert num_found(store, "a", "b") == 2
    assert num_found(store, "a", "d") == 4


def test_sealed_records_read_back_or_not_at_all():
    data = seal({"name": "x", "values": [1, 2.5, None]})
    assert unseal(data) == {"name": "x", "values": [1, 2.5, None]}
    for broken in (None, b"", data[:-1], data.replace(b"2.5", b"2.6"), b"[1]", b"\xff\xfe"):
        assert unseal(broken) is None
    other = json.loads(data)
    other["version"] = 99
    assert unseal(json.dumps(other).encode()) is None


def manifest(tokens, salt="", **more):
    return Manifest(head=head_of(tokens, salt), num_tokens=len(tokens), **more)


def test_snapshots_are_found_along_a_log(files):
    snapshots = Snapshots(files)
    log = list(range(40))
    for length in (10, 25, 40):
        snapshots.put(manifest(log[:length], statistics={"turn": length}))
    snapshots.put(manifest([*log[:20], 99]))
    for place in (snapshots, Snapshots(files)):
        assert [m.num_tokens for m in place.along(log, "")] == [40, 25, 10]
        assert [m.num_tokens for m in place.along(log[:30], "")] == [25, 10]
        assert place.along(log, "acme") == []
        assert place.along(log[1:], "") == []


def test_a_manifest_comes_back_from_json():
    kept = Kept(fingerprint=MINE, num_tokens=16, bundles=("a", "b"), num_bytes=7, reason="x")
    whole = manifest(
        [1, 2], parts={"target": kept}, watermarks={"ngram": 2}, statistics={"a": [1, 2]}
    )
    again = Manifest.from_dict(json.loads(json.dumps(whole.as_dict())))
    assert again == whole
    assert (again.kv_tokens, again.num_bytes, again.bundles) == (16, 7, {"a", "b"})
    assert again.agrees([MINE])
    assert not again.agrees([OTHER])
    assert not again.agrees([])


def test_snapshots_are_bounded_and_damaged_ones_are_none(tmp_path):
    snapshots = Snapshots(DiskFiles(tmp_path), max_snapshots=3)
    for length in range(1, 6):
        snapshots.put(manifest([7] * length))
    assert [m.num_tokens for m in snapshots.along([7] * 9, "")] == [5, 4, 3]
    assert len(list(tmp_path.iterdir())) == 3
    flip(tmp_path / f"{head_of([7] * 4, '')}.snapshot.json")
    assert [m.num_tokens for m in Snapshots(DiskFiles(tmp_path)).along([7] * 9, "")] == [5, 3]


def test_heads_name_the_log_and_its_tenant():
    log = [5, -1, 7, 1 << 40]
    assert heads(log, "", [4, 0, 2, 9]) == [head_of(log[:n], "") for n in (0, 2, 4)]
    names = {head_of(tokens, salt) for tokens in (log, log[:3], []) for salt in ("", "a")}
    assert len(names) == 6
