"""`outrider generate`: where the prompt comes from, what goes where, and mistakes in one line."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from outrider import LLM, SamplingParams
from outrider.cli import main

SEEDED = ("--max-tokens", 12, "--temperature", 0.9, "--seed", 3)
SAMPLING = SamplingParams(max_tokens=12, temperature=0.9, seed=3)


@pytest.fixture(scope="module")
def llm(model):
    return LLM(model)


def tokens_of(result):
    return json.loads(result.stdout)["completions"][0]["token_ids"]


def test_text_on_stdout_and_figures_on_stderr(call, model, llm):
    result = call("generate", model, "--prompt", "def main(", *SEEDED)
    assert result.stdout == llm.generate("def main(", SAMPLING)[0].text + "\n"
    assert result.stderr.startswith("[")
    assert "plain decoding; exact" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_prompt_comes_from_an_option_a_file_or_standard_input(call, model, llm, tmp_path):
    text = "def main(argv):\n    # naïve\n"
    path = tmp_path / "prompt.txt"
    path.write_text(text, encoding="utf-8")
    expected = llm.generate(text, SAMPLING)[0].token_ids
    for args, stdin in [
        (("--prompt", text), ""),
        (("--file", path), ""),
        ((), text),
        (("--prompt", "-"), text),
        (("--file", "-"), text),
    ]:
        result = call("generate", model, *args, *SEEDED, "--json", stdin=stdin)
        assert tokens_of(result) == expected, args


def test_json_holds_the_whole_answer(call, model, draft):
    result = call(
        "generate", model, "--draft-model", draft, "--speculation", '{"num_draft_tokens": 3}',
        "--prompt", "def", "--json", "--n", 2, *SEEDED,
    )  # fmt: skip
    assert result.stderr == ""
    answer = json.loads(result.stdout)
    assert set(answer) == {
        "model", "prompt_token_ids", "completions", "time_to_first_token_s", "latency_s"
    }  # fmt: skip
    assert answer["model"] == model
    assert 0 < answer["time_to_first_token_s"] <= answer["latency_s"]
    assert [completion["index"] for completion in answer["completions"]] == [0, 1]
    for completion in answer["completions"]:
        assert completion["finish_reason"] in ("length", "stop")
        assert completion["error"] is None
        metrics = completion["metrics"]
        assert metrics["drafter"] == "draft_model"
        assert metrics["exactness"] == "exact"
        assert metrics["num_generated_tokens"] == len(completion["token_ids"])
        assert metrics["acceptance_length"] == pytest.approx(
            1 + metrics["num_accepted_tokens"] / metrics["num_drafts"]
        )
        assert metrics["tokens_per_step"] >= 1.0
        assert len(metrics["joint_acceptance"]) == len(metrics["accepted_histogram"]) - 1


@pytest.mark.parametrize(
    "speculation",
    ["off", "ngram", '{"method": "ngram", "num_speculative_tokens": 3}', '{"num_draft_tokens": 2}'],
)
def test_speculation_changes_no_token(call, model, draft, llm, speculation):
    result = call(
        "generate", model, "--draft-model", draft, "--speculation", speculation,
        "--prompt", "def", "--json", *SEEDED,
    )  # fmt: skip
    assert tokens_of(result) == llm.generate("def", SAMPLING)[0].token_ids
    drafter = json.loads(result.stdout)["completions"][0]["metrics"]["drafter"]
    assert drafter == {"off": "", '{"num_draft_tokens": 2}': "draft_model"}.get(
        speculation, "ngram"
    )


def test_a_draft_model_named_in_speculation_is_loaded(call, model, draft):
    speculation = json.dumps({"model": draft, "num_speculative_tokens": 3})
    result = call("generate", model, "--speculation", speculation, "--prompt", "def", *SEEDED)
    assert "draft_model, acceptance length" in result.stderr


def test_chat_wraps_the_prompt_in_the_template(call, model, llm):
    result = call("generate", model, "--chat", "--prompt", "Hi", "--json", *SEEDED)
    messages = [{"role": "user", "content": "Hi"}]
    assert json.loads(result.stdout)["prompt_token_ids"] == llm.tokenizer.apply_chat_template(
        messages
    )
    assert tokens_of(result) == llm.chat(messages, SAMPLING).token_ids


@pytest.mark.parametrize(
    ("args", "sampling"),
    [
        (("--top-k", 3), {"top_k": 3}),
        (("--top-p", 0.5), {"top_p": 0.5}),
        (("--min-p", 0.3), {"min_p": 0.3}),
        (("--stop", "e", "--stop", "a"), {"stop": ("e", "a")}),
        (("--regex", "[a-z]{4,8}"), {"regex": "[a-z]{4,8}"}),
        (("--json-schema", '{"enum": ["cat", "dog"]}'), {"json_schema": {"enum": ["cat", "dog"]}}),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)
def test_every_sampling_option_arrives(call, model, llm, args, sampling):
    args = ("--max-tokens", 30, "--temperature", 2.0, "--seed", 3, *args)
    base = {"max_tokens": 30, "temperature": 2.0, "seed": 3}
    expected = llm.generate("def", SamplingParams(**base, **sampling))[0].token_ids
    result = call("generate", model, "--prompt", "def", "--json", *args)
    assert tokens_of(result) == expected
    assert expected != llm.generate("def", SamplingParams(**base))[0].token_ids


def test_several_completions_one_after_another(call, model, llm):
    result = call("generate", model, "--prompt", "def", "--n", 3, *SEEDED)
    sampling = SamplingParams(max_tokens=12, temperature=0.9, seed=3, n=3)
    texts = [completion.text for completion in llm.generate("def", sampling)[0].completions]
    assert result.stdout == "".join(text + "\n" for text in texts)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--temperature", -1), "temperature=-1.0: must be >= 0"),
        (("--max-tokens", 0), "max_tokens=0: must be >= 1"),
        (("--top-p", 0), "top_p=0.0: must lie in (0, 1]"),
        (("--n", 0), "n=0: must "),
        (("--stop", ""), "stop=('',): must be non-empty texts"),
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "a", "--file", "b"), "--prompt and --file exclude each other"),
        (("--file", "nowhere.txt"), "--file 'nowhere.txt' cannot be read"),
        (("--speculation", "ngrm"), "unknown method 'ngrm'; did you mean 'ngram'"),
        (("--speculation", "{oops"), "--speculation '{oops' is no JSON"),
        (("--speculation", '{"methd": "off"}'), "did you mean 'method'"),
        (("--speculation", '{"num_draft_tokens": 99}'), "num_draft_tokens=99: must lie in [0, 64]"),
        (("--speculation", "draft_model"), "no draft model is loaded"),
        (("--drafter-settings", "suffix"), "--drafter-settings 'suffix' is no JSON"),
        (("--drafter-settings", '{"suffix": {"dept": 9}}'), "did you mean 'depth'"),
        (("--draft-model", "no/such"), "cannot get 'no/such' from the hub"),
        (("--regex", "["), "regex='[' does not compile"),
        (("--json-schema", "{"), "json_schema='{' does not compile"),
        (("--dtype", "float31"), "did you mean 'float32'"),
        (("--device", "toaster"), "device 'toaster' cannot be used here"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line(refused, model, args, message):
    if not {"--prompt", "--file"} & set(args):
        args = (*args, "--prompt", "def")
    assert message in refused("generate", model, *args)


def test_a_model_that_is_not_there(refused):
    assert "cannot get 'no/such'" in refused("generate", "no/such", "--prompt", "x")
    assert "no folder './nowhere'" in refused("generate", "./nowhere", "--prompt", "x")


def test_standard_input_must_be_text(refused, model):
    assert "standard input is not UTF-8" in refused("generate", model, stdin=b"\xff\xfe")
    assert "the prompt is empty" in refused("generate", model, stdin="")


def test_an_answer_that_broke_off_is_printed_and_fails(model):
    """After three letters only the end is left, and that is forbidden."""
    args = ["generate", model, "--prompt", "def", "--regex", "[a-z]{3}"]
    args += ["--sampling", '{"min_tokens": 20}']
    result = CliRunner().invoke(main.app, args)
    assert result.exit_code == 1
    assert len(result.stdout.strip()) == 3
    assert "error: no token is allowed: min_tokens=20" in result.stderr.splitlines()[-1]
    told = json.loads(CliRunner().invoke(main.app, [*args, "--json"]).stdout)
    assert told["completions"][0]["finish_reason"] == "error"
    assert told["completions"][0]["error"].startswith("no token is allowed")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"temperature": 1}', "--temperature"),
        ("[1]", "no JSON object"),
        ("{", "no JSON"),
        ('{"min_token": 3}', "did you mean 'min_tokens'"),
    ],
)
def test_bad_sampling_json_is_refused(model, text, said):
    result = CliRunner().invoke(main.app, ["generate", model, "--prompt", "x", "--sampling", text])
    assert result.exit_code == 2
    assert said in result.stderr


def test_sampling_json_reaches_the_engine(model):
    args = ["generate", model, "--prompt", "x", "--max-tokens", "4", "--json"]
    args += ["--sampling", '{"logit_bias": {"42": 1000}, "ignore_eos": true}']
    told = json.loads(CliRunner().invoke(main.app, args).stdout)
    assert told["completions"][0]["token_ids"] == [42] * 4


def test_logprobs_are_in_the_json(call, model, llm):
    args = ("--prompt", "def", *SEEDED, "--sampling", '{"logprobs": 2}')
    (told,) = json.loads(call("generate", model, *args, "--json").stdout)["completions"]
    sampling = SamplingParams(max_tokens=12, temperature=0.9, seed=3, logprobs=2)
    expected = llm.generate("def", sampling)[0].completions[0].logprobs
    assert [entry["token_id"] for entry in told["logprobs"]] == told["token_ids"]
    assert [entry["logprob"] for entry in told["logprobs"]] == [e.logprob for e in expected]
    tops = [{int(token): value for token, value in e["top"].items()} for e in told["logprobs"]]
    assert tops == [e.top for e in expected]
    (plain,) = json.loads(call("generate", model, *args[:-2], "--json").stdout)["completions"]
    assert plain["logprobs"] == []


def test_logprobs_have_no_place_in_text(refused):
    args = ("--prompt", "x", "--sampling", '{"logprobs": 2}')
    assert refused("generate", "no/such", *args) == "logprobs are printed by --json only"


@pytest.mark.parametrize("command", [("generate", "--prompt", "x"), ("chat",)])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--max-model-len", 1000000), "max_model_len=1000000: "),
        (("--kv-cache-memory-bytes", 1), "kv_cache_memory_bytes=1: a sequence of "),
    ],
)
def test_engine_options_reach_the_engine(refused, model, command, option, message):
    assert refused(command[0], model, *command[1:], *option).startswith(message)


def test_a_shorter_model_refuses_a_longer_prompt(call, refused, model):
    args = ("--prompt", "a b c d e f g h", "--max-model-len")
    assert "(max_model_len=4): shorten it" in refused("generate", model, *args, 4)
    call("generate", model, *args, 64, "--kv-cache-memory-bytes", 1 << 20)


def test_a_real_process_shows_no_traceback(model):
    command = [sys.executable, "-c", "from outrider.cli.main import app; app()"]
    args = ["generate", model, "--prompt", "x", "--temperature", "-1"]
    done = subprocess.run([*command, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: temperature=-1.0: must be >= 0 (0 is greedy)\n"
