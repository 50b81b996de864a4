"""RejectionVerifier: its two formulas at the edges of floating point."""

import math

import pytest
import torch

from outrider.sampling.rng import RootStream
from outrider.step import DraftTree
from outrider.testing import ToyLaws
from outrider.verify.rejection import RejectionVerifier, acceptance, residual


def law(*weights: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(weights, dtype=dtype)


@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [
        (0.2, 0.4, 0.5),
        (0.4, 0.2, 1.0),
        (0.0, 0.4, 0.0),
        (0.4, 0.0, 1.0),
        (0.0, 0.0, 0.0),  # never emit what the target forbids
        (1e-300, 1e-3, 1e-297),
        (5e-324, 5e-324, 1.0),
    ],
)
def test_acceptance_is_the_ratio_of_the_laws(p, q, expected):
    log_p_V = law(p, 1 - p).log()
    assert acceptance(log_p_V, law(q, 1 - q), 0) == pytest.approx(expected, rel=1e-12)


def test_acceptance_of_a_point_mass_is_p():
    assert acceptance(law(0.25, 0.75).log(), None, 1) == pytest.approx(0.75)
    assert acceptance(law(0.0, 1.0).log(), None, 0) == 0.0


def test_residual_is_the_normalised_positive_part():
    p_V, q_V = law(0.5, 0.3, 0.2), law(0.2, 0.6, 0.2)
    assert residual(p_V, q_V, 1).tolist() == pytest.approx([1.0, 0.0, 0.0])
    assert residual(p_V, None, 0).tolist() == pytest.approx([0.0, 0.6, 0.4])


def test_residual_of_equal_laws_is_p():
    p_V = law(0.5, 0.5)
    assert torch.equal(residual(p_V, p_V, 0), p_V)
    assert torch.equal(residual(law(0.0, 1.0), None, 1), law(0.0, 1.0))


def test_a_float32_law_is_read_in_float64():
    p_V, q_V = law(0.7, 0.2, 0.1), law(0.1, 0.2, 0.7, dtype=torch.float32)
    rest_V = residual(p_V, q_V, 2)
    assert rest_V.dtype == torch.float64
    assert rest_V.tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-7)


def test_a_law_over_another_vocabulary_is_a_bug_of_the_drafter():
    with pytest.raises(AssertionError, match="q over 2 tokens, p over 3"):
        acceptance(law(0.2, 0.3, 0.5).log(), law(0.5, 0.5), 0)


def test_branches_are_refused():
    tree = DraftTree(tokens=(0, 1), parents=(-1, -1))
    laws = ToyLaws(lambda context: law(0.5, 0.5), (), tree)
    with pytest.raises(AssertionError, match="chains"):
        RejectionVerifier().verify(tree, laws, RootStream(0, 0, "verify"))


def test_production_streams_reach_the_target_law():
    """End to end with real uniforms: draft and verify purposes of the same roots."""
    p_V, q_V = law(0.5, 0.0, 0.3, 0.2), law(0.1, 0.4, 0.4, 0.1)
    counts = torch.zeros(4, dtype=torch.float64)
    for root in range(6000):
        token = RootStream(7, root, "draft").pick(q_V)
        tree = DraftTree.chain([token], "test", [q_V])
        laws = ToyLaws(lambda context: p_V, (), tree)
        verdict = RejectionVerifier().verify(tree, laws, RootStream(7, root, "verify"))
        counts[tree.tokens[0] if verdict.accepted else verdict.token] += 1
    deviations = (counts / 6000 - p_V).abs() / (p_V * (1 - p_V) / 6000).sqrt().clamp(min=1e-9)
    assert float(deviations.max()) < 4
    assert counts[1] == 0
    assert math.isclose(float(counts.sum()), 6000)
