"""Which kernels serve whom."""

import pytest

from outrider.errors import ConfigError
from outrider.ops.choose import choose
from outrider.ops.torch import TorchOps
from tests.kernels import cpu_library


def test_ours_serve_float32_on_the_cpu() -> None:
    cpu_library()  # skips where they cannot be had
    for dtype in ("auto", "float32"):
        for kernels in ("auto", "cpu"):
            ops = choose(kernels, dtype=dtype, batch_invariant=False)
            assert ops.name == "cpu"
            assert ops.is_batch_invariant, "nothing is gained by giving that up"


def test_torch_serves_whoever_asks_for_it() -> None:
    for promise in (True, False):
        ops = choose("torch", batch_invariant=promise)
        assert isinstance(ops, TorchOps)
        assert ops.is_batch_invariant is promise


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"device": "cuda"}])
def test_torch_serves_where_ours_cannot(options) -> None:
    for promise in (True, False):
        ops = choose("auto", batch_invariant=promise, **options)
        assert isinstance(ops, TorchOps)
        assert ops.is_batch_invariant is promise


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "they compute in float32, not dtype='bfloat16'"),
        ({"device": "cuda:1"}, "device='cuda:1' is no CPU"),
    ],
)
def test_asking_for_ours_where_they_cannot_serve_is_an_error(options, message) -> None:
    with pytest.raises(ConfigError, match=f"kernels='cpu': {message}; use kernels='auto'"):
        choose("cpu", **options)


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"unknown kernels 'fast' \(known: auto, cpu, torch\)"):
        choose("fast")
