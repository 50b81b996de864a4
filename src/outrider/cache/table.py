"""Which blocks hold a sequence's KV (BlockTable), and who may have which block (BlockManager)."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from outrider.cache.eviction import EvictionOrder
from outrider.cache.integrity import Holdings, check_holdings
from outrider.cache.prefix_tree import Node, PrefixTree
from outrider.errors import ConfigError
from outrider.ops.base import slots_of


@dataclass(kw_only=True, eq=False)
class BlockTable:
    """The blocks of one sequence in order of position; only its BlockManager changes it.

    blocks  [ b0 | b1 | b2 | b3 | b4 ]
            [ hashed  )                    in the prefix tree, never written again
                      [ writable     )     KV of positions still to be filled, drafts included

    Attributes:
        salt: tenant; only tables of the same salt share blocks through the prefix tree.
        node: last hashed block's node in the prefix tree (the salt's root if there is none).
        epoch: resets of the prefix cache when this table was opened.
    """

    block_size: int
    salt: str
    node: Node
    epoch: int
    blocks: "array[int]" = field(default_factory=lambda: array("i"))

    @property
    def num_hashed(self) -> int:
        """Leading blocks whose content is in the prefix tree."""
        return self.node.depth

    @property
    def last_hash(self) -> bytes:
        """Names the hashed prefix, across tables and processes."""
        return self.node.hash

    def slots(self, start: int, stop: int) -> list[int]:
        """KV slots of positions [start, stop)."""
        return slots_of(self.blocks, self.block_size, start, stop)

    def cut(self, num_blocks: int) -> list[int]:
        """Shortens the table to `num_blocks` and returns the blocks that stood behind."""
        dropped = self.blocks[num_blocks:].tolist()
        del self.blocks[num_blocks:]
        return dropped


class BlockCopy(NamedTuple):
    """A block whose content must be copied (`KVPool.copy_block`) before the next pass."""

    source: int
    destination: int


class Prefix(NamedTuple):
    """What of a token log is cached, as found by hashing it.

    Attributes:
        nodes: its blocks in the prefix tree, from the root downwards.
        next_hash: names the prefix that is a block longer; b"" where it cannot be.
    """

    nodes: tuple[Node, ...]
    next_hash: bytes


class BlockManager:
    """Hands out blocks of KV and remembers what committed prefixes they hold.

    A block is free, held by tables, or evictable: in the prefix tree but held by nobody, so it may
    be hit or evicted. Only full blocks of committed tokens enter the tree, so a rejected draft is
    simply overwritten. Blocks that are shared or in the tree are guarded: nobody may write them.

    Attributes:
        queries, hits: prompt tokens looked up by `open`, and those found, since the start.
    """

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True
    ) -> None:
        if block_size < 1:
            raise ConfigError(f"block_size={block_size}: must be >= 1; 16 is usual")
        if num_blocks < 1:
            raise ConfigError(
                f"num_blocks={num_blocks}: no block fits; give the KV pool more memory"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.queries = 0
        self.hits = 0
        self.tree = PrefixTree(block_size)
        self._refs = [0] * num_blocks
        self._free = list(reversed(range(num_blocks)))
        self._evictable = EvictionOrder()
        self._epoch = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be had now, evictable ones included."""
        return len(self._free) + len(self._evictable)

    @property
    def num_empty(self) -> int:
        """Blocks that can be had without forgetting a cached prefix."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def usage(self) -> float:
        """Share of blocks that sequences hold, in [0, 1]."""
        return self.num_used / self.num_blocks

    def match(self, tokens: Sequence[int], salt: str = "") -> int:
        """How many of `tokens` `open` would find cached; takes nothing."""
        return sum(self.block_size for _ in self._walk(PrefixTree.root(salt), tokens))

    def look(self, tokens: Sequence[int], salt: str = "") -> Prefix:
        """What `open` would find cached; takes nothing."""
        root, size = PrefixTree.root(salt), self.block_size
        nodes = tuple(self._walk(root, tokens))
        start = len(nodes) * size
        if not self.enable_prefix_caching or start + size >= len(tokens):
            return Prefix(nodes, b"")
        last = nodes[-1] if nodes else root
        return Prefix(nodes, self.tree.hash_below(last, tokens[start : start + size]))

    def is_current(self, prefix: Prefix) -> bool:
        """Whether `look` would find the same now. Nothing is hashed: ancestors outlive a node."""
        nodes, next_hash = prefix
        is_there = not nodes or self.tree.find(nodes[-1].hash) is nodes[-1]
        return is_there and self.tree.find(next_hash) is None

    def can_open(self, prefix: Prefix, num_tokens: int) -> bool:
        """Whether `open` and then `reserve` for `num_tokens` would succeed.

        Args:
            prefix: of that log, as it is now.
        """
        num_revived = 0
        for node in reversed(prefix.nodes):  # whoever holds one holds those above
            if node.block not in self._evictable:
                break
            num_revived += 1
        num_missing = self._num_blocks_for(num_tokens) - len(prefix.nodes)
        return num_missing <= self.num_free - num_revived

    def open(self, tokens: Sequence[int], salt: str = "") -> tuple[BlockTable, int]:
        """A table that holds the longest cached prefix, and that prefix's length in tokens.

        The prefix is made of full blocks and leaves at least the last token to run.
        """
        table = BlockTable(
            block_size=self.block_size, salt=salt, node=PrefixTree.root(salt), epoch=self._epoch
        )
        for node in self._walk(table.node, tokens):
            self._hold(node.block)
            table.blocks.append(node.block)
            table.node = node
        num_cached = len(table.blocks) * self.block_size
        if self.enable_prefix_caching:
            self.queries += len(tokens)
            self.hits += num_cached
        return table, num_cached

    def can_reserve(self, table: BlockTable, num_tokens: int) -> bool:
        return self._num_blocks_for(num_tokens) - len(table.blocks) <= self.num_free

    def reserve(self, table: BlockTable, num_tokens: int) -> bool:
        """Grows the table to slots for `num_tokens` positions; False, and no change, if it cannot.

        Evicts the least recently used prefixes where free blocks do not suffice.
        """
        if num_tokens <= len(table.blocks) * self.block_size:
            return True
        num_missing = self._num_blocks_for(num_tokens) - len(table.blocks)
        if num_missing > self.num_free:
            return False
        table.blocks.extend(self._take(num_missing))
        return True

    def make_writable(self, table: BlockTable, position: int) -> list[BlockCopy] | None:
        """Copy on write: replaces guarded blocks, so that positions >= `position` may be written.

        Positions before it keep their KV once the copies are made, in order. Only a table that was
        truncated into a guarded block has anything to do. None, and no change, if blocks are short.
        """
        first = position // self.block_size
        # Guarded blocks lead the table, so the first one that may be written speaks for the rest.
        if first >= len(table.blocks) or not self.is_guarded(table.blocks[first]):
            return []
        old = [block for block in table.blocks[first:] if self.is_guarded(block)]
        if len(old) > self.num_free:
            return None
        table.node = table.node.ancestor(min(first, table.num_hashed))
        for index, block in enumerate(self._take(len(old)), first):
            table.blocks[index] = block
        self._drop(old)
        is_partial = position % self.block_size > 0
        return [BlockCopy(old[0], table.blocks[first])] if is_partial else []

    def is_guarded(self, block: int) -> bool:
        """Whether writing to `block` would change what others hold or what a hit would find."""
        return self._refs[block] > 1 or block in self.tree

    def commit(self, table: BlockTable, tokens: Sequence[int], num_cached: int) -> None:
        """Enters the blocks that are now full into the prefix tree.

        Args:
            tokens: the committed tokens; drafts have no place here.
            num_cached: how many of them have KV in this table.
        """
        if num_cached < (table.node.depth + 1) * self.block_size or not self._registers(table):
            return
        assert num_cached <= len(tokens), "only committed tokens may be hashed"
        for index in range(table.num_hashed, num_cached // self.block_size):
            self._register(table, index, tokens)

    def truncate(self, table: BlockTable, num_tokens: int) -> None:
        """Gives back blocks beyond `num_tokens` positions; KV of later positions is void.

        After a rewind, `make_writable(table, num_tokens)` before the next write.
        """
        num_kept = self._num_blocks_for(num_tokens)
        if len(table.blocks) > num_kept:
            self._drop(table.cut(num_kept))
        if table.num_hashed * self.block_size > num_tokens:
            table.node = table.node.ancestor(num_tokens // self.block_size)

    def fork(self, table: BlockTable, num_tokens: int) -> tuple[BlockTable, list[BlockCopy]] | None:
        """A second table with the KV of the first `num_tokens` positions; None if blocks are short.

        Full blocks are shared; a partial one is the fork's own, to be copied before the next pass.
        """
        num_full, num_partial = divmod(num_tokens, self.block_size)
        assert self._num_blocks_for(num_tokens) <= len(table.blocks), "positions without slots"
        # Sharing happens through the tree, so that whoever holds a node holds its ancestors.
        assert num_full <= table.num_hashed or not self._registers(table), "commit before a fork"
        if num_partial and not self.num_free:
            return None
        shared = table.blocks[:num_full].tolist()
        for block in shared:
            self._hold(block)
        own = self._take(1) if num_partial else []
        forked = BlockTable(
            block_size=self.block_size,
            salt=table.salt,
            node=table.node.ancestor(min(num_full, table.num_hashed)),
            epoch=table.epoch,
        )
        forked.blocks.extend(shared + own)
        return forked, [BlockCopy(table.blocks[num_full], block) for block in own]

    def free(self, table: BlockTable) -> None:
        """Lets go of all blocks; those in the prefix tree may be hit until evicted."""
        self._drop(table.cut(0))
        table.node = table.node.ancestor(0)

    def reset_prefix_cache(self) -> None:
        """Forgets all prefixes, as after a change of weights.

        Tables that are open keep their blocks, but register none from now on: their KV may mix
        what was before and after.
        """
        self._free += self._evictable
        self._evictable.clear()
        self.tree.clear()
        self._epoch += 1

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """AssertionError unless every block is where exactly one rule says it is.

        Args:
            tables: all tables that are open.
        """
        check_holdings(
            Holdings(refs=self._refs, free=self._free, evictable=self._evictable, tree=self.tree),
            [(table.blocks, table.node, self._registers(table)) for table in tables],
        )

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _walk(self, root: Node, tokens: Sequence[int]) -> Iterator[Node]:
        max_blocks = (len(tokens) - 1) // self.block_size if self.enable_prefix_caching else 0
        return self.tree.walk(root, tokens, max_blocks)

    def _registers(self, table: BlockTable) -> bool:
        return self.enable_prefix_caching and table.epoch == self._epoch

    def _register(self, table: BlockTable, index: int, tokens: Sequence[int]) -> None:
        size = self.block_size
        prefix_hash = self.tree.hash_below(table.node, tokens[index * size : (index + 1) * size])
        node = self.tree.find(prefix_hash)
        if node is None:
            table.node = self.tree.insert(table.node, prefix_hash, table.blocks[index])
            return
        # Another table was first with this prefix. Its block replaces ours: ours is free at once,
        # and whoever holds a node still holds its ancestors, on which eviction rests. Keeping ours
        # beside the tree would break that or leave all that follows unregistered.
        self._adopt(table, index, node)

    def _adopt(self, table: BlockTable, index: int, node: Node) -> None:
        own = table.blocks[index]
        table.node = node
        if node.block != own:
            assert own not in self.tree, f"block {own} was overwritten with make_writable forgotten"
            self._hold(node.block)
            table.blocks[index] = node.block
            self._drop([own])

    def _take(self, num_blocks: int) -> list[int]:
        return [self._take_one() for _ in range(num_blocks)]

    def _take_one(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block = self._evictable.pop()
            self.tree.remove(block)
        self._refs[block] = 1
        return block

    def _hold(self, block: int) -> None:
        if self._refs[block] == 0:
            self._evictable.remove(block)
        self._refs[block] += 1

    def _drop(self, blocks: Sequence[int]) -> None:
        """Last block first, so that in order of eviction leaves are older than their parents."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            assert self._refs[block] >= 0, f"block {block} was let go twice"
            if self._refs[block]:
                continue
            if block in self.tree:
                self._evictable.add(block)
            else:
                self._free.append(block)
