"""Every sampling parameter, alone and with others: same output with speculation as without."""

import random
from collections import Counter
from dataclasses import fields

import pytest

from outrider import LLM, SamplingParams, SpeculationParams
from tests.e2e.drafters import JUNK_TREE, registered

PROMPTS = [
    "def main(argv):\n    for line in lines:\n        print(line)\n    for line in lines:\n",
    [{"role": "user", "content": "Tom has 12 apples and buys 7 more. How many?"}],
]
SPECULATIONS = [
    SpeculationParams(method="draft_model", num_draft_tokens=4),
    SpeculationParams(method="draft_model", num_draft_tokens=7, draft_sample_method="greedy"),
    SpeculationParams(method="ngram", num_draft_tokens=3, width=2, prompt_lookup_min=1),
    SpeculationParams(method=JUNK_TREE, num_draft_tokens=3, width=3),
]
NUM_TOKENS = 24
END, ROLE = 0, 3  # <|end|> and <|system|> of the demo's vocabulary
TEMPERATURES = [0.0, 0.9]


@pytest.fixture(scope="module")
def llm():
    with registered():
        return LLM("demo", check_integrity=True, max_model_len=256, kv_cache_memory_bytes=1 << 25)


def told(outputs):
    """All that a client sees, without times and counts."""
    return [
        (c.text, c.token_ids, c.finish_reason, c.stop_reason, c.error, c.logprobs)
        for output in outputs
        for c in output.completions
    ]


def decode(llm, sampling):
    """Plain decoding, one prompt after the other."""
    return [output for prompt in PROMPTS for output in llm.generate([prompt], sampling, "off")]


def assert_same(llm, sampling, expected):
    """All drafters side by side in one batch repeat what plain decoding gave."""
    llm.engine.drafters[JUNK_TREE].truths = [o.prompt_token_ids + o.token_ids for o in expected]
    batch = [(prompt, spec) for spec in SPECULATIONS for prompt in PROMPTS]
    outputs = llm.generate([p for p, _ in batch], sampling, [s for _, s in batch])
    for index, spec in enumerate(SPECULATIONS):
        mine = outputs[index * len(PROMPTS) : (index + 1) * len(PROMPTS)]
        assert told(mine) == told(expected), spec


# What each field is set to, given plain outputs without it; and, after it, what must be set in
# both runs for the field to make a difference. None: the field makes none at temperature 0.
def common_token(outputs):
    return Counter(t for o in outputs for t in o.token_ids).most_common(1)[0][0]


def letters(outputs, llm):
    """A text that is certain to come up: three letters in the middle of the first answer."""
    return outputs[0].text[10:13]


CASES = {
    "max_tokens": lambda outputs, llm: {"max_tokens": 7},
    "min_tokens": lambda outputs, llm: {"min_tokens": 9},
    "temperature": lambda outputs, llm: {"temperature": 1.7},
    "top_k": lambda outputs, llm: {"top_k": 4},
    "top_p": lambda outputs, llm: {"top_p": 0.5},
    "min_p": lambda outputs, llm: {"min_p": 0.2},
    "repetition_penalty": lambda outputs, llm: {"repetition_penalty": 1.6},
    "presence_penalty": lambda outputs, llm: {"presence_penalty": 1.8},
    "frequency_penalty": lambda outputs, llm: {"frequency_penalty": 1.5},
    "logit_bias": lambda outputs, llm: {"logit_bias": {common_token(outputs): -8.0, 300: 2.0}},
    "bad_words": lambda outputs, llm: {
        "bad_words": (llm.tokenizer.decode([common_token(outputs)]), outputs[1].text[:6])
    },
    "seed": lambda outputs, llm: {"seed": 99},
    "n": lambda outputs, llm: {"n": 3},
    "stop": lambda outputs, llm: {"stop": ("no such text", letters(outputs, llm))},
    "stop_token_ids": lambda outputs, llm: {"stop_token_ids": (outputs[0].token_ids[6],)},
    "ignore_eos": lambda outputs, llm: {"ignore_eos": True},
    "include_stop_str_in_output": lambda outputs, llm: {"include_stop_str_in_output": True},
    "skip_special_tokens": lambda outputs, llm: {"skip_special_tokens": False},
    "logprobs": lambda outputs, llm: {"logprobs": 5},
    "json_schema": lambda outputs, llm: {"json_schema": {"enum": ["cat", "dog", "horse"]}},
    "regex": lambda outputs, llm: {"regex": "[a-z]{5,50}"},
    "grammar": lambda outputs, llm: {"grammar": 'root ::= ("ab" | "cd "){4,30}'},
}
CONTEXTS = {
    "min_tokens": {"logit_bias": {END: 12.0}},
    "ignore_eos": {"logit_bias": {END: 8.0}},
    "skip_special_tokens": {"logit_bias": {ROLE: 12.0}},
}
DRAWN_ONLY = ("temperature", "top_k", "top_p", "min_p", "seed")  # a greedy choice does not change


def test_no_field_is_forgotten():
    assert sorted(CASES) == sorted(field.name for field in fields(SamplingParams))


@pytest.fixture(scope="module")
def without(llm):
    """Plain outputs before a field is set, by temperature and what is set anyway."""
    made = {}

    def without(**base):
        key = repr(base)
        if key not in made:
            made[key] = decode(llm, SamplingParams(**base))
        return made[key]

    return without


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", CASES)
def test_alone(llm, without, name, temperature):
    base = {
        "max_tokens": NUM_TOKENS,
        "temperature": temperature,
        "seed": 7,
        **CONTEXTS.get(name, {}),
    }
    if name == "include_stop_str_in_output":
        base["stop"] = (letters(without(**base), llm),)
    before = without(**base)
    sampling = SamplingParams(**base | CASES[name](before, llm))
    expected = decode(llm, sampling)
    if temperature > 0 or name not in DRAWN_ONLY:
        assert told(expected) != told(before), "the field must make a difference"
    assert_same(llm, sampling, expected)


RANGES = {
    "max_tokens": [NUM_TOKENS, 17],
    "min_tokens": [0, 5],
    "temperature": [0.0, 0.6, 1.0, 1.5],
    "top_k": [0, 0, 2, 30],
    "top_p": [1.0, 0.9, 0.4],
    "min_p": [0.0, 0.05],
    "repetition_penalty": [1.0, 1.3, 0.8],
    "presence_penalty": [0.0, 0.7, -0.5],
    "frequency_penalty": [0.0, 0.4, -0.3],
    "logit_bias": [{}, {END: 6.0, 20: -3.0, 21: float("-inf")}],
    "bad_words": [(), ("the", "self", " in")],
    "seed": [1, 2, 3],
    "n": [1, 1, 2],
    "stop": [(), ("\n\n", "e a", "s."), ("zz",)],
    "stop_token_ids": [(), (271, 17)],
    "ignore_eos": [False, True],
    "include_stop_str_in_output": [False, True],
    "skip_special_tokens": [True, False],
    "logprobs": [None, 0, 3],
}


@pytest.mark.parametrize("seed", range(12))
def test_in_combination(llm, seed):
    rng = random.Random(seed)
    values = {name: rng.choice(choices) for name, choices in RANGES.items()}
    constraint = rng.choice(
        [{}, {}, {"regex": "[a-z ]{5,80}"}, {"grammar": "root ::= [a-f]{6,90}"}]
    )
    sampling = SamplingParams(**values, **constraint)
    expected = decode(llm, sampling)
    assert all(output.completions[0].error == "" for output in expected)
    assert_same(llm, sampling, expected)


def test_stop_inside_a_draft_is_where_it_is_without_one(llm, without):
    """Every cut of the greedy answer: wherever a draft ends, the stop text ends the output."""
    before = without(max_tokens=NUM_TOKENS, temperature=0.0, seed=7)
    text = before[0].text
    for at in range(2, len(text) - 3, 7):
        sampling = SamplingParams(max_tokens=NUM_TOKENS, stop=(text[at : at + 3],))
        expected = decode(llm, sampling)
        assert expected[0].text == text[: text.index(text[at : at + 3])]
        assert expected[0].finish_reason == "stop"
        assert_same(llm, sampling, expected)


def test_every_max_tokens_is_kept_to(llm, without):
    before = without(max_tokens=NUM_TOKENS, temperature=0.9, seed=7)
    for num_tokens in range(1, 9):
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.9, seed=7)
        expected = [output.token_ids[:num_tokens] for output in before]
        for spec in SPECULATIONS:
            outputs = llm.generate(PROMPTS, sampling, spec)
            assert [output.token_ids for output in outputs] == expected


def test_logprobs_are_of_the_raw_law(llm, without):
    """Whatever shapes the draw, the numbers are the model's own."""
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.9, seed=7, logprobs=4, top_k=20)
    for spec in ["off", *SPECULATIONS]:
        (output,) = llm.generate(PROMPTS[:1], sampling, spec)
        found = output.completions[0].logprobs
        assert [entry.token_id for entry in found] == output.token_ids
        for entry in found:
            assert len(entry.top) == 4
            assert entry.logprob <= max(entry.top.values()) <= 0
            assert entry.top.get(entry.token_id, entry.logprob) == entry.logprob
    forced = SamplingParams(max_tokens=4, logprobs=1, logit_bias={300: 50.0})
    (output,) = llm.generate(PROMPTS[:1], forced, "draft_model")
    assert output.token_ids == [300] * 4
    assert all(300 not in entry.top for entry in output.completions[0].logprobs)
