"""Structured outputs: what bodies ask for as one constraint of the engine; the rest is refused."""

import json

import pytest

from outrider import LLM, SamplingParams
from outrider.errors import RequestError
from outrider.serve.structured import (
    ANY_OBJECT,
    Constraint,
    guided,
    one_of,
    response_format,
    structured_outputs,
    the_one,
)

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def test_text_asks_for_nothing():
    assert response_format(None) == response_format({"type": "text"}) == []
    assert the_one([]) == {}


def test_json_object_is_any_object():
    (found,) = response_format({"type": "json_object"})
    assert (found.kind, found.value) == ("json_schema", ANY_OBJECT)


def test_a_schema_is_taken_as_it_is():
    about = {"name": "x", "schema": SCHEMA, "strict": True}
    (found,) = response_format({"type": "json_schema", "json_schema": about})
    assert the_one([found]) == {"json_schema": SCHEMA}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"type": "xml"},
        {"type": ["text"]},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": "text"}},
    ],
    ids=str,
)
def test_other_formats_are_refused(given):
    with pytest.raises(RequestError, match="response_format"):
        response_format(given)


def test_guided_fields_say_what_they_were_called():
    assert guided(SCHEMA, None, None, None) == [Constraint("json_schema", SCHEMA, "guided_json")]
    found = guided(json.dumps(SCHEMA), "a+", ["x"], "root ::= 'x'")
    assert [c.kind for c in found] == ["json_schema", "regex", "grammar", "grammar"]
    with pytest.raises(RequestError, match="guided_json and guided_regex"):
        the_one(found[:2])


def test_structured_outputs():
    assert the_one(structured_outputs({"regex": "a+", "json": None})) == {"regex": "a+"}
    assert the_one(structured_outputs({"json_object": True})) == {"json_schema": ANY_OBJECT}
    assert structured_outputs({"json_object": False}) == []
    both = structured_outputs({"regex": "a", "grammar": "b"})
    assert [c.asked_as for c in both] == ["structured_outputs.regex", "structured_outputs.grammar"]


@pytest.mark.parametrize(
    "given",
    [{"rgex": "a"}, {"regex": 3}, {"json": "{no"}, {"json": []}, {"choice": "a"}, {"choice": []},
     {"choice": [""]}, {"choice": [1]}, {"json_object": "yes"}],
    ids=str,
)  # fmt: skip
def test_malformed_structured_outputs_are_refused(given):
    with pytest.raises(RequestError):
        structured_outputs(given)


def test_deep_nonsense_is_refused_not_a_crash():
    with pytest.raises(RequestError, match="guided_json"):
        guided("[" * 100_000, None, None, None)


@pytest.mark.parametrize("text", ['"quoted"', "back\\slash", "line\nbreak", "é", "{}"])
def test_each_choice_can_be_written(llm: LLM, text: str):
    grammar = one_of([text], "choice")
    (out,) = llm.generate(["the fox"], SamplingParams(grammar=grammar, max_tokens=40))
    assert out.text == text
    assert out.finish_reason == "stop"
