"""The tensors that keys and values live in: one flat row of slots per layer.

Shape legend: S slots (block b holds slots [b * block_size, (b + 1) * block_size)), G key/value
heads, D key width, E value width.
"""

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch

from outrider.errors import ConfigError
from outrider.ops.base import LayerKV

Shape: TypeAlias = tuple[int, int, int]
"""One layer: number of key/value heads, key width, value width."""


class KVPool:
    """Keys and values of every layer, addressed by slot.

    Slots start as zeros: kernels may read a slot that a mask then hides, so garbage must be finite.

    Attributes:
        layers: per shape keys_SGD and values_SGE.
    """

    def __init__(
        self,
        shapes: Iterable[Shape],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if num_blocks < 1:
            raise ConfigError(
                f"num_blocks={num_blocks}: no block fits; give the KV pool more memory"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        num_slots = num_blocks * block_size
        self.layers = [_allocate(shape, num_slots, dtype, device) for shape in shapes]

    @staticmethod
    def bytes_per_block(shapes: Iterable[Shape], block_size: int, dtype: torch.dtype) -> int:
        """What one block costs over all layers; divides a memory budget into blocks."""
        widths = (heads * (key + value) for heads, key, value in shapes)
        return sum(widths) * block_size * dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for layer in self.layers for part in layer)

    def copy_slots(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copies slot by slot; all sources are read before any destination is written."""
        assert len(sources) == len(destinations), "one destination per source"
        if not sources:
            return
        source_n = torch.tensor(sources, device=self.device)
        destination_n = torch.tensor(destinations, device=self.device)
        for layer in self.layers:
            for part in layer:
                part.index_copy_(0, destination_n, part.index_select(0, source_n))

    def copy_block(self, source: int, destination: int) -> None:
        for layer in self.layers:
            for part in layer:
                part[self._rows(destination)] = part[self._rows(source)]

    def _rows(self, block: int) -> slice:
        return slice(block * self.block_size, (block + 1) * self.block_size)


def _allocate(shape: Shape, num_slots: int, dtype: torch.dtype, device: torch.device) -> LayerKV:
    num_heads, key_width, value_width = shape
    return LayerKV(
        keys=torch.zeros(num_slots, num_heads, key_width, dtype=dtype, device=device),
        values=torch.zeros(num_slots, num_heads, value_width, dtype=dtype, device=device),
    )
