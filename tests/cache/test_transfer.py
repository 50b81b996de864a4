"""KV out of one pool and into another: the same bits under the same names, and nothing lost."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from outrider.cache.pool import KVPool
from outrider.cache.prefix_tree import PrefixTree
from outrider.cache.table import BlockManager, BlockTable
from outrider.cache.transfer import (
    PrefixKV,
    export_prefix,
    import_prefix,
    import_runs,
    num_resident,
    prefix_hashes,
)
from outrider.errors import ConfigError

SIZE = 4
SHAPES = [(2, 3, 5), (1, 4, 4)]
LOG = list(range(18))  # four whole blocks and two tokens


class Place:
    """A pool and its manager; the KV of a token is its position times 1000 plus the token."""

    def __init__(self, num_blocks=16, shapes=SHAPES, size=SIZE, dtype=torch.float32, caches=True):
        self.pool = KVPool(shapes, num_blocks, size, dtype, torch.device("cpu"))
        self.manager = BlockManager(num_blocks, size, caches)
        self.open_tables: list[BlockTable] = []

    def fill(self, tokens, salt=""):
        """A table with KV for all tokens, held until `let_go`."""
        table, num_cached = self.manager.open(tokens, salt)
        assert self.manager.reserve(table, len(tokens))
        slots = table.slots(num_cached, len(tokens))
        for part in self.parts():
            for position, slot in enumerate(slots, start=num_cached):
                part[slot] = 1000 * position + tokens[position]
        self.manager.commit(table, tokens, len(tokens))
        self.open_tables.append(table)
        return table

    def cache(self, tokens, salt=""):
        """As a finished request leaves it."""
        self.fill(tokens, salt)
        self.manager.free(self.open_tables.pop())

    def parts(self):
        return [part for layer in self.pool.layers for part in layer]

    def take(self, tokens, salt="", **more):
        return export_prefix(self.pool, self.manager, tokens, salt, **more)

    def give(self, tokens, prefix, salt=""):
        count = import_prefix(self.pool, self.manager, tokens, salt, prefix)
        self.check()
        return count

    def check(self):
        self.manager.check_integrity(self.open_tables)

    def assert_holds(self, tokens, count, salt=""):
        """The first `count` tokens are cached with their KV."""
        table, num_cached = self.manager.open([*tokens, 0], salt)
        assert num_cached == count
        for position, slot in enumerate(table.slots(0, count)):
            for part in self.parts():
                assert bool((part[slot] == 1000 * position + tokens[position]).all())
        self.manager.free(table)


@pytest.fixture
def source():
    place = Place()
    place.cache([50, 51, 52, 53, 54])  # so that blocks have other numbers than in a fresh pool
    place.cache(LOG)
    return place


def test_what_is_taken_out_comes_in_elsewhere(source):
    other = Place(num_blocks=5)
    prefix = source.take(LOG)
    assert (prefix.first, len(prefix.hashes), prefix.num_tokens) == (0, 4, 16)
    assert other.give(LOG, prefix) == 16
    other.assert_holds(LOG, 16)
    assert other.manager.num_used == 0, "nobody holds what was imported"


def test_the_names_are_those_of_the_prefix_tree(source):
    table, _ = source.manager.open(LOG)
    names = list(prefix_hashes(LOG, SIZE))
    assert names[-1] == table.last_hash
    assert tuple(names) == source.take(LOG).hashes
    assert PrefixTree.root("").hash not in names
    source.manager.free(table)


def test_the_last_block_counts_though_a_request_would_run_its_last_token(source):
    assert source.manager.match(LOG[:16]) == 12
    assert num_resident(source.manager, LOG[:16]) == 16
    other = Place()
    assert other.give(LOG[:16], source.take(LOG[:16])) == 16


def test_only_what_is_cached_is_taken(source):
    assert source.take([*LOG[:9], 99, 98, 97]).num_tokens == 8
    assert source.take([99, *LOG]).hashes == ()
    assert source.take(LOG[:3]).hashes == ()


def test_a_later_run_needs_the_one_before(source):
    first, rest = source.take(LOG[:8]), source.take(LOG, start=8)
    assert (rest.first, len(rest.hashes)) == (2, 2)
    other = Place()
    assert other.give(LOG, rest) == 0
    assert other.give(LOG, first) == 8
    assert other.give(LOG, rest) == 16
    other.assert_holds(LOG, 16)


def test_runs_come_in_one_after_the_other(source):
    runs = [source.take(LOG[: 4 * i + 4], start=4 * i) for i in range(4)]
    other = Place()
    assert import_runs(other.pool, other.manager, LOG, "", iter(runs)) == 16
    other.check()
    other.assert_holds(LOG, 16)
    with_a_gap = Place()
    gap = [runs[0], runs[2], runs[1]]
    assert import_runs(with_a_gap.pool, with_a_gap.manager, LOG, "", gap) == 4


def test_only_the_common_beginning_of_another_log_comes_in(source):
    other = Place()
    fork = [*LOG[:9], 99, 98, 97, 96]
    assert other.give(fork, source.take(LOG)) == 8
    other.assert_holds(fork, 8)


def test_a_fork_takes_the_beginning_of_one_run_and_goes_on_with_another(source):
    fork = [*LOG[:9], 99, 98, 97, 96]
    source.cache(fork)
    runs = [source.take(LOG), source.take(fork, start=8)]
    other = Place()
    assert import_runs(other.pool, other.manager, fork, "", runs) == 12
    other.assert_holds(fork, 12)


def test_importing_twice_changes_nothing(source):
    other, prefix = Place(), source.take(LOG)
    other.give(LOG, prefix)
    before = [part.clone() for part in other.parts()], other.manager.num_empty
    assert other.give(LOG, prefix) == 16
    assert other.manager.num_empty == before[1]
    assert all(torch.equal(a, b) for a, b in zip(before[0], other.parts(), strict=True))


def test_blocks_that_are_there_are_not_written(source):
    prefix = source.take(LOG)
    for layer in prefix.layers:
        for part in layer:
            part[:8] = -1.0
    other = Place()
    other.fill(LOG[:8])
    assert other.give(LOG, prefix) == 16
    other.assert_holds(LOG, 16)


def test_tenants_cannot_read_one_another(source):
    place = Place()
    place.cache(LOG, salt="acme")
    assert place.take(LOG, "acme").num_tokens == 16
    assert place.take(LOG, "other").hashes == ()
    other = Place()
    assert other.give(LOG, place.take(LOG, "acme"), salt="other") == 0
    assert other.give(LOG, place.take(LOG, "acme")) == 0
    assert other.give(LOG, place.take(LOG, "acme"), salt="acme") == 16
    assert other.manager.match([*LOG], "") == 0


def test_a_transfer_is_no_hit(source):
    other = Place()
    before = source.manager.queries, source.manager.hits
    other.give(LOG, source.take(LOG))
    other.give(LOG, source.take(LOG))
    assert (source.manager.queries, source.manager.hits) == before
    assert (other.manager.queries, other.manager.hits) == (0, 0)


def test_it_evicts_no_more_than_it_needs(source):
    other = Place(num_blocks=8)
    old, young = list(range(100, 112)), list(range(200, 212))
    other.cache(old)
    other.cache(young)  # two blocks are empty: two must go, the leaves of the older prefix
    assert other.give(LOG, source.take(LOG)) == 16
    other.assert_holds(LOG, 16)
    assert num_resident(other.manager, old) == 4
    assert num_resident(other.manager, young) == 12


def test_it_never_evicts_its_own_beginning(source):
    other = Place(num_blocks=4)
    other.cache(LOG[:8])
    other.cache(list(range(100, 108)))
    assert other.give(LOG, source.take(LOG)) == 16
    other.assert_holds(LOG, 16)


def test_what_sequences_hold_is_left_alone(source):
    other = Place(num_blocks=6)
    held = list(range(100, 112))
    other.fill(held)
    assert other.give(LOG, source.take(LOG)) == 12, "as much as fits"
    other.assert_holds(LOG, 12)
    other.assert_holds(held, 12)
    full = Place(num_blocks=3)
    full.fill(held)
    assert full.give(LOG, source.take(LOG)) == 0


def test_imported_blocks_are_evicted_like_any(source):
    other = Place(num_blocks=4)
    other.give(LOG, source.take(LOG))
    other.fill(list(range(100, 110)))
    other.check()
    assert num_resident(other.manager, LOG) == 4, "leaves first"


def test_a_log_of_whole_blocks_takes_no_block_more(source):
    other = Place(num_blocks=4)
    assert other.give(LOG[:16], source.take(LOG[:16])) == 16
    assert other.manager.num_empty == 0
    assert other.give(LOG[:16], source.take(LOG[:16])) == 16


def test_without_prefix_caching_there_is_nothing_to_transfer(source):
    other = Place(caches=False)
    assert other.give(LOG, source.take(LOG)) == 0
    assert other.manager.num_empty == 16
    assert other.take(LOG).hashes == ()


@pytest.mark.parametrize(
    ("place", "match"),
    [
        (Place(size=2, num_blocks=32), "blocks of 4 tokens does not fit a pool of block_size=2"),
        (Place(shapes=SHAPES[:1]), "2 layers does not fit a pool of 1"),
        (Place(shapes=[(2, 3, 5), (1, 4, 3)]), r"layer 1 is \(16, 1, 4\)"),
        (Place(dtype=torch.bfloat16), r"torch.float32, the pool takes .* in torch.bfloat16"),
    ],
    ids=["block size", "layers", "shape", "dtype"],
)
def test_what_does_not_fit_is_refused_and_nothing_is_taken(source, place, match):
    with pytest.raises(ConfigError, match=match):
        place.give(LOG, source.take(LOG))
    place.check()
    assert num_resident(place.manager, LOG) == 0
    assert place.manager.num_used == 0


def test_a_run_that_was_cut_off_is_refused(source):
    whole = source.take(LOG)
    cut = PrefixKV(
        block_size=SIZE, first=0, hashes=whole.hashes, layers=source.take(LOG[:12]).layers
    )
    with pytest.raises(ConfigError, match="cut off"):
        Place().give(LOG, cut)


def test_half_width_comes_through_bit_by_bit():
    source, other = Place(dtype=torch.bfloat16), Place(dtype=torch.bfloat16)
    source.cache([3] * 8)
    assert other.give([3] * 8, source.take([3] * 8)) == 8
    taken, given = source.take([3] * 8), other.take([3] * 8)
    for a, b in zip(taken.layers, given.layers, strict=True):
        assert a.keys.dtype == torch.bfloat16
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)


def test_a_run_is_a_copy(source):
    prefix = source.take(LOG)
    for part in source.parts():
        part.zero_()
    other = Place()
    other.give(LOG, prefix)
    other.assert_holds(LOG, 16)


logs = st.builds(
    lambda zeros, ones: [0] * zeros + [1] * ones, st.integers(1, 12), st.integers(0, 9)
)


@settings(max_examples=60)
@given(
    there=st.lists(st.tuples(logs, st.sampled_from(["", "acme"])), max_size=4),
    here=st.lists(st.tuples(logs, st.sampled_from(["", "acme"])), max_size=4),
    wanted=st.lists(st.tuples(logs, st.sampled_from(["", "acme"]), st.integers(0, 3)), max_size=5),
    num_blocks=st.integers(1, 12),
    held=st.integers(0, 6),
)
def test_whatever_is_cached_reads_back_as_the_prefix_asked_for(
    there, here, wanted, num_blocks, held
):
    source, other = Place(num_blocks=40), Place(num_blocks=num_blocks)
    for log, salt in there:
        source.cache(log, salt)
    if held and other.manager.num_free * SIZE >= held:
        other.fill([7] * held)
    for log, salt in here:
        if other.manager.can_open(other.manager.look(log, salt), len(log)):
            other.cache(log, salt)
    for log, salt, skipped in wanted:
        start = min(skipped * SIZE, num_resident(source.manager, log, salt))
        before = num_resident(other.manager, log, salt)
        count = other.give(log, source.take(log, salt, start=start), salt)
        assert count >= before
        assert count <= max(before, num_resident(source.manager, log, salt))
        other.assert_holds(log, count, salt)
