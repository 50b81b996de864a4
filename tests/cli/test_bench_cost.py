"""`outrider bench cost`: the table, the file, going on after an interruption, mistakes."""

import json

import pytest
from typer.testing import CliRunner

from outrider.cli.main import app


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    texts = ("def main(argv): return the quick brown fox", "return [line.strip() for line in argv]")
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def given(model, draft, prompts, tmp_path):
    path = tmp_path / "cost.json"
    arms = ("--arm", "off", "--arm", '{"method": "draft_model", "num_speculative_tokens": 2}')
    options = ("--max-tokens", 8, "--ignore-eos", "--engine", '{"block_size": 4}')
    files = ("--prompts", prompts, "--json", path)
    return ("bench", "cost", model, "--draft-model", draft, *arms, *options, *files), path


def test_the_file_adds_up(call, given):
    args, path = given
    result = call(*args, "--dollars-per-hour", 2)
    held = json.loads(path.read_text())
    assert held["dollars_per_hour"] == 2.0
    assert len(held["arms"]) == 2
    assert len(held["classes"]) == 6
    spent = sum(one["seconds"] for one in held["classes"])
    assert spent + held["idle_seconds"] == pytest.approx(sum(a["wall_s"] for a in held["arms"]))
    assert all(one["tokens"] > 0 for one in held["classes"])
    assert held["arms"][0]["power_valid"] in (True, False)
    assert "utilisation" in result.stdout
    assert "input tokens per output token" in " ".join(result.stdout.split())


def test_an_interrupted_run_goes_on(call, given):
    args, path = given
    first = call(*args, "--dollars-per-hour", 2, "--budget", 0)
    assert "--resume" in first.stderr
    kept = json.loads(path.read_text())["arms"]
    assert [arm["name"] for arm in kept] == ["off"]
    call(*args, "--dollars-per-hour", 4, "--resume")
    held = json.loads(path.read_text())["arms"]
    assert held[0]["wall_s"] == kept[0]["wall_s"]
    assert held[0]["dollars"] == pytest.approx(2 * kept[0]["dollars"])
    assert len(held) == 2


def test_mistakes(given):
    args, _ = given
    result = CliRunner().invoke(app, [str(arg) for arg in (*args, "--dollars-per-hour", 0)])
    assert result.exit_code == 2
    assert "dollars_per_hour=0.0" in result.stderr


def test_without_a_price_of_the_machine_seconds_are_told(call, given):
    args, path = given
    result = call(*args, "--out", path.parent / "page")
    held = json.loads(path.read_text())
    assert held["dollars_per_hour"] is None
    for one in held["classes"]:
        assert one["seconds_per_million"] == pytest.approx(1e6 * one["seconds"] / one["tokens"])
        assert one["dollars_per_million"] is one["with_idle"] is None
    assert held["arms"][0]["dollars"] is None
    told = " ".join(result.stdout.split())
    assert "seconds per million output tokens" in told
    assert "Dollars are told by --dollars-per-hour" in told
    assert "$" not in told
    assert "seconds per million tokens" in (path.parent / "page" / "report.html").read_text()
