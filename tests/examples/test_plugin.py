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
from outrider.registry import DRAFTERS, VERIFIERS
from outrider.testing import check_drafter, check_verifier

check_drafter(DRAFTERS.load("echo"))
for most in (0, 1, 2):
    check_verifier(VERIFIERS.load("cautious")(most=most))
"""

USE = """
from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.testing import events, tiny_engine
from outrider_echo import EchoDrafter

for most in (0, 1, 3):
    asked = SpeculationParams(
        method="echo",
        num_draft_tokens=3,
        drafter_options={"period": 2},
        verifier="cautious",
        verifier_options={"most": most},
    )
    sampling = SamplingParams(max_tokens=24, logit_bias={7: 1e4}, ignore_eos=True)
    request = Request(id="r", prompt_token_ids=(9, 7, 7), sampling=sampling, speculation=asked)
    told = events(tiny_engine(drafters=[EchoDrafter()]), [request])["r", 0]
    assert [t for e in told for t in e.token_ids] == [7] * 24
    assert told[-1].metrics.num_steps == 24 / (most + 1), told[-1].metrics
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


def test_the_example_is_two_short_files() -> None:
    files = sorted(path.name for path in EXAMPLE.iterdir() if path.is_file())
    assert files == ["outrider_echo.py", "pyproject.toml"]
    assert len((EXAMPLE / "outrider_echo.py").read_text().splitlines()) <= 60


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
