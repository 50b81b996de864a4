"""KV out of a pool and back into one: whole blocks of a committed prefix, as tensors on the host.

Shape legend: S slots of the blocks in order of position, G key/value heads, D key width, E value
width.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.cache.pool import KVPool
from outrider.cache.prefix_tree import Node, PrefixTree
from outrider.cache.table import BlockManager, BlockTable
from outrider.errors import ConfigError
from outrider.ops.base import LayerKV


@dataclass(frozen=True, kw_only=True, eq=False)
class PrefixKV:
    """Keys and values of consecutive blocks of one prefix, outside any pool.

    prefix  [ b0 | b1 | b2 | b3 | b4 ]
                      [ hashes, layers )     first = 2

    Attributes:
        block_size: tokens per block.
        first: blocks of the prefix that come before these.
        hashes: per block the name of the prefix that ends with it, tenant included.
        layers: per layer keys_SGD and values_SGE, on the host.
    """

    block_size: int
    first: int
    hashes: tuple[bytes, ...]
    layers: list[LayerKV]

    @property
    def num_tokens(self) -> int:
        """Of the prefix up to and with the last block here."""
        return (self.first + len(self.hashes)) * self.block_size


def prefix_hashes(tokens: Sequence[int], block_size: int, salt: str = "") -> Iterator[bytes]:
    """The names that a prefix tree gives to the whole blocks of `tokens`, one after the other."""
    tree, node = PrefixTree(block_size), PrefixTree.root(salt)
    for start in range(0, len(tokens) - block_size + 1, block_size):
        below = tree.hash_below(node, tokens[start : start + block_size])
        node = Node(hash=below, block=-1, depth=node.depth + 1)
        yield below


def num_resident(manager: BlockManager, tokens: Sequence[int], salt: str = "") -> int:
    """How many of `tokens` have KV in whole cached blocks, the last token's included."""
    return len(_resident(manager, tokens, salt)) * manager.block_size


def hold_prefix(manager: BlockManager, tokens: Sequence[int], salt: str = "") -> BlockTable:
    """A table of all whole blocks of `tokens` that are cached, so that they are not evicted."""
    counted = manager.queries, manager.hits
    table, _ = manager.open([*tokens, 0], salt)  # the token behind lets the last block count
    manager.queries, manager.hits = counted  # nobody asked for these
    return table


def export_prefix(
    pool: KVPool, manager: BlockManager, tokens: Sequence[int], salt: str = "", *, start: int = 0
) -> PrefixKV:
    """Copies the cached whole blocks of `tokens` out of the pool; takes and changes nothing.

    Args:
        start: leading tokens, whole blocks of them, to leave out.
    """
    first, rest = divmod(start, manager.block_size)
    assert rest == 0, f"start={start} lies within a block"
    nodes = _resident(manager, tokens, salt)[first:]
    blocks = torch.tensor([node.block for node in nodes], dtype=torch.long, device=pool.device)
    return PrefixKV(
        block_size=manager.block_size,
        first=first,
        hashes=tuple(node.hash for node in nodes),
        layers=[
            LayerKV(_gather(keys, blocks, pool), _gather(values, blocks, pool))
            for keys, values in pool.layers
        ],
    )


def import_prefix(
    pool: KVPool, manager: BlockManager, tokens: Sequence[int], salt: str, prefix: PrefixKV
) -> int:
    """Enters blocks that `export_prefix` took out; see `import_runs`."""
    return import_runs(pool, manager, tokens, salt, [prefix])


def import_runs(
    pool: KVPool,
    manager: BlockManager,
    tokens: Sequence[int],
    salt: str,
    runs: Iterable[PrefixKV],
) -> int:
    """Enters the KV of runs that follow one another; returns how many of `tokens` are cached then.

    They become what a finished request leaves behind: prefixes that may be hit, held by nobody.
    Blocks that are there are left as they are. Each missing one takes an empty block, or the least
    recently used prefix's; what sequences hold is never touched, and where no block is to be had
    the rest is left out. Of each run those blocks come in that bear the hashes of `tokens` and
    `salt` and join what is cached: KV cannot enter under another name than it left with.

    Args:
        runs: taken one at a time, so that they need not be in memory together.

    Raises:
        ConfigError: a run has not this pool's block size, shapes or dtype. Runs before it stay.
    """
    if not manager.enable_prefix_caching:
        return 0
    own = list(prefix_hashes(tokens, manager.block_size, salt))
    table = hold_prefix(manager, tokens[: len(own) * manager.block_size], salt)
    try:
        for run in runs:
            _check_fits(pool, run)
            if not _enter(pool, manager, table, tokens, own, run):
                break
        return len(table.blocks) * manager.block_size
    finally:
        manager.free(table)


def _resident(manager: BlockManager, tokens: Sequence[int], salt: str) -> list[Node]:
    if not manager.enable_prefix_caching:
        return []
    max_blocks = len(tokens) // manager.block_size
    return list(manager.tree.walk(PrefixTree.root(salt), tokens, max_blocks))


def _enter(
    pool: KVPool,
    manager: BlockManager,
    table: BlockTable,
    tokens: Sequence[int],
    own: list[bytes],
    run: PrefixKV,
) -> bool:
    """Whether the table holds the run now, as far as it is of these tokens."""
    num_there, size = len(table.blocks), manager.block_size
    same = _num_equal(own[run.first :], run.hashes)
    wanted = run.first + same
    end = min(wanted, num_there + manager.num_free)
    if run.first <= num_there < end:
        took = manager.reserve(table, end * size)
        assert took, "no more blocks were asked for than are free"
        blocks = torch.tensor(table.blocks[num_there:end].tolist(), device=pool.device)
        skipped = num_there - run.first
        for layer, outside in zip(pool.layers, run.layers, strict=True):
            for part, values in zip(layer, outside, strict=True):
                _scatter(part, blocks, values[skipped * size :], pool)
        manager.commit(table, tokens, end * size)
    return len(table.blocks) >= wanted


def _num_equal(own: Sequence[bytes], other: Sequence[bytes]) -> int:
    """Leading hashes that agree."""
    for index, (mine, given) in enumerate(zip(own, other, strict=False)):
        if mine != given:
            return index
    return min(len(own), len(other))


def _gather(part: Tensor, blocks: Tensor, pool: KVPool) -> Tensor:
    by_block: Tensor = part.unflatten(0, (-1, pool.block_size))
    return by_block[blocks].flatten(0, 1).cpu()


def _scatter(part: Tensor, blocks: Tensor, values: Tensor, pool: KVPool) -> None:
    """Into as many blocks as are given; values may go on behind them."""
    wanted = values[: len(blocks) * pool.block_size].to(pool.device)
    by_block = part.unflatten(0, (-1, pool.block_size))
    by_block[blocks] = wanted.unflatten(0, (-1, pool.block_size))


def _check_fits(pool: KVPool, run: PrefixKV) -> None:
    if run.block_size != pool.block_size:
        raise ConfigError(
            f"KV in blocks of {run.block_size} tokens does not fit a pool of block_size="
            f"{pool.block_size}: compute it anew"
        )
    if len(run.layers) != len(pool.layers):
        raise ConfigError(
            f"KV of {len(run.layers)} layers does not fit a pool of {len(pool.layers)}: it is of "
            "another model"
        )
    num_slots = len(run.hashes) * run.block_size
    for index, (layer, outside) in enumerate(zip(pool.layers, run.layers, strict=True)):
        for part, values in zip(layer, outside, strict=True):
            wanted = (num_slots, *part.shape[1:])
            if tuple(values.shape) != wanted or values.dtype != part.dtype:
                raise ConfigError(
                    f"KV of layer {index} is {tuple(values.shape)} in {values.dtype}, the pool "
                    f"takes {wanted} in {part.dtype}: it is of another model, or cut off"
                )
