"""Weights in 4 bits: codes from -8 to 7, one scale per output and group of `GROUP` inputs.

Shape legend: O outputs, I inputs, P inputs padded to a multiple of 64, G = P / GROUP groups.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.errors import ModelError
from outrider.ops.base import GROUP, Int4Weight
from outrider.ops.quantized import SMALLEST, pack

# Code that the largest magnitude of a group would get unclipped. A negative scale gives the side
# of the largest weight the eighth code.
LARGEST_CODES = [sign * (5.5 + 0.25 * step) for step in range(13) for sign in (1, -1)]


def quantize(weight_OI: Tensor, activation_bits: int) -> Int4Weight:
    """The scale of a group is the best of a grid, refitted to its codes by least squares.

    Raises:
        ModelError: a weight is not finite.
    """
    num_inputs = weight_OI.shape[1]
    weight_OP = F.pad(weight_OI.float(), (0, -num_inputs % (2 * GROUP)))
    if not weight_OP.isfinite().all():
        raise ModelError("a weight is infinite or no number: it cannot be quantised")
    codes_OGg, scales_OG1 = _fit(weight_OP.unflatten(1, (-1, GROUP)))
    packed = pack(codes_OGg.flatten(1).to(torch.int8))
    return Int4Weight(packed, scales_OG1[..., 0].contiguous(), num_inputs, activation_bits)


def _fit(weight_OGg: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of the least squared error among the candidates.

    For codes c the best scale is <w, c> / <c, c>, and leaves |w|^2 - <w, c>^2 / <c, c>. Groups are
    brought to one size, that squares neither vanish nor overflow.
    """
    largest_OG1 = weight_OGg.abs().amax(dim=-1, keepdim=True)
    unit_OGg = weight_OGg / largest_OG1.masked_fill(largest_OG1 < SMALLEST, 1.0)
    best_codes = torch.zeros_like(unit_OGg)
    best_scale = torch.zeros_like(largest_OG1)
    best_gain = torch.zeros_like(largest_OG1)
    for code in LARGEST_CODES:
        codes = torch.round(unit_OGg * code).clamp_(-8, 7)
        product = (unit_OGg * codes).sum(dim=-1, keepdim=True)
        square = codes.square().sum(dim=-1, keepdim=True).clamp_min_(1.0)
        gain = product.square() / square
        is_better = gain > best_gain
        best_codes = torch.where(is_better, codes, best_codes)
        best_scale = torch.where(is_better, product / square, best_scale)
        best_gain = torch.where(is_better, gain, best_gain)
    return best_codes, best_scale * largest_OG1
