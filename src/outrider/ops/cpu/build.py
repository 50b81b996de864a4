"""Compiles C++ for this machine, once, and keeps the result: the kernels, and small libraries.

A library is plain C++ behind a C interface: no torch headers, no Python headers. The kernels take
their threads from the OpenMP runtime that torch has loaded, so that there is one pool of them.
"""

import contextlib
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
from typing import NamedTuple

import torch

SOURCES = Path(__file__).parent / "cpp"
BASE_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=off", "-fPIC", "-w")
COMPILERS = ("c++", "g++", "clang++")
OPENMP_NAMES = ("libgomp", "libiomp5", "libomp")
TIMEOUT_S = 300
logger = logging.getLogger(__name__)


class Sources(NamedTuple):
    """What a library is made of.

    Attributes:
        name: of the file that is kept.
        folder: all of its sources; `main` is the one that is compiled.
        title: what messages call it; `twin` is what serves where it cannot be had.
        is_parallel: whether it gains from threads and the processor's own instructions.
        seconds: what compiling takes, in words.
    """

    name: str
    folder: Path
    main: str
    title: str
    twin: str
    is_parallel: bool = False
    seconds: str = "a few seconds"


def kernels() -> Sources:
    return Sources(
        "kernels",
        SOURCES,
        "outrider.cpp",
        "the CPU kernels",
        "torch's kernels serve",
        is_parallel=True,
        seconds="some ten seconds",
    )


@functools.cache
def load(sources: Sources | None = None) -> ctypes.CDLL | None:
    """The kernels, or what else is asked for, compiled now if they never were.

    None, said once, where that is impossible.
    """
    compiler, sources = find_compiler(), sources or kernels()
    for recipe in recipes(compiler, sources):
        library = recipe.load()
        if library is not None:
            if recipe.weakness:
                logger.warning("%s run %s: slower", sources.title, recipe.weakness)
            return library
    if compiler is None:
        asked = os.environ.get("CXX", "").strip()
        names = f"CXX={asked!r}" if asked else ", ".join(COMPILERS)
        logger.warning("no C++ compiler (%s): %s, slower", names, sources.twin)
    else:
        logger.warning("%s cannot compile %s: %s, slower", compiler, sources.title, sources.twin)
    return None


@functools.cache
def _announce(title: str, seconds: str) -> None:
    logger.warning("compiling %s: once, %s", title, seconds)


class Recipe:
    """One way to compile: flags, and the OpenMP library to link (None: one thread).

    Without a compiler it only finds what another one has made.
    """

    def __init__(
        self,
        compiler: str | None,
        flags: Sequence[str],
        openmp: Path | None,
        sources: Sources | None = None,
    ) -> None:
        self.compiler = compiler
        self.sources = sources or kernels()
        self.flags = (*BASE_FLAGS, *flags, *(("-fopenmp",) if openmp else ()))
        self.openmp = openmp
        lacks = [] if flags else ["without this processor's own instructions"]
        lacks += [] if openmp else ["on one thread (no OpenMP)"]
        self.weakness = " and ".join(lacks) if self.sources.is_parallel else ""

    @property
    def key(self) -> str:
        """Changes with the sources, the flags and the processor, then with the compiler."""
        maker = _digest(self.compiler or "", _version(self.compiler or ""))
        return f"{self._content()}-{maker}"

    def _content(self) -> str:
        files = sorted(path for path in self.sources.folder.iterdir() if path.is_file())
        openmp = self.openmp.name if self.openmp else ""
        texts = [path.read_text() for path in files]
        return _digest(*texts, *self.flags, openmp, processor())

    def load(self) -> ctypes.CDLL | None:
        """From what was kept, else newly made; a file that does not load is made anew."""
        for path in self._kept():
            with contextlib.suppress(OSError):
                return ctypes.CDLL(str(path))
        if self.compiler is None:
            return None
        try:
            path = cache_folder() / f"{self.sources.name}-{self.key}.so"
            _announce(self.sources.title, self.sources.seconds)
            self.build(path)
            return ctypes.CDLL(str(path))
        except (subprocess.SubprocessError, OSError) as error:
            logger.info("%s: %s: %s", self.sources.name, " ".join(self.flags), _reason(error))
            return None

    def _kept(self) -> list[Path]:
        key = self.key if self.compiler else f"{self._content()}-*"
        name = f"{self.sources.name}-{key}.so"
        return [path for folder in _folders() for path in sorted(folder.glob(name))]

    def build(self, library: Path) -> None:
        """Compiles and links apart: linking with -fopenmp would bring in a second runtime."""
        assert self.compiler is not None
        compiler = shlex.split(self.compiler)
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            objects, made = Path(folder, "objects.o"), Path(folder, library.name)
            main = str(self.sources.folder / self.sources.main)
            _run([*compiler, *self.flags, "-c", main, "-o", str(objects)])
            linked = [str(self.openmp), f"-Wl,-rpath,{self.openmp.parent}"] if self.openmp else []
            _run([*compiler, "-shared", str(objects), *linked, "-o", str(made)])
            ctypes.CDLL(str(made))  # a library that does not load is not kept
            os.replace(made, library)


def recipes(compiler: str | None, sources: Sources | None = None) -> Iterator[Recipe]:
    """From the fastest to the one that compiles anywhere."""
    sources = sources or kernels()
    if not sources.is_parallel:
        yield Recipe(compiler, (), None, sources)
        return
    openmp = torch_openmp()
    for runtime in (openmp, None) if openmp else (None,):
        for flags in native_flags():
            yield Recipe(compiler, flags, runtime, sources)


def native_flags() -> tuple[tuple[str, ...], ...]:
    """What compiles for the processor at hand, then for any of its kind."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return ("-march=native",), ()
    return ("-mcpu=native",), ("-march=native",), ()


def find_compiler() -> str | None:
    """CXX alone if it is set (words after the program are kept), else the first that is there."""
    chosen = os.environ.get("CXX", "").strip()
    if chosen:
        return chosen if shutil.which(shlex.split(chosen)[0]) else None
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def torch_openmp() -> Path | None:
    """The OpenMP runtime torch runs on: the one it ships, else the one loaded in this process."""
    shipped = sorted(Path(torch.__file__).parent.glob("lib/lib*omp*"))
    for path in (*shipped, *_loaded_libraries()):
        if path.name.startswith(OPENMP_NAMES):
            return path
    return None


def cache_folder() -> Path:
    """Where builds are kept: OUTRIDER_CACHE, else the user's cache, else a temporary folder."""
    folder = _chosen_folder()
    if folder is not None:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    return _temporary_folder()


def _chosen_folder() -> Path | None:
    """None where there is no home to keep anything in."""
    chosen = os.environ.get("OUTRIDER_CACHE")
    if chosen:
        return Path(chosen)
    with contextlib.suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "outrider")
    return None


def _folders() -> list[Path]:
    """Where a build may be found; the first may be one that cannot be written."""
    folders = [_chosen_folder()]
    with contextlib.suppress(OSError):
        folders.append(cache_folder())
    return list(dict.fromkeys(folder for folder in folders if folder is not None))


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


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@functools.cache
def _version(compiler: str) -> str:
    if not compiler:
        return ""
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
