"""Each transform against a twin written from its definition, and against transformers' own."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from outrider.sampling import transforms

few = settings(max_examples=60)

# Coarse values make ties, -inf makes forbidden tokens.
LOGIT = st.one_of(st.sampled_from([-1.0, 0.0, 0.5, 2.0, -math.inf]), st.floats(-20, 20))
ROW = st.lists(LOGIT, min_size=1, max_size=24).filter(lambda row: max(row) > -math.inf)
DISTINCT = st.lists(
    st.integers(-400, 400).map(lambda n: n / 16), min_size=2, max_size=24, unique=True
)


def tensor(row: list[float]) -> Tensor:
    return torch.tensor(row, dtype=torch.float64)


def kept(row_V: Tensor) -> set[int]:
    return {i for i, x in enumerate(row_V.tolist()) if x > -math.inf}


def law(row: list[float]) -> list[float]:
    total = math.fsum(math.exp(x - max(row)) for x in row)
    return [math.exp(x - max(row)) / total for x in row]


def ranked(row: list[float]) -> list[int]:
    """Allowed tokens, the most likely first, equals by id."""
    return sorted((i for i, x in enumerate(row) if x > -math.inf), key=lambda i: (-row[i], i))


def top_p_twin(row: list[float], top_p: float) -> set[int]:
    chosen, mass = [], 0.0
    for token in ranked(row):
        if chosen and mass >= top_p:
            break
        chosen.append(token)
        mass = math.fsum(law(row)[i] for i in chosen)
    return set(chosen)


@few
@given(ROW, st.integers(1, 30))
def test_top_k_keeps_the_k_most_likely(row, k):
    found_V = transforms.keep_top_k(tensor(row), k)
    assert kept(found_V) == set(ranked(row)[:k])
    assert all(found_V[i] == row[i] for i in kept(found_V))


@few
@given(ROW, st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_sufficient_set(row, top_p):
    masses = [math.fsum(law(row)[i] for i in ranked(row)[:n]) for n in range(len(row) + 1)]
    assume(all(abs(mass - top_p) > 1e-9 for mass in masses))  # on the edge rounding decides
    assert kept(transforms.keep_top_p(tensor(row), top_p)) == top_p_twin(row, top_p)


@pytest.mark.parametrize("size", range(1, 60))
def test_a_tiny_top_p_keeps_the_most_likely_token_of_a_flat_law(size):
    assert kept(transforms.keep_top_p(torch.zeros(size), 1e-20)) == {0}


def test_top_p_keeps_the_token_that_crosses_and_stops_at_equality():
    row_V = tensor([0.5, 0.25, 0.25]).log()
    assert kept(transforms.keep_top_p(row_V, 0.51)) == {0, 1}
    assert kept(transforms.keep_top_p(row_V, 0.5)) == {0}
    assert kept(transforms.keep_top_p(row_V, 0.01)) == {0}


@few
@given(ROW, st.floats(0.001, 1.0))
def test_min_p_is_relative_to_the_most_likely(row, min_p):
    floor = max(row) + math.log(min_p)
    expected = {i for i, x in enumerate(row) if x >= floor and x > -math.inf}
    assert kept(transforms.keep_min_p(tensor(row), min_p)) == expected


@few
@given(ROW, st.floats(0.05, 5.0))
def test_temperature_divides_the_logits(row, temperature):
    found = transforms.scale(tensor(row), temperature).softmax(dim=0).tolist()
    assert found == pytest.approx(law([x / temperature for x in row]), abs=1e-12)


@few
@given(ROW)
def test_temperature_zero_leaves_the_first_argmax(row):
    assert kept(transforms.scale(tensor(row), 0.0)) == {ranked(row)[0]}


def test_a_tiny_temperature_does_not_overflow():
    found_V = transforms.scale(tensor([3.0, 2.0, -math.inf]), 1e-308).softmax(dim=0)
    assert found_V.tolist() == [1.0, 0.0, 0.0]


@few
@given(ROW, st.data(), st.floats(0.2, 5.0), st.floats(-2, 2), st.floats(-2, 2))
def test_penalties(row, data, repetition, presence, frequency):
    token = st.integers(0, len(row) - 1)
    prompt, output = data.draw(st.lists(token)), data.draw(st.lists(token))
    counts = Counter(output)
    expected = []
    for i, x in enumerate(row):
        if i in prompt or i in output:
            x = x / repetition if x > 0 else x * repetition
        expected.append(x - frequency * counts[i] - presence * (counts[i] > 0))
    seen_V = torch.tensor([i in prompt or i in output for i in range(len(row))])
    counts_V = tensor([counts[i] for i in range(len(row))])
    found_V = transforms.penalize_repetition(tensor(row), seen_V, repetition)
    found_V = transforms.penalize_count(found_V, counts_V, frequency=frequency, presence=presence)
    assert found_V.tolist() == pytest.approx(expected, abs=1e-6)


@few
@given(ROW, st.dictionaries(st.integers(0, 23), st.floats(-5, 5)))
def test_bias_is_added(row, bias):
    bias = {i: b for i, b in bias.items() if i < len(row)}
    expected = [x + bias.get(i, 0.0) for i, x in enumerate(row)]
    assert transforms.add_bias(tensor(row), bias).tolist() == pytest.approx(expected, abs=1e-6)


@few
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), max_size=4),
    st.lists(st.integers(0, 2), max_size=5),
)
def test_bad_words_never_complete(words, output):
    forbidden = transforms.forbidden_by_bad_words(words, output)
    for token in range(3):
        longer = [*output, token]
        completes = any(longer[-len(word) :] == word for word in words)
        assert (token in forbidden) == completes


@few
@given(DISTINCT, st.integers(1, 30), st.floats(0.05, 0.95), st.floats(0.01, 1.0), st.floats(0.1, 4))
def test_agrees_with_transformers(row, k, top_p, min_p, temperature):
    row_V = tensor(row)
    pairs = [
        (transforms.keep_top_k(row_V, k), TopKLogitsWarper(k)),
        (transforms.keep_top_p(row_V, top_p), TopPLogitsWarper(top_p)),
        (transforms.keep_min_p(row_V, min_p), MinPLogitsWarper(min_p)),
        (transforms.scale(row_V, temperature), TemperatureLogitsWarper(temperature)),
    ]
    for found_V, warper in pairs:
        theirs_V = warper(torch.zeros(1, 1, dtype=torch.long), row_V[None])[0]
        assert torch.allclose(found_V.softmax(dim=0), theirs_V.softmax(dim=0), atol=1e-9)


@few
@given(DISTINCT, st.lists(st.integers(0, 1), min_size=1), st.floats(0.2, 5.0))
def test_repetition_agrees_with_transformers(row, tokens, penalty):
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), tensor(row)[None])[0]
    seen_V = torch.tensor([i in tokens for i in range(len(row))])
    assert torch.allclose(transforms.penalize_repetition(tensor(row), seen_V, penalty), theirs)


def test_settings_that_are_off_return_the_row_itself():
    row_V, none_V = tensor([1.0, 2.0]), torch.zeros(2)
    assert transforms.add_bias(row_V, {}) is row_V
    assert transforms.forbid(row_V, []) is row_V
    assert transforms.penalize_repetition(row_V, none_V > 0, 1.0) is row_V
    assert transforms.penalize_count(row_V, none_V, frequency=0.0, presence=0.0) is row_V
    assert transforms.scale(row_V, 1.0) is row_V
    assert transforms.keep_min_p(row_V, 0.0) is row_V
    assert transforms.keep_top_k(row_V, 0) is row_V
    assert transforms.keep_top_k(row_V, 2) is row_V
    assert transforms.keep_top_p(row_V, 1.0) is row_V


def test_the_given_row_is_never_changed():
    row_V = tensor([1.0, 2.0, 3.0])
    before = row_V.clone()
    transforms.add_bias(row_V, {0: 1.0})
    transforms.forbid(row_V, [1])
    transforms.penalize_repetition(row_V, row_V > 1, 2.0)
    transforms.penalize_count(row_V, before, frequency=1.0, presence=1.0)
    transforms.scale(row_V, 0.0)
    transforms.scale(row_V, 0.5)
    transforms.keep_min_p(row_V, 0.9)
    transforms.keep_top_k(row_V, 1)
    transforms.keep_top_p(row_V, 0.1)
    assert torch.equal(row_V, before)


@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
def test_a_large_vocabulary_is_cut_as_by_a_full_sort(spread):
    """From a flat row, whose nucleus is most of it, to a peaked one; many ties."""
    row_V = torch.randn(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    row_V = (row_V * spread * 2).round() / 2
    law_V = row_V.softmax(dim=0)
    order_V = law_V.sort(descending=True, stable=True).indices
    num_kept = int((law_V[order_V].cumsum(dim=0) < 0.9).sum()) + 1
    assert kept(transforms.keep_top_p(row_V, 0.9)) == set(order_V[:num_kept].tolist())
    assert kept(transforms.keep_top_k(row_V, 77)) == set(order_V[:77].tolist())
