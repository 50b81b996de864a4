"""What is asked: every bad value is refused by name, with what to do."""

import dataclasses
import math
import re

import pytest
from hypothesis import given, strategies as st

from outrider.errors import RequestError
from outrider.request import Request, SamplingParams, SpeculationParams, StreamParams

BAD_SAMPLING = {
    "max_tokens": (0, -1, 1.5, True, "8"),
    "min_tokens": (-1, 2.0, None, True),
    "temperature": (-0.1, math.nan, math.inf, "hot", None, True),
    "top_k": (-1, 1.5, None, False),
    "top_p": (0, 1.01, -0.5, math.nan, None),
    "min_p": (-0.1, 1.1, math.nan, "x"),
    "repetition_penalty": (0, -1.0, math.inf, None),
    "presence_penalty": (math.nan, math.inf, "x"),
    "frequency_penalty": (math.nan, -math.inf, None),
    "logit_bias": ({"x": 1.0}, {5: "y"}, {5: None}, [1, 2], 7, None),
    "seed": (-1, 2**63, 1.0, "x", True),
    "n": (0, -1, 1.0, None, True),
    "stop": ((), ("",), ("a", 5), 7, None)[1:],
    "bad_words": (("",), (3,), 7),
    "stop_token_ids": ((1.5,), ("a",), 7, (True,)),
    "logprobs": (-1, 1.0, True),
}
BAD_SPECULATION = {
    "method": ("", 5),
    "verifier": ("", 5),
    "model": ("", 5),
    "num_draft_tokens": (-1, 65, 2.0, True, "4"),
    "width": (0, 65, 1.0, True),
    "num_nodes": (0, 257, 1.0, True),
    "drafter_options": (3, "x"),
    "verifier_options": ([], None),
    "prediction": (3, ["x"]),
    "prediction_token_ids": ("x", (1, "x"), [True]),
    "draft_sample_method": ("random", ""),
    "prompt_lookup_min": (0, 33, 1.0),
    "prompt_lookup_max": (0, 33, "2"),
}


def cases(bad):
    return [(name, value) for name, values in bad.items() for value in values]


@pytest.mark.parametrize(("name", "value"), cases(BAD_SAMPLING))
def test_bad_sampling_values_are_named(name, value):
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert "\n" not in str(caught.value)
    assert "must" in str(caught.value)


@pytest.mark.parametrize(("name", "value"), cases(BAD_SPECULATION))
def test_bad_speculation_values_are_named(name, value):
    with pytest.raises(RequestError, match=re.escape(f"{name}={value!r}: must")):
        SpeculationParams(**{name: value})


def test_not_a_number_is_no_bias():
    with pytest.raises(RequestError, match=r"logit_bias\[5\]=nan"):
        SamplingParams(logit_bias={5: math.nan})
    assert SamplingParams(logit_bias={5: -math.inf}).logit_bias == {5: -math.inf}


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"top_p": 1},
        {"min_p": 1},
        {"max_tokens": None, "min_tokens": 99},
        {"min_tokens": 5, "max_tokens": 5},
        {"seed": 2**63 - 1},
        {"logprobs": 0},
        {"stop": ()},
    ],
)
def test_values_at_the_border_are_taken(values):
    params = SamplingParams(**values)
    assert all(getattr(params, name) == value for name, value in values.items())


def test_min_tokens_may_not_exceed_max_tokens():
    with pytest.raises(RequestError, match="min_tokens=6: must not exceed max_tokens=5"):
        SamplingParams(min_tokens=6, max_tokens=5)


def test_at_most_one_constraint():
    with pytest.raises(RequestError, match="regex and grammar"):
        SamplingParams(regex="a", grammar="root ::= 'a'")
    assert SamplingParams(json_schema={"type": "object"}).is_constrained
    assert not SamplingParams().is_constrained


def test_one_text_means_a_tuple_of_one():
    params = SamplingParams(stop="END", bad_words="no")
    assert (params.stop, params.bad_words) == (("END",), ("no",))
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=[3]).stop_token_ids == (3,)


def test_bias_keys_may_be_texts_as_json_has_them():
    assert SamplingParams(logit_bias={"42": -5}).logit_bias == {42: -5.0}


@pytest.mark.parametrize("key", [1.5, "1.5"])
def test_a_bias_key_that_is_no_token_id_is_not_rounded(key):
    with pytest.raises(RequestError, match="must map token ids to numbers"):
        SamplingParams(logit_bias={key: 1.0})


def test_parameters_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 1.0


def test_unknown_keys_are_errors_with_the_nearest_name():
    with pytest.raises(RequestError, match="'temprature'; did you mean 'temperature'"):
        SamplingParams.from_dict({"temprature": 1.0})
    with pytest.raises(RequestError, match="SpeculationParams key 'k'"):
        SpeculationParams.from_dict({"k": 4})


def test_from_dict_takes_json_lists():
    params = SamplingParams.from_dict({"stop": ["x"], "stop_token_ids": [1, 2], "top_k": 5})
    assert (params.stop, params.stop_token_ids, params.top_k) == (("x",), (1, 2), 5)


def test_vllms_name_for_k_is_understood_but_not_both():
    assert SpeculationParams.from_dict({"num_speculative_tokens": 7}).num_draft_tokens == 7
    with pytest.raises(RequestError, match="the same setting: give one"):
        SpeculationParams.from_dict({"num_speculative_tokens": 7, "num_draft_tokens": 7})


def test_lookup_bounds_must_be_in_order():
    with pytest.raises(RequestError, match=r"prompt_lookup_min=5: must not exceed .*max=4"):
        SpeculationParams(prompt_lookup_min=5, prompt_lookup_max=4)


@pytest.mark.parametrize(
    ("values", "is_off"),
    [({}, False), ({"method": "off"}, True), ({"num_draft_tokens": 0}, True),
     ({"method": "ngram", "num_draft_tokens": 0}, True), ({"method": "ngram"}, False)],
)  # fmt: skip
def test_off(values, is_off):
    assert SpeculationParams(**values).is_off is is_off


def test_visibility_is_one_of_two():
    assert StreamParams(visibility="provisional").is_provisional
    assert not StreamParams().is_provisional
    with pytest.raises(RequestError, match="visibility='all': must be one of"):
        StreamParams(visibility="all")


@given(st.floats(0, 5), st.integers(0, 100), st.floats(0.01, 1), st.integers(0, 2**63 - 1))
def test_a_dictionary_of_the_fields_gives_the_same_parameters(temperature, top_k, top_p, seed):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    assert SamplingParams.from_dict(dataclasses.asdict(params)) == params
    assert params.is_greedy == (temperature == 0)


def test_a_request_needs_no_more_than_an_id_and_a_prompt():
    request = Request(id="r", prompt_token_ids=(1,))
    assert (request.priority, request.tenant, request.sampling) == (0, "", SamplingParams())
