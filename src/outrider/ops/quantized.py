"""Products with weights of 8 and 4 bits, in torch: the definition that faster kernels must meet.

Each row of inputs is rounded to integers by a scale of its own, the sums are exact integers, and
every float32 operation stands alone (no fused multiply-add), so a row's bits depend on nothing
but the row:

    s = max |x| / (2^(bits - 1) - 1)   or 1 where that is below the smallest normal float32, NaN
                                       where the row holds a value that is not finite
    q_I = round(x_I / s)               a true division; ties go to the even integer
    8 bits: y_O = float(sum q_I w_OI) * (s * scale_O) + b_O
    4 bits: y_O = s * (0 + float(sum in group 0) * scale_O0 + float(sum in group 1) * ...) + b_O

A sum over all inputs passes 2^31 from 2065 inputs on at 14 bits; one within a group stays below
2^24. Here sums are taken in float64, exact in any order below 2^53. Faster kernels meet 8 bits to
the bit; of 4 bits they may order the sum over groups otherwise, if alike for every row.

Shape legend: N rows, I/O input/output width, G groups of g = GROUP inputs, P = G * GROUP padded
inputs, J runs of 64 inputs, h = HALF bytes of a run.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.ops.base import GROUP, Int4Weight, Int8Weight, Linear

SMALLEST = torch.finfo(torch.float32).tiny
HALF = 32  # inputs that share a byte stand this far apart
ZERO_CODE = 8
OUTPUTS_AT_ONCE = 256  # bounds the memory of converted weights


def quantized(weight: Int8Weight | Int4Weight, bias_O: Tensor | None = None) -> Linear:
    """A float32 layer on the CPU that rounds its inputs to `weight.activation_bits`."""
    assert weight.activation_bits >= 2
    multiply = (
        partial(_multiply8, weight)
        if isinstance(weight, Int8Weight)
        else partial(_multiply4, weight)
    )
    limit = 2 ** (weight.activation_bits - 1) - 1

    def linear(x_NI: Tensor) -> Tensor:
        assert x_NI.dtype == torch.float32
        scale_N1 = row_scales(x_NI, limit)
        y_NO = multiply(torch.round(x_NI / scale_N1).double(), scale_N1)
        return y_NO if bias_O is None else y_NO + bias_O

    return linear


def expanded(weight: Int8Weight | Int4Weight, bias_O: Tensor | None = None) -> Linear:
    """A layer for devices without integer kernels: weights become floats again in every call.

    That saves memory and costs time; inputs keep their dtype and are not rounded.
    """
    return lambda x_NI: F.linear(x_NI, dequantized(weight).to(x_NI.dtype), bias_O)


def dequantized(weight: Int8Weight | Int4Weight) -> Tensor:
    """The weight_OI that these integers stand for, in float32."""
    if isinstance(weight, Int8Weight):
        return weight.values.float() * weight.scales[:, None]
    codes_OGg = unpack(weight.packed).unflatten(1, (-1, GROUP))
    weight_OP: Tensor = (codes_OGg.float() * weight.scales[..., None]).flatten(1)
    return weight_OP[:, : weight.num_inputs].contiguous()


def row_scales(x_NI: Tensor, limit: int) -> Tensor:
    """What each row is divided by so that its largest magnitude becomes `limit`."""
    scale_N1 = x_NI.abs().amax(dim=1, keepdim=True) / limit
    scale_N1 = scale_N1.masked_fill(scale_N1 < SMALLEST, 1.0)
    return scale_N1.masked_fill(scale_N1.isinf(), float("nan"))


def pack(codes_OP: Tensor) -> Tensor:
    """Codes in [-8, 7] (int8, P a multiple of 64), two to a byte as in `Int4Weight.packed`."""
    nibbles_OP: Tensor = (codes_OP + ZERO_CODE).to(torch.uint8)
    low_OJh, high_OJh = nibbles_OP.unflatten(1, (-1, 2, HALF)).unbind(2)
    packed: Tensor = (low_OJh | high_OJh << 4).flatten(1)
    return packed


def unpack(packed: Tensor) -> Tensor:
    """The int8 codes_OP that `pack` took."""
    bytes_OJh = packed.unflatten(1, (-1, HALF))
    nibbles_OP = torch.stack((bytes_OJh & 15, bytes_OJh >> 4), dim=2).flatten(1)
    return nibbles_OP.to(torch.int8) - ZERO_CODE


def _multiply8(weight: Int8Weight, q_NI: Tensor, scale_N1: Tensor) -> Tensor:
    parts = weight.values.split(OUTPUTS_AT_ONCE)
    sums_NO = torch.cat([q_NI @ part.double().t() for part in parts], dim=1)
    return sums_NO.float() * (scale_N1 * weight.scales)


def _multiply4(weight: Int4Weight, q_NI: Tensor, scale_N1: Tensor) -> Tensor:
    codes_OP = unpack(weight.packed)
    q_NP = F.pad(q_NI, (0, codes_OP.shape[1] - q_NI.shape[1]))
    y_NO = q_NI.new_zeros(q_NI.shape[0], codes_OP.shape[0], dtype=torch.float32)
    groups = zip(q_NP.split(GROUP, 1), codes_OP.split(GROUP, 1), weight.scales.t(), strict=True)
    for q_Ng, codes_Og, scale_O in groups:
        y_NO += (q_Ng @ codes_Og.double().t()).float() * scale_O
    return y_NO * scale_N1
