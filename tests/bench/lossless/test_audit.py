"""Scores: sums that stay within a few deviations exactly while the law is right."""

import math

import pytest
import torch

from outrider.bench.lossless.audit import Audit, Score


def test_a_fair_score_is_standard_normal():
    law_V = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    found = []
    for seed in range(200):
        score, generator = Score(), torch.Generator().manual_seed(seed)
        for token in law_V.multinomial(300, replacement=True, generator=generator).tolist():
            score.add(law_V.log(), law_V, token)
        found.append(score.deviations)
    spread = math.sqrt(sum(z * z for z in found) / len(found))
    assert spread == pytest.approx(1.0, abs=0.15)
    assert max(map(abs, found)) < 4.0


def test_a_wrong_law_grows_with_the_number_of_draws():
    right_V, other_V = torch.tensor([[0.5, 0.5], [0.4, 0.6]], dtype=torch.float64)
    score, generator = Score(), torch.Generator().manual_seed(0)
    for token in other_V.multinomial(3000, replacement=True, generator=generator).tolist():
        score.add(torch.tensor([0.0, 1.0], dtype=torch.float64), right_V, token)
    assert score.deviations > 4.0


def test_coins():
    score = Score()
    for _ in range(100):
        score.add_coin(True, 0.5)
    assert score.deviations == pytest.approx(10.0)
    assert (score.num_terms, score.variance) == (100, 25.0)


def test_what_only_one_token_can_be_has_no_room():
    law_V = torch.tensor([1.0, 0.0], dtype=torch.float64)
    score = Score()
    score.add(torch.tensor([0.0, 1.0], dtype=torch.float64), law_V, 0)
    assert score.deviations == 0.0
    score.add(torch.tensor([0.0, 1.0], dtype=torch.float64), law_V, 1)
    assert score.deviations == math.inf


def test_an_audit_leaves_the_engine_as_it_was(target):
    engine = target().llm.engine
    rules = engine.verifiers
    with Audit().attached(engine) as audit:
        assert engine.verifiers is audit
    assert engine.verifiers is rules
