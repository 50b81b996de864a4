"""PrefixTree: the hash chain, the walk along it, and the removal of leaves."""

import hashlib
import struct

import pytest

from outrider.cache.prefix_tree import Node, PrefixTree

SIZE = 2


def grow(tree: PrefixTree, root: Node, tokens: list[int], blocks: list[int]) -> Node:
    node = root
    for index, block in enumerate(blocks):
        chunk = tokens[index * SIZE : (index + 1) * SIZE]
        node = tree.insert(node, tree.hash_below(node, chunk), block)
    return node


def walk(tree: PrefixTree, salt: str, tokens: list[int]) -> list[int]:
    nodes = tree.walk(PrefixTree.root(salt), tokens, len(tokens) // SIZE)
    return [node.block for node in nodes]


def test_hash_is_sha256_over_parent_and_little_endian_int64_tokens() -> None:
    root = PrefixTree.root("acme")
    assert root.hash == hashlib.sha256(b"salt:acme").digest()
    below = PrefixTree(3).hash_below(root, [1, -2, 2**40])
    assert below == hashlib.sha256(root.hash + struct.pack("<qqq", 1, -2, 2**40)).digest()


def test_walk_finds_the_longest_registered_prefix() -> None:
    tree = PrefixTree(SIZE)
    grow(tree, PrefixTree.root(""), [1, 2, 3, 4, 5, 6], [7, 8, 9])
    assert walk(tree, "", [1, 2, 3, 4, 5, 6, 7, 8]) == [7, 8, 9]
    assert walk(tree, "", [1, 2, 3, 4, 0, 6]) == [7, 8]
    assert walk(tree, "", [3, 4, 5, 6]) == []


def test_equal_blocks_below_different_parents_are_different() -> None:
    tree = PrefixTree(SIZE)
    root = PrefixTree.root("")
    grow(tree, root, [1, 2, 5, 5], [0, 1])
    grow(tree, root, [3, 4, 5, 5], [2, 3])
    assert walk(tree, "", [3, 4, 5, 5]) == [2, 3]
    assert len(tree) == 4


def test_tenants_do_not_find_each_other() -> None:
    tree = PrefixTree(SIZE)
    grow(tree, PrefixTree.root("acme"), [1, 2], [0])
    assert walk(tree, "acme", [1, 2]) == [0]
    assert walk(tree, "other", [1, 2]) == []


def test_only_leaves_may_be_removed() -> None:
    tree = PrefixTree(SIZE)
    grow(tree, PrefixTree.root(""), [1, 2, 3, 4], [0, 1])
    with pytest.raises(AssertionError, match="block 0 still has 1 children"):
        tree.remove(0)


def test_a_removed_leaf_makes_its_parent_a_leaf() -> None:
    tree = PrefixTree(SIZE)
    grow(tree, PrefixTree.root(""), [1, 2, 3, 4], [0, 1])
    tree.remove(1)
    assert walk(tree, "", [1, 2, 3, 4]) == [0]
    assert 1 not in tree
    tree.remove(0)
    assert len(tree) == 0


def test_one_block_per_prefix_and_one_prefix_per_block() -> None:
    tree = PrefixTree(SIZE)
    root = PrefixTree.root("")
    grow(tree, root, [1, 2], [0])
    with pytest.raises(AssertionError, match="one block per prefix"):
        grow(tree, root, [1, 2], [1])
    with pytest.raises(AssertionError, match="block 0 already holds another prefix"):
        grow(tree, root, [3, 4], [0])


def test_ancestor_counts_blocks_from_the_root() -> None:
    tree = PrefixTree(SIZE)
    root = PrefixTree.root("")
    leaf = grow(tree, root, [1, 2, 3, 4, 5, 6], [0, 1, 2])
    assert leaf.ancestor(3) is leaf
    assert leaf.ancestor(1).block == 0
    assert leaf.ancestor(0) is root
