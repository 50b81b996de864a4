"""CpuLinear: one linear layer of the kernels, and how its weight is kept.

Shape legend: N rows, O/I output/input width.
"""

import ctypes

import torch
from torch import Tensor

from outrider.ops.base import Int4Weight, Int8Weight, Weight
from outrider.ops.cpu.library import (
    BFLOAT16,
    FLOAT32,
    INT4,
    INT8,
    INT8_FLOAT,
    Library,
    LinearStruct,
)
from outrider.ops.cpu.memory import Arena
from outrider.ops.quantized import dequantized

MAX_ACTIVATION_BITS = 15  # two planes of 7 bits and a sign
MAX_ROUNDED_INPUTS = 1 << 16  # whose products still add up in 32 bits


class CpuLinear:
    """x_NI -> y_NO = x W^T + b over row-major weights in large pages.

    Float32 weights whose values all fit bfloat16, as those of most checkpoints do, are kept so:
    half the bytes to read, and nothing is rounded. On matrix units their sums are taken in
    another order than those of float32 weights.
    """

    def __init__(
        self, library: Library, arena: Arena, weight: Weight, bias_O: Tensor | None
    ) -> None:
        self._run = library.linear
        self.num_outputs, self.num_inputs = weight.shape
        # What the struct points to, and where the weight was, to know a tied one again.
        self.struct, self.kept = _struct(arena, weight, bias_O)
        self.source = weight.data_ptr() if isinstance(weight, Tensor) else 0
        self._address = ctypes.addressof(self.struct)

    def __call__(self, x_NI: Tensor) -> Tensor:
        assert x_NI.dtype == torch.float32
        assert x_NI.shape[1] == self.num_inputs
        if x_NI.stride(1) != 1:
            x_NI = x_NI.contiguous()
        y_NO = x_NI.new_empty(x_NI.shape[0], self.num_outputs)
        self._run(
            self._address,
            x_NI.data_ptr(),
            x_NI.stride(0),
            x_NI.shape[0],
            y_NO.data_ptr(),
            torch.get_num_threads(),
        )
        return y_NO


def stored(weight_OI: Tensor) -> Tensor:
    """The weight in bfloat16 if that loses nothing, else as it is."""
    weight_OI = weight_OI.contiguous()
    half_OI = weight_OI.bfloat16()
    return half_OI if torch.equal(half_OI.float(), weight_OI) else weight_OI


def _struct(
    arena: Arena, weight: Weight, bias_O: Tensor | None
) -> tuple[LinearStruct, tuple[Tensor, Tensor | None, Tensor | None]]:
    """The kernels' view of a layer, and what must live as long as it."""
    num_outputs, num_inputs = weight.shape
    if not isinstance(weight, Tensor):
        assert weight.activation_bits <= MAX_ACTIVATION_BITS
        assert num_inputs <= MAX_ROUNDED_INPUTS
    bias_O = None if bias_O is None else bias_O.float().contiguous()
    scales, bits = None, 0
    if isinstance(weight, Int8Weight):
        values, scales = weight.values, weight.scales.float().contiguous()
        bits = weight.activation_bits
        kind = INT8 if bits else INT8_FLOAT
    elif isinstance(weight, Int4Weight) and weight.activation_bits:
        values, scales = weight.packed, weight.scales.float().contiguous()
        kind, bits = INT4, weight.activation_bits
    else:
        values = stored(dequantized(weight) if isinstance(weight, Int4Weight) else weight.detach())
        kind = BFLOAT16 if values.dtype == torch.bfloat16 else FLOAT32
    values = arena.place(values)
    struct = LinearStruct(
        values.data_ptr(),
        None if scales is None else scales.data_ptr(),
        None if bias_O is None else bias_O.data_ptr(),
        kind,
        num_outputs,
        num_inputs,
        bits,
    )
    return struct, (values, scales, bias_O)
