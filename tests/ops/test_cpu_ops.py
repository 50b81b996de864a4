"""The C++ kernels: products against their twins, and bits that no company or thread can change.

Shape legend: N rows, O/I output/input width.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from outrider.ops.base import GROUP, Int4Weight, Int8Weight, LayerKV, Linear, Weight, Window
from outrider.ops.cpu import linear as cpu_linear
from outrider.ops.cpu.library import BFLOAT16, FLOAT32
from outrider.ops.cpu.ops import CpuOps
from outrider.ops.linear import PROBED_ROWS, is_invariant
from outrider.ops.quantized import dequantized, pack, quantized
from tests.ops.world import CPU, JUNK, Part, World

SHAPES = [(7, 33), (97, 33), (5, 64), (1, 1), (64, 512), (43, 1000), (130, 515)]
LARGE = [(4096, 300), (3, 20000)]
THREADS = [1, 2, 3, 5]
NUM_OUTPUTS = 70  # more than the 32 that matrix units take at once, and no multiple of them


def full(num_outputs: int, num_inputs: int) -> Tensor:
    return torch.randn(num_outputs, num_inputs)


def half(num_outputs: int, num_inputs: int) -> Tensor:
    """In float32, but bfloat16 can hold it."""
    return torch.randn(num_outputs, num_inputs).bfloat16().float()


def int8(num_outputs: int, num_inputs: int, bits: int = 14) -> Int8Weight:
    values = torch.randint(-127, 128, (num_outputs, num_inputs), dtype=torch.int8)
    return Int8Weight(values, torch.rand(num_outputs) + 0.01, bits)


def int4(num_outputs: int, num_inputs: int, bits: int = 14) -> Int4Weight:
    padded = num_inputs + -num_inputs % 64
    codes = torch.randint(-8, 8, (num_outputs, padded), dtype=torch.int8)
    codes[:, num_inputs:] = 0
    scales = torch.randn(num_outputs, padded // GROUP)
    return Int4Weight(pack(codes), scales, num_inputs, bits)


Make = Callable[[int, int], Weight]
MAKERS: dict[str, Make] = {
    "float32": full,
    "bfloat16": half,
    "int8, 14 bits": int8,
    "int8, 8 bits": lambda o, i: int8(o, i, 8),
    "int8, 5 bits": lambda o, i: int8(o, i, 5),
    "int8, floats": lambda o, i: int8(o, i, 0),
    "int4, 14 bits": int4,
    "int4, 8 bits": lambda o, i: int4(o, i, 8),
    "int4, floats": lambda o, i: int4(o, i, 0),
}
ROUNDED = [name for name in MAKERS if "bits" in name]


def exact(weight: Weight) -> Tensor:
    """What the weight stands for, in float64."""
    return (weight if isinstance(weight, Tensor) else dequantized(weight)).double()


def rows_of_many_sizes(count: int, width: int) -> Tensor:
    return torch.randn(count, width) * torch.logspace(-4, 4, count)[:, None]


def worst(ours_NO: Tensor, expected_NO: Tensor, x_NI: Tensor, weight: Weight) -> float:
    """The largest error, as a share of the lengths of the row and of the weights' row.

    One input of a thousand that is left out makes it 1e-3.
    """
    lengths_NO = x_NI.double().norm(dim=1)[:, None] * exact(weight).norm(dim=1)
    return float(((ours_NO.double() - expected_NO.double()).abs() / lengths_NO).max())


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in ROUNDED])
@pytest.mark.parametrize("shape", SHAPES + LARGE)
def test_products_of_floats_are_near_the_exact_ones(cpu: CpuOps, name, shape):
    weight, bias_O = MAKERS[name](*shape), torch.randn(shape[0])
    for count in (1, 3, 7):
        x_NI = rows_of_many_sizes(count, shape[1])
        expected_NO = x_NI.double() @ exact(weight).t()
        y_NO = cpu.linear(weight)(x_NI)
        assert worst(y_NO, expected_NO, x_NI, weight) < 3e-7
        assert torch.equal(cpu.linear(weight, bias_O)(x_NI), y_NO + bias_O)


@pytest.mark.parametrize("name", [name for name in ROUNDED if "int8" in name])
@pytest.mark.parametrize("shape", SHAPES + LARGE)
def test_8_bits_are_the_twin_to_the_bit(cpu: CpuOps, name, shape):
    weight = MAKERS[name](*shape)
    for bias_O in (None, torch.randn(shape[0])):
        ours, twin = cpu.linear(weight, bias_O), quantized(weight, bias_O)
        for count in (1, 2, 5, 17):
            x_NI = rows_of_many_sizes(count, shape[1])
            assert torch.equal(ours(x_NI), twin(x_NI))


@pytest.mark.parametrize("name", [name for name in ROUNDED if "int4" in name])
@pytest.mark.parametrize("shape", SHAPES + LARGE)
def test_4_bits_are_the_twin_up_to_the_order_of_groups(cpu: CpuOps, name, shape):
    weight, bias_O = MAKERS[name](*shape), torch.randn(shape[0])
    for count in (1, 2, 5, 17):
        x_NI = rows_of_many_sizes(count, shape[1])
        y_NO = cpu.linear(weight)(x_NI)
        assert worst(y_NO, quantized(weight)(x_NI), x_NI, weight) < 3e-7
        assert torch.equal(cpu.linear(weight, bias_O)(x_NI), y_NO + bias_O)


@pytest.mark.parametrize("shape", SHAPES + LARGE)
def test_weights_kept_in_bfloat16_give_the_bits_of_float32(cpu: CpuOps, shape, monkeypatch):
    """But for matrix units, which have their own order of sums."""
    weight_OI = half(*shape)
    short = cpu.linear(weight_OI)
    monkeypatch.setattr(cpu_linear, "stored", lambda weight_OI: weight_OI)
    whole = cpu.linear(weight_OI)
    assert (short.struct.kind, whole.struct.kind) == (BFLOAT16, FLOAT32)
    for count in (1, 2, 3, 4, 9, 70):
        x_NI = rows_of_many_sizes(count, shape[1])
        if cpu._library.has_tiles() and shape[0] >= 32:
            assert worst(short(x_NI), whole(x_NI), x_NI, weight_OI) < 3e-7
        else:
            assert torch.equal(short(x_NI), whole(x_NI))


def test_one_weight_that_bfloat16_cannot_hold_keeps_all_in_float32(cpu: CpuOps):
    weight_OI = half(8, 64)
    weight_OI[5, 40] = 1 + 2**-10
    linear = cpu.linear(weight_OI)
    assert linear.struct.kind == FLOAT32
    assert torch.equal(linear(torch.eye(64)), weight_OI.t())


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("shape", [(7, 33), (97, 33), (43, 1000), (3, 20000)])
def test_rows_keep_their_bits_for_any_number_of_rows_and_threads(cpu: CpuOps, name, shape):
    linear = cpu.linear(MAKERS[name](*shape), torch.randn(shape[0]))
    x_NI = rows_of_many_sizes(max(PROBED_ROWS), shape[1])
    whole_NO = linear(x_NI)
    assert is_invariant(linear, x_NI, whole_NO)
    long_NO = linear(torch.cat([x_NI, x_NI, x_NI[:7]]))
    assert torch.equal(long_NO, torch.cat([whole_NO, whole_NO, whole_NO[:7]]))
    for num_threads in THREADS[1:]:
        torch.set_num_threads(num_threads)
        for count in (1, 3, 4, 64):
            assert torch.equal(linear(x_NI[:count]), whole_NO[:count])


@pytest.mark.parametrize("name", MAKERS)
def test_rows_that_stand_apart_are_read_where_they_are(cpu: CpuOps, name):
    linear = cpu.linear(MAKERS[name](NUM_OUTPUTS, 40), torch.randn(NUM_OUTPUTS))
    wide_NI = torch.randn(9, 100)
    expected_NO = linear(wide_NI[:, 30:70].clone())
    assert torch.equal(linear(wide_NI[:, 30:70]), expected_NO)
    assert torch.equal(linear(wide_NI[::2, 30:70]), expected_NO[::2])
    assert torch.equal(linear(wide_NI[:, 30:70].t().contiguous().t()), expected_NO)
    assert torch.equal(linear(wide_NI[:1, 30:70].expand(5, -1)), expected_NO[:1].expand(5, -1))


@pytest.mark.parametrize("name", MAKERS)
def test_weights_that_are_views_are_read_right(cpu: CpuOps, name):
    weight = MAKERS[name](NUM_OUTPUTS, 128)
    turned = [v.t().contiguous().t() if is_matrix(v) else v for v in _fields(weight)]
    assert not turned[0].is_contiguous()
    there = turned[0] if isinstance(weight, Tensor) else type(weight)(*turned)
    x_NI = torch.randn(3, 128)
    assert torch.equal(cpu.linear(there)(x_NI), cpu.linear(weight)(x_NI))


def is_matrix(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2


def _fields(weight: Weight) -> tuple[object, ...]:
    return (weight,) if isinstance(weight, Tensor) else tuple(weight)


@pytest.mark.parametrize("name", MAKERS)
def test_no_rows_give_no_rows(cpu: CpuOps, name):
    assert cpu.linear(MAKERS[name](NUM_OUTPUTS, 40))(torch.empty(0, 40)).shape == (0, NUM_OUTPUTS)


@pytest.mark.parametrize("name", MAKERS)
def test_zeros_give_the_bias(cpu: CpuOps, name):
    bias_O = torch.randn(NUM_OUTPUTS)
    y_NO = cpu.linear(MAKERS[name](NUM_OUTPUTS, 40), bias_O)(torch.zeros(3, 40))
    assert torch.equal(y_NO, bias_O.expand(3, -1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", MAKERS)
def test_what_is_no_number_stays_in_its_row(cpu: CpuOps, name, bad):
    linear = cpu.linear(MAKERS[name](NUM_OUTPUTS, 40), torch.randn(NUM_OUTPUTS))
    for at in (0, 15, 16, 33, 39):
        x_NI = torch.randn(7, 40)
        expected_NO = linear(x_NI)
        x_NI[3, at] = bad
        y_NO = linear(x_NI)
        others = [0, 1, 2, 4, 5, 6]
        assert torch.equal(y_NO[others], expected_NO[others])
        assert not y_NO[3].isfinite().any()
        assert y_NO[3].isnan().all() or name not in ROUNDED


@pytest.mark.parametrize("name", [name for name in ROUNDED if "int8" in name])
def test_tiny_and_huge_rows_are_rounded_as_the_twin_does(cpu: CpuOps, name):
    weight = MAKERS[name](NUM_OUTPUTS, 40)
    limit = 2 ** (weight.activation_bits - 1) - 1
    tiny = torch.finfo(torch.float32).tiny
    sizes = [1e-45, 1e-42, tiny, tiny * limit, tiny * limit * 1.001, 1e-30, 1e30, 3e38]
    x_NI = torch.randn(len(sizes), 40).clamp(-1, 1) * torch.tensor(sizes)[:, None]
    x_NI[:, 7] = torch.tensor(sizes)
    assert torch.equal(cpu.linear(weight)(x_NI), quantized(weight)(x_NI))


def test_ties_are_rounded_to_even_and_sums_pass_32_bits(cpu: CpuOps):
    ones = Int8Weight(torch.ones(1, 2, dtype=torch.int8), torch.ones(1), 8)
    x_NI = torch.tensor([[127.0, tie] for tie in (0.5, 1.5, 2.5, -0.5, -1.5)])
    assert cpu.linear(ones)(x_NI)[:, 0].tolist() == [127.0, 129.0, 129.0, 127.0, 125.0]
    for sign in (1, -1):
        most = Int8Weight(torch.full((5, 40000), 127 * sign, dtype=torch.int8), torch.ones(5), 14)
        for x_NI in (torch.ones(2, 40000), -torch.ones(2, 40000)):
            assert torch.equal(cpu.linear(most)(x_NI), quantized(most)(x_NI))


def test_the_largest_codes_of_4_bits(cpu: CpuOps):
    for code in (-8, 7):
        codes = torch.full((3, 128), code, dtype=torch.int8)
        weight = Int4Weight(pack(codes), torch.tensor([[1.0, -2.0, 0.5, 4.0]] * 3), 128, 14)
        for x_NI in (torch.ones(2, 128), -torch.ones(2, 128)):
            assert torch.equal(cpu.linear(weight)(x_NI), quantized(weight)(x_NI))


def test_what_is_not_float32_is_refused_rather_than_misread(cpu: CpuOps):
    world = World(2, 1, 8, 4)
    layout = cpu.layout(world.spans((Part(0, 2),)), CPU)
    rows, half_rows = torch.randn(2, 1, 8), torch.randn(2, 1, 8).bfloat16()
    with pytest.raises(AssertionError):
        cpu.linear(torch.randn(4, 8))(torch.randn(3, 8).bfloat16())
    with pytest.raises(AssertionError):
        cpu.write_kv(world.kv, half_rows, half_rows, layout)
    with pytest.raises(AssertionError):
        cpu.attend(half_rows, world.kv, layout, scale=1.0)
    with pytest.raises(AssertionError):
        cpu.attend(rows, LayerKV(*(part.half() for part in world.kv)), layout, scale=1.0)


def test_a_layer_outlives_the_tensors_it_was_made_of(cpu: CpuOps):
    layers, expected = [], []
    x_NI = torch.randn(3, 500)
    for make in MAKERS.values():
        weight, bias_O = make(50, 500), torch.randn(50)
        layers.append(cpu.linear(weight, bias_O))
        expected.append(layers[-1](x_NI))
        del weight, bias_O
    rubbish = [torch.full((50, 500), 7.0) for _ in range(20)]
    assert all(torch.equal(a(x_NI), b) for a, b in zip(layers, expected, strict=True)), rubbish


# Several threads share few rows over a long context by cutting the context, and many rows (here
# 1300, of two groups of heads) by handing out rows: both must give the bits of one thread.
FEW = (Part(1296, 1),)
TREE = (Part(1290, 3, (-1, -1, 1, 0, 2, 2), (JUNK, 1293, 1294, JUNK, JUNK, 1295)),)
SOME = (Part(1300, 1), Part(700, 17), Part(0, 3), Part(511, 2, (-1, 0), (513, JUNK)))
MANY = (Part(0, 1300),)
OPTIONS = {
    "plain": {},
    "sliding": {"window": Window(sliding=600)},
    "chunk": {"window": Window(chunk=300)},
    "softcap and sinks": {"softcap": 2.0, "sinks_H": torch.linspace(-4, 4, 4)},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("width", [40, 64])
def test_attention_keeps_its_bits_however_threads_share_the_work(cpu: CpuOps, width, name):
    world = World(4, 2, width, 1301, value_width=width + 3, block_size=16)
    options = OPTIONS[name]
    whole = world.run(cpu, *MANY, **options)
    passes = {parts: world.run(cpu, *parts, **options) for parts in (FEW, TREE, SOME)}
    assert torch.equal(passes[FEW][0], whole[1296])
    assert torch.equal(passes[TREE][[0, 1, 2, 4, 5, 8]], whole[1290:1296])
    assert torch.equal(passes[SOME][1:18], whole[700:717])
    for num_threads in THREADS[1:]:
        torch.set_num_threads(num_threads)
        for parts, expected in passes.items():
            assert torch.equal(world.run(cpu, *parts, **options), expected)
        assert torch.equal(world.run(cpu, *MANY, **options), whole)


def test_memory_of_a_large_pass_leaves_nothing_in_a_small_one(cpu: CpuOps):
    """Scratch memory is kept between passes, and grows."""
    small, large = World(3, 1, 24, 40), World(16, 4, 64, 600, block_size=8)
    linears: list[Linear] = [cpu.linear(int8(30, 100)), cpu.linear(int4(700, 3000))]
    x_NI = torch.randn(80, 3000)

    def run_all() -> list[Tensor]:
        return [small.run(cpu, Part(30, 2)), linears[0](x_NI[:2, :100])]

    before = run_all()
    large.run(cpu, Part(0, 600))
    linears[1](x_NI)
    assert all(torch.equal(a, b) for a, b in zip(run_all(), before, strict=True))
