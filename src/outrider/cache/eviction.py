"""Who goes first: blocks of the prefix tree that nobody holds, least recently used first."""

from collections import OrderedDict
from collections.abc import Iterator


class EvictionOrder:
    """Evictable blocks in the order they were let go; every operation is O(1).

    Whoever holds a block of the prefix tree holds its ancestors too, and lets go of leaves first.
    So the oldest block here never has children left: least recently used is also leaves first,
    and the order of insertion is the only clock needed.
    """

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: int) -> bool:
        return block in self._blocks

    def __iter__(self) -> Iterator[int]:
        """Oldest first."""
        return iter(self._blocks)

    def add(self, block: int) -> None:
        """The last holder let go of `block`."""
        assert block not in self._blocks, f"block {block} was let go twice"
        self._blocks[block] = None

    def remove(self, block: int) -> None:
        """Somebody holds `block` again."""
        del self._blocks[block]

    def pop(self) -> int:
        """The oldest block, which is a leaf."""
        return self._blocks.popitem(last=False)[0]

    def clear(self) -> None:
        self._blocks.clear()
