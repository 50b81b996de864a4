"""Products with quantised weights: the packing, and the twin against its definition, bitwise."""

from fractions import Fraction
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from outrider.ops.base import GROUP, Int4Weight, Int8Weight
from outrider.ops.linear import PROBED_ROWS, invariant
from outrider.ops.quantized import dequantized, pack, quantized, row_scales, unpack
from outrider.ops.torch import TorchOps

WIDTHS = [1, 31, 64, 100, 384]
f32 = np.float32


def int8_weight(num_outputs: int, num_inputs: int, bits: int = 14) -> Int8Weight:
    values = torch.randint(-127, 128, (num_outputs, num_inputs), dtype=torch.int8)
    return Int8Weight(values, torch.rand(num_outputs) + 0.01, bits)


def int4_weight(num_outputs: int, num_inputs: int, bits: int = 14) -> Int4Weight:
    padded = num_inputs + -num_inputs % 64
    codes = torch.randint(-8, 8, (num_outputs, padded), dtype=torch.int8)
    codes[:, num_inputs:] = 0
    scales = torch.randn(num_outputs, padded // GROUP)
    return Int4Weight(pack(codes), scales, num_inputs, bits)


MAKERS = [int8_weight, int4_weight]


@given(st.lists(st.lists(st.integers(-8, 7), min_size=64, max_size=64), min_size=1, max_size=6))
def test_packing_loses_nothing_and_lies_as_documented(runs):
    codes_OP = torch.tensor([[*chain(*runs)]], dtype=torch.int8)
    packed = pack(codes_OP)
    assert packed.dtype == torch.uint8
    expected = [run[i] + 8 | run[i + 32] + 8 << 4 for run in runs for i in range(32)]
    assert packed.tolist() == [expected]
    assert torch.equal(unpack(packed), codes_OP)


def test_rows_are_packed_each_for_itself():
    codes_OP = torch.randint(-8, 8, (5, 192), dtype=torch.int8)
    assert torch.equal(pack(codes_OP), torch.cat([pack(row[None]) for row in codes_OP]))
    assert torch.equal(unpack(pack(codes_OP)), codes_OP)


def test_dequantized_is_code_times_scale():
    eight, four = int8_weight(3, 40), int4_weight(3, 100)
    assert dequantized(eight).shape == eight.shape == (3, 40)
    assert dequantized(four).shape == four.shape == (3, 100)
    assert dequantized(eight)[2, 7] == float(eight.values[2, 7]) * eight.scales[2]
    assert dequantized(four)[1, 99] == float(unpack(four.packed)[1, 99]) * four.scales[1, 3]


def rounded(value: np.float32) -> int:
    """To the nearest integer, ties to even, as Python's exact arithmetic does it."""
    return round(Fraction(float(value)))


def by_definition(x_I, weight, bias_O):
    """The product as the head of `ops/quantized.py` states it: integers, and float32 one by one."""
    x_I = [f32(x) for x in x_I.tolist()]
    scale = f32(max(abs(x) for x in x_I) / f32(2 ** (weight.activation_bits - 1) - 1))
    scale = f32(1) if scale < np.finfo(f32).tiny else scale
    q_I = [rounded(f32(x / scale)) for x in x_I]
    y_O = []
    for output in range(weight.shape[0]):
        if isinstance(weight, Int8Weight):
            row = weight.values[output].tolist()
            total = sum(q * w for q, w in zip(q_I, row, strict=True))
            y = f32(total) * f32(scale * f32(weight.scales[output]))
        else:
            row, y = unpack(weight.packed)[output].tolist(), f32(0)
            for group, step in enumerate(weight.scales[output].tolist()):
                at = slice(group * GROUP, (group + 1) * GROUP)
                total = sum(q * w for q, w in zip(q_I[at], row[at], strict=False))
                y = f32(y + f32(f32(total) * f32(step)))
            y = f32(y * scale)
        y_O.append(y if bias_O is None else f32(y + f32(bias_O[output])))
    return y_O


@pytest.mark.parametrize("bits", [14, 8])
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("num_inputs", WIDTHS)
def test_the_twin_is_the_definition(make, num_inputs, bits):
    weight = make(5, num_inputs, bits)
    x_NI = torch.randn(4, num_inputs) * torch.tensor([[1.0], [1e-3], [40.0], [0.0]])
    for bias_O in (None, torch.randn(5)):
        ours = quantized(weight, bias_O)(x_NI)
        expected = [by_definition(x_I, weight, bias_O) for x_I in x_NI]
        assert torch.equal(ours, torch.tensor(np.array(expected)))


def test_sums_past_32_bits_are_exact():
    values = torch.full((1, 4096), 127, dtype=torch.int8)
    weight = Int8Weight(values, torch.ones(1), 14)
    x_NI = torch.ones(1, 4096)
    total = 4096 * 8191 * 127
    assert total > 2**31
    assert quantized(weight)(x_NI).item() == f32(total) * f32(1 / f32(8191))


def test_more_outputs_than_are_converted_at_once():
    weight = int8_weight(600, 16)
    x_NI = torch.randn(3, 16)
    parts = [
        quantized(Int8Weight(weight.values[at : at + 1], weight.scales[at : at + 1], 14))(x_NI)
        for at in range(600)
    ]
    assert torch.equal(quantized(weight)(x_NI), torch.cat(parts, dim=1))


@pytest.mark.parametrize("bits", [14, 8, 0])
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_bits_do_not_depend_on_company(make, bits, num_threads):
    torch.set_num_threads(num_threads)
    ops = TorchOps()
    linear = ops.linear(make(96, 160, bits), torch.randn(96))
    x_NI = torch.randn(max(PROBED_ROWS), 160) * torch.logspace(-3, 3, max(PROBED_ROWS))[:, None]
    whole_NO = linear(x_NI)
    for rows in PROBED_ROWS:
        assert torch.equal(linear(x_NI[-rows:].clone()), whole_NO[-rows:])
        assert torch.equal(linear(x_NI[:rows].clone()), whole_NO[:rows])
    assert ops.is_batch_invariant


@pytest.mark.parametrize("make", MAKERS)
def test_zeros_give_zeros_and_what_is_not_finite_stays_in_its_row(make):
    weight = make(8, 64)
    x_NI = torch.randn(6, 64)
    x_NI[0] = 0.0
    x_NI[1] = 1e-42  # too small to be rounded by a scale of its own
    x_NI[2, 3] = float("nan")
    x_NI[3, 3] = float("inf")
    x_NI[4, 3] = -float("inf")
    y_NO = quantized(weight)(x_NI)
    assert torch.equal(y_NO[:2], torch.zeros(2, 8))
    assert y_NO[2:5].isnan().all()
    assert torch.equal(y_NO[5:], quantized(weight)(x_NI[5:]))


def test_large_and_small_inputs_reach_the_limit_and_never_pass_it():
    largest = torch.finfo(torch.float32).max
    x_NI = torch.tensor([[largest], [-largest], [1e-30], [8191 * 2.0**-126], [3.3]])
    assert torch.equal((x_NI / row_scales(x_NI, 8191)).round().abs(), torch.full((5, 1), 8191.0))


def test_ties_are_rounded_to_even():
    weight = Int8Weight(torch.ones(1, 2, dtype=torch.int8), torch.ones(1), 8)
    x_NI = torch.tensor([[127.0, tie] for tie in (0.5, 1.5, 2.5, -0.5, -1.5)])
    assert quantized(weight)(x_NI)[:, 0].tolist() == [127.0, 129.0, 129.0, 127.0, 125.0]


@pytest.mark.parametrize(("bits", "error"), [(14, 2e-4), (8, 2e-2)])
@pytest.mark.parametrize("make", MAKERS)
def test_rounded_inputs_are_near_the_dequantised_product(make, bits, error):
    weight = make(64, 512, bits)
    x_NI = torch.randn(16, 512)
    exact_NO = x_NI @ dequantized(weight).t()
    off = (quantized(weight)(x_NI) - exact_NO).norm(dim=1) / exact_NO.norm(dim=1)
    assert off.max() < error
    assert off.max() > error / 100, "inputs are rounded indeed"


@pytest.mark.parametrize("make", MAKERS)
def test_without_activation_bits_it_is_the_dequantised_layer(make):
    weight, bias_O, x_NI = make(32, 96, 0), torch.randn(32), torch.randn(5, 96)
    expected = invariant(dequantized(weight), bias_O)(x_NI)
    assert torch.equal(TorchOps().linear(weight, bias_O)(x_NI), expected)


@pytest.mark.parametrize("make", MAKERS)
def test_other_devices_multiply_expanded_weights(make):
    weight = make(32, 96)
    there = type(weight)(*(v.to("meta") if isinstance(v, torch.Tensor) else v for v in weight))
    ops = TorchOps()
    y_NO = ops.linear(there)(torch.empty(3, 96, dtype=torch.bfloat16, device="meta"))
    assert (y_NO.shape, y_NO.dtype) == ((3, 32), torch.bfloat16)
    assert not ops.is_batch_invariant


@pytest.mark.gpu
@pytest.mark.parametrize("make", MAKERS)
def test_a_gpu_multiplies_expanded_weights(make):
    weight, x_NI = make(32, 96), torch.randn(3, 96)
    there = type(weight)(*(v.cuda() if isinstance(v, torch.Tensor) else v for v in weight))
    y_NO = TorchOps().linear(there)(x_NI.cuda()).cpu()
    expected = x_NI @ dequantized(weight).t()
    assert (y_NO - expected).norm() < 1e-2 * expected.norm()
