"""`outrider bench load`: loads of every kind on a tiny model, resumed, told and refused."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from outrider.bench import load_run
from outrider.bench.saturation import Watched
from outrider.cli.main import app

PROMPTS = [{"prompt": f"def main(argv): {i}", "domain": "code"} for i in range(6)]
MOONCAKE = [
    {"timestamp": 10 * i, "input_length": 20, "output_length": 5, "hash_ids": [0]}
    for i in range(6)
]  # fmt: skip


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def prompts(tmp_path):
    return write_lines(tmp_path / "prompts.jsonl", PROMPTS)


@pytest.fixture
def args(model, prompts):
    return ("bench", "load", model, "--prompts", prompts, "--max-tokens", 4, "--ignore-eos")


def found(path: Path) -> dict:
    return json.loads(path.read_text())


def test_closed_and_open_loops_under_two_arms(call, args, tmp_path):
    path = tmp_path / "load.json"
    asked = ("--arm", "off", "--arm", "ngram", "-c", 2, "--rate", 200, "-n", 6)
    result = call(*args, *asked, "--slo", "ttft:60000", "--json", path)
    told = found(path)
    assert told["kind"] == "load"
    names = [(level["name"], level["arm"]) for level in told["levels"]]
    loads = ("concurrency 2", "rate 200")
    assert names == [(load, arm) for load in loads for arm in ("off", "ngram")]
    for level in told["levels"]:
        assert (level["completed"], level["failed"], level["total_output_tokens"]) == (6, 0, 24)
        assert level["slo_attainment"] == 1.0
        assert level["p99_ttft_ms"] >= level["median_ttft_ms"] > 0
    assert [block["level"] for block in told["blocks"]] == [", ".join(name) for name in names]
    assert all(len(block["requests"]) == 6 for block in told["blocks"])
    assert {best["arm"] for best in told["best"]} == {"off", "ngram"}
    assert told["data"]["num_questions"] == 6
    assert told["provenance"]["versions"]["outrider"]
    for part in ("concurrency 2", "rate 200", "good", "Good: within ttft 60000 ms"):
        assert part in " ".join(result.stdout.split())
    assert not path.with_name("load.json.journal").exists()


def test_a_ramp_and_talks(call, args, tmp_path):
    path = tmp_path / "load.json"
    call(*args, "--ramp", "100:300:0.05", "--burstiness", "inf", "--json", path)
    (level,) = found(path)["levels"]
    assert (level["name"], level["num_prompts"]) == ("ramp 100 to 300", 10)
    call(*args, "-c", 2, "--turns", 3, "--json", path)
    (talks,) = found(path)["levels"]
    assert (talks["name"], talks["concurrency"], talks["completed"]) == ("2 users", 2, 16)
    (block,) = found(path)["blocks"]
    assert max(r["num_prompt_tokens"] for r in block["requests"]) > 30, "a turn holds those before"


def test_a_trace_has_its_lengths_and_no_acceptance(call, args, tmp_path):
    path, trace = tmp_path / "load.json", write_lines(tmp_path / "trace.jsonl", MOONCAKE)
    call(*args, "--arm", "ngram", "--trace", trace, "--json", path)
    told = found(path)
    (level,) = told["levels"]
    assert (level["total_input_tokens"], level["total_output_tokens"]) == (120, 30)
    assert level["spec_decode_withheld"] == "prompts are filler"
    assert told["settings"]["trace"]["layout"] == "mooncake"
    call(*args, "--trace", trace, "--rate", 300, "--rate", 100, "--json", path)
    names = [level["name"] for level in found(path)["levels"]]
    assert names == ["trace.jsonl at rate 100", "trace.jsonl at rate 300"]


def test_an_interrupted_run_goes_on(call, args, tmp_path, monkeypatch):
    path, measured = tmp_path / "load.json", []
    usual = load_run.measure

    def measure(target, level, *rest, **more):
        if level.name == "concurrency 2" and "resumed" not in measured:
            raise KeyboardInterrupt
        measured.append(level.name)
        return usual(target, level, *rest, **more)

    monkeypatch.setattr(load_run, "measure", measure)
    loads = ("-c", 1, "-c", 2, "-n", 4, "--json", path)
    with pytest.raises((AssertionError, KeyboardInterrupt)):
        call(*args, *loads)
    assert not path.exists()
    measured.append("resumed")
    call(*args, *loads, "--resume")
    assert measured[measured.index("resumed") :] == ["resumed", "warm-up", "concurrency 2"]
    assert [level["name"] for level in found(path)["levels"]] == ["concurrency 1", "concurrency 2"]


def test_higher_rates_are_left_out_after_saturation_and_after_the_budget(
    call, args, tmp_path, monkeypatch
):
    monkeypatch.setattr(Watched, "conclude", lambda self: setattr(self, "is_saturated", True))
    path = tmp_path / "load.json"
    result = call(*args, "--rate", 100, "--rate", 200, "-n", 3, "--json", path)
    told = found(path)
    assert [level["name"] for level in told["levels"]] == ["rate 100"]
    assert told["left_out"] == ["rate 200, default: already saturated at rate 100"]
    assert "default (saturated)" in result.stdout
    call(*args, "-c", 1, "--budget", 0, "--json", path)
    assert found(path)["left_out"] == ["concurrency 1, default: the budget was over"]


@pytest.mark.parametrize(
    ("extra", "part"),
    [
        (("--slo", "fast"), "--slo 'fast'"),
        (("--ramp", "1:2"), "--ramp '1:2'"),
        (("--turns", 2, "--rate", 1), "--turns"),
        (("--rate", 0), "rate=0"),
        (("--trace", "none.csv"), "no trace 'none.csv'"),
        (("--arm", "draft_model"), "no request is answered"),
        (("--resume",), "--resume"),
    ],
)
def test_mistakes_are_told(model, extra, part, tmp_path):
    prompts = write_lines(tmp_path / "prompts.jsonl", PROMPTS)
    command = ("bench", "load", model, "--prompts", prompts, *extra)
    result = CliRunner().invoke(app, [str(arg) for arg in command])
    assert result.exit_code == 2, result.output
    message = result.stderr.splitlines()[-1]  # what prompts there are was told before
    assert message.startswith("error: ")
    assert part in message


def test_prompts_that_are_asked_again_are_told(call, args, tmp_path):
    path = tmp_path / "load.json"
    once, often = (
        " ".join(call(*args, "-c", 2, "-n", num, "--json", path).stdout.split()) for num in (6, 13)
    )
    assert "asked up to" not in once
    assert "Each prompt was asked up to 3 times, the later ones from the prefix cache" in often
    assert found(path)["rounds"] == 3


def test_what_the_budget_left_out_is_gone_on_with(call, args, tmp_path):
    path = tmp_path / "load.json"
    asked = (*args, "-c", 1, "-c", 2, "-n", 2, "--json", path)
    first = call(*asked, "--budget", 0)
    assert "go on by --resume" in first.stderr
    assert found(path)["levels"] == []
    second = call(*asked, "--resume")
    assert len(found(path)["levels"]) == 2
    assert "--resume" not in second.stderr
    assert not path.with_name("load.json.journal").exists()
