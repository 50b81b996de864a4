"""One network over a ragged batch of trees: token lists and block tables in, logits out.

Shape legend: N rows of the pass, R rows whose logits are wanted, V vocabulary.
"""

from array import array
from collections.abc import Sequence as Items
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from outrider.cache.pool import KVPool
from outrider.models.base import Network
from outrider.ops.base import Span
from outrider.step import Batch, DraftTree, TargetOutput


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

    def forward(self, batch: Batch, drafts: list[DraftTree]) -> TargetOutput:
        """One pass of the target over all rows and their drafts."""
        pieces = [
            Piece(
                row.seq.table,
                row.seq.num_cached,
                row.seq.tokens[row.seq.num_cached : row.seq.num_cached + row.num_tokens],
                tree,
                row.reaches_end,
            )
            for row, tree in zip(batch.rows, drafts, strict=True)
        ]
        return self.run(pieces)

    @torch.inference_mode()
    def run(self, pieces: list[Piece]) -> TargetOutput:
        spans: list[Span] = []
        tokens: list[int] = []
        wanted: list[int] = []
        first: list[int] = []
        for piece in pieces:
            end = len(tokens) + len(piece.chain) + len(piece.tree)
            first.append(len(wanted) if piece.wants_logits else -1)
            if piece.wants_logits:
                wanted += range(len(tokens) + len(piece.chain) - 1, end)
            tokens += piece.chain
            tokens += piece.tree.tokens
            spans.append(_span(piece))
        logits_RV = self._forward(tokens, spans, wanted)
        return TargetOutput(logits_RV, first, _argmax(logits_RV) if wanted else [])

    def _forward(self, tokens: list[int], spans: list[Span], wanted: list[int]) -> Tensor:
        device = self.network.spec.device
        layout = self.network.ops.layout(spans, device)
        return self.network.forward(
            torch.tensor(tokens, device=device),
            layout,
            self.pool.layers,
            torch.tensor(wanted, dtype=torch.long, device=device),
        )


def _argmax(logits_RV: Tensor) -> list[int]:
    """The likeliest token of each row, the lowest id of equals; -1 where logits are no numbers."""
    peak_R, token_R = logits_RV.max(dim=-1)
    return torch.where(peak_R.isfinite(), token_R, -1).tolist()


def _span(piece: Piece) -> Span:
    table, parents = piece.table, piece.tree.parents
    return Span(table.blocks, piece.num_cached, len(piece.chain), parents, table.block_size)
