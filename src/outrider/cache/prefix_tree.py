"""Which block holds the KV of which prefix: a tree of full blocks, keyed by chained hashes."""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Node:
    """One full block of tokens below the prefix it continues.

    Attributes:
        hash: sha256 over the parent's hash and the block's tokens, so it names the whole prefix.
        block: where the KV is; -1 for a root, which stands for the empty prefix.
        depth: blocks from the root down to here, this one included.
        num_children: registered continuations; only a node without any may be removed.
    """

    hash: bytes
    block: int
    depth: int
    parent: "Node | None" = None
    num_children: int = 0

    def ancestor(self, depth: int) -> "Node":
        """The node above (or this one) that stands at `depth`."""
        node = self
        while node.depth > depth:
            assert node.parent is not None, "only a root has no parent, and its depth is 0"
            node = node.parent
        return node


class PrefixTree:
    """Registered blocks by hash and by number. It knows nothing of who holds them."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        # Little-endian int64 on every machine: hashes may be compared between processes.
        self._pack = struct.Struct(f"<{block_size}q").pack
        self._by_hash: dict[bytes, Node] = {}
        self._by_block: dict[int, Node] = {}

    def __len__(self) -> int:
        return len(self._by_block)

    def __contains__(self, block: int) -> bool:
        return block in self._by_block

    def __iter__(self) -> Iterator[Node]:
        return iter(self._by_hash.values())

    @staticmethod
    def root(salt: str) -> Node:
        """The empty prefix of one tenant; other salts lead to other hashes all the way down."""
        return Node(hash=hashlib.sha256(b"salt:" + salt.encode()).digest(), block=-1, depth=0)

    def find(self, prefix_hash: bytes) -> Node | None:
        return self._by_hash.get(prefix_hash)

    def node_of(self, block: int) -> Node | None:
        return self._by_block.get(block)

    def hash_below(self, parent: Node, tokens: Sequence[int]) -> bytes:
        """The name of the prefix that continues `parent` with one block of tokens."""
        return hashlib.sha256(parent.hash + self._pack(*tokens)).digest()

    def walk(self, root: Node, tokens: Sequence[int], max_blocks: int) -> Iterator[Node]:
        """The registered prefix of `tokens`, from the root downwards, hashed only as far."""
        node: Node | None = root
        for start in range(0, max_blocks * self._block_size, self._block_size):
            assert node is not None
            node = self.find(self.hash_below(node, tokens[start : start + self._block_size]))
            if node is None:
                return
            yield node

    def insert(self, parent: Node, prefix_hash: bytes, block: int) -> Node:
        assert prefix_hash not in self._by_hash, "one block per prefix"
        assert block not in self._by_block, f"block {block} already holds another prefix"
        node = Node(hash=prefix_hash, block=block, depth=parent.depth + 1, parent=parent)
        self._by_hash[prefix_hash] = self._by_block[block] = node
        parent.num_children += 1
        return node

    def remove(self, block: int) -> None:
        """Forgets a leaf; a node with children would leave them unreachable."""
        node = self._by_block.pop(block)
        assert node.num_children == 0, f"block {block} still has {node.num_children} children"
        assert node.parent is not None, "registered nodes have parents"
        node.parent.num_children -= 1
        del self._by_hash[node.hash]

    def clear(self) -> None:
        self._by_hash.clear()
        self._by_block.clear()
