"""Rotary position embeddings: the table of cosines and sines, and the turn of queries and keys.

Shape legend: N rows of the pass, P positions of the table, J query and key heads, D head width,
W rotated width (its two halves hold the pairs), F = W / 2 frequencies.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from outrider.models.rope_scaling import RopeConfig, inverse_frequencies
from outrider.ops.base import Layout

FIRST_POSITIONS = 1024


class Turn(NamedTuple):
    """The rows' rotation: cos_N1W, and sin_N1W with its first half negated."""

    cos: Tensor
    sin: Tensor


class RopeTable:
    """Cosines and sines of every position so far, in the dtype of the hidden states.

    They are taken in float64 of float32 angles: vectorised float32 sines may differ in the last
    bit between a long and a short table, and growth must not change what earlier passes saw.
    """

    def __init__(self, config: RopeConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        self._config = config
        self._dtype = dtype
        self._device = device
        self._frequencies_F = inverse_frequencies(config)
        self._num_positions = 0
        self._cos_PW = self._sin_PW = torch.empty(0)

    def at(self, layout: Layout) -> Turn:
        """The rotation of every row of the pass."""
        cos_PW, sin_PW = self.tables(layout)
        cos_NW = cos_PW.index_select(0, layout.positions_N)
        sin_NW = sin_PW.index_select(0, layout.positions_N)
        return Turn(cos_NW.unsqueeze(1), sin_NW.unsqueeze(1))

    def tables(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """cos_PW and sin_PW, the latter with its first half negated, as far as the pass needs."""
        needed = max(span.num_cached + span.num_rows for span in layout.spans)
        if needed > self._num_positions:
            self._grow(needed)
        return self._cos_PW, self._sin_PW

    def _grow(self, needed: int) -> None:
        num_positions = max(FIRST_POSITIONS, self._num_positions)
        while num_positions < needed:
            num_positions *= 2
        angles_PF = torch.arange(num_positions).float().unsqueeze(1) * self._frequencies_F
        cos_PF = self._stored(angles_PF.double().cos())
        sin_PF = self._stored(angles_PF.double().sin())
        self._cos_PW = torch.cat((cos_PF, cos_PF), dim=-1)
        self._sin_PW = torch.cat((-sin_PF, sin_PF), dim=-1)
        self._num_positions = num_positions

    def _stored(self, values_PF: Tensor) -> Tensor:
        scaled_PF = values_PF.float() * self._config.attention_factor
        return scaled_PF.to(device=self._device, dtype=self._dtype)


def rotate_(heads_NJD: Tensor, turn: Turn) -> Tensor:
    """Turns the leading W of each head in place: x cos + (second half, first half) sin."""
    width = turn.cos.shape[-1]
    turned_NJW = heads_NJD[..., :width]
    swapped_NJW = turned_NJW.roll(width // 2, -1).mul_(turn.sin)
    turned_NJW.mul_(turn.cos).add_(swapped_NJW)
    return heads_NJD
