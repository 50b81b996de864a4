"""Constrained output under speculation: always valid, and the tokens of plain decoding."""

import dataclasses
import json
import re

import pytest

from outrider import LLM, SamplingParams, SpeculationParams
from outrider.engine.outputs import RequestOutput
from outrider.errors import RequestError
from tests.e2e.drafters import JUNK_TREE, registered

PROMPTS = [
    "The animal, as JSON: ",
    "def main(argv):\n    x = cat-1 + cat-1 + ",
]
SPECULATIONS = {
    "ngram": SpeculationParams(method="ngram", num_draft_tokens=4, prompt_lookup_min=1),
    "draft model": SpeculationParams(method="draft_model", num_draft_tokens=4),
    "draft model, own noise": SpeculationParams(
        method="draft_model", num_draft_tokens=3, draft_sample_method="probabilistic"
    ),
    "junk tree": SpeculationParams(method=JUNK_TREE, num_draft_tokens=3, width=3),
}
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog", "horse"]},
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["old", "wild"]}, "maxItems": 2},
    },
    "required": ["kind", "name", "age", "tags"],
    "additionalProperties": False,
}
REGEX = r"(cat|dog|horse)-[0-9]{1,3}( and (cat|dog|horse)-[0-9]{1,3}){0,2}"
EBNF = """
root ::= term (operator term){1,2}
term ::= number | "(" number operator number ")"
operator ::= " " [-+*] " "
number ::= [1-9] [0-9]{0,2}
"""
CONSTRAINTS = {
    "schema": {"json_schema": SCHEMA},
    "regex": {"regex": REGEX},
    "EBNF": {"grammar": EBNF},
}
TEMPERATURES = [0.0, 1.0]
NUM_TOKENS = 100  # more than the longest output of any constraint, one byte a token


@pytest.fixture(scope="module")
def loaded():
    with registered():
        return LLM("demo", check_integrity=True, max_model_len=256, kv_cache_memory_bytes=1 << 25)


@pytest.fixture
def llm(loaded):
    loaded.engine.drafters[JUNK_TREE].truths = []
    yield loaded
    assert loaded.engine.manager.num_used == 0


@pytest.fixture(scope="module")
def blanks(loaded):
    """Bias against tokens that are blanks alone: a model may fill any JSON with them for ever."""
    tokens = range(loaded.tokenizer.vocab_size)
    return {t: float("-inf") for t in tokens if loaded.tokenizer.decode([t]).isspace()}


@pytest.fixture(scope="module")
def plain(loaded, blanks):
    """Outputs of plain decoding, by constraint and temperature; made when first asked for."""
    made = {}

    def plain(kind, temperature) -> tuple[SamplingParams, list[RequestOutput]]:
        if (kind, temperature) not in made:
            sampling = SamplingParams(
                max_tokens=NUM_TOKENS,
                temperature=temperature,
                seed=11,
                logit_bias=blanks if kind == "schema" else {},
                **CONSTRAINTS[kind],
            )
            made[kind, temperature] = sampling, loaded.generate(PROMPTS, sampling, "off")
        return made[kind, temperature]

    return plain


def told(outputs):
    """All that a client sees, without times and counts."""
    return [
        (c.text, c.token_ids, c.finish_reason, c.stop_reason, c.error)
        for output in outputs
        for c in output.completions
    ]


def same_with_all(llm, sampling):
    """Outputs of plain decoding, which every speculation must repeat."""
    expected = llm.generate(PROMPTS, sampling, "off")
    llm.engine.drafters[JUNK_TREE].truths = [o.prompt_token_ids + o.token_ids for o in expected]
    for name, speculation in SPECULATIONS.items():
        assert told(llm.generate(PROMPTS, sampling, speculation)) == told(expected), name
    return expected


def assert_valid(llm, sampling, output):
    """Every token was allowed, and the output is whole."""
    for completion in output.completions:
        state = llm.engine.grammars.compile(sampling)
        for token in completion.token_ids:
            mask_V = state.mask()
            assert mask_V is None or mask_V[token]
            state.advance([token])
        assert completion.finish_reason == "stop"
        assert state.is_finished
        if sampling.json_schema is not None:
            assert_meets_schema(json.loads(completion.text))
        elif sampling.regex is not None:
            assert re.fullmatch(sampling.regex, completion.text)
        else:
            assert re.fullmatch(r"[-+*()0-9 ]+", completion.text)
            assert completion.text.count("(") == completion.text.count(")")


def assert_meets_schema(value):
    assert list(value) == ["kind", "name", "age", "tags"]
    assert value["kind"] in ("cat", "dog", "horse")
    assert len(value["name"]) <= 4
    assert 0 <= value["age"] <= 120
    assert len(value["tags"]) <= 2
    assert set(value["tags"]) <= {"old", "wild"}


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_plain_decoding_is_valid(llm, plain, kind, temperature):
    sampling, outputs = plain(kind, temperature)
    for output in outputs:
        assert_valid(llm, sampling, output)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", CONSTRAINTS)
@pytest.mark.parametrize("name", SPECULATIONS)
def test_speculation_gives_the_same_valid_tokens(llm, plain, kind, temperature, name):
    sampling, expected = plain(kind, temperature)
    llm.engine.drafters[JUNK_TREE].truths = [o.prompt_token_ids + o.token_ids for o in expected]
    outputs = llm.generate(PROMPTS, sampling, SPECULATIONS[name])
    assert told(outputs) == told(expected)
    for output in outputs:
        assert_valid(llm, sampling, output)
    if name != "ngram":  # it may find no match
        assert all(output.metrics.num_drafts > 0 for output in outputs)
    if name == "junk tree":
        assert sum(output.metrics.num_accepted_tokens for output in outputs) > 0


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_rejection_keeps_to_the_grammar(llm, blanks, temperature):
    sampling = SamplingParams(
        max_tokens=NUM_TOKENS,
        temperature=temperature,
        seed=3,
        logit_bias=blanks,
        json_schema=SCHEMA,
        n=3,
    )
    spec = SpeculationParams(method="draft_model", num_draft_tokens=4, verifier="rejection")
    outputs = llm.generate(PROMPTS, sampling, spec)
    for output in outputs:
        assert_valid(llm, sampling, output)
    if temperature == 0.0:
        assert told(outputs) == told(llm.generate(PROMPTS, sampling, "off"))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("min_tokens", [0, 9])
def test_with_stop_and_min_tokens(llm, temperature, min_tokens):
    """The stop text ends the output inside the grammar, but not before the minimum."""
    sampling = SamplingParams(
        max_tokens=40,
        temperature=temperature,
        seed=2,
        regex=r"(ab|cd|ef){30}",
        stop=("d", "b", "f"),
        min_tokens=min_tokens,
    )
    for output in same_with_all(llm, sampling):
        assert output.finish_reason == "stop"
        assert output.completions[0].stop_reason in ("d", "b", "f")
        assert len(output.token_ids) >= min_tokens
        assert re.fullmatch(r"(ab|cd|ef)*[ace]", output.text)
        assert len(output.text) < 3 or min_tokens


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_min_tokens_holds_the_end_off(llm, temperature):
    (end,) = llm.engine.spec.eos_token_ids
    asked = {
        "max_tokens": 30,
        "temperature": temperature,
        "seed": 2,
        "regex": "[a-z]{1,900}",
        "logit_bias": {end: 60.0},
    }
    outputs = same_with_all(llm, SamplingParams(**asked, min_tokens=15))
    assert all(len(output.token_ids) >= 15 for output in outputs)
    assert all(re.fullmatch("[a-z]+", output.text) for output in outputs)
    free = llm.generate(PROMPTS, SamplingParams(**asked), "off")
    assert min(len(output.token_ids) for output in free) < 15


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", SPECULATIONS)
def test_a_complete_output_that_may_not_end_fails_alone(llm, name, temperature):
    stuck = SamplingParams(
        max_tokens=40, temperature=temperature, seed=2, regex="[a-z]{3}", min_tokens=20
    )
    fine = SamplingParams(max_tokens=12, temperature=temperature, seed=2)
    broken, whole = llm.generate([PROMPTS[0]] * 2, [stuck, fine], SPECULATIONS[name])
    (plain,) = llm.generate(PROMPTS[0], stuck, "off")
    assert broken.finish_reason == plain.finish_reason == "error"
    assert re.fullmatch("[a-z]{3}", plain.text)
    assert plain.text.startswith(broken.text)
    assert "min_tokens=20" in broken.completions[0].error
    assert "\n" not in broken.completions[0].error
    assert told([whole]) == told(llm.generate(PROMPTS[0], fine, "off"))


def test_each_of_n_completions_has_a_grammar_of_its_own(llm):
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=1.3, seed=5, n=3, regex=REGEX)
    for output in same_with_all(llm, sampling):
        assert_valid(llm, sampling, output)
        assert len({completion.text for completion in output.completions}) > 1


def test_constraints_of_all_kinds_side_by_side(llm, plain):
    known = [plain(kind, 1.0) for kind in CONSTRAINTS]
    free = SamplingParams(max_tokens=20, temperature=1.0, seed=11)
    expected = [outputs[0] for _, outputs in known] + llm.generate([PROMPTS[0]], free, "off")
    samplings = [sampling for sampling, _ in known] + [free]
    specs = list(SPECULATIONS.values())
    assert told(llm.generate([PROMPTS[0]] * 4, samplings, specs)) == told(expected)


def test_a_schema_may_be_text_or_a_mapping(llm, plain):
    sampling, expected = plain("schema", 1.0)
    as_text = dataclasses.replace(sampling, json_schema=json.dumps(SCHEMA))
    assert told(llm.generate(PROMPTS, as_text, "draft_model")) == told(expected)


@pytest.mark.parametrize(
    ("constraint", "match"),
    [
        ({"json_schema": "{"}, "json_schema='{' does not compile"),
        ({"json_schema": {"type": "wizard"}}, "does not compile.*wizard"),
        ({"json_schema": {"$ref": "#/nowhere"}}, "does not compile"),
        ({"regex": "(["}, r"regex='\(\[' does not compile"),
        ({"grammar": "root ::= missing"}, "does not compile.*missing"),
        ({"grammar": "no root here"}, "does not compile"),
    ],
    ids=repr,
)
def test_what_does_not_compile_is_refused_in_one_line(llm, constraint, match):
    with pytest.raises(RequestError, match=match) as caught:
        llm.generate(PROMPTS, SamplingParams(**constraint))
    assert "\n" not in str(caught.value)
    assert len(llm.generate("Hi", SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids) == 4


def test_only_one_constraint_at_a_time():
    with pytest.raises(RequestError, match=r"regex and grammar.*at most one"):
        SamplingParams(regex="a", grammar='root ::= "a"')
