"""One network over a ragged batch of trees: token lists and block tables in, logits out.

Shape legend: N rows of the pass, R rows whose logits are wanted, V vocabulary.
"""

from array import array
from collections.abc import Sequence as Items
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from outrider.cache.pool import KVPool
from outrider.models.base import Network, ShowsStates
from outrider.ops.base import Span
from outrider.step import Batch, DraftTree, States, TargetOutput


class Blocks(Protocol):
    """What the runner needs of a block table."""

    blocks: "array[int]"
    block_size: int


class Piece(NamedTuple):
    """One sequence's part of a pass.

    Attributes:
        table: where its KV lives; it has room for cached positions, chain and nodes.
        num_cached: positions that have KV already.
        chain: committed tokens to run, from position `num_cached` on.
        tree: draft nodes below the last token of the chain.
        wants_logits: of the chain's last token and of the nodes.
    """

    table: Blocks
    num_cached: int
    chain: Items[int]
    tree: DraftTree
    wants_logits: bool


class Runner:
    """Runs `network` with its KV in `pool`."""

    def __init__(self, network: Network, pool: KVPool) -> None:
        self.network = network
        self.pool = pool
        # Asked once: a protocol is looked up name by name.
        self._shows = network if isinstance(network, ShowsStates) else None

    def forward(
        self, batch: Batch, drafts: list[DraftTree], taps: tuple[int, ...] = ()
    ) -> TargetOutput:
        """One pass of the target over all rows and their drafts.

        Args:
            taps: boundaries between layers whose states are handed out, rising; only for a network
                that `ShowsStates`.
        """
        pieces = []
        for (seq, num_tokens, _), tree in zip(batch.rows, drafts, strict=True):
            start, stop = seq.num_cached, seq.num_cached + num_tokens
            reaches_end = stop == len(seq.tokens)
            pieces.append(Piece(seq.table, start, seq.tokens[start:stop], tree, reaches_end))
        return self.run(pieces, taps)

    @torch.inference_mode()
    def run(self, pieces: list[Piece], taps: tuple[int, ...] = ()) -> TargetOutput:
        spans: list[Span] = []
        tokens: list[int] = []
        wanted: list[int] = []
        first: list[int] = []
        for table, num_cached, chain, tree, wants_logits in pieces:
            first.append(len(wanted) if wants_logits else -1)
            tokens += chain
            root = len(tokens) - 1
            tokens += tree.tokens
            if wants_logits:
                wanted += range(root, len(tokens))
            spans.append(Span(table.blocks, num_cached, len(chain), tree.parents, table.block_size))
        network = self.network
        device = network.spec.device
        layout = network.ops.layout(spans, device)
        tokens_N, wanted_R, kv = upload(tokens, device), upload(wanted, device), self.pool.layers
        states = None
        if taps:
            assert self._shows is not None, "no hidden states in this network"
            logits_RV, tapped_AND = self._shows.forward_tapped(tokens_N, layout, kv, wanted_R, taps)
            states = _states(pieces, taps, tapped_AND)
        else:
            logits_RV = network.forward(tokens_N, layout, kv, wanted_R)
        argmax_R = network.ops.argmax(logits_RV) if wanted else []
        return TargetOutput(logits_RV, first, argmax_R, states)


def _states(pieces: list[Piece], taps: tuple[int, ...], tapped_AND: Tensor) -> States:
    start, num_rows = [], 0
    for piece in pieces:
        start.append(num_rows)
        num_rows += len(piece.chain) + len(piece.tree.tokens)
    lengths = [len(piece.chain) for piece in pieces]
    return States(taps, tapped_AND, start, lengths, [piece.num_cached for piece in pieces])


def upload(numbers: list[int], device: torch.device) -> Tensor:
    """An int64 tensor; through a buffer, for torch takes seven times as long over a list."""
    if not numbers:
        return torch.empty(0, dtype=torch.long, device=device)
    return torch.frombuffer(array("q", numbers), dtype=torch.long).to(device)
