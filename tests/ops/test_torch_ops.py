"""What only the reference kernels have: probed products, and lanes of keys that are gathered."""

import pytest
import torch

from outrider.ops.base import Span
from outrider.ops.linear import CANDIDATES, PROBED_ROWS, chosen, invariant, is_invariant
from outrider.ops.torch import TorchOps

CPU = torch.device("cpu")


def test_invariant_linear_passes_its_own_probe_for_odd_shapes():
    for shape in [(4, 64), (8, 64), (64, 64), (172, 64), (97, 33), (1152, 384), (384, 1024)]:
        weight, bias = torch.randn(shape), torch.randn(shape[0])
        x = torch.randn(max(PROBED_ROWS), shape[1])
        linear = invariant(weight, bias)
        torch.testing.assert_close(
            linear(x), torch.nn.functional.linear(x, weight, bias), rtol=1e-4, atol=1e-3
        )
        assert is_invariant(linear, x, torch.nn.functional.linear(x, weight, bias))
        assert chosen(*shape, True, torch.get_num_threads()) in CANDIDATES


@pytest.mark.parametrize("num_threads", [1, 2, 3, 16])
@pytest.mark.parametrize("shape", [(640, 384), (384, 384), (172, 64), (4096, 160)])
def test_rows_keep_their_bits_beyond_what_was_probed(num_threads, shape):
    """Row counts that the probe never saw, on as many threads as a machine may have."""
    assert not {65, 100, 255, 700} & set(PROBED_ROWS)
    torch.set_num_threads(num_threads)
    linear = invariant(torch.randn(shape))
    x = torch.randn(700, shape[1])
    alone = torch.cat([linear(x[i : i + 1]) for i in (0, 64, 99, 254, 699)])
    for count, at in ((65, 64), (100, 99), (255, 254), (700, 699)):
        assert torch.equal(linear(x[:count])[at], alone[[64, 99, 254, 699].index(at) + 1])
        assert torch.equal(linear(x[:count])[0], alone[0])


def test_long_and_short_sequences_are_not_padded_to_one_length():
    """Memory: keys gathered stay near the keys seen, whatever the longest sequence."""
    spans = [Span(list(range(4001)), 4000, 1), *(Span(list(range(21)), 20, 1) for _ in range(31))]
    layout = TorchOps().layout(spans, CPU)
    gathered = sum(group.slots_BL.numel() for group in layout.plan)
    assert gathered < 2 * (4032 + 31 * 64)


def test_the_promise_ends_where_the_kernels_do_not_keep_it():
    ops = TorchOps()
    ops.linear(torch.randn(8, 8))
    assert ops.is_batch_invariant
    ops.linear(torch.randn(8, 8).bfloat16())
    assert not ops.is_batch_invariant


def test_the_probe_catches_a_product_that_depends_on_the_row_count():
    weight = torch.randn(64, 64)

    def depends(x):
        y = torch.nn.functional.linear(x, weight)
        return y if x.shape[0] > 1 else y + 1e-6

    x = torch.randn(max(PROBED_ROWS), 64)
    assert not is_invariant(depends, x, torch.nn.functional.linear(x, weight))


def test_the_slow_twin_of_the_linear_layers_is_invariant():
    weight = torch.randn(160, 96)
    x = torch.randn(max(PROBED_ROWS), 96)
    assert is_invariant(CANDIDATES["tiled"](weight, None), x, torch.nn.functional.linear(x, weight))
