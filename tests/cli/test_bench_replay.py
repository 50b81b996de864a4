"""`outrider bench replay`: a file with provenance, a table for people, mistakes in one line."""

import json
from types import SimpleNamespace

import pytest

from outrider.bench import replay as replays
from outrider.bench.result import load
from outrider.cli import bench_replay

TEXT = "def main(argv):\n    return argv\n"
LINES = [
    {"prompt": TEXT, "output": TEXT, "session": "a"},
    {"prompt": "# nothing alike", "output": TEXT, "session": "b", "prediction": TEXT},
]


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


@pytest.fixture
def args(log, model):
    return ("bench", "replay", model, "--workload", log)


@pytest.fixture
def replayed(call, args, tmp_path):
    """Rows of the result's file, and what was printed."""

    def replayed(*more):
        path = tmp_path / "replay.json"
        shown = call(*args, *more, "--json", path)
        return load(path).findings["results"], shown

    return replayed


def test_the_file_says_what_was_replayed_and_where(call, args, log, model, tmp_path):
    path, page = tmp_path / "replay.json", tmp_path / "page"
    result = call(*args, "--speculation", "ngram", "--json", path, "--out", page)
    found = load(path)
    assert found.kind == "replay"
    assert found.target["model"] == model
    assert found.data["num_records"] == {str(log): 2}
    assert found.data["hash"]
    assert found.settings["speculation"] == ["ngram"]
    assert found.provenance["versions"]["outrider"]
    assert [block["key"] for block in found.blocks] == [f"{log}: ngram"]
    (ngram,) = found.findings["results"]
    assert ngram["workload"] == str(log)
    assert ngram["drafter"] == "ngram"
    assert ngram["speculation"] == {"method": "ngram"}
    assert ngram["num_records"] == 2
    assert ngram["num_accepted_tokens"] > 0
    assert ngram["acceptance_rate"] == ngram["num_accepted_tokens"] / ngram["num_draft_tokens"]
    assert ngram["draft_share"] == ngram["num_drafts"] / ngram["num_calls"]
    for key in ("acceptance_length", "tokens_per_call"):
        assert 1.0 <= ngram[key]["low"] <= ngram[key]["value"] <= ngram[key]["high"]
    per_call = ngram["num_tokens"] / ngram["num_calls"]
    assert ngram["tokens_per_call"]["value"] == pytest.approx(per_call)
    length = 1 + ngram["num_accepted_tokens"] / ngram["num_drafts"]
    assert ngram["acceptance_length"]["value"] == pytest.approx(length)
    assert "2 answers replayed" in result.stdout
    assert "tokens per call" in (page / "report.html").read_text()
    assert list(tmp_path.glob("*.journal")) == []


def test_an_interrupted_replay_goes_on(call, args, tmp_path, monkeypatch):
    path, played, usual = tmp_path / "replay.json", [], bench_replay.replay

    def replay(records, make, params, **more):
        if len(played) == 1:
            played.append("broke off")
            raise KeyboardInterrupt
        played.append(params.method)
        return usual(records, make, params, **more)

    monkeypatch.setattr(bench_replay, "replay", replay)
    asked = (*args, "--speculation", "ngram", "--speculation", "suffix", "--json", path)
    with pytest.raises(AssertionError, match="interrupted"):
        call(*asked)
    call(*asked, "--resume")
    assert played == ["ngram", "broke off", "suffix"]
    assert [row["drafter"] for row in load(path).findings["results"]] == ["ngram", "suffix"]


def test_other_answers_are_another_run(refused, call, args, log, tmp_path, monkeypatch):
    asked = (*args, "--speculation", "ngram", "--json", tmp_path / "replay.json")
    with monkeypatch.context() as patch:
        patch.setattr(bench_replay.Result, "write", lambda self, path: 1 / 0)
        with pytest.raises(AssertionError):
            call(*asked)
    log.write_text(log.read_text() + json.dumps(LINES[0]) + "\n")
    assert "is of another run (data:" in refused(*asked, "--resume")


def test_the_table_names_each_setting(call, args):
    deep = json.dumps({"method": "ngram", "num_draft_tokens": 9})
    shown = call(*args, "--speculation", "ngram", "--speculation", deep).stdout
    assert "2 answers replayed" in shown
    assert shown.count("ngram") == 2
    assert "per call: tokens per call, all calls counted" in shown


def test_a_limit_leaves_out_later_records_and_one_session_has_no_interval(replayed):
    (ngram,), _ = replayed("--speculation", "ngram", "--limit", 1)
    assert ngram["num_records"] == 1
    assert ngram["tokens_per_call"]["low"] is None


def test_a_shorter_prompt_is_read_where_one_is_asked_for(replayed):
    def accepted(*more):
        return replayed("--speculation", "ngram", "--limit", 1, *more)[0][0]["num_accepted_tokens"]

    assert accepted("--max-prompt-tokens", 1) < accepted()


def test_without_a_choice_all_that_need_no_model_are_replayed(replayed):
    rows, result = replayed()
    names = [row["drafter"] for row in rows]
    assert "ngram" in names
    assert "draft_model" not in names
    assert "left out: drafter 'draft_model' needs draft model" in result.stderr


def test_an_answer_may_be_called_response(call, model, tmp_path):
    path, log = tmp_path / "replay.json", tmp_path / "log.jsonl"
    log.write_text(json.dumps({"prompt": [5, 6, 7, 5, 6], "response": [7, 5, 6, 7]}) + "\n")
    args = ("bench", "replay", model, "--workload", log, "--speculation", "ngram")
    call(*args, "--json", path)
    (row,) = load(path).findings["results"]
    assert row["num_tokens"] == 4
    assert row["num_accepted_tokens"] > 0


def test_workloads_of_a_folder_are_found(call, model, tmp_path):
    solved = {"question": "1+1?", "175b_verification": {"solution": "1+1=2 and 1+1=2"}}
    (tmp_path / "gsm8k_model_solutions.jsonl").write_text(json.dumps(solved))
    path = tmp_path / "replay.json"
    args = ("bench", "replay", model, "--data", tmp_path, "--speculation", "ngram")
    call(*args, "--fresh", "--json", path)
    (found,) = load(path).findings["results"]
    assert (found["workload"], found["num_records"]) == ("gsm8k", 1)


def test_prices_of_a_model_predict_what_drafts_are_worth(call, args, model, log, tmp_path):
    prices, path = tmp_path / "cal.json", tmp_path / "replay.json"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": TEXT}) + "\n")
    small = ("--rows", "1,2,4,8", "--context", "16", "--budget", 0, "--prompts", prompts)
    call("bench", "calibrate", model, "--arm", "ngram", *small, "--json", prices)
    shown = call(*args, "--speculation", "ngram", "--calibration", prices, "--json", path)
    (row,) = load(path).findings["results"]
    assert 0 < row["predicted"] < row["tokens_per_call"]["value"]
    assert "predicted by --calibration" in " ".join(shown.stdout.split())


def test_a_prediction_is_tokens_over_seconds():
    passes = SimpleNamespace(predict=lambda rows: 0.010 + 0.001 * rows)
    prices = SimpleNamespace(cost=SimpleNamespace(passes=passes), plain_s=lambda load: 0.012)
    row = {
        "num_draft_tokens": 30,
        "num_drafts": 10,
        "draft_share": 0.5,
        "draft_us_per_call": 400.0,
        "other_us_per_call": 100.0,
        "tokens_per_call": {"value": 2.0},
    }
    assert replays.predicted(row, prices) == pytest.approx(2 * 0.012 / (0.012 + 0.0015 + 0.0005))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("--speculation", "draft_model"),
            "'draft_model' needs draft model: it cannot be replayed",
        ),
        (("--speculation", "ngramm"), "unknown drafter 'ngramm'; did you mean 'ngram'?"),
        (("--speculation", "off"), "--speculation: name a method that drafts"),
        (("--speculation", '{"method": "ngram", "width": 60}'), "width=60"),
        (("--workload", "gsm8k"), "no folder is given: use --data"),
        (("--workload", "nothing.jsonl"), "nothing.jsonl"),
    ],
)
def test_a_mistake_is_one_line(refused, args, more, message):
    assert message in refused(*args, "--speculation", "ngram", *more)


def test_no_workload_is_a_mistake(refused, model, tmp_path):
    args = ("bench", "replay", model, "--speculation", "ngram")
    assert "no workload: give --workload" in refused(*args)
    assert "holds none of" in refused(*args, "--data", tmp_path)
