"""check_integrity: each way to break the books is noticed, by name of the block."""

from collections.abc import Callable

import pytest

from outrider.cache.table import BlockManager, BlockTable


def make_books() -> tuple[BlockManager, BlockTable]:
    """Table holds [0 hashed, 1 hashed, 2]; blocks 3 and 4 are evictable; 5 is free."""
    manager = BlockManager(6, 2)
    table, _ = manager.open([1])
    assert manager.reserve(table, 5)
    manager.commit(table, [1, 2, 3, 4, 5], 5)
    other, _ = manager.open([9])
    assert manager.reserve(other, 4)
    manager.commit(other, [9, 8, 7, 6], 4)
    manager.free(other)
    manager.check_integrity([table])
    return manager, table


def leak(manager: BlockManager, _: BlockTable) -> None:
    manager._free.pop()


def free_twice(manager: BlockManager, _: BlockTable) -> None:
    manager._free.append(5)


def free_while_held(manager: BlockManager, _: BlockTable) -> None:
    manager._free.append(2)


def count_one_too_many(manager: BlockManager, _: BlockTable) -> None:
    manager._refs[2] += 1


def hold_twice(_: BlockManager, table: BlockTable) -> None:
    table.blocks.append(2)


def hold_without_reference(_: BlockManager, table: BlockTable) -> None:
    table.blocks.append(5)


def evict_parent_first(manager: BlockManager, _: BlockTable) -> None:
    manager._evictable.remove(4)
    manager._evictable.add(4)


def forget_a_child(manager: BlockManager, _: BlockTable) -> None:
    node = manager.tree.node_of(0)
    assert node is not None
    node.num_children = 0


def unregister_a_parent(manager: BlockManager, _: BlockTable) -> None:
    node = manager.tree.node_of(0)
    assert node is not None
    node.num_children = 0
    manager.tree.remove(0)


def register_under_two_names(manager: BlockManager, table: BlockTable) -> None:
    node = manager.tree.insert(table.node, b"another", 2)
    node.block = 0


def register_a_free_block(manager: BlockManager, table: BlockTable) -> None:
    manager.tree.insert(table.node, b"another", 5)


def swap_hashed_blocks(_: BlockManager, table: BlockTable) -> None:
    table.blocks[0], table.blocks[1] = table.blocks[1], table.blocks[0]


def hold_a_foreign_block(manager: BlockManager, table: BlockTable) -> None:
    manager.commit(table, [1, 2, 3, 4, 5, 6], 6)
    manager._evictable.remove(3)
    manager._refs[3] = 1
    table.blocks.insert(2, 3)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (leak, r"block 5 must be exactly one of free \(0 times\)"),
        (free_twice, r"block 5 must be exactly one of free \(2 times\)"),
        (free_while_held, r"block 2 must be exactly one of .* held \(1 references\)"),
        (count_one_too_many, "block 2 has 2 references but 1 tables hold it"),
        (hold_twice, "a table holds a block twice"),
        (hold_without_reference, "block 5 has 0 references but 1 tables hold it"),
        (evict_parent_first, "block 3 would be evicted before its child 4"),
        (forget_a_child, "block 0 counts 0 children but has 1"),
        (unregister_a_parent, "block 1 is registered but its parent 0 is not"),
        (register_under_two_names, "block 0 is registered more than once"),
        (register_a_free_block, "free block 5 is in the prefix tree"),
        (swap_hashed_blocks, "hashed block 1 is not block 1 of its table"),
        (hold_a_foreign_block, "hashed block 2 is not block 2 of its table"),
    ],
)
def test_damage_is_noticed(damage: Callable[[BlockManager, BlockTable], None], text: str) -> None:
    manager, table = make_books()
    damage(manager, table)
    with pytest.raises(AssertionError, match=text):
        manager.check_integrity([table])


def test_a_forgotten_table_is_noticed() -> None:
    manager, _ = make_books()
    with pytest.raises(AssertionError, match="block 0 has 1 references but 0 tables hold it"):
        manager.check_integrity([])


def test_sharing_past_the_tree_is_noticed() -> None:
    manager, table = make_books()
    other, _ = manager.open([9])
    other.blocks.append(2)
    manager._refs[2] += 1
    with pytest.raises(AssertionError, match=r"blocks \[2\] are shared but not in the prefix tree"):
        manager.check_integrity([table, other])


def test_a_guarded_block_behind_a_writable_one_is_noticed() -> None:
    manager, table = make_books()
    other, _ = manager.open([9])
    assert manager.reserve(other, 2)
    other.blocks.append(0)
    manager._refs[0] += 1
    with pytest.raises(AssertionError, match="must lead their table"):
        manager.check_integrity([table, other])


def test_a_registered_block_of_a_table_from_before_a_reset_is_noticed() -> None:
    manager, table = make_books()
    table.epoch -= 1
    with pytest.raises(AssertionError, match="their table may not register"):
        manager.check_integrity([table])
