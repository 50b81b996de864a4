"""Trainable Llama-like layers over packed rows that may look back at earlier steps of themselves.

Training-time test (EAGLE-3, Li et al. 2025): in step k a row sees the rows of step 0 up to itself,
and of each later step only its own column. So scores are a causal block and k columns; a mask over
all rows of all steps is never built.

Shape legend: N rows, C rows of a chunk, M rows they may see, D width, H query heads, G key/value
heads, R = H / G, E width of a head, W rotated width, F = W / 2, S later steps.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from outrider.models.heads.spec import DecoderShape
from outrider.models.rope_scaling import RopeConfig, inverse_frequencies
from outrider.train.heads.pieces import Packed

CHUNK = 256  # rows whose scores are held at a time
HIDDEN = -1e30  # as good as minus infinity, and no NaN where a padded row sees nothing


class Turn(NamedTuple):
    """Rotation of every row: cos_N1F and sin_N1F."""

    cos: Tensor
    sin: Tensor


def turn_at(rope: RopeConfig, positions_N: Tensor) -> Turn:
    """The rotation at these positions."""
    frequencies_F = inverse_frequencies(rope).to(positions_N.device)
    angles_NF = (positions_N.float().unsqueeze(1) * frequencies_F).double()
    cos_NF, sin_NF = (
        part.float() * rope.attention_factor for part in (angles_NF.cos(), angles_NF.sin())
    )
    return Turn(cos_NF.unsqueeze(1), sin_NF.unsqueeze(1))


def rotated(heads_NHE: Tensor, turn: Turn) -> Tensor:
    """The leading 2F of each head turned; pairs are its two halves."""
    half = turn.cos.shape[-1]
    first, second, rest = heads_NHE.tensor_split((half, 2 * half), dim=-1)
    cos, sin = turn.cos.to(heads_NHE.dtype), turn.sin.to(heads_NHE.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


class Seen(NamedTuple):
    """Keys and values of one layer, step by step; every step adds its own."""

    keys: list[Tensor]
    values: list[Tensor]


class Course:
    """One batch on its way through the steps: what rows see, and where they stand.

    Args:
        num_layers: of the head.
    """

    def __init__(self, batch: Packed, rope: RopeConfig, num_layers: int) -> None:
        self._batch = batch
        self._rope = rope
        self.seen = [Seen([], []) for _ in range(num_layers)]
        self.chunks = list(_chunks(batch))
        self.turn = turn_at(rope, batch.positions_N)

    def begin(self, step: int) -> None:
        """Row t of step k stands at position t + k."""
        self.turn = turn_at(self._rope, self._batch.positions_N + step)


class Chunk(NamedTuple):
    """Rows [first, stop), and [low, stop) that they may see, as far as mask_CM says."""

    first: int
    stop: int
    low: int
    mask_CM: Tensor


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self._eps = eps

    def forward(self, hidden_ND: Tensor) -> Tensor:
        wide_ND = hidden_ND.float()
        return F.rms_norm(wide_ND, list(self.weight.shape), self.weight, self._eps)


class Attention(nn.Module):
    """Grouped-query attention over a course."""

    def __init__(self, shape: DecoderShape, hidden: int, reads: int) -> None:
        super().__init__()
        self._shape = shape
        query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(reads, query, bias=shape.has_qkv_bias)
        self.k_proj = nn.Linear(reads, key, bias=shape.has_qkv_bias)
        self.v_proj = nn.Linear(reads, key, bias=shape.has_qkv_bias)
        self.o_proj = nn.Linear(query, hidden, bias=shape.has_output_bias)
        if shape.has_qk_norm:
            self.q_norm = RMSNorm(shape.head_dim, shape.norm_eps)
            self.k_norm = RMSNorm(shape.head_dim, shape.norm_eps)

    def forward(self, input_NX: Tensor, course: Course, seen: Seen) -> Tensor:
        shape = self._shape
        query_NHE = self.q_proj(input_NX).unflatten(1, (shape.num_heads, shape.head_dim))
        key_NGE = self.k_proj(input_NX).unflatten(1, (shape.num_kv_heads, shape.head_dim))
        value_NGE = self.v_proj(input_NX).unflatten(1, (shape.num_kv_heads, shape.head_dim))
        if shape.has_qk_norm:
            query_NHE = self.q_norm(query_NHE).to(value_NGE.dtype)
            key_NGE = self.k_norm(key_NGE).to(value_NGE.dtype)
        seen.keys.append(rotated(key_NGE, course.turn))
        seen.values.append(value_NGE)
        mixed_NHE = attend(rotated(query_NHE, course.turn), seen, course.chunks)
        out_ND: Tensor = self.o_proj(mixed_NHE.flatten(1))
        return out_ND


class MLP(nn.Module):
    """down(silu(gate) * up)."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        gated_NI = F.silu(self.gate_proj(hidden_ND)) * self.up_proj(hidden_ND)
        out_ND: Tensor = self.down_proj(gated_NI)
        return out_ND


class Layer(nn.Module):
    """An ordinary layer around some attention."""

    def __init__(self, attention: nn.Module, hidden: int, inner: int, eps: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(hidden, eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.mlp = MLP(hidden, inner)

    def forward(self, hidden_ND: Tensor, course: Course, seen: Seen) -> Tensor:
        hidden_ND = hidden_ND + self.self_attn(self.input_layernorm(hidden_ND), course, seen)
        out_ND: Tensor = hidden_ND + self.mlp(self.post_attention_layernorm(hidden_ND))
        return out_ND


def attend(query_NHE: Tensor, seen: Seen, chunks: list[Chunk]) -> Tensor:
    """Every row over the rows of step 0 up to itself, and its own columns of later steps.

    Scores live for one chunk at a time, in the backward pass too, where they are computed again.
    """
    mixed = []
    for first, stop, low, mask_CM in chunks:
        later = [part[first:stop] for part in (*seen.keys[1:], *seen.values[1:])]
        mixed.append(
            checkpoint(
                _attend_chunk,
                query_NHE[first:stop],
                seen.keys[0][low:stop],
                seen.values[0][low:stop],
                mask_CM,
                *later,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        )
    return torch.cat(mixed)


def _attend_chunk(
    query_CHE: Tensor, keys_MGE: Tensor, values_MGE: Tensor, mask_CM: Tensor, *later_CGE: Tensor
) -> Tensor:
    """`later_CGE`: keys of the steps after the first, then their values."""
    num_rows, num_heads, width = query_CHE.shape
    num_kv_heads, num_seen = keys_MGE.shape[1], keys_MGE.shape[0]
    num_later = len(later_CGE) // 2
    query_GRCE = (query_CHE / math.sqrt(width)).unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
    flat_GQE = query_GRCE.flatten(1, 2)
    block = (flat_GQE @ keys_MGE.permute(1, 2, 0)).unflatten(1, (-1, num_rows))
    scores = [block.masked_fill(~mask_CM, HIDDEN)]
    for keys_CGE in later_CGE[:num_later]:
        own_G1CE = keys_CGE.transpose(0, 1).unsqueeze(1)
        scores.append((query_GRCE * own_G1CE).sum(-1, keepdim=True))
    shares = torch.cat(scores, dim=-1).float().softmax(-1).to(values_MGE.dtype)
    mixed_GQE = shares[..., :num_seen].flatten(1, 2) @ values_MGE.transpose(0, 1)
    mixed_GRCE: Tensor = mixed_GQE.unflatten(1, (-1, num_rows))
    for step, values_CGE in enumerate(later_CGE[num_later:]):
        own_G1CE = values_CGE.transpose(0, 1).unsqueeze(1)
        share_GRC1 = shares[..., num_seen + step, None]
        mixed_GRCE = mixed_GRCE + share_GRC1 * own_G1CE
    return mixed_GRCE.permute(2, 0, 1, 3).reshape(num_rows, num_heads, -1)


def _chunks(batch: Packed) -> "list[Chunk]":
    starts = batch.start_N.tolist()
    chunks = []
    for first in range(0, len(batch), CHUNK):
        stop = min(first + CHUNK, len(batch))
        low = starts[first]
        rows_C1 = batch.index_N[first:stop, None]
        seen_1M = batch.index_N[None, low:stop]
        is_own_CM = seen_1M >= batch.start_N[first:stop, None]
        chunks.append(Chunk(first, stop, low, (seen_1M <= rows_C1) & is_own_CM))
    return chunks
