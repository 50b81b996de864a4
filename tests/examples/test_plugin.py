"""examples/outrider_echo: installed as a stranger would, listed, and put through the checks."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import outrider

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "outrider_echo"

CHECKS = """
from outrider.registry import VERIFIERS
from outrider.testing import check_drafter, check_verifier

check_drafter("echo")
check_drafter("echo", speculation={"drafter_options": {"period": 3}, "verifier": "cautious"})
for most in (0, 2):
    check_verifier(VERIFIERS.load("cautious")(most=most))
"""

USE = """
from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.testing import events, tiny_engine

def told(**asked):
    sampling = SamplingParams(max_tokens=40, temperature=0.3, ignore_eos=True)
    speculation = SpeculationParams(**asked)
    request = Request(
        id="r", prompt_token_ids=(9, 7, 9, 7), sampling=sampling, speculation=speculation, seed=2
    )
    found = events(tiny_engine(drafters=["echo"]), [request])["r", 0]
    return [t for event in found for t in event.token_ids], found

plain, _ = told(method="off")
echo = {"method": "echo", "num_draft_tokens": 3, "drafter_options": {"period": 2}}
for most in (0, 1, 2, 3):
    tokens, found = told(**echo, verifier="cautious", verifier_options={"most": most})
    assert tokens == plain
    assert max(event.num_accepted for event in found) == most, "as many as may stand, and no more"
assert max(event.num_accepted for event in told(**echo, verifier="cautious")[1]) == 2
"""


CONFORMS = """
from outrider.draft.base import Drafter
from outrider.verify.base import Verifier
from outrider_cautious import CautiousVerifier
from outrider_echo import EchoDrafter

drafter: Drafter = EchoDrafter()
verifier: Verifier = CautiousVerifier()
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example in it, built from a copy: a build writes beside its source."""
    source = tmp_path_factory.mktemp("source") / EXAMPLE.name
    shutil.copytree(EXAMPLE, source)
    target = tmp_path_factory.mktemp("site")
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *offline, "--target", target, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def python(installed: Path, code: str, *args: str) -> str:
    """What a program prints that finds the example beside outrider."""
    paths = [str(installed), str(Path(outrider.__file__).parents[1])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", code, *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_is_a_short_file_per_part() -> None:
    files = {path.name: path for path in EXAMPLE.iterdir() if path.is_file()}
    assert sorted(files) == ["outrider_cautious.py", "outrider_echo.py", "pyproject.toml"]
    for path in files.values():
        assert len(path.read_text().splitlines()) <= 40, path.name


@pytest.mark.slow
def test_its_types_are_those_of_the_protocols(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    conforms = tmp_path / "conforms.py"
    conforms.write_text(CONFORMS)
    sources = [str(path) for path in (*sorted(EXAMPLE.glob("*.py")), conforms)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYPYPATH", os.pathsep.join([str(ROOT / "src"), str(EXAMPLE)]))
        settings = ["--strict", "--config-file", str(ROOT / "pyproject.toml")]
        told, errors, _ = api.run([*settings, *sources])
    assert told.startswith("Success"), told + errors


def test_it_is_listed_with_its_source(installed: Path) -> None:
    told = python(installed, "from outrider.cli.main import app; app()", "plugins", "--json")
    found = json.loads(told)
    drafters = {part["name"]: part for part in found["drafters"]}
    verifiers = {part["name"]: part for part in found["verifiers"]}
    assert drafters["echo"]["source"] == verifiers["cautious"]["source"] == "outrider-echo"
    assert drafters["echo"]["warmth"] == "R0"
    assert verifiers["cautious"]["exactness"] == "exact"


def test_it_passes_the_checks_for_strangers_and_its_settings_do_what_they_say(
    installed: Path,
) -> None:
    python(installed, CHECKS + USE)


@pytest.mark.slow
def test_it_can_be_replayed(installed: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"prompt": [5, 5], "output": [5, 5, 5, 5, 5, 5, 5, 5, 5, 5]}\n')
    args = ("bench", "replay", "--speculation", "echo", "--workload", str(log), "--json")
    (found,) = json.loads(python(installed, "from outrider.cli.main import app; app()", *args))[
        "results"
    ]
    assert (found["num_calls"], found["num_accepted_tokens"]) == (2, 8)
