"""GbvVerifier: both rules against their definitions, exact, in the order known of their means."""

import numpy as np
import pytest

from outrider.errors import RequestError
from outrider.request import SamplingParams, SpeculationParams
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
from outrider.verify import gbv
from outrider.verify.block import BlockVerifier
from outrider.verify.gbv import GbvVerifier, Picked, pick_chain
from outrider.verify.tree import TreeVerifier
from tests.verify.toy_problems import EXACT, law, request, toys

SIZES = [(2, 2, 2), (3, 2, 2), (2, 3, 2), (2, 2, 3), (3, 1, 3), (4, 1, 2)]  # V, K, M
RULES = [GbvVerifier(), GbvVerifier(rule="recursive")]
SELECTION, RECURSIVE = RULES


@pytest.mark.parametrize("verifier", RULES, ids=lambda v: v.rule)
def test_it_passes_what_every_verifier_must(verifier):
    check_verifier(verifier)


@pytest.mark.parametrize("zeros", [0.0, 0.5])
@pytest.mark.parametrize(("size", "length", "count"), SIZES)
@pytest.mark.parametrize("verifier", RULES, ids=lambda v: v.rule)
def test_the_law_is_the_targets(verifier, size, length, count, zeros):
    for p, q in toys(size, zeros):
        call = speculate(verifier, p, draw_chains(q, count, length))
        assert bias(call, p, length + 2) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("zeros", [0.0, 0.5])
@pytest.mark.parametrize(("size", "length", "count"), [(3, 3, 2), (2, 4, 2), (2, 3, 3), (3, 2, 3)])
@pytest.mark.parametrize("verifier", RULES, ids=lambda v: v.rule)
def test_the_law_is_the_targets_at_larger_sizes(verifier, size, length, count, zeros):
    for p, q in toys(size, zeros, 3):
        call = speculate(verifier, p, draw_chains(q, count, length))
        assert bias(call, p, length + 2) < EXACT


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize("verifier", RULES, ids=lambda v: v.rule)
def test_consecutive_calls_leave_the_law_alone(verifier, zeros):
    for p, q in toys(2, zeros, 3):
        call = speculate(verifier, p, draw_chains(q, 2, 1), num_calls=2)
        assert bias(call, p, 4) < EXACT


@pytest.mark.parametrize("verifier", RULES, ids=lambda v: v.rule)
@pytest.mark.parametrize("q_V", [law(1.0, 0.0, 0.0), law(0.2, 0.3, 0.5), law(0.25, 0.25, 0.5)])
def test_laws_at_the_edges(verifier, q_V):
    """Ties of the ratio everywhere, point masses, and laws that are equal but for rounding."""
    for p_V in (law(0.2, 0.3, 0.5), law(0.0, 1.0, 0.0), law(0.2, 0.3, 0.5) * (1 + 1e-15)):
        call = speculate(verifier, lambda c, p=p_V: p, draw_chains(lambda c: q_V, 2, 2))
        assert bias(call, lambda c, p=p_V: p, 4) < EXACT


# Path selection


def ratios(p_row, q_row):
    return np.divide(p_row, q_row, out=np.full(len(q_row), np.inf), where=q_row > 0)


def largest_path(p, q, paths):
    """By its definition: whole chains compared from the root, by p/q and then by id."""

    def key(path):
        rows = [(p(path[:i]).numpy(), q(path[:i]).numpy()) for i in range(len(path))]
        return [(ratios(*row)[token], token) for row, token in zip(rows, path, strict=True)]

    return max(paths, key=key)


def picked(p, q, count, length):
    """The experiment that draws chains and picks one: (its tokens, its law at each of them)."""

    def call(stream):
        tree = draw_chains(q, count, length)((), stream)
        found = pick_chain(tree.paths, tree, ToyLaws(p, (), tree))
        tokens = tuple(tree.tokens[node] for node in found.nodes)
        laws = tuple(float(row[token]) for row, token in zip(found.laws, tokens, strict=True))
        everything = [tuple(tree.tokens[node] for node in path) for path in tree.paths]
        assert largest_path(p, q, everything)[: len(tokens)] == tokens
        return tokens, laws

    return call


@pytest.mark.parametrize(("size", "length", "count"), [*SIZES, (2, 2, 4)])
def test_the_picked_chain_has_the_law_that_it_is_verified_against(size, length, count):
    for p, q in toys(size, 0.0, 4):
        seen = exact_law(picked(p, q, count, length))
        assert sum(seen.values()) == pytest.approx(1.0, abs=EXACT)
        assert len({tokens for tokens, _ in seen}) == len(seen), "one law per path"
        for (_, laws), weight in seen.items():
            assert weight == pytest.approx(float(np.prod(laws)), abs=EXACT)


@pytest.mark.parametrize("count", [2, 3])
def test_the_pick_ends_at_the_first_token_that_the_target_forbids(count):
    """No later prefix can stand, and after it a grammar has no law to give."""
    for p, q in toys(3, 0.5, 8 if count == 2 else 2):
        for (tokens, _), weight in exact_law(picked(p, q, count, 3)).items():
            is_allowed = [float(p(tokens[:i])[token]) > 0 for i, token in enumerate(tokens)]
            assert weight > 0
            assert all(is_allowed[:-1])
            assert len(tokens) == 3 or not is_allowed[-1]


def test_tiny_masses_do_not_underflow():
    q_V, p_V = law(1e-200, 1e-150, 1.0), law(0.5, 0.3, 0.2)
    path = (0,) * 8
    tree = DraftTree.chain(path, "test", [q_V] * 8)
    chains = (tuple(range(8)),) * 3
    found = pick_chain(chains, tree, ToyLaws(lambda c: p_V, (), tree))
    assert len(found.nodes) == 8
    for row in found.laws:
        assert float(row.sum()) == pytest.approx(1.0)
        assert bool(row.isfinite().all())


def test_the_mutant_that_verifies_the_picked_chain_against_q_is_caught(monkeypatch):
    def plain(chains, tree, p):
        nodes, p_rows, _ = pick_chain(chains, tree, p)
        return Picked(nodes, p_rows, [tree.law(node) for node in nodes])

    monkeypatch.setattr(gbv, "pick_chain", plain)
    found = [bias(speculate(SELECTION, p, draw_chains(q, 2, 2)), p, 4) for p, q in toys(3, 0.0)]
    assert max(found) > 0.05


# Both rules


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize("verifier", RULES, ids=lambda v: v.rule)
def test_one_chain_is_block_verification(verifier, zeros):
    for p, q in toys(3, zeros):
        for draft in (draw_chain(q, 3), draw_chains(q, 1, 3)):
            seen = exact_law(speculate(verifier, p, draft))
            assert seen == pytest.approx(exact_law(speculate(BlockVerifier(), p, draft)), abs=EXACT)


def mean_accepted(verifier, size, length, count, num_toys=8):
    """Mean E[tau] over random toys; the first chain alone where `count` is 1."""
    found = [
        expected_accepted(speculate(verifier, p, draw_chains(q, count, length)))
        for p, q in toys(size, 0.0, num_toys)
    ]
    return sum(found) / num_toys


@pytest.mark.parametrize(("size", "length", "count"), SIZES)
def test_recursive_is_never_below_block_on_the_first_chain(size, length, count):
    for zeros in (0.0, 0.4):
        for p, q in toys(size, zeros):
            alone = expected_accepted(speculate(BlockVerifier(), p, draw_chain(q, length)))
            drafts = draw_chains(q, count, length)
            assert expected_accepted(speculate(RECURSIVE, p, drafts)) > alone - EXACT


@pytest.mark.parametrize(("size", "length", "count"), [(2, 2, 2), (2, 3, 2), (3, 2, 2), (2, 2, 3)])
def test_the_rules_accept_in_the_order_of_the_table(size, length, count):
    """Means over random toys; on single toys selection may come last.

    With three chains over two tokens selection and recursive change places with the toys.
    """
    block = mean_accepted(BlockVerifier(), size, length, 1)
    tokenwise = mean_accepted(TreeVerifier(), size, length, count)
    recursive = mean_accepted(RECURSIVE, size, length, count)
    selection = mean_accepted(SELECTION, size, length, count)
    assert block + 0.05 < tokenwise
    assert tokenwise + 0.01 < recursive
    assert tokenwise < selection
    if count == 2:
        assert recursive + 0.05 < selection


@pytest.mark.parametrize("verifier", RULES, ids=lambda v: v.rule)
def test_chains_may_end_where_their_tokens_say(verifier):
    """As at an end of sequence: token 0 is the last of its chain, so that lengths differ."""

    def ending(context, stream, q):
        tree = draw_chains(q, 2, 3)(context, stream)
        paths = []
        for path in tree.paths:
            stops = [i for i, node in enumerate(path) if tree.tokens[node] == 0]
            paths.append(path[: stops[0] + 1] if stops else path)
        return DraftTree(
            tokens=tree.tokens, parents=tree.parents, laws=tree.laws, paths=tuple(paths)
        )

    for p, q in toys(2, 0.0, 4):
        call = speculate(verifier, p, lambda c, s, q=q: ending(c, s, q))
        assert bias(call, p, 5) < EXACT


class Grammar(ToyLaws):
    """As under a grammar: after a forbidden path there is no law."""

    def law(self, node):
        path = self._tree.path_tokens(node)
        for i, token in enumerate(path):
            if self._p(self._context + path[:i])[token] == 0.0:
                raise RequestError("no token is allowed")
        return super().law(node)


@pytest.mark.parametrize("verifier", RULES, ids=lambda v: v.rule)
def test_no_law_is_asked_for_after_a_forbidden_token(verifier):
    for i in range(3):
        p, q = ToyModel(f"p{i}", 3, 0.5), ToyModel(f"q{i}", 3)

        def call(stream, p=p, q=q):
            tree = draw_chains(q, 2, 3)((), stream)
            return verifier.verify(tree, Grammar(p, (), tree), stream).accepted

        assert sum(exact_law(call).values()) == pytest.approx(1.0)


@pytest.mark.parametrize("verifier", RULES, ids=lambda v: v.rule)
def test_without_drafts_it_draws_from_the_target(verifier):
    p = ToyModel("p", 3)
    assert bias(speculate(verifier, p, lambda c, s: EMPTY_TREE), p, 2) < EXACT


@pytest.mark.parametrize("verifier", RULES, ids=lambda v: v.rule)
def test_a_perfect_drafter_on_one_chain_is_always_believed(verifier):
    for p, _ in toys(3, 0.3, 4):
        law = exact_law(speculate(verifier, p, draw_chains(p, 1, 3)))
        assert {accepted for (_, accepted), weight in law.items() if weight > EXACT} == {3}


def test_an_unknown_rule_is_refused():
    with pytest.raises(RequestError, match="rule='best': must be one of selection, recursive"):
        GbvVerifier(rule="best")


@pytest.mark.parametrize("rule", ["selection", "recursive"])
def test_in_the_engine_greedy_tokens_are_those_of_plain_decoding(rule):
    """With penalties: then no short cut serves the row, and drafts bring no laws."""
    sampling = SamplingParams(max_tokens=20, repetition_penalty=1.3, ignore_eos=True)
    asked = SpeculationParams(
        method="draft_model",
        draft_sample_method="probabilistic",
        verifier="gbv",
        verifier_options={"rule": rule},
    )
    tokens = [
        run(tiny_engine(draft_noise=0.01), [request(sampling, speculation)])
        for speculation in (SpeculationParams(method="off"), asked)
    ]
    assert tokens[0] == tokens[1]
