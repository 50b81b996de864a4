"""Mistakes: one line with the value and the remedy; the engine serves the next one as before."""

import json
import re

import pytest
from safetensors.torch import load_file, save_file

from outrider import LLM, SamplingParams, SpeculationParams
from outrider.errors import ConfigError, ModelError, OutriderError, PairError, RequestError
from outrider.tokenizer import TokenizerError
from tests.engine.tiny_checkpoint import MAX_POSITIONS, VOCAB, write_checkpoint

GOOD = SamplingParams(max_tokens=6, temperature=0.9, seed=4, ignore_eos=True)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("draft"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def llm(target, draft):
    return LLM(target, draft_model=draft, check_integrity=True)


@pytest.fixture(scope="module")
def bare(target):
    """Without a draft model."""
    return LLM(target, check_integrity=True)


@pytest.fixture
def copy(tmp_path):
    """A checkpoint to break."""
    return write_checkpoint(tmp_path / "copy")


@pytest.fixture(scope="module")
def expected(llm):
    return llm.generate("def main(", GOOD)[0].token_ids


def one_line(call, error, *parts) -> str:
    """The message of the error: one line that holds all parts."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert isinstance(caught.value, OutriderError)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
    return message


def assert_serves(llm, expected):
    assert not llm.engine.has_work()
    assert llm.engine.manager.num_used == 0
    assert llm.generate("def main(", GOOD)[0].token_ids == expected


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("no-such-model", ["cannot get 'no-such-model' from the hub", "name a local folder"]),
        ("Qwen/No-Such", ["cannot get 'Qwen/No-Such' from the hub", "HF_HUB_OFFLINE"]),
        ("./no/such/folder", ["no folder './no/such/folder'", "'Qwen/Qwen3-0.6B'"]),
        ("two words", ["no folder 'two words'"]),
    ],
)
def test_a_model_that_is_not_there(name, parts):
    one_line(lambda: LLM(name), ModelError, *parts)


def test_a_draft_model_that_is_not_there(target):
    one_line(lambda: LLM(target, draft_model="no/such"), ModelError, "cannot get 'no/such'")


def test_a_folder_without_a_model(tmp_path):
    one_line(lambda: LLM(tmp_path), ModelError, tmp_path, "config.json")
    (tmp_path / "config.json").write_text("{")
    one_line(lambda: LLM(tmp_path), ModelError, "config.json", "download it again")
    (tmp_path / "config.json").write_text("{}")
    one_line(lambda: LLM(tmp_path), ModelError)


def test_a_truncated_checkpoint(copy):
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:size])
        one_line(lambda: LLM(copy), ModelError, weights, "download it again")
    weights.unlink()
    one_line(lambda: LLM(copy), ModelError, "no weights in", copy)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_a_missing_tensor(copy, name):
    weights = load_file(copy / "model.safetensors")
    del weights[name]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    one_line(lambda: LLM(copy), ModelError, name)


def test_a_tensor_of_another_shape(copy):
    weights = load_file(copy / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = weights[name][:-1].contiguous()
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    one_line(lambda: LLM(copy), ModelError, name)


def test_an_architecture_that_nobody_knows(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "wizard"}))
    one_line(lambda: LLM(copy), ModelError, "wizard")


def test_a_missing_or_broken_tokenizer(copy):
    path = copy / "tokenizer.json"
    path.write_text(path.read_text()[:200])
    one_line(lambda: LLM(copy), TokenizerError, copy, "download it again")
    for file in copy.glob("tokenizer*"):
        file.unlink()
    one_line(lambda: LLM(copy), TokenizerError, "no tokenizer in", copy, "tokenizer.json")


def test_the_method_of_another_vocabulary(target, tmp_path):
    other = write_checkpoint(tmp_path, text="zyx wvu tsr qpo zyx wvu tsr qpo " * 3)
    llm = LLM(target, draft_model=other)
    one_line(
        lambda: llm.generate("def main(", GOOD, "draft_model"),
        RequestError,
        "the draft model here has another vocabulary",
        "use method='translate'",
    )


def test_vocabularies_of_another_size(target, tmp_path):
    wide = write_checkpoint(tmp_path, vocab_size=VOCAB + 7)
    one_line(
        lambda: LLM(target, draft_model=wide, load_tokenizer=False),
        PairError,
        VOCAB + 7,
        VOCAB,
        "use a draft model of the same family",
    )


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"max_num_seq": 4}, ["engine option 'max_num_seq'", "did you mean 'max_num_seqs'"]),
        ({"tensor_parallel_size": 2}, ["unknown engine option 'tensor_parallel_size'"]),
        ({"max_num_seqs": 0}, ["max_num_seqs=0", ">= 1"]),
        ({"max_num_seqs": "4"}, ["max_num_seqs='4'"]),
        ({"block_size": -1}, ["block_size=-1"]),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 8}, ["max_num_batched_tokens=8", "64"]),
        ({"max_model_len": MAX_POSITIONS + 1}, [f"max_model_len={MAX_POSITIONS + 1}", "128"]),
        (
            {"kv_cache_memory_bytes": 1000},
            ["kv_cache_memory_bytes=1000", "raise it or lower max_model_len"],
        ),
        ({"drafters": ["ngrm"]}, ["unknown drafter 'ngrm'", "did you mean 'ngram'"]),
        ({"long_prefill_token_threshold": -1}, ["long_prefill_token_threshold=-1"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_engine_options(target, options, parts):
    one_line(lambda: LLM(target, **options), ConfigError, *parts)


def test_the_remedy_for_little_memory_works(target):
    needed = re.search(
        r"needs (\d+)",
        one_line(lambda: LLM(target, kv_cache_memory_bytes=5000, max_model_len=64), ConfigError),
    )[1]
    enough = LLM(target, kv_cache_memory_bytes=int(needed), max_model_len=64)
    assert len(enough.generate("a", GOOD)[0].token_ids) == 6


SPECULATIONS = [
    ("ngrm", RequestError, ["unknown method 'ngrm'", "did you mean 'ngram'", "draft_model"]),
    ("eagle9", RequestError, ["unknown method 'eagle9'", "known: "]),
    ({"methd": "ngram"}, RequestError, ["SpeculationParams key 'methd'", "did you mean 'method'"]),
    ({"num_draft_tokens": 65}, RequestError, ["num_draft_tokens=65", "[0, 64]"]),
    ({"num_draft_tokens": -1}, RequestError, ["num_draft_tokens=-1", "[0, 64]"]),
    ({"num_draft_tokens": 2.5}, RequestError, ["num_draft_tokens=2.5"]),
    (
        {"num_draft_tokens": 2, "num_speculative_tokens": 2},
        RequestError,
        ["num_speculative_tokens", "num_draft_tokens", "give one"],
    ),
    ({"verifier": "greedy"}, PairError, ["verifier='greedy'", "0.9", "use verifier='sampled'"]),
    ({"verifier": "gredy"}, RequestError, ["verifier 'gredy'", "did you mean 'greedy'"]),
    (
        {"method": "ngram", "width": 2, "verifier": "rejection"},
        PairError,
        ["width=2", "'rejection'", "use width=1 or verifier='sampled'"],
    ),
    (
        {"draft_sample_method": "coupled", "verifier": "rejection"},
        PairError,
        ["draft_sample_method='coupled'", "verifier='sampled'", "'rejection'"],
    ),
    ({"draft_sample_method": "lucky"}, RequestError, ["draft_sample_method='lucky'", "coupled"]),
    (
        {"method": "ngram", "draft_sample_method": "coupled"},
        RequestError,
        ["draft_sample_method='coupled'", "ngram"],
    ),
    ({"width": 17}, RequestError, ["width=17", "draft_model"]),
    ({"width": 65}, RequestError, ["width=65", "[1, 64]"]),
    (
        {"method": "ngram", "prompt_lookup_min": 5, "prompt_lookup_max": 2},
        RequestError,
        ["prompt_lookup_min=5", "prompt_lookup_max=2"],
    ),
    ({"prompt_lookup_max": 3}, RequestError, ["prompt_lookup_max=3", "drop it"]),
    ({"model": "other/draft"}, RequestError, ["model='other/draft'", "load that model"]),
    ({"method": "ngram", "model": "x"}, RequestError, ["model='x'", "drop it"]),
    (5, RequestError, ["speculation=5"]),
]


@pytest.mark.parametrize(
    ("speculation", "error", "parts"), SPECULATIONS, ids=[str(case[0]) for case in SPECULATIONS]
)
def test_speculation(llm, expected, speculation, error, parts):
    one_line(lambda: llm.generate("def main(", GOOD, speculation), error, *parts)
    assert_serves(llm, expected)


def test_a_draft_model_that_was_not_loaded(bare, expected):
    for speculation in ("draft_model", {"method": "draft_model", "num_draft_tokens": 2}):
        one_line(
            lambda asked=speculation: bare.generate("a", GOOD, asked),
            RequestError,
            "method='draft_model'",
            "draft_model=...",
        )
    assert_serves(bare, expected)


def test_a_method_left_out_of_this_engine(target):
    llm = LLM(target, drafters=[])
    message = "method='ngram': not set up in this engine; name it in LLM(drafters=...)"
    one_line(lambda: llm.generate("a", GOOD, "ngram"), RequestError, message)


PROMPTS = [
    ("", ["the prompt is empty", "give some text"]),
    ([], ["no prompt was given"]),
    ([[]], ["prompt=[]", "token ids"]),
    ([5] * MAX_POSITIONS, ["128 tokens", "at most 127", "shorten it"]),
    ("word " * 100, ["tokens", "at most 127", "max_model_len=128", "shorten it"]),
    ([5, VOCAB], [f"prompt token id {VOCAB}", f"0 to {VOCAB - 1}"]),
    ([5, -1], ["prompt token id -1"]),
    ([1.5], ["prompt=1.5"]),
    ([["a", "b"]], ["prompt=['a', 'b']"]),
    ([{"role": "user"}], ["content"]),
    ([{"role": "wizard", "content": "x"}], ["unknown role wizard"]),
]


@pytest.mark.parametrize(("prompt", "parts"), PROMPTS, ids=[repr(case[0])[:30] for case in PROMPTS])
def test_prompts(llm, expected, prompt, parts):
    one_line(lambda: llm.generate(prompt, GOOD), RequestError, *parts)
    assert_serves(llm, expected)


SAMPLINGS = [
    ({"max_tokens": 0}, ["max_tokens=0", ">= 1"]),
    ({"max_tokens": 4, "min_tokens": 5}, ["min_tokens=5", "max_tokens=4"]),
    ({"temperature": -0.1}, ["temperature=-0.1", ">= 0"]),
    ({"temperature": float("nan")}, ["temperature=nan", "finite"]),
    ({"temperature": "hot"}, ["temperature='hot'"]),
    ({"top_p": 0.0}, ["top_p=0.0", "(0, 1]"]),
    ({"top_k": -1}, ["top_k=-1"]),
    ({"min_p": 1.5}, ["min_p=1.5", "[0, 1]"]),
    ({"repetition_penalty": 0.0}, ["repetition_penalty=0.0"]),
    ({"n": 0}, ["n=0"]),
    ({"seed": -1}, ["seed=-1"]),
    ({"logprobs": -1}, ["logprobs=-1"]),
    ({"logprobs": VOCAB + 1}, [f"logprobs={VOCAB + 1}", f"{VOCAB} tokens"]),
    ({"stop": ("",)}, ["stop=('',)"]),
    ({"bad_words": [""]}, ["bad_words"]),
    ({"stop_token_ids": (VOCAB,)}, ["stop_token_ids", f"{VOCAB}"]),
    ({"logit_bias": {VOCAB: 1.0}}, ["logit_bias", f"{VOCAB}"]),
    ({"logit_bias": {5: float("inf")}}, ["logit_bias[5]=inf"]),
    ({"logit_bias": "x"}, ["logit_bias='x'"]),
    ({"regex": "["}, ["regex='['", "does not compile"]),
    ({"regex": "a", "grammar": "b"}, ["regex and grammar", "at most one"]),
]


@pytest.mark.parametrize(
    ("sampling", "parts"), SAMPLINGS, ids=[str(case[0])[:40] for case in SAMPLINGS]
)
def test_sampling(llm, expected, sampling, parts):
    one_line(lambda: llm.generate("def main(", SamplingParams(**sampling)), RequestError, *parts)
    assert_serves(llm, expected)


def test_keys_that_nobody_knows():
    one_line(
        lambda: SamplingParams.from_dict({"temprature": 1}), RequestError, "did you mean 'temp"
    )
    one_line(
        lambda: SpeculationParams.from_dict({"num_draft_token": 1}), RequestError, "did you mean"
    )


def test_settings_that_forbid_everything_fail_that_request_alone(llm, expected):
    nothing = SamplingParams(
        max_tokens=6, logit_bias=dict.fromkeys(range(VOCAB), float("-inf")), seed=4
    )
    broken, good = llm.generate(["def main(", "def main("], [nothing, GOOD])
    assert broken.finish_reason == "error"
    assert "logit_bias" in broken.completions[0].error
    assert "\n" not in broken.completions[0].error
    assert good.token_ids == expected
    assert_serves(llm, expected)
