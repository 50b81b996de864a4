"""TreeVerifier: exact law on every kind of tree, more candidates never hurt, known mistakes."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from outrider.sampling.laws import Laws
from outrider.sampling.rng import RootStream, Stream
from outrider.step import EMPTY_TREE, DraftTree, Kind, Verdict
from outrider.testing import (
    ToyLaws,
    bias,
    check_verifier,
    draw_chain,
    draw_chains,
    draw_siblings,
    draw_tree,
    exact_law,
    pick_chain,
    pick_tree,
    speculate,
)
from outrider.testing.enumerate import Context, Draft, Model
from outrider.verify.rejection import RejectionVerifier
from outrider.verify.sampled import SampledVerifier
from outrider.verify.tree import TreeVerifier
from tests.verify.toy_problems import (
    BIASED,
    EXACT,
    accepted_on_average,
    law,
    law_is_right,
    most_apart,
    recorded,
    toys,
    without,
    worst,
    zeroed,
)

SIZES = [(2, 2), (3, 2), (2, 3), (3, 3)]
TREES = [(2, (2, 1)), (3, (2, 1)), (2, (2, 2)), (2, (2, 1, 1))]
LARGE_TREES = [(3, (2, 2)), (3, (2, 1, 1)), (3, (3, 1)), (4, (3,))]


def mixed(q: Model, widths: Sequence[int], pattern: str) -> Draft:
    """Siblings by a pattern of letters, each recorded with the law that it came from.

    "b": the best of what is left of q. "w": the worst of it. "d": a draw from what is left. "q": a
    draw from the whole of q, perhaps a token that is there already.
    """

    def draft(context: Context, stream: Stream) -> DraftTree:
        tokens: list[int] = []
        parents: list[int] = []
        laws: list[Tensor | None] = []
        level: list[tuple[int, Context]] = [(-1, context)]
        for width in widths:
            below: list[tuple[int, Context]] = []
            for parent, path in level:
                left_V = q(path).clone()
                for how in pattern[:width]:
                    law_V = q(path) if how == "q" else left_V / left_V.sum()
                    if how in "bw":
                        likeliest_first = law_V.argsort(descending=True)[: int((law_V > 0).sum())]
                        token = int(likeliest_first[0 if how == "b" else -1])
                    else:
                        token = stream.pick(law_V)
                    below.append((len(tokens), (*path, token)))
                    tokens.append(token)
                    parents.append(parent)
                    laws.append(None if how in "bw" else law_V)
                    left_V[token] = 0.0
                    if float(left_V.sum()) == 0.0:
                        break
            level = below
        return DraftTree(tokens=tuple(tokens), parents=tuple(parents), laws=tuple(laws))

    return draft


# The law of the output.


def test_it_passes_what_every_verifier_must():
    check_verifier(TreeVerifier())
    assert TreeVerifier().accepts == frozenset(Kind)


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize(("size", "length"), SIZES)
def test_chains_leave_the_target_law_alone(size, length, zeros):
    for p, q in toys(size, zeros):
        assert law_is_right(
            TreeVerifier(), p, [draw_chain(q, length), pick_chain(q, length)], length + 2
        )


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize(("size", "widths"), TREES)
def test_trees_leave_the_target_law_alone(size, widths, zeros):
    for p, q in toys(size, zeros):
        drafts = [make(q, widths) for make in (draw_siblings, pick_tree, draw_tree)]
        assert law_is_right(TreeVerifier(), p, drafts, len(widths) + 2)


@pytest.mark.slow
@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize(("size", "widths"), LARGE_TREES)
def test_larger_trees_leave_the_target_law_alone(size, widths, zeros):
    for p, q in toys(size, zeros):
        drafts = [make(q, widths) for make in (draw_siblings, pick_tree)]
        assert law_is_right(TreeVerifier(), p, drafts, len(widths) + 2)


@pytest.mark.parametrize("pattern", ["bd", "db", "wd", "dw", "bq", "qb", "dq", "qd"])
def test_mixed_trees_leave_the_target_law_alone(pattern):
    for zeros in (0.0, 0.4):
        for p, q in toys(3, zeros, count=4):
            assert law_is_right(TreeVerifier(), p, [mixed(q, (2, 1), pattern)], 4)
        for p, q in toys(2, zeros):
            assert law_is_right(TreeVerifier(), p, [mixed(q, (2, 2), pattern)], 4)


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize(("size", "num_chains", "length"), [(2, 2, 2), (2, 3, 2), (3, 3, 1)])
def test_independent_chains_leave_the_target_law_alone(size, num_chains, length, zeros):
    for p, q in toys(size, zeros):
        assert law_is_right(TreeVerifier(), p, [draw_chains(q, num_chains, length)], length + 2)


def test_consecutive_calls_leave_the_target_law_alone():
    for p, q in toys(2, 0.3):
        call = speculate(TreeVerifier(), p, draw_siblings(q, (2, 1)), num_calls=2)
        assert bias(call, p, 5) < EXACT


# How many drafts stand.


@pytest.mark.parametrize(("size", "length"), SIZES)
def test_on_chains_it_is_token_rejection(size, length):
    for p, q in toys(size, 0.3):
        for draft in (draw_chain(q, length), pick_chain(q, length)):
            laws = [
                exact_law(speculate(v, p, draft)) for v in (TreeVerifier(), RejectionVerifier())
            ]
            assert most_apart(*laws) < EXACT


@pytest.mark.parametrize(("size", "widths"), TREES)
def test_on_picked_trees_it_has_the_law_of_nodewise_sampling(size, widths):
    for p, q in toys(size):
        draft = pick_tree(q, widths)
        laws = [exact_law(speculate(v, p, draft)) for v in (TreeVerifier(), SampledVerifier())]
        assert most_apart(*laws) < EXACT


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize(
    "drafts",
    [
        lambda q: [draw_siblings(q, (width,)) for width in (1, 2, 3, 4)],
        lambda q: [pick_tree(q, (width,)) for width in (1, 2, 3, 4)],
        lambda q: [draw_chains(q, num_chains, 1) for num_chains in (1, 2, 3)],
        lambda q: [mixed(q, (width,), "bdd") for width in (1, 2, 3)],
        lambda q: [mixed(q, (width,), "dbd") for width in (1, 2, 3)],
    ],
    ids=["drawn", "picked", "independent", "picked first", "picked second"],
)
def test_another_candidate_never_lowers_the_chance_of_a_hit(drafts, zeros):
    for p, q in toys(4, zeros):
        hits = [accepted_on_average(TreeVerifier(), p, draft) for draft in drafts(q)]
        assert all(more >= fewer - EXACT for fewer, more in pairwise(hits))


def test_siblings_drawn_without_replacement_hit_more_often():
    """Means over random problems, in the order known of them."""
    drafts = {
        "one": lambda q: draw_chain(q, 1),
        "with": lambda q: draw_chains(q, 2, 1),
        "without": lambda q: draw_siblings(q, (2,)),
    }
    hits = {
        name: sum(accepted_on_average(TreeVerifier(), p, make(q)) for p, q in toys(3, count=40))
        for name, make in drafts.items()
    }
    assert hits["one"] + 2 < hits["with"] < hits["without"] - 2


def test_no_rule_for_independent_draws_may_pass_the_min_cut():
    """min over sets S of tokens: 1 - p(S) + 1 - (1 - q(S))^M."""
    for p, q in toys(4):
        for num_chains in (1, 2, 3):
            hit = accepted_on_average(TreeVerifier(), p, draw_chains(q, num_chains, 1))
            sets = [[x for x in range(4) if bits >> x & 1] for bits in range(16)]
            cuts = [
                2 - float(p(())[s].sum()) - (1 - float(q(())[s].sum())) ** num_chains for s in sets
            ]
            assert hit <= min(cuts) + EXACT


@pytest.mark.parametrize("widths", [(1, 1, 1), (2, 1), (2, 2)])
def test_a_perfect_drafter_is_always_believed(widths):
    for p, _ in toys(3, 0.3):
        law = exact_law(speculate(TreeVerifier(), p, draw_siblings(p, widths)))
        doubted = sum(weight for (_, n), weight in law.items() if n < len(widths))
        assert doubted < EXACT  # siblings are renormalised, so p and q may differ by rounding


# Mutants: each known mistake is built once, and the enumeration must see it.


def test_the_recorder_of_mutants_can_record_the_truth():
    assert worst(TreeVerifier(), lambda q: recorded(q, draw_siblings(q, (2, 1)), without)) < EXACT


@pytest.mark.parametrize("record", [zeroed, lambda q_V, before: q_V], ids=["zeroed", "plain"])
def test_q_not_renormalised_after_a_tried_sibling(record):
    assert worst(TreeVerifier(), lambda q: recorded(q, draw_siblings(q, (2, 1)), record)) > BIASED


def test_siblings_sorted_after_the_draw():
    def likeliest_first(q: Model) -> Draft:
        def draft(context: Context, stream: Stream) -> DraftTree:
            q_V = q(context)
            drawn = draw_siblings(q, (2,))(context, stream).tokens
            tokens = sorted(drawn, key=lambda token: -float(q_V[token]))
            laws = (q_V, without(q_V, tokens[:1]))
            return DraftTree(tokens=tuple(tokens), parents=(-1, -1), laws=laws)

        return draft

    assert worst(TreeVerifier(), likeliest_first) > BIASED


def test_a_draw_at_half_the_temperature_with_the_row_of_the_whole():
    def warm(q: Model) -> Draft:
        def sharp(context: Context) -> Tensor:
            return (q(context).log() / 0.5).softmax(dim=0)

        return recorded(q, draw_siblings(sharp, (2, 1)), without)

    assert worst(TreeVerifier(), warm) > 0.01


def test_an_unlikely_token_dropped_after_it_was_drawn():
    def dropping(q: Model) -> Draft:
        def draft(context: Context, stream: Stream) -> DraftTree:
            tree = draw_siblings(q, (2,))(context, stream)
            kept = [i for i, token in enumerate(tree.tokens) if float(q(context)[token]) >= 0.3]
            return DraftTree(
                tokens=tuple(tree.tokens[i] for i in kept),
                parents=(-1,) * len(kept),
                laws=tuple(tree.laws[i] for i in kept),
            )

        return draft

    assert worst(TreeVerifier(), dropping) > BIASED


class SameCoin:
    """A stream whose flips all compare with one uniform, known ever more narrowly."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._low, self._high = 0.0, 1.0

    def flip(self, probability: float) -> bool:
        cut = min(max(probability, self._low), self._high)
        heads = self._stream.flip((cut - self._low) / (self._high - self._low))
        self._low, self._high = (self._low, cut) if heads else (cut, self._high)
        return heads

    def pick(self, law_V: Tensor) -> int:
        return self._stream.pick(law_V)


class OneUniform(TreeVerifier):
    def verify(self, tree: DraftTree, p: Laws, rng: Stream) -> Verdict:
        return super().verify(tree, p, SameCoin(rng))


def test_one_uniform_for_all_candidates():
    assert worst(OneUniform(), lambda q: draw_siblings(q, (2, 1))) > BIASED


class ForgetsDuplicates(TreeVerifier):
    """Tries equal draws once, but each distinct token with plain q."""

    def verify(self, tree: DraftTree, p: Laws, rng: Stream) -> Verdict:
        merged = DraftTree(tokens=tree.tokens, parents=tree.parents, laws=tree.laws)
        return super().verify(merged, p, rng)


def test_duplicates_among_independent_draws_count():
    assert worst(ForgetsDuplicates(), lambda q: draw_chains(q, 2, 2)) > BIASED


# Edges.


class Planned(ToyLaws):
    """Laws that note the nodes they are asked for."""

    def __init__(self, p: Model, tree: DraftTree) -> None:
        super().__init__(p, (), tree)
        self.asked: list[int] = []

    def law(self, node: int) -> Tensor:
        self.asked.append(node)
        return super().law(node)


def test_only_visited_nodes_cost_a_law():
    tree = DraftTree(tokens=(0, 1, 0, 1), parents=(-1, -1, 0, 1))
    p = Planned(lambda context: law(0.0, 1.0), tree)
    verdict = TreeVerifier().verify(tree, p, RootStream(0, 0, "verify"))
    assert verdict == Verdict((1, 3), 1)
    assert p.asked == [-1, 1, 3]


def test_plain_decoding_is_a_tree_without_nodes():
    laws = ToyLaws(lambda context: law(0.0, 1.0), (), EMPTY_TREE)
    assert TreeVerifier().verify(EMPTY_TREE, laws, RootStream(0, 0, "verify")) == Verdict((), 1)


def test_chains_that_ended_early_offer_nothing_more():
    one = law(0.0, 1.0)
    tree = DraftTree(
        tokens=(1, 1), parents=(-1, 0), laws=(one, one), paths=((0,), (0, 1)), source="test"
    )
    laws = ToyLaws(lambda context: one, (), tree)
    assert TreeVerifier().verify(tree, laws, RootStream(0, 0, "verify")) == Verdict((0, 1), 1)


class Careful(RootStream):
    """A production stream that refuses what is no probability."""

    def flip(self, probability: float) -> bool:
        assert 0.0 <= probability <= 1.0
        return super().flip(probability)

    def pick(self, law_V: Tensor) -> int:
        assert float(law_V.min()) >= 0.0
        assert abs(float(law_V.sum()) - 1.0) < 1e-6
        return super().pick(law_V)


@pytest.mark.parametrize("sharpness", [0.1, 3.0, 40.0])
def test_large_float32_laws_stay_numbers(sharpness):
    size, widths = 50_000, (3, 2, 1)
    generator = torch.Generator().manual_seed(5)
    p_DV, noise_DV = torch.randn(2, 4, size, generator=generator) * sharpness
    p_DV[:, :100] = -torch.inf
    q_DV = (0.8 * p_DV.clamp(min=-5) + 0.2 * noise_DV).softmax(dim=1)
    for root in range(3):
        rng = RootStream(3, root, "draft")
        tree = draw_siblings(lambda context: q_DV[len(context)], widths)((), rng)
        laws = ToyLaws(lambda context: p_DV[len(context)].double().softmax(dim=0), (), tree)
        verdict = TreeVerifier().verify(tree, laws, Careful(3, root, "verify"))
        assert verdict.token >= 100
        assert all(tree.tokens[node] >= 100 for node in verdict.accepted)
