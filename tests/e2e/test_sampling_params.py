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
NUM_TOKENS = 16
END, ROLE, WORD = 0, 3, 300  # <|end|>, <|system|> and some word of the demo's vocabulary
TEMPERATURES = [0.0, 1.3]


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
    return llm.generate(PROMPTS, sampling, "off")


def assert_same(llm, sampling, expected):
    """All drafters side by side in one batch repeat what plain decoding gave."""
    llm.engine.drafters[JUNK_TREE].truths = [o.prompt_token_ids + o.token_ids for o in expected]
    batch = [(prompt, spec) for spec in SPECULATIONS for prompt in PROMPTS]
    outputs = llm.generate([p for p, _ in batch], sampling, [s for _, s in batch])
    for index, spec in enumerate(SPECULATIONS):
        mine = outputs[index * len(PROMPTS) : (index + 1) * len(PROMPTS)]
        assert told(mine) == told(expected), spec


def common_token(outputs):
    return Counter(t for o in outputs for t in o.token_ids).most_common(1)[0][0]


def letters(outputs):
    """A text that is certain to come up: three letters in the second half of the first answer."""
    text = outputs[0].text
    ends = range(len(text) // 2 + 3, len(text))
    return next(text[end - 3 : end] for end in ends if text[end - 3 : end].isascii())


# What each field is set to, given plain outputs without it.
CASES = {
    "max_tokens": lambda outputs, llm: {"max_tokens": 7},
    "min_tokens": lambda outputs, llm: {"min_tokens": 9},
    "temperature": lambda outputs, llm: {"temperature": 0.4},
    "top_k": lambda outputs, llm: {"top_k": 4},
    "top_p": lambda outputs, llm: {"top_p": 0.5},
    "min_p": lambda outputs, llm: {"min_p": 0.2},
    "repetition_penalty": lambda outputs, llm: {"repetition_penalty": 1000.0},
    "presence_penalty": lambda outputs, llm: {"presence_penalty": 60.0},
    "frequency_penalty": lambda outputs, llm: {"frequency_penalty": 20.0},
    "logit_bias": lambda outputs, llm: {"logit_bias": {common_token(outputs): -60.0, WORD: 2.0}},
    "bad_words": lambda outputs, llm: {
        "bad_words": (llm.tokenizer.decode([common_token(outputs)]), outputs[1].text[:6])
    },
    "seed": lambda outputs, llm: {"seed": 99},
    "n": lambda outputs, llm: {"n": 2},
    "stop": lambda outputs, llm: {"stop": ("no such text", letters(outputs))},
    "stop_token_ids": lambda outputs, llm: {"stop_token_ids": (outputs[0].token_ids[6],)},
    "ignore_eos": lambda outputs, llm: {"ignore_eos": True},
    "include_stop_str_in_output": lambda outputs, llm: {"include_stop_str_in_output": True},
    "skip_special_tokens": lambda outputs, llm: {"skip_special_tokens": False},
    "logprobs": lambda outputs, llm: {"logprobs": 5},
    "json_schema": lambda outputs, llm: {"json_schema": {"enum": ["cat", "dog", "horse"]}},
    "regex": lambda outputs, llm: {"regex": "[a-z]{5,50}"},
    "grammar": lambda outputs, llm: {"grammar": 'root ::= ("ab" | "cd "){4,30}'},
}
# What is set in both runs, so that the field makes a difference to any model: as a rule that the
# end may not come, else that it, a role's mark or a word comes at once.
NO_END = {"logit_bias": {END: float("-inf")}}
CONTEXTS = {
    "min_tokens": {"logit_bias": {END: 60.0}},
    "repetition_penalty": {"logit_bias": {WORD: 60.0}},
    "presence_penalty": {"logit_bias": {WORD: 60.0}},
    "frequency_penalty": {"logit_bias": {WORD: 60.0}},
    "ignore_eos": {"logit_bias": {END: 60.0}, "presence_penalty": 60.0},
    "skip_special_tokens": {"logit_bias": {ROLE: 60.0}, "presence_penalty": 60.0},
    "json_schema": {},
    "regex": {},
    "grammar": {},
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
        **CONTEXTS.get(name, NO_END),
    }
    if name == "include_stop_str_in_output":
        base["stop"] = (letters(without(**base)),)
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


@pytest.mark.parametrize("seed", range(10))
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


def test_ignore_eos_with_a_grammar(llm):
    """After a complete output only the end may follow; it is committed once."""
    sampling = SamplingParams(max_tokens=NUM_TOKENS, regex="[a-z]{3}", ignore_eos=True)
    expected = decode(llm, sampling)
    assert [output.token_ids.count(END) for output in expected] == [1, 1]
    assert_same(llm, sampling, expected)


def test_stop_inside_a_draft_is_where_it_is_without_one(llm, without):
    """Every cut of the greedy answer: wherever a draft ends, the stop text ends the output."""
    before = without(max_tokens=NUM_TOKENS, temperature=0.0, seed=7, **NO_END)
    text = before[0].text
    for at in range(2, len(text) - 3, max(1, len(text) // 5)):
        sampling = SamplingParams(max_tokens=NUM_TOKENS, stop=(text[at : at + 3],), **NO_END)
        expected = decode(llm, sampling)
        assert expected[0].text == text[: text.index(text[at : at + 3])]
        assert expected[0].finish_reason == "stop"
        assert_same(llm, sampling, expected)


def test_every_max_tokens_is_kept_to(llm, without):
    before = without(max_tokens=NUM_TOKENS, temperature=0.9, seed=7, **NO_END)
    for num_tokens in range(1, 7):
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.9, seed=7, **NO_END)
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
    whole = SamplingParams(max_tokens=1, logprobs=llm.engine.spec.vocab_size)
    (entry,) = llm.generate(PROMPTS[:1], whole, "off")[0].completions[0].logprobs
    least = min(entry.top, key=entry.top.__getitem__)
    forced = SamplingParams(max_tokens=4, logprobs=1, logit_bias={least: 90.0})
    (output,) = llm.generate(PROMPTS[:1], forced, "draft_model")
    assert output.token_ids == [least] * 4
    assert output.completions[0].logprobs[0].logprob == entry.top[least]
    assert least not in output.completions[0].logprobs[0].top
