"""`outrider bench ab`: what is asked becomes arms and blocks, what came out a file and a table."""

import hashlib
import json
import re

import pytest
from typer.testing import CliRunner

from outrider.bench import journal as journals
from outrider.bench.target import Arm
from outrider.cli import bench_options as options
from outrider.cli.main import app
from outrider.errors import RequestError
from outrider.request import SpeculationParams

DRAFTED = '{"method": "draft_model", "num_speculative_tokens": 2}'


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"def f{i}(argv):"}) + "\n" for i in range(10)))
    return path


@pytest.fixture
def few(prompts, tmp_path):
    """Arguments of a short run that writes ab.json."""
    result = tmp_path / "ab.json"
    return ("--prompts", prompts, "--max-tokens", 6, "--budget", 2, "--json", result)


def test_it_measures_and_writes_what_was_promised(call, model, draft, few, tmp_path):
    arms = ("--arm", "off", "--arm", DRAFTED, "--arm", "ngram")
    told = call("bench", "ab", model, "--draft-model", draft, *arms, *few)
    held = json.loads((tmp_path / "ab.json").read_text())
    assert held["kind"] == "ab"
    names = [(pair["base"], pair["arm"]) for pair in held["pairs"]]
    k2 = "draft_model K=2"
    assert names == [("off", k2), ("off", "ngram"), (k2, "ngram")]
    for pair in held["pairs"]:
        assert pair["interval"][0] <= pair["ratio"] <= pair["interval"][1]
        assert pair["null_interval"] == held["null"]["interval"]
        assert pair["verdict"] in ("faster", "slower", "equal", "undecided")
        assert pair["num_identical"] == pair["num_prompts"] > 0
    assert [arm["name"] for arm in held["arms"]] == ["off", k2, "ngram"]
    assert held["arms"][1]["acceptance"]["num_drafts"] > 0
    assert held["data"]["num_questions"] == 10
    assert held["target"]["model_hash"]
    assert held["seeds"] == {"run": 0}
    assert held["provenance"]["commit"]
    assert held["blocks"][0]["runs"][0]["seconds_per_token"] > 0
    assert k2 in told.stdout
    assert "null: off" in told.stdout
    assert list(tmp_path.glob("*.journal")) == []


def test_alone_an_arm_is_compared_with_off_and_none_is_the_default(call, model, few, tmp_path):
    for given, name in (((), "default"), (("--arm", "ngram"), "ngram")):
        call("bench", "ab", model, *given, *few)
        held = json.loads((tmp_path / "ab.json").read_text())
        assert [arm["name"] for arm in held["arms"]] == ["off", name]


def test_one_prompt_alone_has_no_interval_and_says_so(call, model, prompts, tmp_path):
    out = tmp_path / "out"
    given = ("--prompts", prompts, "--limit", 1, "--max-tokens", 6, "--budget", 1)
    told = call("bench", "ab", model, "--arm", "ngram", *given, "--out", out).stdout
    held = json.loads((out / "ab.json").read_text())
    (pair,) = held["pairs"]
    assert pair["interval"] is pair["null_interval"] is held["null"]["interval"] is None
    assert pair["interval_note"] == held["null"]["interval_note"] == "unknown: one prompt only"
    assert pair["verdict"] == held["null"]["verdict"] == "undecided"
    assert "(unknown)" in told
    assert "Intervals are unknown: one prompt only; give more prompts." in " ".join(told.split())
    page = (out / "report.html").read_text()
    assert "95 % interval unknown: one prompt only" in page
    assert not re.search(r"\bnan\b", told + page.partition("<script")[0])


def test_what_is_compared_is_said_as_it_is(call, model, few):
    """A prompt by itself is timed from its first token on, a batch as a whole."""
    alone, batch = (
        " ".join(call("bench", "ab", model, "--arm", "ngram", *few, *more).stdout.split())
        for more in ((), ("-c", 2))
    )
    assert "times as fast: by time per output token after the first (TPOT)" in alone
    assert "times as fast: by time of a whole block of prompts per output token" in batch
    for told in (alone, batch):
        assert "tokens/s: all tokens over all seconds, waiting for the first one included" in told


def test_the_report_says_which_prompts_were_asked(call, model, prompts, tmp_path):
    out = tmp_path / "out"
    given = ("--prompts", prompts, "--limit", 2, "--max-tokens", 4, "--budget", 0, "--arm", "ngram")
    call("bench", "ab", model, *given, "--out", out)
    data = json.loads((out / "ab.json").read_text())["data"]
    sha256 = hashlib.sha256(prompts.read_bytes()).hexdigest()
    assert (data["path"], data["sha256"]) == (str(prompts), sha256)
    assert (data["num_questions"], data["num_in_file"]) == (2, 10)
    assert data["origin"] == "a file of the user's own"
    told = f"Asked: 2 of 10 prompts of {prompts}, a file of the user&#x27;s own"
    assert f"{told}, SHA-256 {sha256[:16]}." in (out / "report.html").read_text()


def test_a_report_lies_beside_the_result(call, model, prompts, tmp_path):
    out = tmp_path / "out"
    given = ("--prompts", prompts, "--max-tokens", 4, "--budget", 0, "--arm", "ngram")
    call("bench", "ab", model, *given, "--out", out)
    assert json.loads((out / "ab.json").read_text())["kind"] == "ab"
    assert "ngram" in (out / "report.html").read_text()


def test_an_interrupted_run_is_resumed(call, model, few, tmp_path, monkeypatch):
    add, count = journals.Journal.add, []

    def interrupted(self, key, block):
        count.append(key)
        if len(count) == 4:
            raise KeyboardInterrupt
        return add(self, key, block)

    args = ("bench", "ab", model, "--arm", "ngram", *few)
    with monkeypatch.context() as patch:
        patch.setattr(journals.Journal, "add", interrupted)
        with pytest.raises(AssertionError, match="interrupted"):
            call(*args)
    lines = (tmp_path / "ab.json.journal").read_text().splitlines()
    assert len(lines) == 1 + 3
    call(*args, "--resume")
    held = json.loads((tmp_path / "ab.json").read_text())
    assert held["blocks"][:3] == [json.loads(line)["block"] for line in lines[1:]]
    assert list(tmp_path.glob("*.journal")) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), 'give MODEL (such as "demo") or --url URL'),
        (("MODEL", "--resume"), "there is no"),
        (("MODEL", "--arm", '{"metod": "ngram"}'), "did you mean 'method'"),
        (("MODEL", "--arm", '{"method": }'), "--arm '{\"method\": }' is no JSON"),
        (("MODEL", "--arm", "ngrm"), "arm 'ngrm' fails: unknown method 'ngrm'"),
        (("MODEL", "--engine", '{"max_seqs": 3}'), "unknown engine option 'max_seqs'"),
        (("MODEL", "-c", 2, "--batch", 1), "batch=1: at concurrency 2 prompts of a block may be 2"),
        (("MODEL", "--eps", 2), "eps=2.0: must lie between 0 and 1"),
        (
            ("MODEL", "--concurrency", 11),
            "concurrency 11 needs as many prompts, there are 10: raise --limit or",
        ),
        (("--url", "http://127.0.0.1:9", "--draft-model", "x"), "--draft-model 'x': the server"),
    ],
)
def test_a_mistake_is_told(model, few, args, message):
    given = [model if arg == "MODEL" else arg for arg in args]
    result = CliRunner().invoke(app, ["bench", "ab", *map(str, (*given, *few))])
    assert result.exit_code == 2
    assert result.stdout == ""
    *before, told = result.stderr.splitlines()
    assert told.startswith("error: ")
    assert message in told
    assert all("prompts.jsonl: 10 prompts" in line for line in before)


@pytest.mark.parametrize(
    ("text", "arm"),
    [
        ("off", Arm(name="off", speculation=SpeculationParams(method="off"))),
        ("suffix", Arm(name="suffix", speculation=SpeculationParams(method="suffix"))),
        ("default", Arm(name="default")),
        (
            '{"method": "ngram", "num_speculative_tokens": 3, "verifier": "rejection"}',
            Arm(
                name="ngram K=3 verifier=rejection",
                speculation=SpeculationParams(
                    method="ngram", num_draft_tokens=3, verifier="rejection"
                ),
            ),
        ),
        (
            '{"num_draft_tokens": 0}',
            Arm(name="off", speculation=SpeculationParams(num_draft_tokens=0)),
        ),
        (
            '{"policy": "adaptive", "name": "ours"}',
            Arm(name="ours", speculation=SpeculationParams(policy="adaptive")),
        ),
        ('{"extra": {"k": 1}, "name": "theirs"}', Arm(name="theirs", extra={"k": 1})),
    ],
)
def test_arms(text, arm):
    assert options.read_arm(text) == options.Parsed(arm)


def test_an_arm_may_have_a_server_of_its_own():
    assert options.read_arm("http://a:1") == options.Parsed(Arm(name="http://a:1"), "http://a:1")
    arm, url = options.read_arm('{"url": "http://a:1", "method": "off"}')
    assert (arm.name, arm.speculation.method, url) == ("http://a:1", "off", "http://a:1")


def test_arms_of_one_name_are_numbered():
    told = options.read_arms(["off", "off", '{"method": "off"}'])
    assert [one.arm.name for one in told] == ["off", "off (2)", "off (3)"]


def test_extra_is_an_object():
    with pytest.raises(RequestError, match="extra=3: give an object"):
        options.read_arm('{"method": "off", "extra": 3}')
