"""DraftKV: a draft model's keys and values of many sequences, in step with their token logs."""

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from outrider.cache.pool import KVPool
from outrider.cache.table import BlockManager, BlockTable
from outrider.draft.recall import Recall
from outrider.sampling.shaper import Shaper
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, Commit, DraftTree

Layers: TypeAlias = list[tuple[Tensor, Tensor]]


@dataclass(eq=False)
class DraftState:
    """One sequence in the draft model's pool.

    Attributes:
        num_cached: leading tokens of the log whose draft KV is right; while drafting, those of
            a drafted chain too.
        ran: drafted nodes that have KV: node n at place n behind the log as it was drafted for.
        ranker, recall: made when first needed, for they follow the token log.
    """

    table: BlockTable
    num_cached: int
    ran: DraftTree = EMPTY_TREE
    ranker: Shaper | None = None
    recall: Recall | None = None


class DraftKV:
    """Opens, rolls back, saves and restores the draft KV of sequences."""

    def __init__(self, pool: KVPool, manager: BlockManager) -> None:
        self.pool = pool
        self.manager = manager

    def open(self, seq: Sequence) -> DraftState:
        """With the longest prefix that the pool still knows."""
        return DraftState(*self.manager.open(seq.tokens, seq.request.tenant))

    def reserve(self, state: DraftState, num_tokens: int, num_nodes: int) -> bool:
        """Room for the log and nodes behind it; what an earlier draft left there is void."""
        if not self.manager.reserve(state.table, num_tokens + num_nodes):
            return False
        state.num_cached, state.ran = min(state.num_cached, num_tokens - 1), EMPTY_TREE
        return True

    def settle(self, state: DraftState, commit: Commit) -> None:
        """Keeps KV of the tokens that were committed, wherever in the draft they were run.

        Compared token by token, for what was committed may be the guess of another drafter.
        """
        tokens = commit.seq.tokens
        num_before = len(tokens) - len(commit.tokens)
        if state.num_cached >= num_before:
            nodes = along(state.ran, commit.tokens)
            self._gather(state.table, num_before, nodes)
            state.num_cached = min(num_before + len(nodes), len(tokens) - 1)
        state.ran = EMPTY_TREE
        self.manager.commit(state.table, tokens, state.num_cached)

    def _gather(self, table: BlockTable, start: int, nodes: list[int]) -> None:
        """Moves the nodes of a path, which stand anywhere behind `start`, to the places there."""
        if nodes and nodes[-1] != len(nodes) - 1:
            slots = table.slots(start, start + nodes[-1] + 1)
            moved = [(node, depth) for depth, node in enumerate(nodes) if node != depth]
            self.pool.copy_slots([slots[s] for s, _ in moved], [slots[t] for _, t in moved])

    def save(self, state: DraftState) -> Layers:
        """Keys and values per layer, on the host."""
        slots = torch.tensor(state.table.slots(0, state.num_cached))
        return [(kv.keys[slots].cpu(), kv.values[slots].cpu()) for kv in self.pool.layers]

    def load(self, state: DraftState, layers: Layers, num_tokens: int) -> None:
        """Fills what is not cached of the first `num_tokens`; no change where blocks are short."""
        start = state.num_cached
        if start >= num_tokens or not self.manager.reserve(state.table, num_tokens):
            return
        slots = torch.tensor(state.table.slots(start, num_tokens))
        for kv, (keys, values) in zip(self.pool.layers, layers, strict=True):
            kv.keys[slots] = keys[start:num_tokens].to(kv.keys)
            kv.values[slots] = values[start:num_tokens].to(kv.values)
        state.num_cached = num_tokens


def along(tree: DraftTree, tokens: Items[int]) -> list[int]:
    """Nodes whose tokens, from the root down, are the first of `tokens`."""
    nodes: list[int] = []
    last = -1
    for node, token in enumerate(tree.tokens):
        if len(nodes) == len(tokens):
            break
        if token == tokens[len(nodes)] and tree.parents[node] == last:
            nodes.append(node)
            last = node
    return nodes
