"""RowNetwork: a head that reads features of its target row by row, over keys and values of its own.

EAGLE-1/2/3, P-EAGLE and MTP share one rule: row t pairs the feature of position t with the token at
t + 1, and its law is that of the token at t + 2.

Shape legend: N rows of a pass, R rows that are wanted, V vocabulary of the target, D width of what
a row is fed with, A boundaries between layers of the target, H hidden width of the target.
"""

from collections.abc import Sequence as Items
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from outrider.cache.pool import KVPool
from outrider.models.base import ModelSpec, Network, ShowsStates
from outrider.models.runner import Blocks, upload
from outrider.ops.base import LayerKV, Layout, Ops, Span
from outrider.step import DraftTree, TargetOutput


@runtime_checkable
class ShownTarget(Network, ShowsStates, Protocol):
    """A target that heads can read."""


class HeadOutput(NamedTuple):
    """What a pass of a head says.

    Attributes:
        logits_RV: float32, over the target's vocabulary; -inf for tokens the head does not know.
        feedback_ND: of every row, what a row after it is fed with in the place of a feature.
    """

    logits_RV: Tensor
    feedback_ND: Tensor


class RowNetwork(Protocol):
    """One head.

    Attributes:
        spec: `kv_shapes`, `vocab_size` (of the target), `max_positions`, dtype and device count.
        boundaries: of the target's states that it reads, rising.
    """

    spec: ModelSpec
    ops: Ops
    boundaries: tuple[int, ...]

    def read(self, tapped_ARH: Tensor) -> Tensor:
        """From features of the target to what rows are fed with, inputs_RD.

        Args:
            tapped_ARH: states of some positions at `boundaries`.
        """
        ...

    def forward(
        self,
        tokens_N: Tensor,
        inputs_ND: Tensor,
        layout: Layout,
        kv: list[LayerKV],
        wanted_R: Tensor,
    ) -> HeadOutput:
        """Runs rows and writes their keys and values.

        Args:
            tokens_N: the token after the position of each row.
            inputs_ND: of `read` for committed rows; the feedback of the row before for others.
        """
        ...


class HeadPiece(NamedTuple):
    """One sequence's part of a pass of a head.

    Attributes:
        table: where its KV lives; it has room for the rows so far, chain and nodes.
        num_cached: rows that have KV already.
        chain: tokens of rows one after another, from row `num_cached` on.
        tree: rows of draft nodes below the last of the chain; node tokens and parents.
        inputs_PD: of the chain's rows and then the nodes'.
        wants_logits: of the chain's last row and of the nodes.
        num_drafted: how many drafted tokens the chain's last row has read; nodes go on from there.
        is_behind_gap: whether the row in place 0 is not that of position 0.
        wants_argmax: of the rows with logits, as who draws from their laws does not.
    """

    table: Blocks
    num_cached: int
    chain: Items[int]
    tree: DraftTree
    inputs_PD: Tensor
    wants_logits: bool
    num_drafted: int = 0
    is_behind_gap: bool = False
    wants_argmax: bool = True


class HeadRunner:
    """Runs a head with its KV in `pool`."""

    def __init__(self, network: RowNetwork, pool: KVPool) -> None:
        self.network = network
        self.pool = pool

    @torch.inference_mode()
    def run(self, pieces: list[HeadPiece]) -> tuple[TargetOutput, Tensor]:
        """One pass; output as a target's, and feedback_ND of all rows, piece after piece.

        Where nobody wants argmax tokens, there are none.
        """
        spans: list[Span] = []
        tokens: list[int] = []
        wanted: list[int] = []
        first: list[int] = []
        for table, num_cached, chain, tree, _, wants_logits, *_ in pieces:
            first.append(len(wanted) if wants_logits else -1)
            tokens += chain
            root = len(tokens) - 1
            tokens += tree.tokens
            if wants_logits:
                wanted += range(root, len(tokens))
            spans.append(Span(table.blocks, num_cached, len(chain), tree.parents, table.block_size))
        network = self.network
        device = network.spec.device
        logits_RV, feedback_ND = self.forward(
            pieces,
            upload(tokens, device),
            torch.cat([piece.inputs_PD for piece in pieces]),
            network.ops.layout(spans, device),
            upload(wanted, device),
        )
        is_asked = any(piece.wants_logits and piece.wants_argmax for piece in pieces)
        argmax_R = network.ops.argmax(logits_RV) if is_asked else []
        return TargetOutput(logits_RV, first, argmax_R), feedback_ND

    def forward(
        self,
        pieces: list[HeadPiece],
        tokens_N: Tensor,
        inputs_ND: Tensor,
        layout: Layout,
        wanted_R: Tensor,
    ) -> HeadOutput:
        """The network's own; one that must know more of the pieces has a runner that tells it."""
        return self.network.forward(tokens_N, inputs_ND, layout, self.pool.layers, wanted_R)
