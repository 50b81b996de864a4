"""How the C++ kernels come to be: compiled once and kept, or replaced by torch's with a word of it.

A stub stands in for the compiler: it notes its calls and links a library that was made before.
"""

import functools
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import outrider
from outrider.errors import ConfigError
from outrider.ops.base import Int8Weight
from outrider.ops.choose import choose
from outrider.ops.cpu import build, library as library_module
from outrider.ops.cpu.ops import CpuOps
from outrider.ops.torch import TorchOps
from tests.kernels import built, compiled, cpu_library
from tests.ops.world import Part, World

STUB = """#!{python}
import shutil, sys
arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(" ".join(arguments) + "\\n")
if "--version" in arguments:
    print("stub 1.0")
elif set({refused!r}) & set(arguments):
    sys.exit("error: unrecognized option")
elif "-o" in arguments:
    shutil.copy({made!r}, arguments[arguments.index("-o") + 1])
"""
LOGGER = "outrider.ops.cpu.build"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing is loaded yet, and the folder for builds is empty; undone afterwards."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("OUTRIDER_CACHE", str(folder))
    forget(monkeypatch)
    return folder


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    cached = ((build, "load"), (build, "_version"), (build, "_announce"))
    for module, name in (*cached, (library_module, "library")):
        function = getattr(module, name).__wrapped__
        monkeypatch.setattr(module, name, functools.cache(function))


class Stub(NamedTuple):
    """A compiler that only pretends."""

    path: Path
    log: Path

    def compilations(self) -> list[str]:
        """The calls that made objects of sources."""
        return [line for line in self._calls() if " -c " in line]

    def _calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def make_stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Stub]:
    """Puts a stub in the place of the compiler; it fails where it meets an option in `refused`."""

    def make(*refused: str, made: Path | None = None) -> Stub:
        if made is None:
            with pytest.MonkeyPatch.context() as patch:
                patch.delenv("OUTRIDER_CACHE")
                cpu_library("cpu, portable")  # skips where there is no compiler
                made = built(())
        stub = Stub(tmp_path / "stub-c++", tmp_path / "calls.log")
        text = STUB.format(
            python=sys.executable, log=str(stub.log), refused=refused, made=str(made)
        )
        stub.path.write_text(text)
        stub.path.chmod(0o755)
        monkeypatch.setenv("CXX", str(stub.path))
        return stub

    return make


def said(caplog: pytest.LogCaptureFixture, words: str) -> int:
    """How many warnings say so."""
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    return sum(words in message for message in warnings)


def test_where_there_is_a_compiler_the_kernels_load() -> None:
    if build.find_compiler() is None:
        pytest.skip("no C++ compiler on the PATH")
    ops = CpuOps(cpu_library())
    assert ops._library.lanes() in (4, 8, 16)
    assert ops._library.has_threads() == 1
    assert torch.equal(ops.linear(torch.eye(5))(torch.ones(1, 5)), torch.ones(1, 5))


def test_without_a_compiler_torch_serves_and_it_is_said_once(monkeypatch, tmp_path, caplog) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert build.find_compiler() is None
    for _ in range(3):
        assert library_module.library() is None
        assert isinstance(choose("auto"), TorchOps)
    assert said(caplog, "no C++ compiler") == len(caplog.records) == 1
    with pytest.raises(ConfigError, match=r"kernels='cpu': they could not be compiled"):
        choose("cpu")


def test_a_compiler_that_fails_is_tried_in_every_way_and_said_once(
    make_stub, cache, caplog
) -> None:
    stub = make_stub("-c", made=Path("nothing"))
    for _ in range(2):
        assert library_module.library() is None
        assert isinstance(choose("auto"), TorchOps)
    assert len(stub.compilations()) == len(list(build.recipes(str(stub.path))))
    assert said(caplog, "cannot compile the CPU kernels") == 1
    assert said(caplog, "compiling the CPU kernels") == 1
    assert list(cache.iterdir()) == []
    with pytest.raises(ConfigError, match="could not be compiled"):
        choose("cpu")


def test_what_cannot_be_run_at_all_is_no_compiler(make_stub, caplog) -> None:
    stub = make_stub(made=Path("nothing"))
    stub.path.write_bytes(b"\x7fELF of another machine")
    assert library_module.library() is None
    assert said(caplog, "torch's kernels serve") == 1


def test_a_library_that_does_not_load_is_not_kept(make_stub, cache, tmp_path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    make_stub(made=broken)
    assert library_module.library() is None
    assert list(cache.iterdir()) == []


def test_flags_that_a_compiler_refuses_are_left_out_and_that_is_said(make_stub, caplog) -> None:
    native = [flag for flags in build.native_flags() for flag in flags]
    stub = make_stub(*native)
    assert library_module.library() is not None
    assert len(stub.compilations()) == len(native) + 1
    assert not set(native) & set(stub.compilations()[-1].split())
    assert "-fopenmp" in stub.compilations()[-1]
    assert said(caplog, "cannot compile") == 0
    assert said(caplog, "without this processor's own instructions: slower") == 1


def test_a_compiler_without_openmp_builds_for_one_thread_and_that_is_said(
    make_stub, caplog
) -> None:
    stub = make_stub("-fopenmp")
    assert library_module.library() is not None
    last = stub.compilations()[-1]
    assert build.native_flags()[0][0] in last
    assert "-fopenmp" not in last
    assert said(caplog, "on one thread (no OpenMP): slower") == 1


def test_a_build_that_was_kept_serves_where_there_is_no_compiler(
    make_stub, cache, monkeypatch, tmp_path, caplog
) -> None:
    make_stub()
    assert library_module.library() is not None
    forget(monkeypatch)
    caplog.clear()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.delenv("CXX")
    assert build.find_compiler() is None
    assert isinstance(choose("cpu"), CpuOps)
    assert caplog.records == []


def test_a_kept_build_that_does_not_load_is_made_anew(make_stub, cache, monkeypatch) -> None:
    stub = make_stub()
    cache.mkdir()
    recipe = next(build.recipes(str(stub.path)))
    (cache / f"kernels-{recipe.key}.so").write_bytes(b"half of it")
    assert library_module.library() is not None
    assert len(stub.compilations()) == 1


def test_the_second_load_compiles_nothing(make_stub, cache, monkeypatch, caplog) -> None:
    stub = make_stub()
    assert library_module.library() is not None
    assert library_module.library() is library_module.library()
    assert len(stub.compilations()) == 1
    assert said(caplog, "compiling the CPU kernels") == 1
    (kept,) = cache.iterdir()
    assert kept.name.startswith("kernels-")
    forget(monkeypatch)
    caplog.clear()
    assert isinstance(choose("cpu"), CpuOps)
    assert len(stub.compilations()) == 1
    assert caplog.records == []


def test_importing_compiles_nothing(make_stub, cache) -> None:
    stub = make_stub()
    modules = "outrider, outrider.ops.choose, outrider.ops.cpu.ops, outrider.ops.cpu.library"
    source = Path(outrider.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    subprocess.run([sys.executable, "-c", f"import {modules}"], check=True, env=environment)
    assert not stub.log.exists()
    assert not cache.exists()


def test_the_folder_for_builds(monkeypatch, tmp_path, cache) -> None:
    assert build.cache_folder() == cache
    assert cache.is_dir()
    monkeypatch.delenv("OUTRIDER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.cache_folder() == tmp_path / "xdg" / "outrider"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert build.cache_folder() == tmp_path / "home" / ".cache" / "outrider"


def test_a_folder_that_cannot_be_made_gives_way_to_a_temporary_one(
    make_stub, monkeypatch, tmp_path
) -> None:
    make_stub()
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("OUTRIDER_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert library_module.library() is not None
    assert len(list(tmp_path.glob("temporary/outrider-*/kernels-*.so"))) == 1


def test_a_folder_that_cannot_be_written_still_serves_what_is_in_it(
    make_stub, monkeypatch, tmp_path, cache
) -> None:
    stub = make_stub()
    assert library_module.library() is not None
    forget(monkeypatch)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(os, "access", lambda path, mode: cache not in (path, *Path(path).parents))
    assert build.cache_folder() != cache
    assert library_module.library() is not None
    assert len(stub.compilations()) == 1
    (kept,) = cache.iterdir()
    kept.rename(cache / "kernels-of-another-version.so")
    forget(monkeypatch)
    assert library_module.library() is not None
    assert len(stub.compilations()) == 2, "the wanted build was not there"


def test_without_a_home_there_is_a_temporary_folder(monkeypatch, tmp_path) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("OUTRIDER_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert build.cache_folder().parent == tmp_path


def test_no_folder_at_all_leaves_torch(make_stub, monkeypatch, tmp_path, caplog) -> None:
    make_stub()
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("OUTRIDER_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    assert library_module.library() is None
    assert isinstance(choose("auto"), TorchOps)


def recipe(flags: tuple[str, ...] = (), openmp: Path | None = None) -> build.Recipe:
    return build.Recipe(sys.executable, flags, openmp)


def test_a_changed_source_changes_the_key(monkeypatch, tmp_path) -> None:
    sources = tmp_path / "cpp"
    shutil.copytree(build.SOURCES, sources)
    before = recipe().key
    monkeypatch.setattr(build, "SOURCES", sources)
    assert recipe().key == before, "where the sources lie does not matter"
    for source in sorted(sources.iterdir()):
        text = source.read_text()
        source.write_text(text + "\n")
        assert recipe().key != before, source.name
        source.write_text(text)
    (sources / "more.h").write_text("")
    assert recipe().key != before


def test_flags_openmp_compiler_and_processor_change_the_key(monkeypatch) -> None:
    keys = [recipe().key, recipe(("-O1",)).key, recipe(openmp=Path("libgomp.so")).key]
    keys.append(build.Recipe(shutil.which("sh") or "", (), None).key)
    monkeypatch.setattr(build, "_version", lambda compiler: "another version")
    keys.append(recipe().key)
    monkeypatch.setattr(build, "processor", lambda: "another processor")
    keys.append(recipe().key)
    assert len(set(keys)) == len(keys)


def test_without_openmp_there_are_the_same_bits_on_one_thread(monkeypatch) -> None:
    monkeypatch.delenv("OUTRIDER_CACHE")
    threaded = CpuOps(cpu_library("cpu, portable"))
    single = CpuOps(compiled((), has_openmp=False))
    assert (threaded._library.has_threads(), single._library.has_threads()) == (1, 0)
    world, x_NI = World(4, 2, 40, 700), torch.randn(9, 300)
    values = torch.randint(-127, 128, (50, 300), dtype=torch.int8)
    for num_threads in (1, 3):  # what was asked for is no matter where there is one
        torch.set_num_threads(num_threads)
        for weight in (torch.randn(50, 300), Int8Weight(values, torch.rand(50), 14)):
            assert torch.equal(single.linear(weight)(x_NI), threaded.linear(weight)(x_NI))
        for part in (Part(690, 1), Part(0, 700)):
            assert torch.equal(world.run(single, part), world.run(threaded, part))
