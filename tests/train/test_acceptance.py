"""The computed number of steps equals speculative decoding that is really run."""

import random

import pytest
import torch

from outrider.train.acceptance import (
    continue_target,
    expected_steps,
    lookup_ngram,
    model_acceptance,
    repeat_last,
    unfold_model,
    unfold_proposer,
)
from tests.train.conftest import make_decoder


def simulate_steps(accept_NK: torch.Tensor, chance: random.Random) -> int:
    position, steps = 0, 0
    while position < len(accept_NK):
        accepted = 0
        for probability in accept_NK[position].tolist():
            if chance.random() >= probability:
                break
            accepted += 1
        position += accepted + 1
        steps += 1
    return steps


def test_expected_steps_equal_the_mean_of_simulations() -> None:
    accept_NK = torch.rand(12, 3, generator=torch.Generator().manual_seed(0))
    chance = random.Random(0)
    mean = sum(simulate_steps(accept_NK, chance) for _ in range(20_000)) / 20_000
    assert expected_steps(accept_NK) == pytest.approx(mean, rel=0.01)


@pytest.mark.parametrize(("probability", "steps"), [(0.0, 12.0), (1.0, 3.0)])
def test_expected_steps_at_the_ends(probability: float, steps: float) -> None:
    assert expected_steps(torch.full((12, 3), probability)) == pytest.approx(steps)


def test_a_drafter_equal_to_the_target_is_always_accepted() -> None:
    target = make_decoder(seed=1)
    prompts_BT = torch.randint(0, 300, (3, 5))
    for temperature in (0.0, 1.0):
        tokens_BT = continue_target(target, prompts_BT, 8, temperature=temperature, seed=0)
        accept_BN = model_acceptance(target, target, tokens_BT, 5, temperature=temperature)
        assert accept_BN.shape == (3, 8)
        assert torch.allclose(accept_BN, torch.ones(3, 8))


def test_mean_acceptance_is_the_overlap_of_the_laws() -> None:
    target, draft = make_decoder(seed=1), make_decoder(seed=2)
    for model in (target, draft):
        model.lm_head.weight.data *= 5.0
    prompts_BT = torch.randint(0, 300, (1, 5)).expand(4000, 5)
    tokens_BT = continue_target(target, prompts_BT, 1, temperature=1.0, seed=0)
    accept_BN = model_acceptance(target, draft, tokens_BT, 5, temperature=1.0)
    with torch.no_grad():
        p_V, q_V = (model(prompts_BT[:1])[0, -1].softmax(-1) for model in (target, draft))
    overlap = float(torch.minimum(p_V, q_V).sum())
    assert 0.05 < overlap < 0.95
    assert float(accept_BN.mean()) == pytest.approx(overlap, abs=0.03)


def test_greedy_steps_equal_a_real_greedy_run() -> None:
    accept_N = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    # K = 2: (1 1 +0), (1 1 +1), (1 0): eight tokens in three steps.
    assert expected_steps(unfold_model(accept_N, 2)) == 3.0


def test_lookup_copies_what_followed_the_longest_match() -> None:
    assert lookup_ngram([1, 2, 3, 4, 9, 3, 5, 1, 2, 3], 2) == [4, 9]
    assert lookup_ngram([7, 3, 5, 6, 3], 4) == [5, 6, 3]
    assert lookup_ngram([1, 2, 3], 4) == []


def test_proposals_are_compared_with_the_text() -> None:
    accept_NK = unfold_proposer(repeat_last, [4, 4, 4, 5, 5], 1, 2)
    assert accept_NK.tolist() == [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]
