"""The statistics: enumeration finds mutants, the G-test keeps its level and finds small shifts."""

import random
from collections import Counter
from itertools import product

import pytest

from outrider.bench.lossless.law_tests import chi_square_tail, enumerate_rule, g_test
from outrider.registry import VERIFIERS
from outrider.verify.base import Exactness
from tests.bench.lossless import wrong

TOKENS = (5, 7, 9)
NEXT = {5: (0.6, 0.3, 0.1), 7: (0.2, 0.5, 0.3), 9: (0.9, 0.05, 0.05)}


def law_of(next_token):
    """Of three tokens, the first after token 5."""
    law = {}
    for path in product(TOKENS, repeat=3):
        weight = 1.0
        for before, token in zip((5, *path), path, strict=False):
            weight *= next_token[before][TOKENS.index(token)]
        law[path] = weight
    return law


def draws(law, count, seed):
    return Counter(random.Random(seed).choices(list(law), weights=list(law.values()), k=count))


@pytest.mark.parametrize("name", ["sampled", "greedy", "rejection", "block", "tree"])
def test_right_rules_are_off_by_rounding(name):
    found = enumerate_rule(VERIFIERS.load(name)())
    assert found.passes
    assert found.bias < 1e-12
    assert found.num_cases > 10


@pytest.mark.parametrize("rule", [wrong.OtherTemperature, wrong.SoftmaxOfPick])
def test_wrong_laws_are_told_with_where(rule):
    found = enumerate_rule(rule())
    assert not found.passes
    assert found.bias > 0.01
    assert "chain" in found.where


@pytest.mark.parametrize("rule", [wrong.OtherNoise, wrong.OneTooMany])
def test_broken_verdicts_are_told_in_words(rule):
    found = enumerate_rule(rule())
    assert not found.passes
    assert found.broken or found.bias > 0.01


def test_lossy_rules_have_a_bias():
    rule = VERIFIERS.load("typical")()
    assert rule.exactness is Exactness.LOSSY
    assert enumerate_rule(rule).bias > 0.01


@pytest.mark.parametrize(
    ("statistic", "degrees", "p"),
    [(3.8415, 1, 0.05), (18.307, 10, 0.05), (54.052, 26, 0.001), (0.0, 4, 1.0), (7.0, 0, 1.0)],
)
def test_chi_square_as_in_the_tables(statistic, degrees, p):
    assert chi_square_tail(statistic, degrees) == pytest.approx(p, rel=1e-3)


def test_p_is_uniform_for_the_right_law():
    law = law_of(NEXT)
    found = sorted(g_test(draws(law, 500, seed), law).p for seed in range(400))
    worst = max(abs(p - (i + 0.5) / 400) for i, p in enumerate(found))
    assert worst < 1.63 / 20  # Kolmogorov and Smirnov at 1 %


def test_a_shift_of_one_context_is_found():
    shifted = {**NEXT, 7: (0.35, 0.4, 0.25)}
    assert g_test(draws(law_of(shifted), 1500, 0), law_of(NEXT)).p < 1e-5


def test_what_can_never_come_is_found():
    law = {path: weight for path, weight in law_of(NEXT).items() if path[0] != 9}
    assert g_test({(9, 5, 5): 1, (5, 5, 5): 1000}, law).p == 0.0


def test_rare_tokens_share_a_cell():
    law = {(0,): 0.98, (1,): 0.01, (2,): 0.01}
    found = g_test({(0,): 300, (1,): 2, (2,): 5}, law)
    assert found.degrees == 1
    assert g_test({(0,): 100}, law).degrees == 0
