"""Where old rows and columns stand in larger matrices, and what fills the rest."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from outrider.train.shapes import GrownShape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


class Axis(NamedTuple):
    """One side of a matrix: where its old indices stand among `length` new ones."""

    homes: Tensor
    length: int

    def times(self, count: int) -> "Axis":
        """`count` such sides, one after another."""
        starts = torch.arange(count) * self.length
        return Axis((starts[:, None] + self.homes).flatten(), count * self.length)


class Placing:
    """Old weights in the first rows and columns of larger ones.

    What writes to the stream gets zeros around it, so new channels stay zero. What reads gets
    gaussian values, so that its work is real.

    Args:
        noise: deviation, relative to that of the old weight, of gaussian values in place of the
            zeros.

    Attributes:
        hidden: channels of the stream.
    """

    def __init__(
        self,
        old: GrownShape,
        new: GrownShape,
        head_dim: int,
        *,
        seed: int,
        dtype: torch.dtype,
        noise: float = 0.0,
    ) -> None:
        self._noise, self._dtype = noise, dtype
        self._generator = torch.Generator().manual_seed(seed)
        self.hidden = _first(old.hidden_size, new.hidden_size)
        units = _first(old.intermediate_size, new.intermediate_size)
        queries = Axis(_head_rows(old, new, head_dim), new.num_heads * head_dim)
        keys = _first(old.num_kv_heads * head_dim, new.num_kv_heads * head_dim)
        self._places = {
            "q_proj": (queries, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries),
            "gate_proj": (units, self.hidden),
            "up_proj": (units, self.hidden),
            "down_proj": (self.hidden, units),
            "fc": (self.hidden, self.hidden),
        }

    def matrix(self, kind: str, weight: Tensor, *, is_old: bool = True) -> Tensor:
        """A projection; one that reads several streams side by side keeps each in its block.

        Args:
            kind: last part of its module's name; "fc" from stream to stream.
            is_old: whether the old values stand in it, or only what fills the rest.
        """
        rows, columns = self._places[kind]
        columns = columns.times(weight.shape[1] // len(columns.homes))
        deviation = 1.0 if kind in READERS else self._noise
        return self._place(weight, rows, columns, deviation=deviation, is_old=is_old)

    def bias(self, kind: str, bias: Tensor) -> Tensor:
        """Of a projection, with zeros for what is new."""
        rows, _ = self._places[kind]
        grown = torch.zeros(rows.length)
        grown[rows.homes] = bias.float()
        return grown.to(self._dtype)

    def outer(self, weight: Tensor) -> Tensor:
        """An embedding or output matrix (V, D)."""
        rows = _first(len(weight), len(weight))
        return self._place(weight, rows, self.hidden, deviation=self._noise, is_old=True)

    def norm(self, weight: Tensor) -> Tensor:
        """The gain of a norm over the stream, or over several side by side."""
        old_width, new_width = len(self.hidden.homes), self.hidden.length
        axis = self.hidden.times(len(weight) // old_width)
        scale = math.sqrt(old_width / new_width)
        grown = torch.full((axis.length,), scale)
        grown[axis.homes] = weight.float() * scale
        return grown.to(self._dtype)

    def _place(
        self, weight: Tensor, rows: Axis, columns: Axis, *, deviation: float, is_old: bool
    ) -> Tensor:
        """`weight` at its rows and columns, gaussian values of relative `deviation` elsewhere."""
        size = (rows.length, columns.length)
        if deviation > 0.0:
            scale = deviation * float(weight.float().std())
            grown = torch.randn(size, generator=self._generator) * scale
        else:
            grown = torch.zeros(size)
        if is_old:
            grown[rows.homes[:, None], columns.homes] = weight.float()
        return grown.to(self._dtype)


def home(boundary: int, num_old: int, num_new: int) -> int:
    """Where old layers are spread evenly: the new layer that an old one has become.

    The stream before old layer j is that before its home, for new layers add nothing; the last
    boundary, `num_old`, becomes `num_new`.
    """
    return boundary * num_new // num_old


def _first(old: int, new: int) -> Axis:
    return Axis(torch.arange(old), new)


def _head_rows(old: GrownShape, new: GrownShape, head_dim: int) -> Tensor:
    """Rows of the old query heads: each stays in the group of the kv head it reads."""
    old_group, new_group = old.num_heads // old.num_kv_heads, new.num_heads // new.num_kv_heads
    head = torch.arange(old.num_heads)
    homes = head // old_group * new_group + head % old_group
    return (homes[:, None] * head_dim + torch.arange(head_dim)).flatten()
