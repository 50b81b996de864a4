"""From weights to integers: error bounds, exact cases, and the table of schemes."""

import pytest
import torch
from hypothesis import given, strategies as st

from outrider.errors import ConfigError, ModelError
from outrider.ops.base import GROUP, Int4Weight, Int8Weight
from outrider.ops.quantized import dequantized, unpack
from outrider.quant import int4, int8
from outrider.quant.schemes import AS_STORED, SCHEMES, find_scheme

QUANTIZED = [name for name in SCHEMES if name != "off"]
seeds = st.integers(0, 2**31)
deviations = st.sampled_from([1e-30, 1e-3, 1.0, 1e20])


def random_weight(seed: int, num_inputs: int, deviation: float = 1.0) -> torch.Tensor:
    """Rows of different size, with outliers."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(7, num_inputs, generator=generator) * deviation
    weight_OI[1] *= 100.0
    weight_OI[2, 0] *= 50.0
    weight_OI[3] = 0.0
    return weight_OI


@given(seeds, st.integers(1, 130), deviations)
def test_int8_is_within_half_a_step(seed, num_inputs, deviation):
    weight_OI = random_weight(seed, num_inputs, deviation)
    found = int8.quantize(weight_OI, 14)
    assert found.values.dtype == torch.int8
    assert found.values.min() >= -127
    assert found.activation_bits == 14
    error_OI = (dequantized(found) - weight_OI).abs()
    assert (error_OI <= 0.5001 * found.scales[:, None] * (weight_OI != 0)).all()
    largest_O = weight_OI.abs().amax(dim=1)
    assert torch.allclose(found.scales[largest_O > 0] * 127, largest_O[largest_O > 0])


@given(seeds, st.integers(1, 130), deviations)
def test_int4_is_no_worse_than_plain_rounding(seed, num_inputs, deviation):
    """A group's squared error is at most that of max |w| / 7, which is on the grid."""
    weight_OI = random_weight(seed, num_inputs, deviation)
    found = int4.quantize(weight_OI, 14)
    assert found.shape == weight_OI.shape
    padded = num_inputs + -num_inputs % 64
    assert found.packed.shape == (7, padded // 2)
    assert found.scales.shape == (7, padded // GROUP)
    assert (unpack(found.packed)[:, num_inputs:] == 0).all()
    for start in range(0, num_inputs, GROUP):
        group_Og = weight_OI[:, start : start + GROUP].double()
        step_O1 = (group_Og.abs().amax(dim=1, keepdim=True) / 7).clamp_min(1e-300)
        plain_Og = (group_Og / step_O1).round() * step_O1
        ours_Og = dequantized(found)[:, start : start + GROUP].double()
        worst_O = (plain_Og - group_Og).square().sum(1)
        slack_O = 1e-5 * group_Og.square().sum(1)
        assert ((ours_Og - group_Og).square().sum(1) <= worst_O + slack_O).all()


def test_the_grid_and_the_refit_pay():
    weight_OI = torch.randn(64, 512)
    groups = weight_OI.unflatten(1, (-1, GROUP))
    step = groups.abs().amax(-1, keepdim=True) / 7
    plain = ((groups / step).round() * step - groups).square().sum()
    ours = (dequantized(int4.quantize(weight_OI, 14)) - weight_OI).square().sum()
    assert ours < 0.75 * plain


@pytest.mark.parametrize("largest", [-127, 127])
def test_int8_keeps_multiples_of_a_step(largest):
    values = torch.randint(-127, 128, (4, 40))
    values[:, 3] = largest
    scales_O1 = torch.tensor([[0.5], [3.0], [2.0**-20], [7.0]])
    found = int8.quantize(values * scales_O1, 8)
    assert torch.equal(found.values, values.to(torch.int8))
    assert torch.allclose(found.scales, scales_O1[:, 0], rtol=1e-6)


@pytest.mark.parametrize(("low", "high"), [(-8, 7), (-7, 8), (-7, 7)])
def test_int4_keeps_multiples_of_a_step(low, high):
    """Either side may have the eighth code, for scales have a sign."""
    codes = torch.randint(low, high + 1, (4, 96))
    codes[:, ::GROUP], codes[:, 1::GROUP] = low, high
    weight_OI = codes * torch.tensor([[0.5], [3.0], [2.0**-20], [7.0]])
    assert torch.allclose(dequantized(int4.quantize(weight_OI, 14)), weight_OI, rtol=1e-6)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(name, value):
    weight_OI = torch.randn(4, 70)
    weight_OI[2, 65] = value
    for quantize in (SCHEMES[name].layer, SCHEMES[name].head):
        with pytest.raises(ModelError, match="infinite or no number: it cannot be quantised"):
            quantize(weight_OI)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_stored_dtype_and_zeros(name, dtype):
    weight_OI = torch.randn(6, 64).to(dtype)
    weight_OI[0] = 0.0
    restored_OI = dequantized(SCHEMES[name].layer(weight_OI))
    assert restored_OI.dtype == torch.float32
    assert (restored_OI[0] == 0).all()
    assert (restored_OI - weight_OI.float()).norm() < 0.12 * weight_OI.float().norm()


@pytest.mark.parametrize(
    ("name", "layer", "bits"),
    [
        ("int8", Int8Weight, 14),
        ("int8-dynamic", Int8Weight, 8),
        ("int8-weight-only", Int8Weight, 0),
        ("int4", Int4Weight, 14),
    ],
)
def test_what_a_scheme_makes_of_layers_and_head(name, layer, bits):
    scheme = find_scheme(name)
    weight_OI = torch.randn(4, 64)
    assert isinstance(scheme.layer(weight_OI), layer)
    assert isinstance(scheme.head(weight_OI), Int8Weight), "the head never falls below 8 bits"
    assert scheme.layer(weight_OI).activation_bits == scheme.head(weight_OI).activation_bits == bits
    assert (scheme.name, scheme.variant, scheme.is_off) == (name, name, False)


def test_off_is_as_stored():
    weight_OI = torch.randn(4, 64)
    assert find_scheme(None) is find_scheme("off") is AS_STORED
    assert AS_STORED.layer(weight_OI) is AS_STORED.head(weight_OI) is weight_OI
    assert (AS_STORED.is_off, AS_STORED.variant) == (True, "")


@pytest.mark.parametrize("name", ["int3", "INT8", "", 8, ["int8"]])
def test_an_unknown_scheme_names_the_choices(name):
    with pytest.raises(ConfigError, match="known: int4, int8, int8-dynamic, int8-wei"):
        find_scheme(name)
