"""Proof that no block is lost, shared by mistake, or found under a wrong name."""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple, TypeAlias

from outrider.cache.eviction import EvictionOrder
from outrider.cache.prefix_tree import Node, PrefixTree


class Holdings(NamedTuple):
    """What a BlockManager believes: references per block, and where the others are."""

    refs: Sequence[int]
    free: Sequence[int]
    evictable: EvictionOrder
    tree: PrefixTree


Claim: TypeAlias = tuple[Sequence[int], Node, bool]
"""One table: its blocks, its last hashed node, and whether it may still register blocks."""


def check_holdings(holdings: Holdings, claims: Collection[Claim]) -> None:
    """AssertionError, with the block at fault, where holdings and tables contradict each other."""
    _check_places(holdings)
    _check_references(holdings, claims)
    _check_tree(holdings.tree)
    _check_eviction(holdings)
    for claim in claims:
        _check_claim(holdings, *claim)


def _require(holds: bool, text: str) -> None:
    # Not an assert: this check must speak under `python -O` too.
    if not holds:
        raise AssertionError(text)


def _check_places(holdings: Holdings) -> None:
    free = Counter(holdings.free)
    for block, refs in enumerate(holdings.refs):
        places = free[block] + (block in holdings.evictable) + (refs > 0)
        _require(
            places == 1,
            f"block {block} must be exactly one of free ({free[block]} times), "
            f"evictable ({block in holdings.evictable}) and held ({refs} references)",
        )
        is_registered = block in holdings.tree
        _require(not (free[block] and is_registered), f"free block {block} is in the prefix tree")
        _require(
            block not in holdings.evictable or is_registered,
            f"block {block} is evictable but not in the prefix tree",
        )


def _check_references(holdings: Holdings, claims: Collection[Claim]) -> None:
    held = Counter(block for blocks, _, _ in claims for block in set(blocks))
    for block, refs in enumerate(holdings.refs):
        _require(
            refs == held[block],
            f"block {block} has {refs} references but {held[block]} tables hold it",
        )


def _check_tree(tree: PrefixTree) -> None:
    num_children: Counter[bytes] = Counter()
    for node in tree:
        _require(tree.find(node.hash) is node, f"block {node.block} is listed under a foreign hash")
        _require(
            tree.node_of(node.block) is node, f"block {node.block} is registered more than once"
        )
        parent = node.parent
        if parent is None:
            raise AssertionError(f"block {node.block} is registered without a parent")
        _require(
            tree.find(parent.hash) is parent if parent.depth else parent.parent is None,
            f"block {node.block} is registered but its parent {parent.block} is not",
        )
        _require(node.depth == parent.depth + 1, f"block {node.block} stands at a wrong depth")
        num_children[parent.hash] += 1
    for node in tree:
        _require(
            node.num_children == num_children[node.hash],
            f"block {node.block} counts {node.num_children} children "
            f"but has {num_children[node.hash]}",
        )


def _check_eviction(holdings: Holdings) -> None:
    """Nobody holds a child without its parent, and children are evicted before parents."""
    age = {block: index for index, block in enumerate(holdings.evictable)}
    for node in holdings.tree:
        parent = node.parent
        if parent is None or parent.block not in age:
            continue
        _require(
            node.block in age and age[node.block] < age[parent.block],
            f"block {parent.block} would be evicted before its child {node.block}",
        )


def _check_claim(holdings: Holdings, blocks: Sequence[int], node: Node, may_register: bool) -> None:
    refs, tree = holdings.refs, holdings.tree
    _require(len(set(blocks)) == len(blocks), f"a table holds a block twice: {list(blocks)}")
    guarded = [refs[block] > 1 or block in tree for block in blocks]
    _require(
        guarded == sorted(guarded, reverse=True),
        f"shared or registered blocks must lead their table, but {list(blocks)} are {guarded}",
    )
    if not may_register:
        stale = [block for block in blocks if block in tree]
        _require(
            not stale, f"blocks {stale} are in the prefix tree but their table may not register"
        )
        return
    loose = [b for b in blocks if refs[b] > 1 and b not in tree]
    _require(not loose, f"blocks {loose} are shared but not in the prefix tree")
    while node.parent is not None:
        block = blocks[node.depth - 1] if node.depth <= len(blocks) else None
        _require(
            node.block == block and tree.find(node.hash) is node,
            f"hashed block {node.block} is not block {node.depth - 1} of its table ({block})",
        )
        node = node.parent
