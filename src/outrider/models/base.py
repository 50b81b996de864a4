"""What every network offers the runner, whatever runs it: the lean decoder, or the adapter.

Shape legend: N rows of the pass, R rows whose logits are wanted, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from outrider.ops.base import LayerKV, Layout, Ops


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
