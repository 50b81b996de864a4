"""BlockTable and BlockManager: one behaviour per test, blocks of four slots."""

import pytest

from outrider.cache.table import BlockManager, BlockTable
from outrider.errors import ConfigError

SIZE = 4


def make_manager(num_blocks: int = 8, enable_prefix_caching: bool = True) -> BlockManager:
    return BlockManager(num_blocks, SIZE, enable_prefix_caching)


def fill(manager: BlockManager, tokens: list[int], salt: str = "") -> BlockTable:
    """A table with committed KV for all tokens."""
    table, _ = manager.open(tokens, salt)
    assert manager.reserve(table, len(tokens))
    manager.commit(table, tokens, len(tokens))
    return table


def test_slots_follow_the_blocks_of_the_table() -> None:
    manager = make_manager()
    first, _ = manager.open([1])
    table, _ = manager.open([1])
    for num_tokens in (4, 8):  # interleaved, so that blocks are not neighbours
        assert manager.reserve(table, num_tokens)
        assert manager.reserve(first, num_tokens)
    assert list(table.blocks) == [0, 2]
    assert table.slots(0, 8) == [0, 1, 2, 3, 8, 9, 10, 11]
    assert table.slots(3, 6) == [3, 8, 9]
    assert table.slots(5, 5) == []


def test_slots_beyond_the_reservation_are_a_bug() -> None:
    table, _ = make_manager().open([1])
    with pytest.raises(AssertionError, match="not reserved"):
        table.slots(0, 1)


def test_a_committed_prefix_is_found_again() -> None:
    manager = make_manager()
    table = fill(manager, list(range(10)))
    assert table.num_hashed == 2
    assert manager.match([*range(8), 99]) == 8
    again, num_cached = manager.open([*range(8), 99])
    assert (num_cached, again.blocks) == (8, table.blocks[:2])
    assert again.last_hash == table.last_hash
    manager.check_integrity([table, again])


def test_the_last_token_always_has_to_run() -> None:
    manager = make_manager()
    fill(manager, list(range(8)))
    assert manager.match(list(range(8))) == 4
    assert manager.match(list(range(9))) == 8
    assert manager.match([0]) == 0


def test_a_partial_block_is_not_found() -> None:
    manager = make_manager()
    fill(manager, list(range(7)))
    assert manager.match(list(range(9))) == 4


def test_tenants_share_nothing() -> None:
    manager = make_manager()
    fill(manager, list(range(8)), salt="acme")
    assert manager.match(list(range(9)), "acme") == 8
    assert manager.match(list(range(9)), "other") == 0
    assert manager.match(list(range(9))) == 0


def test_match_takes_nothing_and_counts_nothing() -> None:
    manager = make_manager()
    table = fill(manager, list(range(8)))
    manager.free(table)
    before = manager.queries
    manager.match(list(range(9)))
    assert manager.num_used == 0
    assert manager.queries == before


def test_queries_and_hits_are_counted_in_tokens() -> None:
    manager = make_manager()
    fill(manager, list(range(10)))
    manager.open(list(range(9)))
    assert (manager.queries, manager.hits) == (19, 8)


def test_reserve_is_all_or_nothing() -> None:
    manager = make_manager(num_blocks=3)
    table, _ = manager.open([1])
    assert manager.reserve(table, 8)
    assert not manager.can_reserve(table, 13)
    assert not manager.reserve(table, 13)
    assert len(table.blocks) == 2
    assert manager.can_reserve(table, 12)
    assert manager.reserve(table, 12)
    assert (manager.num_free, manager.num_used, manager.usage) == (0, 3, 1.0)


def test_reserving_what_is_there_takes_nothing() -> None:
    manager = make_manager(num_blocks=1)
    table, _ = manager.open([1])
    assert manager.reserve(table, 4)
    assert manager.reserve(table, 2)
    assert manager.num_used == 1


def test_eviction_takes_the_least_recently_used_leaf_first() -> None:
    manager = make_manager(num_blocks=4)
    old = fill(manager, [*range(8)])
    young = fill(manager, [*range(50, 58)])
    manager.free(old)
    manager.free(young)
    pressing, _ = manager.open([99])
    assert manager.reserve(pressing, 4)
    assert manager.match([*range(8), 0]) == 4  # the leaf went, its parent stays
    assert manager.match([*range(50, 58), 0]) == 8
    assert manager.reserve(pressing, 8)
    assert manager.match([*range(8), 0]) == 0
    assert manager.match([*range(50, 58), 0]) == 8
    manager.check_integrity([pressing])


def test_a_hit_makes_a_prefix_young_again() -> None:
    manager = make_manager(num_blocks=2)
    for tokens in ([*range(4)], [*range(50, 54)]):
        manager.free(fill(manager, tokens))
    again, _ = manager.open([*range(4), 0])
    manager.free(again)
    pressing, _ = manager.open([99])
    assert manager.reserve(pressing, 4)
    assert manager.match([*range(4), 0]) == 4
    assert manager.match([*range(50, 54), 0]) == 0


def test_blocks_in_use_are_never_evicted() -> None:
    manager = make_manager(num_blocks=2)
    table = fill(manager, list(range(8)))
    pressing, _ = manager.open([99])
    assert not manager.reserve(pressing, 1)
    assert manager.num_free == 0
    manager.check_integrity([table, pressing])


def test_can_open_counts_hits_that_would_stop_being_evictable() -> None:
    manager = make_manager(num_blocks=3)
    manager.free(fill(manager, list(range(8))))
    prompt = [*range(8), 99]
    assert manager.num_free == 3
    assert manager.can_open(manager.look(prompt), 12)
    assert not manager.can_open(manager.look(prompt), 13)
    table, _ = manager.open(prompt)
    assert manager.reserve(table, 12)
    assert manager.can_open(manager.look(prompt), 8)
    assert not manager.can_open(manager.look(prompt), 9)


def test_an_identical_block_is_given_up_for_the_registered_one() -> None:
    manager = make_manager()
    tables = [manager.open(list(range(10)))[0] for _ in range(2)]
    for table in tables:
        assert manager.reserve(table, 10)
    for table in tables:
        manager.commit(table, list(range(10)), 10)
    assert tables[0].blocks[:2] == tables[1].blocks[:2]
    assert tables[0].blocks[2] != tables[1].blocks[2]
    assert manager.num_used == 4
    manager.check_integrity(tables)


def test_commit_hashes_full_blocks_with_kv_only() -> None:
    manager = make_manager()
    table, _ = manager.open(list(range(9)))
    assert manager.reserve(table, 9)
    manager.commit(table, list(range(9)), 3)
    assert table.num_hashed == 0
    manager.commit(table, list(range(9)), 5)
    assert table.num_hashed == 1
    assert manager.match(list(range(9))) == 4


def test_drafts_may_not_be_committed() -> None:
    manager = make_manager()
    table, _ = manager.open([1, 2, 3])
    assert manager.reserve(table, 8)
    with pytest.raises(AssertionError, match="only committed tokens"):
        manager.commit(table, [1, 2, 3], 4)


def test_truncate_gives_back_reserved_blocks_and_keeps_hashed_ones() -> None:
    manager = make_manager()
    table = fill(manager, list(range(6)))
    assert manager.reserve(table, 16)
    manager.truncate(table, 6)
    assert len(table.blocks) == 2
    assert (manager.num_used, table.num_hashed) == (2, 1)
    manager.check_integrity([table])


def test_rewinding_into_a_registered_block_copies_it_before_a_write() -> None:
    manager = make_manager()
    table = fill(manager, list(range(8)))
    registered = table.blocks[1]
    manager.truncate(table, 6)
    assert table.num_hashed == 1
    copies = manager.make_writable(table, 6)
    assert copies == [(registered, table.blocks[1])]
    assert not manager.is_guarded(table.blocks[1])
    assert manager.match([*range(8), 0]) == 8
    manager.commit(table, [*range(6), 98, 99], 8)
    assert manager.match([*range(6), 98, 99, 0]) == 8
    manager.check_integrity([table])


def test_rewinding_to_the_start_of_a_block_copies_nothing() -> None:
    manager = make_manager()
    table = fill(manager, list(range(8)))
    manager.truncate(table, 4)
    assert manager.make_writable(table, 4) == []
    assert len(table.blocks) == 1


def test_make_writable_without_a_truncate_replaces_later_blocks_too() -> None:
    manager = make_manager()
    table = fill(manager, list(range(12)))
    old = list(table.blocks)
    assert manager.make_writable(table, 6) == [(old[1], table.blocks[1])]
    assert table.blocks[0] == old[0]
    assert not set(table.blocks[1:]) & set(old)
    assert table.num_hashed == 1
    manager.check_integrity([table])


def test_make_writable_changes_nothing_when_blocks_are_short() -> None:
    manager = make_manager(num_blocks=2)
    table = fill(manager, list(range(8)))
    manager.truncate(table, 6)
    before = list(table.blocks)
    assert manager.make_writable(table, 6) is None
    assert list(table.blocks) == before
    manager.check_integrity([table])


def test_the_same_tokens_after_a_rewind_need_no_copy() -> None:
    manager = make_manager(num_blocks=2)
    table = fill(manager, list(range(8)))
    manager.truncate(table, 6)
    manager.commit(table, list(range(8)), 8)
    assert table.num_hashed == 2
    manager.check_integrity([table])


def test_a_forgotten_make_writable_is_noticed() -> None:
    manager = make_manager()
    table = fill(manager, list(range(8)))
    manager.truncate(table, 6)
    with pytest.raises(AssertionError, match="already holds another prefix"):
        manager.commit(table, [*range(6), 98, 99], 8)


def test_fork_shares_full_blocks_and_copies_the_partial_one() -> None:
    manager = make_manager()
    table = fill(manager, list(range(10)))
    forked = manager.fork(table, 10)
    assert forked is not None
    child, copies = forked
    assert child.blocks[:2] == table.blocks[:2]
    assert copies == [(table.blocks[2], child.blocks[2])]
    assert (child.num_hashed, child.salt) == (2, table.salt)
    manager.check_integrity([table, child])


def test_fork_at_a_block_boundary_takes_no_block() -> None:
    manager = make_manager(num_blocks=2)
    table = fill(manager, list(range(8)))
    forked = manager.fork(table, 8)
    assert forked is not None
    assert forked[1] == []
    manager.check_integrity([table, forked[0]])


def test_fork_without_a_free_block_changes_nothing() -> None:
    manager = make_manager(num_blocks=2)
    table = fill(manager, list(range(6)))
    assert manager.fork(table, 6) is None
    manager.check_integrity([table])


def test_fork_before_commit_is_a_bug() -> None:
    manager = make_manager()
    table, _ = manager.open(list(range(8)))
    assert manager.reserve(table, 8)
    with pytest.raises(AssertionError, match="commit before a fork"):
        manager.fork(table, 8)


def test_without_prefix_caching_forks_still_share() -> None:
    manager = make_manager(enable_prefix_caching=False)
    table = fill(manager, list(range(8)))
    assert manager.match([*range(8), 0]) == 0
    assert (manager.queries, table.num_hashed) == (0, 0)
    forked = manager.fork(table, 8)
    assert forked is not None
    child, _ = forked
    manager.truncate(child, 6)
    copies = manager.make_writable(child, 6)
    assert copies == [(table.blocks[1], child.blocks[1])]
    manager.check_integrity([table, child])
    manager.free(table)
    manager.free(child)
    assert manager.num_used == 0


def test_freed_blocks_are_all_available() -> None:
    manager = make_manager(num_blocks=3)
    table = fill(manager, list(range(10)))
    manager.free(table)
    assert (list(table.blocks), table.num_hashed, manager.num_free) == ([], 0, 3)
    manager.check_integrity([])


def test_reset_forgets_prefixes_even_of_open_tables() -> None:
    manager = make_manager()
    table = fill(manager, list(range(8)))
    manager.reset_prefix_cache()
    assert manager.match([*range(8), 0]) == 0
    manager.check_integrity([table])


def test_a_table_from_before_a_reset_never_registers() -> None:
    manager = make_manager()
    table = fill(manager, list(range(6)))
    manager.reset_prefix_cache()
    assert manager.reserve(table, 12)
    manager.commit(table, list(range(12)), 12)
    assert manager.match([*range(12), 0]) == 0
    manager.free(table)
    manager.check_integrity([])
    assert manager.num_used == 0
    fill(manager, list(range(8)))
    assert manager.match([*range(8), 0]) == 8


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (4, 0)])
def test_impossible_sizes_are_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ConfigError, match="=0"):
        BlockManager(num_blocks, block_size)
