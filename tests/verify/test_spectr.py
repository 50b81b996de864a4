"""SpectrVerifier: exact at r* and above, biased below it, and never better than i.i.d. can be."""

from itertools import chain, combinations

import pytest
import torch

from outrider.request import SamplingParams, SpeculationParams
from outrider.sampling.rng import RootStream
from outrider.step import EMPTY_TREE, DraftTree
from outrider.testing import (
    ToyLaws,
    ToyModel,
    bias,
    check_verifier,
    draw_chain,
    draw_chains,
    exact_law,
    expected_accepted,
    run,
    speculate,
    tiny_engine,
)
from outrider.verify import spectr
from outrider.verify.rejection import RejectionVerifier
from outrider.verify.spectr import SpectrVerifier, chains_of, division_factor, expected_tries
from tests.verify.toy_problems import EXACT, law, request, toys

SIZES = [(2, 2, 2), (3, 2, 2), (2, 3, 2), (2, 2, 3), (3, 1, 3), (4, 1, 2)]  # V, K, M


def test_it_passes_what_every_verifier_must():
    check_verifier(SpectrVerifier())


@pytest.mark.parametrize("zeros", [0.0, 0.5])
@pytest.mark.parametrize(("size", "length", "count"), SIZES)
def test_the_law_is_the_targets(size, length, count, zeros):
    for p, q in toys(size, zeros):
        call = speculate(SpectrVerifier(), p, draw_chains(q, count, length))
        assert bias(call, p, length + 2) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("zeros", [0.0, 0.5])
@pytest.mark.parametrize(("size", "length", "count"), [(3, 3, 2), (2, 4, 2), (2, 3, 3), (3, 2, 3)])
def test_the_law_is_the_targets_at_larger_sizes(size, length, count, zeros):
    for p, q in toys(size, zeros, 3):
        call = speculate(SpectrVerifier(), p, draw_chains(q, count, length))
        assert bias(call, p, length + 2) < EXACT


@pytest.mark.parametrize("zeros", [0.0, 0.4])
def test_consecutive_calls_leave_the_law_alone(zeros):
    for p, q in toys(2, zeros, 3):
        call = speculate(SpectrVerifier(), p, draw_chains(q, 2, 1), num_calls=2)
        assert bias(call, p, 4) < EXACT


@pytest.mark.parametrize("q_V", [law(1.0, 0.0, 0.0), law(0.2, 0.3, 0.5), law(0.0, 0.0, 1.0)])
def test_laws_at_the_edges(q_V):
    p_V = law(0.2, 0.3, 0.5)
    for target in (p_V, law(0.0, 1.0, 0.0), p_V * (1 + 1e-15)):
        call = speculate(SpectrVerifier(), lambda c, t=target: t, draw_chains(lambda c: q_V, 3, 2))
        assert bias(call, lambda c, t=target: t, 4) < EXACT


def test_a_smaller_factor_is_biased(monkeypatch):
    def too_small(p_V, q_V, count):
        return 1.0 + 0.5 * (division_factor(p_V, q_V, count) - 1.0)

    monkeypatch.setattr(spectr, "division_factor", too_small)
    found = [
        bias(speculate(SpectrVerifier(), p, draw_chains(q, 2, 2)), p, 4) for p, q in toys(3, 0.0)
    ]
    assert max(found) > 1e-2


def test_a_larger_factor_is_exact_and_accepts_less(monkeypatch):
    def accepted():
        calls = [(speculate(SpectrVerifier(), p, draw_chains(q, 3, 1)), p) for p, q in toys(3, 0.0)]
        assert max(bias(call, p, 3) for call, p in calls) < EXACT
        return sum(expected_accepted(call) for call, _ in calls)

    best = accepted()
    monkeypatch.setattr(
        spectr, "division_factor", lambda p, q, m: (division_factor(p, q, m) + m) / 2
    )
    assert accepted() < best - 0.01


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_the_factor_is_rounded_up_and_leaves_a_residual(count, zeros):
    for p, q in toys(6, zeros, 20):
        p_V, q_V = p(()), q(())
        r = division_factor(p_V, q_V, count)
        assert 1.0 <= r <= count
        tries = expected_tries(p_V, q_V, r, count)
        assert float((p_V - torch.minimum(q_V, p_V / r) * tries).min()) > -EXACT
        below = r - 2 * spectr.TOLERANCE
        assert below < 1.0 or expected_tries(p_V, q_V, below, count) > below


def hit_bound(p_V, q_V, count):
    """min over token subsets S of 1 - p(S) + 1 - (1 - q(S))^M: the best any rule could do."""
    tokens = range(len(p_V))
    subsets = chain.from_iterable(combinations(tokens, n) for n in range(len(p_V) + 1))
    return min(
        1.0 - float(p_V[list(s)].sum()) + 1.0 - (1.0 - float(q_V[list(s)].sum())) ** count
        for s in subsets
    )


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize(("size", "count"), [(2, 2), (3, 2), (3, 3), (4, 2), (4, 3)])
def test_the_hit_rate_is_within_the_known_share_of_the_optimum(size, count, zeros):
    for p, q in toys(size, zeros):
        hit = expected_accepted(speculate(SpectrVerifier(), p, draw_chains(q, count, 1)))
        bound = hit_bound(p(()), q(()), count)
        assert (1.0 - (1.0 - 1.0 / count) ** count) * bound - 1e-4 <= hit <= bound + EXACT


def test_the_hit_rate_is_the_closed_form():
    for p, q in toys(3, 0.3):
        p_V, q_V = p(()), q(())
        r = division_factor(p_V, q_V, 3)
        beta = float(torch.minimum(q_V, p_V / r).sum())
        hit = expected_accepted(speculate(SpectrVerifier(), p, draw_chains(q, 3, 1)))
        assert hit == pytest.approx(1.0 - (1.0 - beta) ** 3, abs=EXACT)


@pytest.mark.parametrize("zeros", [0.0, 0.4])
def test_one_chain_is_token_rejection(zeros):
    for p, q in toys(3, zeros):
        draft = draw_chain(q, 3)
        seen = exact_law(speculate(SpectrVerifier(), p, draft))
        assert seen == pytest.approx(exact_law(speculate(RejectionVerifier(), p, draft)))


def test_a_perfect_drafter_is_always_believed():
    for p, _ in toys(3, 0.3, 4):
        law = exact_law(speculate(SpectrVerifier(), p, draw_chains(p, 3, 2)))
        assert {accepted for _, accepted in law} == {2}


def test_more_chains_are_accepted_more_often():
    for p, q in toys(3, 0.0):
        hits = [
            expected_accepted(speculate(SpectrVerifier(), p, draw_chains(q, m, 1)))
            for m in (1, 2, 3)
        ]
        assert hits == sorted(hits)


def test_all_chains_on_the_accepted_path_compete_at_the_next_node():
    """The first token is certain, so that three equal beginnings are three candidates."""
    sure = law(0.0, 1.0, 0.0)
    for p, q in toys(3, 0.0):
        alone = expected_accepted(speculate(SpectrVerifier(), p, draw_chains(q, 3, 1)))
        behind = speculate(
            SpectrVerifier(),
            lambda c, p=p: p(c[1:]) if c else sure,
            draw_chains(lambda c, q=q: q(c[1:]) if c else sure, 3, 2),
        )
        assert expected_accepted(behind) == pytest.approx(1.0 + alone, abs=EXACT)


def test_chains_may_end_where_their_tokens_say():
    """As at an end of sequence: token 0 is the last of its chain."""

    def ending(draft):
        def cut(context, stream):
            return end_at_token(draft(context, stream), 0)

        return cut

    for p, q in toys(2, 0.0, 4):
        call = speculate(SpectrVerifier(), p, ending(draw_chains(q, 2, 3)))
        assert bias(call, p, 5) < EXACT


def end_at_token(tree, token):
    """Every chain cut behind the token; nodes stay where they are."""
    paths = []
    for path in tree.paths:
        stops = [i for i, node in enumerate(path) if tree.tokens[node] == token]
        paths.append(path[: stops[0] + 1] if stops else path)
    return DraftTree(tokens=tree.tokens, parents=tree.parents, laws=tree.laws, paths=tuple(paths))


def test_a_chain_without_paths_is_one_chain_and_branches_need_them():
    assert chains_of(EMPTY_TREE) == ()
    assert chains_of(DraftTree.chain((4, 5, 6), "test")) == ((0, 1, 2),)
    with pytest.raises(AssertionError, match="paths"):
        chains_of(DraftTree(tokens=(4, 5), parents=(-1, -1)))


def test_without_drafts_it_draws_from_the_target():
    p = ToyModel("p", 3)
    assert bias(speculate(SpectrVerifier(), p, lambda c, s: EMPTY_TREE), p, 2) < EXACT


def test_float32_laws_over_another_vocabulary_are_a_bug():
    tree = DraftTree.chain((0,), "test", [torch.tensor([0.5, 0.5])])
    laws = ToyLaws(lambda context: law(0.2, 0.3, 0.5), (), tree)
    with pytest.raises(AssertionError, match="q over 2 tokens, p over 3"):
        SpectrVerifier().verify(tree, laws, RootStream(0, 0, "verify"))


def test_in_the_engine_greedy_tokens_are_those_of_plain_decoding():
    """With penalties: then no short cut serves the row, and drafts bring no laws."""
    sampling = SamplingParams(max_tokens=20, repetition_penalty=1.3, ignore_eos=True)
    asked = SpeculationParams(
        method="draft_model", draft_sample_method="probabilistic", verifier="spectr"
    )
    tokens = [
        run(tiny_engine(draft_noise=0.01), [request(sampling, speculation)])
        for speculation in (SpeculationParams(method="off"), asked)
    ]
    assert tokens[0] == tokens[1]
