"""`outrider bench lossless`: exit status, the file, and mistakes in one line."""

import json

import pytest
from typer.testing import CliRunner

from outrider.cli.main import app
from tests.bench.lossless.conftest import wrong_rules

__all__ = ["wrong_rules"]

QUICK = ("--limit", 2, "--max-tokens", 40, "--draws", 60)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    texts = ("def main(argv):", "the quick brown fox", "return [line")
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def test_a_right_rule_passes(call, model, draft, prompts, tmp_path):
    path, arm = tmp_path / "lossless.json", '{"method": "draft_model", "verifier": "rejection"}'
    given = ("--draft-model", draft, "--arm", arm, "--prompts", prompts, "--json", path)
    result = call("bench", "lossless", model, *given, "--max-tokens", 64, "--draws", 60)
    assert "lossless" in result.stdout
    held = json.loads(path.read_text())
    assert held["kind"] == "lossless"
    assert held["passes"] is True
    assert held["arms"][0]["rule"] == "rejection"
    assert {check["level"] for check in held["checks"]} == {"L1", "L2", "L3"}
    assert held["provenance"]["versions"]["outrider"]
    assert held["blocks"][0]["key"].startswith("L1: off")
    assert not path.with_name("lossless.json.journal").exists()


def test_a_wrong_rule_ends_with_status_1(wrong_rules, model, draft, prompts):
    arm = '{"method": "draft_model", "verifier": "other_temperature"}'
    given = ["--draft-model", draft, "--arm", arm, "--prompts", str(prompts), "--level", "L2"]
    given += [str(one) for one in QUICK]
    result = CliRunner().invoke(app, ["bench", "lossless", model, *given])
    assert result.exit_code == 1, result.output
    assert "not lossless" in result.stdout


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ((), "drafts nothing"),
        (("--arm", "ngram", "--level", "L9"), "unknown level 'L9'"),
        (("--arm", "ngram", "--temperature", "0"), "temperature=0.0"),
    ],
)
def test_mistakes_are_one_line(model, prompts, asked, told):
    given = ["bench", "lossless", model, "--prompts", str(prompts), *asked]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2, result.output
    assert told in result.stderr.splitlines()[-1]


def test_what_is_not_decided_has_a_status_of_its_own(model, prompts):
    """Neither passed (0) nor failed (1), and no mistake of the caller's (2)."""
    given = ["bench", "lossless", model, "--arm", "ngram", "--prompts", str(prompts)]
    result = CliRunner().invoke(app, [*given, "--level", "L3", "--budget", "0"])
    assert "undecided" in result.stdout
    assert result.exit_code == 3, result.output


def test_the_statuses_are_told():
    told = " ".join(CliRunner().invoke(app, ["bench", "lossless", "--help"]).stdout.split())
    assert "Exit status 0: every arm is what it says it is" in told.replace(" │ │ ", " ")
