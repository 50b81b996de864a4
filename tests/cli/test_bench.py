"""`outrider bench replay`: figures for programs, a table for people, mistakes in one line."""

import json

import pytest

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
    return ("bench", "replay", "--tokenizer", model, "--workload", log)


def test_json_on_stdout_and_the_table_on_stderr(call, args, log):
    result = call(*args, "--speculation", "ngram", "--json")
    found = json.loads(result.stdout)
    (ngram,) = found["results"]
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
    assert "2 answers replayed" in result.stderr


def test_the_table_names_each_setting(call, args):
    deep = json.dumps({"method": "ngram", "num_draft_tokens": 9})
    shown = call(*args, "--speculation", "ngram", "--speculation", deep).stdout
    assert "2 answers replayed" in shown
    assert shown.count("ngram") == 2
    assert "per call: tokens per call, all calls counted" in shown


def test_a_limit_leaves_out_later_records_and_one_session_has_no_interval(call, args):
    found = json.loads(call(*args, "--speculation", "ngram", "--limit", 1, "--json").stdout)
    (ngram,) = found["results"]
    assert ngram["num_records"] == 1
    assert ngram["tokens_per_call"]["low"] is None


def test_a_shorter_prompt_is_read_where_one_is_asked_for(call, args):
    def accepted(*more):
        result = call(*args, "--speculation", "ngram", "--limit", 1, "--json", *more)
        return json.loads(result.stdout)["results"][0]["num_accepted_tokens"]

    assert accepted("--max-prompt-tokens", 1) < accepted()


def test_without_a_choice_all_that_need_no_model_are_replayed(call, args):
    result = call(*args, "--json")
    names = [found["drafter"] for found in json.loads(result.stdout)["results"]]
    assert "ngram" in names
    assert "draft_model" not in names
    assert "left out: drafter 'draft_model' needs draft model" in result.stderr


def test_workloads_of_a_folder_are_found(call, model, tmp_path):
    solved = {"question": "1+1?", "175b_verification": {"solution": "1+1=2 and 1+1=2"}}
    (tmp_path / "gsm8k_model_solutions.jsonl").write_text(json.dumps(solved))
    args = ("bench", "replay", "--tokenizer", model, "--data", tmp_path, "--speculation", "ngram")
    (found,) = json.loads(call(*args, "--fresh", "--json").stdout)["results"]
    assert (found["workload"], found["num_records"]) == ("gsm8k", 1)


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
    args = ("bench", "replay", "--tokenizer", model, "--speculation", "ngram")
    assert "no workload: give --workload" in refused(*args)
    assert "holds none of" in refused(*args, "--data", tmp_path)
