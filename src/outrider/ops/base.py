"""The kernels' interface: who may see what in one pass (Layout), and the operations on it (Ops).

Shape legend: N rows of the pass (all sequences, ragged), R rows whose logits are
wanted, V vocabulary, H query heads, G key/value heads, D head
width, S slots of a KV pool, I/O input/output width of a linear layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

Linear: TypeAlias = Callable[[Tensor], Tensor]


class LayerKV(NamedTuple):
    """One layer's share of the KV pool: keys_SGD and values_SGE (their widths may differ)."""

    keys: Tensor
    values: Tensor


class Int8Weight(NamedTuple):
    """A linear weight in 8 bits: W_OI = values_OI * scales_O.

    Attributes:
        values: int8 [O, I], in [-127, 127].
        scales: float32 [O].
        activation_bits: how inputs are rounded before the integer product, each row by its own
            largest magnitude; 0 leaves them in float32.
    """

    values: Tensor
    scales: Tensor
    activation_bits: int = 14

    @property
    def shape(self) -> torch.Size:
        return self.values.shape


class Int4Weight(NamedTuple):
    """A linear weight in 4 bits: W_OI = (nibble - 8) * scale of its row and `GROUP` inputs.

    Attributes:
        packed: uint8 [O, P / 2], P = inputs padded to a multiple of 64: byte i of each 32 holds
            input i of its 64 in the low nibble and input i + 32 in the high one; padding is 8.
        scales: float32 [O, P / GROUP]; they have a sign, so either side may use the code -8.
        num_inputs: I.
        activation_bits: as in Int8Weight.
    """

    packed: Tensor
    scales: Tensor
    num_inputs: int
    activation_bits: int = 14

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.packed.shape[0], self.num_inputs))


GROUP = 32
Weight: TypeAlias = Tensor | Int8Weight | Int4Weight


class Span(NamedTuple):
    """One sequence's rows in a pass: a chain of committed tokens, then the nodes of a tree.

    Attributes:
        blocks: the sequence's block table (an `array("i")` is read where it lies): place i of the
            sequence is slot blocks[i // block_size] * block_size + i % block_size. Places go
            `num_cached` cached positions first, then one per new row (chain first, then nodes).
        num_cached: positions that have KV already.
        num_chain: committed tokens run in this pass (at least 1).
        parents: per draft node its parent among the nodes, -1 for the last token of the chain.
        block_size: slots of a block; 1 makes `blocks` a list of slots.
    """

    blocks: Sequence[int]
    num_cached: int
    num_chain: int
    parents: tuple[int, ...] = ()
    block_size: int = 1

    @property
    def num_rows(self) -> int:
        return self.num_chain + len(self.parents)

    def slots(self) -> list[int]:
        """The slot of every place of the sequence."""
        return slots_of(self.blocks, self.block_size, 0, self.num_cached + self.num_rows)


def slots_of(blocks: Sequence[int], block_size: int, start: int, stop: int) -> list[int]:
    """Slots of the places [start, stop) of a block table."""
    assert stop <= len(blocks) * block_size, f"places [{start}, {stop}) are not reserved"
    if block_size == 1:
        return list(blocks[start:stop])
    first, last = start // block_size, -(-stop // block_size)
    slots = [s for b in blocks[first:last] for s in range(b * block_size, (b + 1) * block_size)]
    return slots[start - first * block_size : stop - first * block_size]


class Window(NamedTuple):
    """Which earlier positions a layer sees; the default sees them all.

    Attributes:
        sliding: a row at position t sees positions > t - sliding; 0 is unlimited.
        chunk: a row at position t sees positions of its own chunk t // chunk only; 0 is off.
    """

    sliding: int = 0
    chunk: int = 0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Positions, KV slots and visibility of the rows of one pass; made by `Ops.layout`.

    Rows stand sequence after sequence, in the order of `spans`. Everything else is private to
    the kernels that made it.
    """

    spans: list[Span]
    positions_N: Tensor
    slots_N: Tensor
    plan: object = None


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """One layer of a dense decoder; its products were made by `Ops.linear`.

    Attributes:
        qkv: queries, keys and values of all heads, one below the other.
        gate_up: the gate's outputs, then as many of the other branch.
    """

    attention_norm_D: Tensor
    mlp_norm_D: Tensor
    query_norm_D: Tensor | None
    key_norm_D: Tensor | None
    qkv: Linear
    output: Linear
    gate_up: Linear
    down: Linear
    window: Window
    has_rope: bool


@dataclass(frozen=True, kw_only=True)
class DecoderParts:
    """A whole dense decoder (norm, attention, norm, gated feed-forward), for kernels that fuse."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    attention_scale: float
    rotated_width: int
    embedding_VD: Tensor
    final_norm_D: Tensor
    head: Linear
    layers: list[LayerParts]


class Entry(NamedTuple):
    """What enters a decoder's layers in the place of embedded tokens (of a draft head's).

    Attributes:
        hidden_ND: the residual stream before the first layer.
        first_NX: what the first layer's queries, keys and values are made from; None is that
            stream, normed as usual.
    """

    hidden_ND: Tensor
    first_NX: Tensor | None = None


class Passed(NamedTuple):
    """What a pass through a decoder yields.

    Attributes:
        logits_RV: float32, of the rows that were asked for.
        tapped_AND: the residual stream of all rows at the A boundaries that were asked for, in the
            network's dtype; boundary j is before layer j, the last before the final norm.
    """

    logits_RV: Tensor
    tapped_AND: Tensor


class DecoderPass(Protocol):
    """All layers of a decoder as one call.

    Attributes:
        embedding_VD: the embedding as it is kept; other copies may go.
    """

    embedding_VD: Tensor

    def __call__(
        self,
        tokens_N: Tensor,
        layout: Layout,
        kv: list[LayerKV],
        wanted_R: Tensor,
        cos_PW: Tensor,
        sin_PW: Tensor,
        *,
        entry: Entry | None = None,
        taps: Sequence[int] = (),
    ) -> Passed:
        """Logits of the rows `wanted_R` indexes; writes the rows' KV.

        `kv` of the first layers alone runs those, then the last norm and the head.

        Args:
            cos_PW, sin_PW: rotation of every position, the sines' first half negated.
            entry: enters the first layer; then `tokens_N` is not looked at.
            taps: boundaries to hand out, rising.
        """
        ...


class Ops(Protocol):
    """The kernels of one backend.

    `is_batch_invariant` promises that a row's result is bitwise the same whatever rows ride
    along, wherever it stands among them, and however its context was split into passes.
    """

    name: str
    is_batch_invariant: bool

    def layout(self, spans: list[Span], device: torch.device) -> Layout:
        """Uploads what the kernels need to know about this pass."""
        ...

    def linear(self, weight: Weight, bias_O: Tensor | None = None) -> Linear:
        """A callable x_NI -> y_NO = x W^T + b; packs the weight once.

        What a quantised weight yields is defined in `ops.quantized`: to the bit for 8 bits, up to
        the order of its float32 sums over groups for 4 bits, and up to rounding without
        `activation_bits` (then it is the product of the dequantised weight).
        """
        ...

    def write_kv(self, kv: LayerKV, keys_NGD: Tensor, values_NGE: Tensor, layout: Layout) -> None:
        """Stores the rows' keys and values in their slots."""
        ...

    def attend(
        self,
        query_NHD: Tensor,
        kv: LayerKV,
        layout: Layout,
        *,
        scale: float,
        window: Window = Window(),
        softcap: float = 0.0,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Attention of every row over its path: cached positions, chain, ancestors, itself.

        Args:
            scale: multiplies query-key products.
            softcap: > 0 squashes scores to softcap * tanh(score / softcap) (Gemma 2).
            sinks_H: per head a logit that takes part in the softmax without a value (GPT-OSS).

        Returns:
            out_NHE, in the dtype of the query.
        """
        ...

    def argmax(self, logits_RV: Tensor) -> list[int]:
        """The likeliest token of each row, the lowest id of equals; -1 where it is no number."""
        ...

    def fuse(self, parts: DecoderParts) -> DecoderPass | None:
        """All layers as one call, or None: then the decoder calls the other operations."""
        ...
