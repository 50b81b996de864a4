"""`outrider bench calibrate`, `sweep` and `advise`, on a checkpoint of two layers."""

import json

import pytest
from typer.testing import CliRunner

from outrider.bench.result import load
from outrider.cli.main import app

SHORT = ("--max-tokens", 8, "--budget", 0)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": f"def f{i}(argv): return [line"} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return json.loads(path.read_text())


def test_calibrate_writes_points_and_what_sweep_takes(call, model, prompts, tmp_path) -> None:
    path = tmp_path / "cal.json"
    small = ("--rows", "1,2,4", "--context", "16,32", "--budget", 0)
    result = call(
        "bench", "calibrate", model, "--arm", "ngram", "--prompts", prompts, *small, "--json", path
    )
    assert "context 16" in result.stdout
    found = read(path)
    assert found["kind"] == "calibrate"
    assert {(p["rows"], p["context"]) for p in found["points"]} == {
        (n, c) for n in (1, 2, 4) for c in (16, 32)
    }
    assert found["provenance"]["versions"]["outrider"]

    swept = tmp_path / "sweep.json"
    call(
        "bench", "sweep", model, "--arm", "ngram", "--calibration", path, "--prompts", prompts,
        "--draft-tokens", "2", "-c", "1", *SHORT, "--json", swept,
    )  # fmt: skip
    (cell,) = read(swept)["cells"]
    assert cell["predicted"] > 0


def test_sweep_measures_and_predicts_cells(call, model, draft, prompts, tmp_path) -> None:
    path = tmp_path / "sweep.json"
    result = call(
        "bench", "sweep", model, "--draft-model", draft, "--prompts", prompts,
        "--draft-tokens", "1,2", "-c", "1,2", "--temperature", "0,1", *SHORT,
        "--json", path, "--out", tmp_path / "page",
    )  # fmt: skip
    found = read(path)
    assert found["kind"] == "sweep"
    assert len(found["cells"]) == 8
    measured = [cell for cell in found["cells"] if cell["ratio"] is not None]
    assert {(c["temperature"], c["concurrency"]) for c in measured} == {
        (t, c) for t in (0.0, 1.0) for c in (1, 2)
    }
    for cell in measured:
        assert cell["residual_term"] in cell["residual_terms"]
        assert cell["tokens_per_pass"] >= 1.0
    assert all(cell["predicted"] for cell in found["cells"])
    assert len(found["controller"]) == 4
    assert "calibration" in found["blocks"][0]
    assert "draft_model, temperature 1" in result.stdout
    assert (tmp_path / "page" / "report.html").is_file()
    assert not list(tmp_path.glob("*.journal"))
    load(path)


def test_sweep_of_a_context(call, model, prompts, tmp_path) -> None:
    path = tmp_path / "sweep.json"
    call(
        "bench", "sweep", model, "--arm", "ngram", "--prompts", prompts, "--draft-tokens", "2",
        "-c", "1", "--context", "40,80", "--no-adaptive", *SHORT, "--json", path,
    )  # fmt: skip
    found = read(path)
    assert [cell["context"] for cell in found["cells"]] == [40, 80]
    assert found["controller"] == []


def test_advise_answers(call, model, draft, prompts, tmp_path) -> None:
    path = tmp_path / "advise.json"
    result = call(
        "bench", "advise", model, "--draft-model", draft, "--draft-model", model,
        "--prompts", prompts, "--draft-tokens", "1,2", "-c", "1,2", *SHORT, "--json", path,
    )  # fmt: skip
    found = read(path)
    assert found["pays"] in ("yes", "no", "open")
    assert found["answer"] in " ".join(result.stdout.split())
    assert {row["draft_model"] for row in found["table"]} == {draft, model}
    assert any(row["ratio"] is None for row in found["table"])  # predicted, and left at that
    pair = found["pairs"][0]  # without a budget a single block is measured
    assert pair["null_interval"] is pair["interval"] is None
    assert pair["interval_note"] in ("unknown: one prompt only", "unknown: one block only")
    assert pair["verdict"] == "undecided"


@pytest.fixture
def refusal():
    """The last line that a command says before it gives up."""

    def refusal(*args):
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == 2, result.output
        return result.stderr.splitlines()[-1]

    return refusal


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--draft-tokens", "two"), "--draft-tokens 'two': give numbers from 1 on"),
        (("-c", "0,4"), "--concurrency '0,4': give numbers from 1 on"),
        (("-c", "1,64"), "concurrency 64 needs as many prompts, there are 6: raise --limit"),
        (("-c", "1,4", "--limit", 3), "stay at --concurrency 3 and below"),
        (("--context", "4000"), "context 4000: must lie between 1 and 120"),
        (("--calibration", "nowhere.json"), "no file 'nowhere.json'"),
        (("--arm", "nobody"), "nobody"),
        (("--arm", "default"), "an arm names its method"),
    ],
)
def test_what_cannot_be_swept_is_told(refusal, model, prompts, options, told) -> None:
    usual = {"--arm": ("--arm", "ngram"), "-c": ("-c", "1")}
    given = [part for name, pair in usual.items() if name not in options for part in pair]
    asked = ("bench", "sweep", model, *given, "--prompts", prompts, *SHORT, *options)
    assert told in refusal(*asked)


def test_advise_drops_no_load_for_want_of_prompts(refusal, model, prompts) -> None:
    asked = ("--arm", "ngram", "--prompts", prompts, "--limit", 4, *SHORT)
    told = refusal("bench", "advise", model, *asked)  # 1 and 8 at once, where nobody says
    assert "concurrency 8 needs as many prompts, there are 4: raise --limit" in told


def test_a_server_cannot_be_calibrated_and_the_remedy_is_told(refusal) -> None:
    told = refusal("bench", "calibrate", "--url", "http://127.0.0.1:9")
    assert "--url 'http://127.0.0.1:9'" in told
    assert "outrider bench sweep --url" in told


def test_only_off_is_nothing_to_sweep(refusal, model, prompts) -> None:
    """The usual drafter is taken where none is named."""
    asked = ("--prompts", prompts, *SHORT, "--engine", '{"drafters": []}', "--arm", "off")
    assert "no arm drafts" in refusal("bench", "sweep", model, *asked)


def test_a_server_needs_arms(refusal) -> None:
    told = refusal("bench", "advise", "--url", "http://127.0.0.1:9", "demo")
    assert "name what to try" in told or "127.0.0.1:9" in told
