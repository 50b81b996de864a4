"""Scores, baselines, loops and intervals against their definitions.

Shape legend: V vocabulary, G written tokens, K depths.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from outrider.doctor.baselines import last_token, same_words, score_copies
from outrider.doctor.evidence import Evidence
from outrider.doctor.scores import (
    Score,
    along,
    difference,
    score_text,
    total,
)
from outrider.doctor.standing import Standing, coupled, joint_of, standing
from outrider.doctor.texts import Text, num_before_loop

V = 5


def evidence(tokens: tuple[int, ...], num_prompt: int, seed: int = 0) -> Evidence:
    generator = torch.Generator().manual_seed(seed)
    laws = torch.randn(len(tokens) - num_prompt, V, generator=generator).mul(2).softmax(-1)
    return Evidence(Text(0, tokens, num_prompt, is_sampled=True), laws, {})


def logits_of(num_tokens: int, num_depths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [
        torch.randn(num_tokens - 1 - depth, V, generator=generator) for depth in range(num_depths)
    ]


def test_overlap_and_match_are_of_the_right_rows() -> None:
    tokens, num_prompt = (1, 3, 0, 2, 4, 1, 1), 3
    seen, guesses = evidence(tokens, num_prompt), logits_of(7, 3)
    found = score_text(seen, guesses, 3)
    for depth, i in itertools.product(range(3), range(4)):
        t = num_prompt - 1 + i  # the row, and t + 1 + d the position whose law is guessed
        at = t + 1 + depth
        if at > len(tokens) - 1:
            assert math.isnan(found.overlap_KG[depth, i])
            continue
        p_V, q_V = seen.laws_GV[at - num_prompt], guesses[depth][t].softmax(-1)
        assert found.overlap_KG[depth, i] == pytest.approx(float(torch.minimum(p_V, q_V).sum()))
        assert found.match_KG[depth, i] == float(p_V.argmax() == q_V.argmax())


def test_texts_shorter_than_a_draft_have_fewer_depths() -> None:
    seen = evidence((1, 2, 0), 1)
    found = score_text(seen, logits_of(3, 2), 3)
    assert found.overlap_KG.shape == (3, 2)
    assert np.isnan(found.overlap_KG[2]).all()


class Told:
    """A draft that says what it was made to say."""

    boundaries: tuple[int, ...] = ()
    max_depth = None

    def __init__(self, logits: list[Tensor]) -> None:
        self.logits = logits

    def guess(self, tokens: object, states: object, num_depths: int) -> list[Tensor]:
        return self.logits[:num_depths]


@pytest.mark.parametrize("is_sampled", [True, False])
def test_standing_is_of_the_right_rows(is_sampled: bool) -> None:
    tokens, num_prompt = (1, 3, 0, 2, 4, 1, 1), 3
    seen, guesses = evidence(tokens, num_prompt), logits_of(7, 3)
    seen = seen._replace(text=seen.text._replace(is_sampled=is_sampled))
    found = standing(Told(guesses), seen, 4)
    assert np.isnan(found.expected_KG[3]).all()
    for depth, i in itertools.product(range(3), range(4)):
        at = num_prompt + i + depth  # the position whose law is guessed
        if at > len(tokens) - 1:
            assert math.isnan(found.expected_KG[depth, i])
            continue
        p_V, q_V = seen.laws_GV[at - num_prompt], guesses[depth][num_prompt - 1 + i].softmax(-1)
        both_V = both_pick(p_V, q_V)
        wanted = float(both_V.sum()) if is_sampled else float(p_V.argmax() == q_V.argmax())
        assert found.expected_KG[depth, i] == pytest.approx(wanted, rel=1e-5)
        if at + 1 == len(tokens):
            assert math.isnan(found.told_KG[depth, i])
            continue
        token = tokens[at + 1]
        if is_sampled:
            wanted = float(both_V[token] / p_V[token])
        assert found.told_KG[depth, i] == pytest.approx(wanted, rel=1e-5)


def both_pick(p_V: Tensor, q_V: Tensor) -> Tensor:
    """1 / sum_y max(p_y / p_x, q_y / q_x), by x."""
    p_V, q_V = p_V.double(), q_V.double()
    larger_VV = torch.maximum(p_V / p_V.unsqueeze(1), q_V / q_V.unsqueeze(1))
    return 1.0 / larger_VV.sum(1)


def test_two_laws_under_the_same_noise_pick_the_same_as_often_as_the_formula_says() -> None:
    generator = torch.Generator().manual_seed(4)
    p_NV, q_NV = torch.randn(2, 3, 7, generator=generator).mul(2).softmax(-1)
    found_NV = coupled(p_NV, q_NV)
    noise_RV = torch.empty(200_000, 7, dtype=torch.float64).exponential_(generator=generator)
    for p_V, q_V, found_V in zip(p_NV, q_NV, found_NV, strict=True):
        torch.testing.assert_close(found_V, both_pick(p_V, q_V), rtol=1e-5, atol=1e-9)
        picked_R, drafted_R = (noise_RV / p_V).argmin(1), (noise_RV / q_V).argmin(1)
        for x in range(7):
            seen = float(((picked_R == x) & (drafted_R == x)).double().mean())
            assert seen == pytest.approx(float(found_V[x]), abs=0.005)


def test_tokens_that_one_law_excludes_are_never_picked_by_both() -> None:
    p_NV = torch.tensor([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    q_NV = torch.tensor([[0.0, 0.5, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]])
    found_NV = coupled(p_NV, q_NV)
    assert found_NV[0].tolist() == pytest.approx([0.0, 1 / 3, 0.0, 0.0])
    assert found_NV[1].tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0])


def test_joint_acceptance_is_what_coupled_drafts_get() -> None:
    """Over all texts of two tokens, each as likely as the target writes it."""
    generator = torch.Generator().manual_seed(2)

    def law(*shape: int) -> Tensor:
        return torch.randn(*shape, V, generator=generator).mul(1.5).softmax(-1)

    p1, q1, p2, q2 = law(), law(), law(V), law(V)
    first_V, second_V = both_pick(p1, q1), coupled(p2, q2).sum(-1)
    two = float((first_V * second_V).sum())
    rows, weights = [], []
    for x in range(V):
        told = (float(first_V[x] / p1[x]), math.nan)
        expected = (float(first_V.sum()), float(second_V[x]))
        rows.append(Standing(*(np.array([[one], [other]]) for one, other in (expected, told))))
        weights.append(float(p1[x]))
    repeats = np.random.default_rng(0).multinomial(200_000, np.array(weights) / sum(weights))
    texts = [row for row, count in zip(rows, repeats, strict=True) for _ in range(count)]
    found = joint_of(texts)
    assert found[0] == pytest.approx(float(first_V.sum()))
    assert found[1] == pytest.approx(two, abs=0.003)


def test_joint_agreement_on_greedy_text_is_counted() -> None:
    match_KG = np.array([[1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, math.nan]])
    assert joint_of([Standing(match_KG, match_KG)]) == (0.75, 1 / 3)


def test_texts_that_only_say_the_same_again_are_cut() -> None:
    fresh = [1, 2, 3, 4, 5, 6, 7]
    assert num_before_loop(fresh) == 7
    assert num_before_loop([*fresh, *[9] * 12]) == 8
    assert num_before_loop([*fresh, *[9] * 11]) == 18  # it may be a word
    assert num_before_loop([*fresh, *[8, 9, 0, 0] * 3]) == 11
    assert num_before_loop([*fresh, *[8, 9, 0, 0] * 3, 8]) == 11 + 0
    assert num_before_loop([]) == 0


def test_copies() -> None:
    tokens = (1, 2, 3, 1, 2)
    assert last_token(tokens, 3, 2) == [[1, 1], [2, 2]]
    assert same_words(tokens, 2, 3) == [[], [2, 3, 1], [3, 1, 2]]
    # Of two places where the last token stood, the one with more of the same words before it.
    assert same_words((5, 1, 7, 6, 1, 8, 5, 1), 7, 2) == [[7, 6]]
    seen = evidence((4, 4, 4, 0, 4), 2)
    found = score_copies(seen, last_token, 2)
    assert found.overlap_KG[0, 0] == pytest.approx(float(seen.laws_GV[0, 4]))
    assert found.overlap_KG[1, 0] == pytest.approx(float(seen.laws_GV[1, 4]))
    assert np.isnan(found.overlap_KG[1, 2])


def score(rng: np.random.Generator, gain: float, num_prompts: int = 20) -> tuple[Score, Score]:
    """The same rows, the second better by `gain` and some noise."""
    count_PK = rng.integers(10, 40, size=(num_prompts, 3)).astype(float)
    first_PK = count_PK * rng.uniform(0.3, 0.7, size=(num_prompts, 1))
    better_PK = first_PK + count_PK * (gain + 0.05 * rng.standard_normal((num_prompts, 1)))
    return Score(first_PK, first_PK, count_PK), Score(better_PK, better_PK, count_PK)


def test_intervals_hold_the_true_difference() -> None:
    rng, held, clear = np.random.default_rng(1), 0, 0
    for _ in range(60):
        first, second = score(rng, 0.0)
        found = difference(second, first, num_tried=16)
        held += found.low <= 0.0 <= found.high
        clear += found.is_clear
    assert held >= 50
    assert clear == 0


def test_a_clear_difference_is_not_by_chance_and_matters() -> None:
    rng = np.random.default_rng(2)
    first, second = score(rng, 0.1)
    assert difference(second, first, num_tried=16).is_clear
    assert not difference(first, second).is_clear
    tiny = Score(first.overlap_PK + 0.005 * first.count_PK, first.match_PK, first.count_PK)
    found = difference(tiny, first)
    assert found.low > 0.0
    assert not found.is_clear  # too little to change anything for
    few, fewer = score(rng, 0.3, num_prompts=4)
    assert not difference(fewer, few).is_clear


def test_sums_by_prompt() -> None:
    parts = [(torch.tensor([0.5, 0.25]), torch.ones(2))]
    one = along(parts, 2, 3)
    found = total([(7, one), (2, one), (7, one)])
    assert found.count_PK.tolist() == [[2.0, 0.0], [4.0, 0.0]]
    assert found.overlap_PK[:, 0].tolist() == [0.75, 1.5]
