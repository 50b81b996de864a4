"""The house rules that no linter knows: packaging, public names, opening sentences, portability."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "outrider"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Hosts of package registries, and folders of one particular machine.
REGISTRY = re.compile(r"\b(pypi|pythonhosted|npmjs|crates|download\.pytorch)\.(org|com|io)")
MACHINE_PATH = re.compile(r"(?<![\w.~/])/(work|tmp|root|home|mnt|opt)/\w")


def tracked_files() -> list[Path]:
    """Files of the working tree that git knows or would add."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]


def text_of(path: Path) -> str:
    """The file's text; empty for a binary file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def matches(pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(text_of(path).splitlines(), start=1)
        if pattern.search(line)
    ]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel as a user would install it."""
    pytest.importorskip("hatchling", reason="builds a wheel with hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_holds_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    expected = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in tracked_files()
        if path.is_relative_to(PACKAGE)
    }
    assert "outrider/py.typed" in expected
    assert expected - set(wheel.namelist()) == set()


def test_wheel_holds_only_the_package(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"outrider"}
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_wheel_installs_the_command(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "outrider = outrider.cli.main:app" in wheel.read(name).decode()


def test_public_names_are_the_documented_ones() -> None:
    import outrider

    page = (ROOT / "docs" / "reference" / "python.md").read_text()
    documented = re.findall(r"^## `(\w+)`$", page, flags=re.MULTILINE)
    assert sorted(outrider.__all__) == sorted(documented)
    for name in outrider.__all__:
        assert getattr(outrider, name).__doc__, f"{name} has no docstring"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_source_opens_with_a_sentence(path: Path) -> None:
    code = path.read_text()
    if not code.strip():
        return  # marks a package, holds nothing to describe
    docstring = ast.get_docstring(ast.parse(code))
    assert docstring, "the file opens with a sentence that says what lives here"
    assert re.search(r"[.:)]$", docstring.splitlines()[0]), "its first line is a whole sentence"


def test_no_file_names_a_registry_host() -> None:
    assert matches(REGISTRY, tracked_files()) == []


def test_no_path_of_one_machine() -> None:
    assert matches(MACHINE_PATH, tracked_files()) == []


def test_the_patterns_can_fail() -> None:
    assert MACHINE_PATH.search("see " + "/".join(["", "home", "me"]))
    relative = ("./home/me", "~/" + "work/x", "a/" + "tmp/b")
    assert not any(MACHINE_PATH.search(f"see {path}, or") for path in relative)
    assert REGISTRY.search("from " + ".".join(["files", "pythonhosted", "org"]))


def test_changelog_has_an_unreleased_section() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    dated = re.compile(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}")
    assert [heading for heading in headings[1:] if not dated.fullmatch(heading)] == []


def test_log_entries_are_dated() -> None:
    log = (ROOT / "LOG.md").read_text()
    entries = re.findall(r"^## (.*)$", log, flags=re.MULTILINE)
    dated = re.compile(r"\d{4}-\d{2}-\d{2} .+")
    assert [entry for entry in entries if not dated.fullmatch(entry)] == []
    assert entries == sorted(entries, key=lambda entry: entry[:10], reverse=True), "newest first"


def test_every_make_target_is_explained() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    explained = re.findall(r"^([a-z-]+):.*##", makefile, flags=re.MULTILINE)
    assert sorted(explained) == sorted(phony.split())


def test_constraints_pin_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    normal = {pin.lower().replace("_", "-") for pin in pins}
    names = [re.match(r"[\w.-]+", line).group().lower().replace("_", "-") for line in wanted]
    assert [name for name in names if name not in normal] == []
