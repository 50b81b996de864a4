"""Which kernels serve a device: ours in C++ on the CPU where they can be built, else torch's."""

from outrider.errors import ConfigError, unknown
from outrider.ops.base import Ops
from outrider.ops.torch import TorchOps

KERNELS = ("auto", "cpu", "torch")


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
        batch_invariant: for torch's kernels; ours always are.

    Raises:
        ConfigError: an unknown name, or C++ kernels that cannot serve here.
    """
    if kernels not in KERNELS:
        raise ConfigError(unknown("kernels", kernels, list(KERNELS)))
    reason = "" if kernels == "torch" else _why_not(device, dtype)
    if kernels == "cpu" and reason:
        raise ConfigError(f"kernels='cpu': {reason}; use kernels='auto'")
    if kernels == "torch" or reason:
        return TorchOps(batch_invariant=batch_invariant)
    return _cpu() or TorchOps(batch_invariant=batch_invariant)


def _why_not(device: str, dtype: str) -> str:
    """What keeps the C++ kernels from serving; empty if nothing does."""
    if device.partition(":")[0] != "cpu":
        return f"device={device!r} is no CPU"
    if dtype not in ("auto", "float32"):
        return f"they compute in float32, not dtype={dtype!r}"
    if _cpu() is None:
        return "they could not be compiled (is a C++ compiler on the PATH?)"
    return ""


def _cpu() -> Ops | None:
    from outrider.ops.cpu.library import library  # compiles at the first call
    from outrider.ops.cpu.ops import CpuOps

    found = library()
    return None if found is None else CpuOps(found)
