"""One sequence's queries, keys and values, and passes over parts of it in scattered blocks.

Shape legend: T positions of the sequence, H query heads, G key/value heads, D/E key/value width.
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from outrider.ops.base import LayerKV, Ops, Span

CPU = torch.device("cpu")
MAX_PARTS = 4
MAX_NODES = 64
JUNK = -1


class Part(NamedTuple):
    """Rows of a pass: `nodes` says which position each node of a tree repeats, or JUNK."""

    num_cached: int
    num_chain: int
    parents: tuple[int, ...] = ()
    nodes: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return self.num_cached + self.num_chain + len(self.parents)

    @property
    def positions(self) -> list[int]:
        return [*range(self.num_cached, self.num_cached + self.num_chain), *self.nodes]


class World:
    """Random rows for positions [0, length), junk rows, and a KV pool full of noise."""

    def __init__(
        self,
        heads: int,
        groups: int,
        width: int,
        length: int,
        *,
        value_width: int | None = None,
        block_size: int = 1,
        seed: int = 0,
    ) -> None:
        make = torch.Generator().manual_seed(seed)
        value_width = value_width or width
        self.query_THD = torch.randn(length + 1, heads, width, generator=make)  # the last is junk
        self.keys_TGD = torch.randn(length + 1, groups, width, generator=make)
        self.values_TGE = torch.randn(length + 1, groups, value_width, generator=make)
        self.block_size = block_size
        num_blocks = MAX_PARTS * -(-(length + MAX_NODES) // block_size)
        num_slots = num_blocks * block_size
        self.kv = LayerKV(
            torch.randn(num_slots, groups, width, generator=make),
            torch.randn(num_slots, groups, value_width, generator=make),
        )
        self.blocks = torch.randperm(num_blocks, generator=make).tolist()
        self.scale = width**-0.5

    def run(self, ops: Ops, *parts: Part, **options: Any) -> Tensor:
        """Attention of all rows of the parts, side by side in one pass; [rows, H, E]."""
        spans = self.spans(parts)
        for span in spans:
            self._fill(span)
        at = [position for part in parts for position in part.positions]
        layout = ops.layout(spans, CPU)
        ops.write_kv(self.kv, self.keys_TGD[at], self.values_TGE[at], layout)
        return ops.attend(self.query_THD[at], self.kv, layout, **{"scale": self.scale, **options})

    def alone(self, ops: Ops, position: int, **options: Any) -> Tensor:
        """Attention of one position in a pass of its own."""
        return self.run(ops, Part(position, 1), **options)[0]

    def spans(self, parts: tuple[Part, ...]) -> list[Span]:
        """Every part gets blocks of its own, in no order."""
        free = iter(self.blocks)
        return [
            Span(
                list(itertools.islice(free, -(-part.size // self.block_size))),
                part.num_cached,
                part.num_chain,
                part.parents,
                self.block_size,
            )
            for part in parts
        ]

    def _fill(self, span: Span) -> None:
        cached = torch.tensor(span.slots()[: span.num_cached], dtype=torch.long)
        self.kv.keys[cached] = self.keys_TGD[: span.num_cached]
        self.kv.values[cached] = self.values_TGE[: span.num_cached]
