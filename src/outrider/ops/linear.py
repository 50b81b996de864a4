"""Linear layers whose rows do not depend on their company: packed CPU products, chosen by a probe.

`F.linear` sums a row in an order that changes with the number of rows, so a token decoded alone
and the same token verified among others differ in the last bits. The products below do not; which
of them keeps that promise on this machine is not documented anywhere, so each (output, input)
shape is probed once per process, and the first that passes is used.

Shape legend: N rows, I/O input/output width.
"""

import functools
import logging
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.ops.base import Linear

MAX_ROWS = 64
PROBED_ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 47, 48, 56, 63, 64)
TILE = 8
logger = logging.getLogger(__name__)
Maker = Callable[[Tensor, Tensor | None], Linear]


def plain(weight_OI: Tensor, bias_O: Tensor | None = None) -> Linear:
    """`F.linear`: fastest for many rows, bits vary with their number."""
    return lambda x_NI: F.linear(x_NI, weight_OI, bias_O)


def mkl_packed(weight_OI: Tensor, bias_O: Tensor | None, *, min_rows: int) -> Linear:
    """MKL's packed single-precision product; fewer than `min_rows` rows are padded."""
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight_OI.contiguous(), TILE)
    shape_only_OI = weight_OI.new_empty(1).expand(weight_OI.shape)
    multiply = torch.ops.mkl._mkl_linear

    def linear(x_NI: Tensor) -> Tensor:
        num_rows = x_NI.shape[0]
        if num_rows < min_rows:
            x_NI = F.pad(x_NI, (0, 0, 0, min_rows - num_rows))
        y_NO: Tensor = multiply(x_NI.contiguous(), packed, shape_only_OI, bias_O, x_NI.shape[0])
        return y_NO[:num_rows]

    return linear


def onednn_packed(weight_OI: Tensor, bias_O: Tensor | None) -> Linear:
    """oneDNN's packed product; a single row takes another kernel there, so two are run."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), TILE)
    multiply = torch.ops.mkldnn._linear_pointwise

    def linear(x_NI: Tensor) -> Tensor:
        num_rows = x_NI.shape[0]
        if num_rows == 1:
            x_NI = F.pad(x_NI, (0, 0, 0, 1))
        y_NO: Tensor = multiply(x_NI.contiguous(), packed, bias_O, "none", [], "")
        return y_NO[:num_rows]

    return linear


def tiled(weight_OI: Tensor, bias_O: Tensor | None) -> Linear:
    """The slow twin that holds everywhere: every product has exactly `TILE` rows."""

    def linear(x_NI: Tensor) -> Tensor:
        num_rows = x_NI.shape[0]
        x_NI = F.pad(x_NI, (0, 0, 0, -num_rows % TILE))
        tiles = [F.linear(tile, weight_OI, bias_O) for tile in x_NI.split(TILE)]
        return torch.cat(tiles)[:num_rows]

    return linear


CANDIDATES: dict[str, Maker] = {
    "mkl": functools.partial(mkl_packed, min_rows=1),
    "mkl, 2 rows": functools.partial(mkl_packed, min_rows=2),
    "onednn": onednn_packed,
    "tiled": tiled,
}


def invariant(weight_OI: Tensor, bias_O: Tensor | None = None) -> Linear:
    """A linear layer (float32, CPU) whose rows are bitwise independent of their company.

    No product has more than `MAX_ROWS` rows: larger ones were not probed, and libraries change
    their plan where rows outnumber threads.
    """
    name = chosen(*weight_OI.shape, bias_O is not None, torch.get_num_threads())
    return in_pieces(CANDIDATES[name](weight_OI, bias_O))


def in_pieces(linear: Linear) -> Linear:
    """The same layer with at most `MAX_ROWS` rows per product."""

    def pieces(x_NI: Tensor) -> Tensor:
        if x_NI.shape[0] <= MAX_ROWS:
            return linear(x_NI)
        return torch.cat([linear(piece) for piece in x_NI.split(MAX_ROWS)])

    return pieces


@functools.cache
def chosen(num_outputs: int, num_inputs: int, has_bias: bool, num_threads: int) -> str:
    """Name of the first candidate that passes the probe for this shape and thread count."""
    generator = torch.Generator().manual_seed(num_outputs * 31 + num_inputs)
    weight_OI = torch.randn(num_outputs, num_inputs, generator=generator)
    bias_O = torch.randn(num_outputs, generator=generator) if has_bias else None
    x_NI = torch.randn(max(PROBED_ROWS), num_inputs, generator=generator)
    expected_NO = F.linear(x_NI, weight_OI, bias_O)
    for name, make in CANDIDATES.items():
        try:
            if is_invariant(make(weight_OI, bias_O), x_NI, expected_NO):
                return name
        except (RuntimeError, AttributeError, NotImplementedError):
            continue  # this build of torch has no such kernel
    logger.warning(
        "no linear kernel for %d x %d keeps its bits with %d threads: near ties may flip",
        num_outputs, num_inputs, num_threads,
    )  # fmt: skip
    return "tiled"


def is_invariant(linear: Linear, x_NI: Tensor, expected_NO: Tensor) -> bool:
    """Whether rows keep their bits for every probed number of rows and at every offset."""
    whole_NO = linear(x_NI)
    if not torch.allclose(whole_NO, expected_NO, rtol=1e-4, atol=1e-3):
        return False
    return all(torch.equal(linear(part), whole_NO[at]) for at, part in _parts(x_NI))


def _parts(x_NI: Tensor) -> Iterable[tuple[slice, Tensor]]:
    for rows in PROBED_ROWS:
        for start in {0, x_NI.shape[0] - rows}:
            yield slice(start, start + rows), x_NI[start : start + rows].clone()
