"""Which kernels serve a device: ours in C++ on the CPU where they can be built, else torch's."""

from outrider.errors import ConfigError, unknown
from outrider.ops.base import Ops
from outrider.ops.torch import TorchOps

KERNELS = ("auto", "cpu", "torch")
TORCH_WAS_ASKED = "torch was asked for"


def choose(
    kernels: str = "auto",
    *,
    device: str = "cpu",
    dtype: str = "auto",
    batch_invariant: bool = True,
) -> Ops:
    """The operations for a network.

    Args:
        kernels: "cpu" (C++, float32), "torch", or "auto": C++ where it serves.
        dtype: as asked for; on the CPU "auto" is float32.
        batch_invariant: False lets torch's kernels be faster; ours are invariant at no cost.

    Raises:
        ConfigError: an unknown name, or C++ kernels that cannot serve here.
    """
    if kernels not in KERNELS:
        raise ConfigError(unknown("kernels", kernels, list(KERNELS)))
    found = TORCH_WAS_ASKED if kernels == "torch" else _cpu(device, dtype)
    if not isinstance(found, str):
        return found
    if kernels == "cpu":
        raise ConfigError(f"kernels='cpu': {found}; use kernels='auto'")
    return TorchOps(batch_invariant=batch_invariant)


def _cpu(device: str, dtype: str) -> Ops | str:
    """The C++ kernels, or what keeps them from serving."""
    if device.partition(":")[0] != "cpu":
        return f"device={device!r} is no CPU"
    if dtype not in ("auto", "float32"):
        return f"they compute in float32, not dtype={dtype!r}"
    from outrider.ops.cpu.library import library  # compiles at the first call
    from outrider.ops.cpu.ops import CpuOps

    found = library()
    if found is None:
        return "they could not be compiled (is a C++ compiler on the PATH?)"
    return CpuOps(found)
