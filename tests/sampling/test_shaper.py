"""The Shaper: settings in force together, along paths, and refused when they cannot be honoured."""

import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from outrider.errors import RequestError
from outrider.request import SamplingParams
from outrider.sampling.shaper import Shaper, laws_together

V = 12
EOS = 11
PROMPT = [1, 2, 2, 3]


def shaper(num_prompt: int = len(PROMPT), bad_words=(), **settings) -> Shaper:
    return Shaper(
        SamplingParams(**settings),
        vocab_size=V,
        eos_token_ids=[EOS],
        bad_words_ids=bad_words,
        num_prompt=num_prompt,
    )


def logits(seed: int = 0) -> Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(seed))


def allowed(log_law_V: Tensor) -> set[int]:
    return {i for i, x in enumerate(log_law_V.tolist()) if x > -math.inf}


def test_without_settings_the_law_is_the_softmax():
    log_law_V = shaper(temperature=1.0).log_law(logits(), PROMPT)
    assert log_law_V.dtype == torch.float64
    assert torch.allclose(log_law_V, logits().double().log_softmax(dim=0))


def test_all_settings_together_follow_the_documented_order():
    settings = {
        "temperature": 0.7,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.1,
        "top_k": 6,
        "top_p": 0.8,
        "min_p": 0.05,
        "logit_bias": {4: 1.5, 5: -math.inf},
        "min_tokens": 5,
        "stop_token_ids": (6,),
    }
    row, output = logits().double().tolist(), [7, 7, 8]
    row[4] += 1.5
    row[5] = row[6] = row[EOS] = -math.inf
    for i in {*PROMPT, *output}:
        row[i] = row[i] / 1.3 if row[i] > 0 else row[i] * 1.3
    row[7] -= 0.1 * 2 + 0.2
    row[8] -= 0.1 + 0.2
    row = [x / 0.7 for x in row]
    order = sorted(
        (i for i in range(V) if row[i] > max(row) + math.log(0.05)), key=lambda i: -row[i]
    )
    order = order[:6]
    total = sum(math.exp(row[i]) for i in order)
    while sum(math.exp(row[i]) for i in order[:-1]) / total >= 0.8:
        order.pop()
    total = sum(math.exp(row[i]) for i in order)
    law_V = shaper(**settings).log_law(logits(), PROMPT + output).exp()
    expected = [math.exp(row[i]) / total if i in order else 0.0 for i in range(V)]
    assert law_V.tolist() == pytest.approx(expected, abs=1e-12)
    assert 2 <= len(order) <= 5


def test_counts_along_a_path_equal_those_of_committed_tokens():
    settings = {
        "temperature": 1.0,
        "repetition_penalty": 1.7,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
    }
    incremental, output, path = shaper(**settings), [], (5, 5, 3)
    for seed in range(6):
        along_V = incremental.log_law(logits(seed), PROMPT + output, path)
        fresh_V = shaper(**settings).log_law(logits(seed), [*PROMPT, *output, *path])
        assert torch.equal(along_V, fresh_V)
        output += [seed, 9]


def test_the_prompt_counts_for_repetition_only():
    plain_V = shaper(temperature=1.0).log_law(logits(), PROMPT)
    counted_V = shaper(temperature=1.0, presence_penalty=1.0).log_law(logits(), PROMPT)
    repeated_V = shaper(temperature=1.0, repetition_penalty=2.0).log_law(logits(), PROMPT)
    assert torch.equal(plain_V, counted_V)
    assert not torch.allclose(plain_V, repeated_V)


def test_minimum_length_counts_the_path():
    shape = shaper(temperature=1.0, min_tokens=3, stop_token_ids=(6,))
    assert {6, EOS}.isdisjoint(allowed(shape.log_law(logits(), [*PROMPT, 7], (8,))))
    assert allowed(shape.log_law(logits(), [*PROMPT, 7], (8, 9))) == set(range(V))


def test_bad_words_reach_from_the_output_into_the_path_but_not_into_the_prompt():
    shape = shaper(temperature=1.0, bad_words=[(3, 5), (7, 8, 9), (10,)])
    assert allowed(shape.log_law(logits(), PROMPT)) == set(range(V)) - {10}
    assert allowed(shape.log_law(logits(), [*PROMPT, 3])) == set(range(V)) - {5, 10}
    assert allowed(shape.log_law(logits(), [*PROMPT, 7], (8,))) == set(range(V)) - {9, 10}


def test_a_mask_comes_before_everything():
    mask_V = torch.zeros(V, dtype=torch.bool)
    mask_V[[2, 5]] = True
    shape = shaper(temperature=1.0, top_k=1, logit_bias={0: 100.0})
    assert allowed(shape.log_law(logits(), PROMPT, (), mask_V)) <= {2, 5}


def test_greedy_is_a_point_mass_on_the_first_argmax():
    row_V = torch.zeros(V)
    row_V[[3, 8]] = 1.0
    assert shaper(top_p=0.1).log_law(row_V, PROMPT).exp().tolist() == [
        float(i == 3) for i in range(V)
    ]


@pytest.mark.parametrize(
    ("settings", "is_plain"),
    [
        ({}, True),
        ({"top_p": 0.5, "top_k": 3, "min_p": 0.1}, True),
        ({"temperature": 0.1}, False),
        ({"logit_bias": {1: 1.0}}, False),
        ({"presence_penalty": 0.1}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"min_tokens": 1}, False),
        ({"regex": "a"}, False),
        ({"bad_words": [(1,)]}, False),
    ],
)
def test_plain_greedy_is_when_nothing_moves_the_argmax(settings, is_plain):
    assert shaper(**{"bad_words": (), **settings}).is_plain_greedy == is_plain


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"logit_bias": {V: 1.0}}, "logit_bias: token id 12"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias: token id -1"),
        ({"logit_bias": {1: math.inf}}, r"logit_bias\[1\]=inf"),
        ({"stop_token_ids": (99,)}, "stop_token_ids: token id 99"),
        ({"logprobs": V + 1}, "logprobs=13"),
        ({"bad_words": [(1, V)]}, "bad_words: token id 12"),
        ({"bad_words": [()]}, "no tokens"),
    ],
)
def test_settings_the_model_cannot_honour_are_refused(settings, named):
    with pytest.raises(RequestError, match=named):
        shaper(**settings)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_allowed_tokens_fails_its_request_by_name(temperature):
    shape = shaper(
        temperature=temperature, logit_bias=dict.fromkeys(range(11), -math.inf), min_tokens=1
    )
    with pytest.raises(RequestError, match=r"no token is allowed: logit_bias=.*min_tokens=1"):
        shape.log_law(logits(), PROMPT)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_fail_their_request(value):
    row_V = logits()
    row_V[4] = value
    with pytest.raises(RequestError, match=r"logits hold (nan|inf)"):
        shaper(temperature=1.0).log_law(row_V, PROMPT)


def test_a_row_does_not_depend_on_the_rows_beside_it():
    rows = torch.stack([logits(i) for i in range(5)])
    settings = {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2}
    alone = [shaper(**settings).log_law(rows[i].clone(), PROMPT) for i in range(5)]
    shape = shaper(**settings)
    assert all(torch.equal(shape.log_law(rows[i], PROMPT), alone[i]) for i in (4, 0, 2, 1, 3))


@given(st.integers(1, 9), st.integers(1, 300), st.integers(0, 99), st.data())
def test_laws_made_together_keep_the_bits_of_each_alone(num_rows, size, seed, data):
    """A seed's tokens rest on this: a row is now a root in company, now a node by itself."""
    generator = torch.Generator().manual_seed(seed)
    logits_RV = torch.randn(num_rows, size, generator=generator) * 5
    temperatures = st.sampled_from([0.1, 0.7, 0.8, 1.0, 1.3])
    shapers = [
        Shaper(
            SamplingParams(temperature=data.draw(temperatures)),
            vocab_size=size,
            eos_token_ids=[],
            bad_words_ids=(),
            num_prompt=1,
        )
        for _ in range(num_rows)
    ]
    before_RV = logits_RV.clone()
    made = laws_together(logits_RV, shapers)
    assert torch.equal(logits_RV, before_RV), "the logits of the pass are not ours to change"
    for logits_V, one, law_V in zip(logits_RV, shapers, made, strict=True):
        assert one.is_only_scaled
        assert torch.equal(law_V, one.shape(logits_V, PROMPT).softmax(dim=0))
        by_definition = (logits_V.double() / one.sampling.temperature).softmax(dim=0)
        assert torch.allclose(law_V, by_definition, rtol=1e-12)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_no_number_spoils_no_other(wrong):
    logits_RV = torch.stack([logits(0), torch.full((V,), wrong), logits(1)])
    one = shaper(temperature=0.5)
    first, broken, last = laws_together(logits_RV, [one] * 3)
    assert broken is None
    assert torch.equal(first, one.shape(logits(0), PROMPT).softmax(dim=0))
    assert torch.equal(last, one.shape(logits(1), PROMPT).softmax(dim=0))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"top_k": 3},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"logit_bias": {1: 1.0}},
        {"min_tokens": 2},
        {"regex": "a+"},
        {"bad_words": [(1,)]},
    ],
)
def test_whoever_asks_for_more_than_a_temperature_is_shaped_alone(settings):
    assert not shaper(**{"temperature": 0.8, **settings}).is_only_scaled
