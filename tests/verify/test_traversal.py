"""TraversalVerifier: exact law on every kind of tree, block on chains, never below recursion."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from outrider.sampling.laws import Laws
from outrider.sampling.rng import RootStream, Stream
from outrider.step import EMPTY_TREE, DraftTree, Verdict
from outrider.testing import (
    ToyLaws,
    ToyModel,
    bias,
    check_verifier,
    draw_chain,
    draw_chains,
    draw_siblings,
    exact_law,
    expected_accepted,
    pick_chain,
    pick_tree,
    speculate,
)
from outrider.testing.enumerate import Context, Draft, Model
from outrider.verify.block import BlockVerifier
from outrider.verify.traversal import TraversalVerifier
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
LARGE_TREES = [(3, (2, 2)), (3, (2, 1, 1)), (3, (3, 1)), (2, (1, 2, 1))]


def mixed(q: Model, widths: Sequence[int], is_picked: Sequence[bool]) -> Draft:
    """Siblings without replacement, the i-th the best of what is left of q or drawn from it."""

    def draft(context: Context, stream: Stream) -> DraftTree:
        tokens: list[int] = []
        parents: list[int] = []
        laws: list[Tensor | None] = []
        level: list[tuple[int, Context]] = [(-1, context)]
        for width in widths:
            below: list[tuple[int, Context]] = []
            for parent, path in level:
                left_V = q(path).clone()
                for i in range(min(width, int((left_V > 0).sum()))):
                    law_V = left_V / left_V.sum()
                    token = int(law_V.argmax()) if is_picked[i] else stream.pick(law_V)
                    below.append((len(tokens), (*path, token)))
                    tokens.append(token)
                    parents.append(parent)
                    laws.append(None if is_picked[i] else law_V)
                    left_V[token] = 0.0
            level = below
        return DraftTree(tokens=tuple(tokens), parents=tuple(parents), laws=tuple(laws))

    return draft


# The law of the output.


def test_it_passes_what_every_verifier_must():
    check_verifier(TraversalVerifier())


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize(("size", "widths"), TREES)
def test_trees_leave_the_target_law_alone(size, widths, zeros):
    for p, q in toys(size, zeros):
        drafts = [make(q, widths) for make in (draw_siblings, pick_tree)]
        assert law_is_right(TraversalVerifier(), p, drafts, len(widths) + 2)


@pytest.mark.slow
@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize(("size", "widths"), LARGE_TREES)
def test_larger_trees_leave_the_target_law_alone(size, widths, zeros):
    for p, q in toys(size, zeros):
        drafts = [make(q, widths) for make in (draw_siblings, pick_tree)]
        assert law_is_right(TraversalVerifier(), p, drafts, len(widths) + 2)


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize("is_picked", [(True, False), (False, True)])
def test_mixed_trees_leave_the_target_law_alone(is_picked, zeros):
    for size, widths in TREES:
        for p, q in toys(size, zeros):
            assert law_is_right(
                TraversalVerifier(), p, [mixed(q, widths, is_picked)], len(widths) + 2
            )


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize(
    ("size", "num_chains", "length"), [(2, 2, 2), (3, 2, 2), (2, 3, 2), (3, 3, 1), (2, 2, 3)]
)
def test_independent_chains_leave_the_target_law_alone(size, num_chains, length, zeros):
    for p, q in toys(size, zeros):
        assert law_is_right(
            TraversalVerifier(), p, [draw_chains(q, num_chains, length)], length + 2
        )


def test_consecutive_calls_leave_the_target_law_alone():
    for p, q in toys(2, 0.3):
        call = speculate(TraversalVerifier(), p, draw_siblings(q, (2, 1)), num_calls=2)
        assert bias(call, p, 5) < EXACT


class ByDefinition(TraversalVerifier):
    """The rule over paths of tokens, every number worked out anew when it is needed."""

    def verify(self, tree: DraftTree, p: Laws, rng: Stream) -> Verdict:
        children = {node: tree.children(node) for node in range(-1, len(tree))}
        target = {node: p.law(node) for node in range(-1, len(tree))}
        replaced = {-1: 1.0}

        def weight(node: int) -> float:
            if node in replaced:
                return replaced[node]
            up, token = tree.parents[node], tree.tokens[node]
            return min(1.0, weight(up) * float(target[up][token] / tree.law(node)[token]))

        while True:
            leaf = -1
            while children[leaf]:
                leaf = children[leaf][0]
            if leaf == -1 or rng.flip(weight(leaf)):
                return Verdict(tree.path(leaf), rng.pick(target[leaf]))
            up = tree.parents[leaf]
            children[up].pop(0)
            w = weight(up)
            excess_V = (w * target[up] - tree.law(leaf)).clamp(min=0.0)
            total = float(excess_V.sum())
            target[up] = excess_V / total if total > 0 else target[up]
            if up != -1:
                room = total + 1.0 - w
                replaced[up] = total / room if room > 0 else 0.0


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize(("size", "widths"), TREES)
def test_numbers_that_are_kept_are_those_of_the_definition(size, widths, zeros):
    for p, q in toys(size, zeros, count=4):
        draft = draw_siblings(q, widths)
        laws = [exact_law(speculate(v, p, draft)) for v in (TraversalVerifier(), ByDefinition())]
        assert most_apart(*laws) < EXACT


# How many drafts stand.


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize(("size", "length"), SIZES)
def test_on_chains_it_is_block_verification(size, length, zeros):
    """Token for token: the joint law of the output and of the number accepted."""
    for p, q in toys(size, zeros):
        for draft in (draw_chain(q, length), pick_chain(q, length)):
            calls = [speculate(v, p, draft) for v in (TraversalVerifier(), BlockVerifier())]
            assert most_apart(*(exact_law(call) for call in calls)) < EXACT
            one, other = (expected_accepted(call) for call in calls)
            assert one == pytest.approx(other, abs=EXACT)


@pytest.mark.parametrize(("size", "widths"), TREES)
def test_it_accepts_no_less_than_recursive_rejection(size, widths):
    gains = []
    for p, q in toys(size) + toys(size, 0.4):
        for draft in (draw_siblings(q, widths), mixed(q, widths, (True, False))):
            tree, traversal = (
                accepted_on_average(rule, p, draft)
                for rule in (TreeVerifier(), TraversalVerifier())
            )
            gains.append(traversal - tree)
    assert min(gains) > -EXACT
    assert size == 2 or max(gains) > 0.02


@pytest.mark.parametrize(("size", "widths"), TREES)
def test_picked_trees_gain_nothing_and_lose_nothing(size, widths):
    for p, q in toys(size):
        tree, traversal = (
            accepted_on_average(rule, p, pick_tree(q, widths))
            for rule in (TreeVerifier(), TraversalVerifier())
        )
        assert traversal == pytest.approx(tree, abs=EXACT)


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize(
    "drafts",
    [
        lambda q: [draw_siblings(q, (width,)) for width in (1, 2, 3, 4)],
        lambda q: [pick_tree(q, (width,)) for width in (1, 2, 3, 4)],
        lambda q: [draw_chains(q, num_chains, 1) for num_chains in (1, 2, 3)],
        lambda q: [mixed(q, (width,), (True, False, False)) for width in (1, 2, 3)],
    ],
    ids=["drawn", "picked", "independent", "mixed"],
)
def test_another_candidate_never_lowers_the_chance_of_a_hit(drafts, zeros):
    for p, q in toys(4, zeros):
        hits = [accepted_on_average(TraversalVerifier(), p, draft) for draft in drafts(q)]
        assert all(more >= fewer - EXACT for fewer, more in pairwise(hits))


@pytest.mark.parametrize("widths", [(1, 1, 1), (2, 1), (2, 2)])
def test_a_perfect_drafter_is_always_believed(widths):
    for p, _ in toys(3, 0.3):
        law = exact_law(speculate(TraversalVerifier(), p, draw_siblings(p, widths)))
        doubted = sum(weight for (_, n), weight in law.items() if n < len(widths))
        assert doubted < EXACT  # siblings are renormalised, so p and q may differ by rounding


# Mutants: each known mistake is built once, and the enumeration must see it.


def test_the_recorder_of_mutants_can_record_the_truth():
    assert (
        worst(TraversalVerifier(), lambda q: recorded(q, draw_siblings(q, (2, 1)), without)) < EXACT
    )


@pytest.mark.parametrize("record", [zeroed, lambda q_V, before: q_V], ids=["zeroed", "plain"])
def test_q_not_renormalised_after_a_tried_sibling(record):
    assert (
        worst(TraversalVerifier(), lambda q: recorded(q, draw_siblings(q, (2, 1)), record)) > BIASED
    )


def test_siblings_sorted_after_the_draw():
    def likeliest_first(q: Model) -> Draft:
        def draft(context: Context, stream: Stream) -> DraftTree:
            q_V = q(context)
            drawn = draw_siblings(q, (2,))(context, stream).tokens
            tokens = sorted(drawn, key=lambda token: -float(q_V[token]))
            laws = (q_V, without(q_V, tokens[:1]))
            return DraftTree(tokens=tuple(tokens), parents=(-1, -1), laws=laws)

        return draft

    assert worst(TraversalVerifier(), likeliest_first) > BIASED


def test_a_draw_at_half_the_temperature_with_the_row_of_the_whole():
    def warm(q: Model) -> Draft:
        def sharp(context: Context) -> Tensor:
            return (q(context).log() / 0.5).softmax(dim=0)

        return recorded(q, draw_siblings(sharp, (2, 1)), without)

    assert worst(TraversalVerifier(), warm) > 0.01


def test_an_unlikely_token_dropped_after_it_was_drawn():
    def dropping(q: Model) -> Draft:
        def draft(context: Context, stream: Stream) -> DraftTree:
            tree = draw_siblings(q, (1, 2))(context, stream)
            rows = [q(context + tree.path_tokens(parent)) for parent in tree.parents]
            kept = [0] + [i for i in (1, 2) if float(rows[i][tree.tokens[i]]) >= 0.3]
            return DraftTree(
                tokens=tuple(tree.tokens[i] for i in kept),
                parents=(-1,) + (0,) * (len(kept) - 1),
                laws=tuple(tree.laws[i] for i in kept),
            )

        return draft

    assert worst(TraversalVerifier(), dropping) > BIASED


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


class OneUniform(TraversalVerifier):
    def verify(self, tree: DraftTree, p: Laws, rng: Stream) -> Verdict:
        return super().verify(tree, p, SameCoin(rng))


def test_one_uniform_for_all_leaves():
    assert worst(OneUniform(), lambda q: draw_siblings(q, (2, 1))) > BIASED


class ForgetsMerging(TraversalVerifier):
    """Reads independent chains as if plain q were the law of every distinct sibling."""

    def verify(self, tree: DraftTree, p: Laws, rng: Stream) -> Verdict:
        merged = DraftTree(tokens=tree.tokens, parents=tree.parents, laws=tree.laws)
        return super().verify(merged, p, rng)


def test_distinct_tokens_of_independent_draws_are_drawn_without_replacement():
    assert worst(ForgetsMerging(), lambda q: draw_chains(q, 2, 2)) > BIASED


# Edges.


class Counted(ToyLaws):
    """Laws that note the nodes they are asked for."""

    def __init__(self, p: Model, tree: DraftTree) -> None:
        super().__init__(p, (), tree)
        self.asked: set[int] = set()

    def law(self, node: int) -> Tensor:
        self.asked.add(node)
        return super().law(node)


def test_laws_below_a_forbidden_token_are_not_asked_for():
    tree = DraftTree(tokens=(0, 1, 0, 1, 0), parents=(-1, -1, 0, 1, 2))
    p = Counted(lambda context: law(0.0, 1.0), tree)
    verdict = TraversalVerifier().verify(tree, p, RootStream(0, 0, "verify"))
    assert verdict == Verdict((1, 3), 1)
    assert p.asked == {-1, 1, 3}


def test_plain_decoding_is_a_tree_without_nodes():
    laws = ToyLaws(lambda context: law(0.0, 1.0), (), EMPTY_TREE)
    verdict = TraversalVerifier().verify(EMPTY_TREE, laws, RootStream(0, 0, "verify"))
    assert verdict == Verdict((), 1)


def test_recorded_laws_are_left_as_they_are():
    q_V = law(0.6, 0.4)
    tree = DraftTree(
        tokens=(0, 1), parents=(-1, -1), laws=(q_V, q_V), paths=((0,), (1,)), source="test"
    )
    laws = ToyLaws(lambda context: law(0.0, 1.0), (), tree)
    verdict = TraversalVerifier().verify(tree, laws, RootStream(0, 0, "verify"))
    assert verdict == Verdict((1,), 1)
    assert q_V.tolist() == [0.6, 0.4]


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
@pytest.mark.parametrize("make", [draw_siblings, lambda q, widths: draw_chains(q, 3, 3)])
def test_large_float32_laws_stay_numbers(make, sharpness):
    size = 50_000
    generator = torch.Generator().manual_seed(5)
    p_DV, noise_DV = torch.randn(2, 4, size, generator=generator) * sharpness
    p_DV[:, :100] = -torch.inf
    q_DV = (0.8 * p_DV.clamp(min=-5) + 0.2 * noise_DV).softmax(dim=1)
    for root in range(3):
        rng = RootStream(3, root, "draft")
        tree = make(lambda context: q_DV[len(context)], (3, 2, 1))((), rng)
        laws = ToyLaws(lambda context: p_DV[len(context)].double().softmax(dim=0), (), tree)
        verdict = TraversalVerifier().verify(tree, laws, Careful(3, root, "verify"))
        assert verdict.token >= 100
        assert all(tree.tokens[node] >= 100 for node in verdict.accepted)


def test_production_streams_reach_the_target_law():
    """Two positions with real uniforms: draft and verify purposes of the same roots."""
    p, q = ToyModel("p", 3, 0.2), ToyModel("q", 3)
    num_calls, counts = 4000, torch.zeros(9, dtype=torch.float64)
    for root in range(num_calls):
        draft = draw_siblings(q, (2, 1))((), RootStream(7, root, "draft"))
        rng = RootStream(7, root, "verify")
        verdict = TraversalVerifier().verify(draft, ToyLaws(p, (), draft), rng)
        tokens = (*(draft.tokens[node] for node in verdict.accepted), verdict.token)
        while len(tokens) < 2:
            tokens += (rng.pick(p(tokens)),)
        counts[3 * tokens[0] + tokens[1]] += 1
    true = torch.cat([p(())[x] * p((x,)) for x in range(3)])
    deviations = (counts / num_calls - true).abs() / (true * (1 - true) / num_calls).sqrt()
    assert float(deviations[true > 0].max()) < 4
    assert float(counts[true == 0].sum()) == 0
