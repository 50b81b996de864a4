"""What every network offers the runner, whatever runs it: the lean decoder, or the adapter.

Shape legend: N rows of the pass, R rows whose logits are wanted, V vocabulary, D hidden width,
A boundaries between layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from outrider.ops.base import LayerKV, Layout, Ops, Passed


class KVShape(NamedTuple):
    """What one layer stores per token: `num_heads` keys of `key_width`, values of `value_width`."""

    num_heads: int
    key_width: int
    value_width: int


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What the engine must know about a network.

    Attributes:
        name: hub id, folder, or shipped name it was loaded from.
        family: `model_type` of its configuration ("llama", "qwen3").
        vocab_size: width of the logits.
        max_positions: longest context.
        eos_token_ids: tokens that end an answer.
        kv_shapes: one per layer that owns KV.
        dtype: of weights and KV.
        fingerprint: changes whenever weights or configuration do.
        mask_token_id: token that stands for unknown ones in a draft model that was trained to
            draft in parallel (PARD).
        hidden_size, num_layers: of a network that hands out its hidden states (`ShowsStates`);
            0 in others.
    """

    name: str
    family: str
    vocab_size: int
    max_positions: int
    eos_token_ids: tuple[int, ...]
    kv_shapes: tuple[KVShape, ...]
    dtype: torch.dtype
    device: torch.device
    num_parameters: int
    fingerprint: str
    mask_token_id: int | None = None
    hidden_size: int = 0
    num_layers: int = 0


class Network(Protocol):
    """One model over a ragged pass; it writes the rows' KV and returns logits."""

    spec: ModelSpec
    ops: Ops

    def forward(
        self, tokens_N: Tensor, layout: Layout, kv: list[LayerKV], wanted_R: Tensor
    ) -> Tensor:
        """Runs all rows, returns float32 logits_RV of the rows `wanted_R` indexes.

        `kv` has one entry per `spec.kv_shapes`; positions and slots are in `layout`.
        """
        ...


@runtime_checkable
class ShowsStates(Protocol):
    """A network that hands out hidden states, for draft heads that read them.

    Boundary j is the residual stream before layer j: 0 is the embedding, `spec.num_layers` the
    state before the final norm.
    """

    def forward_tapped(
        self,
        tokens_N: Tensor,
        layout: Layout,
        kv: list[LayerKV],
        wanted_R: Tensor,
        taps: Sequence[int],
    ) -> Passed:
        """As `Network.forward`, with the boundaries `taps` (rising) of all rows.

        The logits have the same bits as without.
        """
        ...

    def embed(self, tokens_N: Tensor) -> Tensor:
        """Embeddings_ND as the first layer gets them, in the network's dtype."""
        ...

    def final_norm(self, hidden_ND: Tensor) -> Tensor:
        """The norm before the head."""
        ...

    def head(self, hidden_RD: Tensor) -> Tensor:
        """float32 logits_RV of normed states."""
        ...
