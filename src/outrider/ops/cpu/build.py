"""Compiles the kernels for this machine, once, and keeps the result.

The library is plain C++ behind a C interface: no torch headers, no Python headers. It takes its
threads from the OpenMP runtime that torch has loaded, so that there is one pool of them.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "cpp"
MAIN = SOURCES / "outrider.cpp"
BASE_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=off", "-fPIC", "-w")
NATIVE_FLAGS = (("-march=native",), ("-mcpu=native",), ())
COMPILERS = ("c++", "g++", "clang++")
OPENMP_NAMES = ("libgomp", "libiomp5", "libomp")
TIMEOUT_S = 300
logger = logging.getLogger(__name__)


@functools.cache
def load() -> ctypes.CDLL | None:
    """The kernels, compiled now if they never were; None, said once, where that is impossible."""
    compiler = find_compiler()
    if compiler is None:
        logger.warning(
            "no C++ compiler (%s): torch's kernels serve, slower",
            f"CXX={os.environ['CXX']!r}" if os.environ.get("CXX") else ", ".join(COMPILERS),
        )
        return None
    for recipe in recipes(compiler):
        try:
            library = cache_folder() / f"kernels-{recipe.key}.so"
            if not library.exists():
                _announce()
                recipe.build(library)
            return ctypes.CDLL(str(library))
        except (subprocess.SubprocessError, OSError) as error:
            logger.info("kernels: %s: %s", " ".join(recipe.flags), _reason(error))
    logger.warning("%s cannot compile the CPU kernels: torch's kernels serve, slower", compiler)
    return None


@functools.cache
def _announce() -> None:
    logger.warning("compiling the CPU kernels: once, some ten seconds")


class Recipe:
    """One way to compile: flags, and the OpenMP library to link (None: one thread)."""

    def __init__(self, compiler: str, flags: Sequence[str], openmp: Path | None) -> None:
        self.compiler = compiler
        self.flags = (*BASE_FLAGS, *flags, *(("-fopenmp",) if openmp else ()))
        self.openmp = openmp

    @property
    def key(self) -> str:
        """Changes with the sources, the compiler, its flags and the processor."""
        parts = [path.read_text() for path in sorted(SOURCES.iterdir()) if path.is_file()]
        parts += [
            self.compiler,
            _version(self.compiler),
            *self.flags,
            str(self.openmp),
            processor(),
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]

    def build(self, library: Path) -> None:
        """Compiles and links apart: linking with -fopenmp would bring in a second runtime."""
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            objects, made = Path(folder, "kernels.o"), Path(folder, library.name)
            _run([*shlex.split(self.compiler), *self.flags, "-c", str(MAIN), "-o", str(objects)])
            linked = [str(self.openmp), f"-Wl,-rpath,{self.openmp.parent}"] if self.openmp else []
            _run([*shlex.split(self.compiler), "-shared", str(objects), *linked, "-o", str(made)])
            ctypes.CDLL(str(made))  # a library that does not load is not kept
            os.replace(made, library)


def recipes(compiler: str) -> Iterator[Recipe]:
    """From the fastest to the one that compiles anywhere."""
    openmp = torch_openmp()
    for runtime in (openmp, None) if openmp else (None,):
        for flags in NATIVE_FLAGS:
            yield Recipe(compiler, flags, runtime)


def find_compiler() -> str | None:
    """CXX alone if it is set (words after the program are kept), else the first that is there."""
    chosen = os.environ.get("CXX", "").strip()
    if chosen:
        return chosen if shutil.which(shlex.split(chosen)[0]) else None
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def torch_openmp() -> Path | None:
    """The OpenMP runtime torch runs on: the one loaded in this process, else the one it ships."""
    for path in (*_loaded_libraries(), *sorted(Path(torch.__file__).parent.glob("lib/lib*omp*"))):
        if path.name.startswith(OPENMP_NAMES):
            return path
    return None


def cache_folder() -> Path:
    """OUTRIDER_CACHE, else the user's cache folder, else (not writable) a temporary one."""
    chosen = os.environ.get("OUTRIDER_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(chosen) if chosen else Path(base, "outrider")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return _temporary_folder()
    if os.access(folder, os.W_OK) or any(folder.glob("kernels-*.so")):
        return folder
    return _temporary_folder()


def _temporary_folder() -> Path:
    """Nobody else may put a library there: one that is found is loaded."""
    folder = Path(tempfile.gettempdir(), f"outrider-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if is_ours and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return folder
    return Path(tempfile.mkdtemp(prefix="outrider-"))


def processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _loaded_libraries() -> list[Path]:
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    return sorted({Path(line.split(maxsplit=5)[5]) for line in lines if "omp" in line})


@functools.cache
def _version(compiler: str) -> str:
    command = [*shlex.split(compiler), "--version"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:  # not a program of this machine: compiling will say so
        return ""


def _run(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)


def _reason(error: Exception) -> str:
    text = getattr(error, "stderr", "") or str(error)
    return str(text).strip().partition("\n")[0]
