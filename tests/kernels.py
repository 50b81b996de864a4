"""The kernels that tests run on, by name; a skip with its reason where this machine lacks them."""

import ctypes
import functools
from pathlib import Path

import pytest

from outrider.ops.base import Ops
from outrider.ops.cpu import build
from outrider.ops.cpu.library import Library, library
from outrider.ops.cpu.ops import CpuOps
from outrider.ops.torch import TorchOps

# Instruction sets that the sources know beside the machine's own; None are the machine's own.
CPU_FLAGS: dict[str, tuple[str, ...] | None] = {
    "cpu": None,
    "cpu, no tiles": ("-march=native", "-mno-amx-tile"),
    "cpu, avx2": ("-mavx2", "-mfma"),
    "cpu, portable": (),
}
ALL_KERNELS = ("torch", "cpu", "cpu, avx2", "cpu, portable")


def make_ops(name: str) -> Ops:
    """Kernels by name: "torch", or one of CPU_FLAGS."""
    return TorchOps() if name == "torch" else CpuOps(cpu_library(name))


def cpu_library(name: str = "cpu") -> Library:
    """The C++ kernels for an instruction set; skips the test where they cannot be had."""
    if build.find_compiler() is None:
        pytest.skip("no C++ compiler on the PATH")
    flags = CPU_FLAGS[name]
    if flags is None:
        found = library()
        assert found is not None, "a compiler is there: the kernels must build"
        return found
    missing = {flag[2:] for flag in flags if flag in ("-mavx2", "-mfma")} - features()
    if "-mno-amx-tile" in flags and "amx_tile" not in features():
        missing = {"amx_tile"}
    if missing:
        pytest.skip(f"this processor has no {', '.join(missing)}")
    return compiled(flags)


def features() -> set[str]:
    """What the processor can do, as Linux names it."""
    return set(build.processor().split())


@functools.cache
def compiled(flags: tuple[str, ...], has_openmp: bool = True) -> Library:
    """A build with flags of our own."""
    return Library(ctypes.CDLL(str(built(flags, has_openmp))))


@functools.cache
def built(flags: tuple[str, ...], has_openmp: bool = True) -> Path:
    """The file of such a build, kept where all builds are."""
    compiler = build.find_compiler()
    assert compiler is not None
    recipe = build.Recipe(compiler, flags, build.torch_openmp() if has_openmp else None)
    path = build.cache_folder() / f"kernels-{recipe.key}.so"
    if not path.exists():
        recipe.build(path)
    return path
