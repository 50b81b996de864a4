"""Weights in 8 bits: symmetric, one scale per output.

Shape legend: O outputs, I inputs.
"""

import torch
from torch import Tensor

from outrider.errors import ModelError
from outrider.ops.base import Int8Weight
from outrider.ops.quantized import row_scales

LIMIT = 127


def quantize(weight_OI: Tensor, activation_bits: int) -> Int8Weight:
    """The largest magnitude of a row becomes 127; a row of zeros stays one.

    Clipping the largest values buys nothing here: see `benchmarks/quantization.md`.

    Raises:
        ModelError: a weight is not finite.
    """
    weight_OI = weight_OI.float()
    scales_O1 = row_scales(weight_OI, LIMIT)
    if scales_O1.isnan().any():
        raise ModelError("a weight is infinite or no number: it cannot be quantised")
    values_OI = torch.round(weight_OI / scales_O1).to(torch.int8)
    return Int8Weight(values_OI, scales_O1[:, 0].contiguous(), activation_bits)
