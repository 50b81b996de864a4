"""Token Recycling: what a pass of the target found likely after each token is the next draft.

Luo et al. 2024 (arXiv:2408.08696). Each row of a pass, accepted or not, ranks
the successors of its token; a table remembers the last ranking of every token, and a draft follows
it down a fixed tree: a node is its parent token's j-th successor.

Shape legend: V vocabulary, N rows of the pass, U rows learnt from, R sequences drafted for,
C columns of a tree (the root, then its nodes), J successors of a token.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence as Items
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outrider.draft.base import Snapshot, Surroundings, Warmth
from outrider.request import Option
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, Commit, DraftTree, Plan, Row, TargetOutput

NUM_SUCCESSORS = 8
MAX_TENANTS = 64
UNSEEN = -1

# How often the next token is the j-th successor on record: the demo's target over 8163 tokens of
# answers to 38 prompts, mean of temperature 0 and 0.7.
HIT_RATES = (0.57, 0.08, 0.04, 0.027, 0.018, 0.013, 0.012, 0.01)

# Rows cost little on a GPU, and there the published tree pays; on a CPU every row is paid for.
GPU_NODES = 80
CPU_NODES = 8
PUBLISHED_LEVELS = (8, 21, 25, 15, 8, 3)

Table: TypeAlias = NDArray[np.int32]


class RecycleDrafter:
    """Drafts from a table of successors that all sequences of a tenant share and keep up to date.

    A token that no pass has met yet has no successors: the tree ends there.

    Args:
        vocab_size: of the target.
        num_nodes: nodes of a tree where the request does not say.
        max_tenants: tables kept; the one not used for longest goes first.
        num_successors: J, kept per token, at 4 bytes each; a tree is no wider. At most 8.

    Attributes:
        tables: by tenant, int32 [V + 1, J], likeliest first. -1 in rows of unseen tokens, and in
            the last row, which belongs to "token -1" so that a missing node has no children either.
    """

    name = "recycle"
    needs: tuple[str, ...] = ("logits",)
    warmth = Warmth.R0
    default_draft_tokens = len(PUBLISHED_LEVELS)
    default_width = max_width = NUM_SUCCESSORS
    min_width = 1
    default_num_nodes: int | None = CPU_NODES
    sample_methods: tuple[str, ...] = ("greedy",)
    options: Mapping[str, Option] = {}
    settings: Mapping[str, Option] = {
        "max_tenants": Option(MAX_TENANTS, "tenants whose tables are kept", 1, 1e6),
        "num_successors": Option(
            NUM_SUCCESSORS, "successors kept per token, and widest tree", 1, NUM_SUCCESSORS
        ),
    }

    def __init__(
        self,
        vocab_size: int,
        num_nodes: int = CPU_NODES,
        max_tenants: int = MAX_TENANTS,
        num_successors: int = NUM_SUCCESSORS,
    ) -> None:
        assert max_tenants >= 1
        assert 1 <= num_successors <= NUM_SUCCESSORS
        self.default_num_nodes = num_nodes
        self.default_width = self.max_width = num_successors
        self.tables: dict[str, Table] = {}
        self._shape = (vocab_size + 1, min(num_successors, vocab_size))
        self._max_tenants = max_tenants

    @classmethod
    def build(
        cls,
        surroundings: Surroundings,
        *,
        max_tenants: int = MAX_TENANTS,
        num_successors: int = NUM_SUCCESSORS,
    ) -> "RecycleDrafter":
        spec = surroundings.target.runner.network.spec
        num_nodes = CPU_NODES if spec.device.type == "cpu" else GPU_NODES
        return cls(spec.vocab_size, num_nodes, max_tenants, num_successors)

    def open(self, seq: Sequence) -> None:
        """The table is its tenant's; a sequence only says that its rows may be learnt from."""
        seq.drafter_state[self.name] = True

    def draft(self, rows: Items[Row], plan: Plan) -> list[DraftTree]:
        trees = [EMPTY_TREE] * len(rows)
        alike: dict[tuple[str, int, int, int], list[int]] = {}
        for i, (row, part) in enumerate(zip(rows, plan, strict=True)):
            width = min(part.width, self._shape[1])
            asked = (row.seq.request.tenant, part.num_nodes, part.depth, width)
            alike.setdefault(asked, []).append(i)
        for (tenant, *size), at in alike.items():
            shape = template(*size)
            roots = [rows[i].seq.tokens[-1] for i in at]
            tokens_RC = _follow(self.successors(tenant), roots, shape)
            for i, tokens in zip(at, tokens_RC[:, 1:].tolist(), strict=True):
                trees[i] = _tree(tokens, shape.parents, self.name)
        return trees

    def successors(self, tenant: str = "") -> Table:
        """The table of a tenant, new if there is none; the one used last stands last."""
        table = self.tables.pop(tenant, None)
        if table is None:
            table = np.full(self._shape, UNSEEN, dtype=np.int32)
            if len(self.tables) == self._max_tenants:
                del self.tables[next(iter(self.tables))]
        self.tables[tenant] = table
        return table

    def observe(self, commits: Items[Commit], output: TargetOutput) -> None:
        """Remembers the top successors of each token that had a row; later rows win."""
        rows_of: dict[str, dict[int, int]] = {}
        for commit, first in zip(commits, output.first, strict=True):
            seq = commit.seq
            if first >= 0 and not commit.error and self.name in seq.drafter_state:
                row_of = rows_of.setdefault(seq.request.tenant, {})
                row_of.update((token, row) for row, token in enumerate(_row_tokens(commit), first))
        if not rows_of:
            return
        rows = [row for row_of in rows_of.values() for row in row_of.values()]
        top_UJ = output.logits_NV[rows].topk(self._shape[1], dim=-1).indices.cpu().numpy()
        start = 0
        for tenant, row_of in rows_of.items():
            self.successors(tenant)[list(row_of)] = top_UJ[start : start + len(row_of)]
            start += len(row_of)

    def close(self, seq: Sequence) -> None:
        seq.drafter_state.pop(self.name, None)

    def shared(self, tenant: str) -> dict[str, Tensor]:
        """Rows of the tokens that were met: ids int32 [U], their successors int32 [U, J]."""
        table = self.tables.get(tenant)
        if table is None:
            return {}
        ids = np.flatnonzero(table[:, 0] != UNSEEN).astype(np.int32)
        return {"ids": torch.from_numpy(ids), "successors": torch.from_numpy(table[ids])}

    def take_shared(self, tenant: str, tensors: Mapping[str, Tensor]) -> int:
        """Rows of tokens that were not met since; returns how many."""
        if not _is_shared(tensors, *self._shape):
            return 0
        ids, successors = tensors["ids"].numpy(), tensors["successors"].numpy()
        table = self.successors(tenant)
        is_new = table[ids, 0] == UNSEEN
        table[ids[is_new]] = successors[is_new]
        return int(is_new.sum())

    def snapshot(self, seq: Sequence) -> Snapshot | None:
        """None: the table belongs to the engine, not to a sequence."""
        return None

    def restore(self, seq: Sequence, snapshot: Snapshot) -> int:
        self.open(seq)
        return len(seq.tokens)


class Level(NamedTuple):
    """Nodes of one depth: columns of their parents (0 is the root), and which successor each is."""

    parents: NDArray[np.int64]
    ranks: NDArray[np.int64]


class Template(NamedTuple):
    """The shape of a tree, level by level; `parents` as in a `DraftTree`."""

    parents: tuple[int, ...]
    levels: tuple[Level, ...]


@lru_cache(maxsize=256)
def template(num_nodes: int, depth: int, width: int) -> Template:
    """The tree that is expected to be accepted furthest: its nodes are the likeliest ones.

    Args:
        width: most children of any node, so 1 is a chain.
    """
    paths = sorted(_likeliest(num_nodes, depth, width), key=len)  # stable: likeliest first
    column_of = {path: column for column, path in enumerate(((), *paths))}
    levels = []
    for length in range(1, max(map(len, paths), default=0) + 1):
        level = [path for path in paths if len(path) == length]
        parents = np.array([column_of[path[:-1]] for path in level])
        levels.append(Level(parents, np.array([path[-1] for path in level])))
    return Template(tuple(column_of[path[:-1]] - 1 for path in paths), tuple(levels))


def _likeliest(num_nodes: int, depth: int, width: int) -> Iterator[tuple[int, ...]]:
    """Best-first search: nodes as paths of ranks, by the product of their hit rates.

    That product is the chance that the node is accepted, so the best N are the best tree. The
    published tree of 80 nodes says how many may lie at each depth.
    """
    room = list(PUBLISHED_LEVELS)
    if num_nodes != GPU_NODES or depth < len(room) or width < NUM_SUCCESSORS:
        room = [num_nodes] * depth
    heap: list[tuple[float, tuple[int, ...]]] = [(-HIT_RATES[0], (0,))] if room else []
    while heap and num_nodes:
        weight, path = heapq.heappop(heap)
        if not room[len(path) - 1]:
            continue
        room[len(path) - 1] -= 1
        num_nodes -= 1
        yield path
        if len(path) < len(room):
            heapq.heappush(heap, (weight * HIT_RATES[0], (*path, 0)))
        if path[-1] + 1 < width:
            step = HIT_RATES[path[-1] + 1] / HIT_RATES[path[-1]]
            heapq.heappush(heap, (weight * step, (*path[:-1], path[-1] + 1)))


def _follow(table: Table, roots: list[int], shape: Template) -> Table:
    """The tokens of all trees, level by level; -1 where the table has none."""
    tokens_RC = np.empty((len(roots), 1 + len(shape.parents)), dtype=np.int32)
    tokens_RC[:, 0] = roots
    start = 1
    for parents, ranks in shape.levels:
        stop = start + len(ranks)
        tokens_RC[:, start:stop] = table[tokens_RC[:, parents], ranks]
        start = stop
    return tokens_RC


def _row_tokens(commit: Commit) -> tuple[int, ...]:
    """The tokens whose successors the rows of a commit rank: the root's, then the nodes'."""
    tokens = commit.seq.tokens
    return (tokens[len(tokens) - len(commit.tokens) - 1], *commit.tree.tokens)


def _tree(tokens: list[int], parents: tuple[int, ...], source: str) -> DraftTree:
    """Without the nodes that the table has no token for; nothing hangs below those."""
    if UNSEEN not in tokens:
        return DraftTree(tokens=tuple(tokens), parents=parents, source=source)
    node_of = {-1: -1}
    kept = [node for node, token in enumerate(tokens) if token != UNSEEN]
    node_of.update({node: index for index, node in enumerate(kept)})
    return DraftTree(
        tokens=tuple(tokens[node] for node in kept),
        parents=tuple(node_of[parents[node]] for node in kept),
        source=source,
    )


def _is_shared(tensors: Mapping[str, Tensor], num_rows: int, num_successors: int) -> bool:
    """Whether these are rows of a table of that shape; its last row belongs to no token."""
    ids, successors = tensors.get("ids"), tensors.get("successors")
    if ids is None or successors is None or not len(ids):
        return False
    return (
        ids.dtype == successors.dtype == torch.int32
        and ids.dim() == 1
        and tuple(successors.shape) == (len(ids), num_successors)
        and 0 <= int(ids.min()) <= int(ids.max()) < num_rows - 1
        and 0 <= int(successors.min()) <= int(successors.max()) < num_rows - 1
    )
