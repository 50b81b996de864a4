"""Every verifier's exact output law is the target's; every known mistake is caught.

The law is enumerated (`outrider.testing.enumerate`), so a right rule is off by rounding only.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from outrider.sampling.laws import Laws
from outrider.sampling.rng import Stream
from outrider.step import DraftTree, Verdict
from outrider.testing import (
    ToyLaws,
    ToyModel,
    bias,
    draw_chain,
    draw_tree,
    exact_law,
    expected_accepted,
    pick_chain,
    pick_tree,
    speculate,
)
from outrider.testing.enumerate import Context, Draft, Model
from outrider.verify.greedy import GreedyVerifier
from outrider.verify.rejection import RejectionVerifier, acceptance
from outrider.verify.sampled import SampledVerifier

EXACT = 1e-12
BIASED = 1e-3
SIZES = [(2, 2), (3, 2), (2, 3), (3, 3), (2, 4)]
WIDTHS = [(2, 1), (2, 2), (2, 1, 1)]
SEEDS = range(8)


def fixed(*laws: list[float]) -> Model:
    """The law at depth d is laws[d], the last one from there on."""
    rows = [torch.tensor(law, dtype=torch.float64) for law in laws]
    return lambda context: rows[min(len(context), len(rows) - 1)]


def toys(size: int, zeros: float) -> list[tuple[Model, Model]]:
    """Random (p, q) pairs; `zeros` is the share of tokens that each forbids."""
    return [(ToyModel(f"p{i}", size, zeros), ToyModel(f"q{i}", size, zeros)) for i in SEEDS]


ADVERSARIAL = {
    "ties": (fixed([1 / 3, 1 / 3, 1 / 3]), fixed([0.5, 0.25, 0.25])),
    "point mass p": (fixed([0.0, 1.0, 0.0]), fixed([0.4, 0.3, 0.3])),
    "point mass q": (fixed([0.4, 0.3, 0.3]), fixed([0.0, 1.0, 0.0])),
    "equal": (fixed([0.2, 0.3, 0.5]), fixed([0.2, 0.3, 0.5])),
    "equal but for rounding": (fixed([0.1 + 0.2, 0.7, 0.0]), fixed([0.3, 0.7, 0.0])),
    "disjoint": (fixed([0.4, 0.6, 0.0, 0.0]), fixed([0.0, 0.0, 0.5, 0.5])),
    "disjoint later": (fixed([0.5, 0.5], [1.0, 0.0]), fixed([0.5, 0.5], [0.0, 1.0])),
    "almost never": (fixed([1e-9, 1 - 1e-9, 0.0]), fixed([1 - 1e-9, 0.0, 1e-9])),
}


@pytest.mark.parametrize("zeros", [0.0, 0.5])
@pytest.mark.parametrize(("size", "length"), SIZES)
@pytest.mark.parametrize("verifier", [RejectionVerifier(), SampledVerifier()], ids=lambda v: v.name)
def test_chains_leave_the_target_law_alone(verifier, size, length, zeros):
    for p, q in toys(size, zeros):
        for draft in (draw_chain(q, length), pick_chain(q, length)):
            assert bias(speculate(verifier, p, draft), p, length + 2) < EXACT


@pytest.mark.parametrize("zeros", [0.0, 0.5])
@pytest.mark.parametrize("widths", WIDTHS)
def test_fixed_trees_leave_the_target_law_alone(widths, zeros):
    for p, q in toys(3, zeros):
        call = speculate(SampledVerifier(), p, pick_tree(q, widths), num_calls=2)
        assert bias(call, p, len(widths) + 3) < EXACT


@pytest.mark.parametrize("zeros", [0.0, 0.5])
@pytest.mark.parametrize("widths", WIDTHS)
def test_drawn_trees_leave_the_target_law_alone(widths, zeros):
    """Siblings are i.i.d. draws, so duplicates among them occur."""
    for p, q in toys(2, zeros):
        call = speculate(SampledVerifier(), p, draw_tree(q, widths))
        assert bias(call, p, len(widths) + 2) < EXACT


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize(("size", "length"), [(2, 2), (3, 1), (2, 3)])
@pytest.mark.parametrize("verifier", [RejectionVerifier(), SampledVerifier()], ids=lambda v: v.name)
def test_consecutive_calls_leave_the_target_law_alone(verifier, size, length, zeros):
    for p, q in toys(size, zeros)[:3]:
        call = speculate(verifier, p, draw_chain(q, length), num_calls=2)
        assert bias(call, p, length + 3) < EXACT


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("verifier", [RejectionVerifier(), SampledVerifier()], ids=lambda v: v.name)
def test_adversarial_laws(verifier, name):
    p, q = ADVERSARIAL[name]
    for draft in (draw_chain(q, 2), pick_chain(q, 2)):
        assert bias(speculate(verifier, p, draft), p, 4) < EXACT


@pytest.mark.parametrize("widths", [(1, 1, 1), *WIDTHS])
def test_greedy_ids_equal_plain_decoding_whatever_is_drafted(widths):
    for p, q in toys(2, 0.0):
        for call in (
            speculate(GreedyVerifier(), p, draw_tree(q, widths)),
            speculate(GreedyVerifier(), p, pick_tree(q, widths), num_calls=3),
        ):
            assert all(tokens == _greedy(p, len(tokens)) for tokens, _ in exact_law(call))


def _greedy(p: Model, length: int) -> Context:
    tokens: Context = ()
    while len(tokens) < length:
        tokens += (int(p(tokens).argmax()),)
    return tokens


@pytest.mark.parametrize(("size", "length"), SIZES)
def test_rejection_accepts_as_often_as_the_closed_form(size, length):
    for p, q in toys(size, 0.3):
        call = speculate(RejectionVerifier(), p, draw_chain(q, length))
        assert expected_accepted(call) == pytest.approx(_expected(p, q, length, ()), abs=EXACT)


def _expected(p: Model, q: Model, length: int, path: Context) -> float:
    """E[tau] = sum_x min(p, q)(x) (1 + E[tau below x]): the product of 1 - TV along the draft."""
    if length == 0:
        return 0.0
    both = torch.minimum(p(path), q(path)).tolist()
    return sum(
        share * (1.0 + _expected(p, q, length - 1, (*path, x)))
        for x, share in enumerate(both)
        if share
    )


@pytest.mark.parametrize("widths", [(1, 1), (2, 1), (2, 2)])
def test_sampled_accepts_the_mass_of_the_children(widths):
    for p, q in toys(3, 0.0):
        draft = pick_tree(q, widths)
        call = speculate(SampledVerifier(), p, draft)
        assert expected_accepted(call) == pytest.approx(_mass(p, q, widths, ()), abs=EXACT)


def _mass(p: Model, q: Model, widths: tuple[int, ...], path: Context) -> float:
    if not widths:
        return 0.0
    children = q(path).topk(widths[0]).indices.tolist()
    return sum(float(p(path)[x]) * (1.0 + _mass(p, q, widths[1:], (*path, x))) for x in children)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_perfect_drafter_is_always_believed(length):
    for p, _ in toys(3, 0.3):
        sampled = exact_law(speculate(RejectionVerifier(), p, draw_chain(p, length)))
        assert {accepted for _, accepted in sampled} == {length}
        greedy = exact_law(speculate(GreedyVerifier(), p, pick_chain(p, length)))
        assert {accepted for _, accepted in greedy} == {length}


# Mutants: each known mistake is built once, and the enumeration must see it.


def worst(size: int, length: int, make: Callable[[Model, Model], tuple[object, Draft]]) -> float:
    """Largest bias over the toys of a mutant (verifier, draft)."""
    return max(
        bias(speculate(verifier, p, draft), p, length + 2)
        for p, q in toys(size, 0.0)
        for verifier, draft in [make(p, q)]
    )


def tempered(q: Model, temperature: float) -> Model:
    return lambda context: (q(context).log() / temperature).softmax(dim=0)


def recorded_as(q: Model, draft: Draft) -> Draft:
    """The same tokens, with the rows of q recorded as if they were the laws drawn from."""

    def mutant(context: Context, stream: Stream) -> DraftTree:
        tree = draft(context, stream)
        laws = [q(context + tree.path_tokens(tree.parents[i])) for i in range(len(tree))]
        return DraftTree.chain(tree.tokens, "mutant", laws)

    return mutant


def test_trap_1_a_law_of_another_temperature():
    def mutant(p, q):
        return RejectionVerifier(), recorded_as(q, draw_chain(tempered(q, 0.5), 3))

    assert worst(3, 3, mutant) > 0.1


def test_trap_1_a_greedy_draft_with_its_softmax_row():
    def mutant(p, q):
        return RejectionVerifier(), recorded_as(q, pick_chain(q, 3))

    assert worst(3, 3, mutant) > 0.3


def stopping(q: Model, length: int, keeps: Callable[[list[float], list[Tensor]], int]) -> Draft:
    """A sampled chain cut to `keeps(probabilities of the drawn tokens, laws)` tokens."""

    def draft(context: Context, stream: Stream) -> DraftTree:
        tree = draw_chain(q, length)(context, stream)
        drawn = [float(law[token]) for law, token in zip(tree.laws, tree.tokens, strict=True)]
        kept = keeps(drawn, list(tree.laws))
        return DraftTree.chain(tree.tokens[:kept], "stopping", tree.laws[:kept])

    return draft


def before_unlikely(drawn: list[float], laws: list[Tensor]) -> int:
    """Drops the first unlikely token, and what follows."""
    return next((i for i, probability in enumerate(drawn) if probability < 0.3), len(drawn))


def after_unlikely(drawn: list[float], laws: list[Tensor]) -> int:
    """Keeps the first unlikely token, and drops what follows."""
    return min(len(drawn), before_unlikely(drawn, laws) + 1)


def before_flat(drawn: list[float], laws: list[Tensor]) -> int:
    """Stops before a law without a clear favourite: what was drawn from it is not looked at."""
    return next((i for i, law in enumerate(laws) if float(law.max()) < 0.5), len(laws))


def while_likely(probabilities: list[float]) -> int:
    """Trims the tail once the product falls below a threshold."""
    product, kept = 1.0, 0
    for probability in probabilities:
        product *= probability
        if product < 0.3:
            break
        kept += 1
    return kept


@pytest.mark.parametrize("keeps", [before_unlikely, lambda drawn, laws: while_likely(drawn)])
def test_trap_2_whether_a_token_is_verified_depends_on_it(keeps):
    assert worst(3, 3, lambda p, q: (RejectionVerifier(), stopping(q, 3, keeps))) > 0.05


@pytest.mark.parametrize(
    "keeps",
    [
        after_unlikely,
        before_flat,
        lambda drawn, laws: while_likely([float(law.max()) for law in laws]),
    ],
)
def test_trap_2_stop_rules_that_look_at_laws_are_exact(keeps):
    assert worst(3, 3, lambda p, q: (RejectionVerifier(), stopping(q, 3, keeps))) < EXACT


class SamplePerPath(SampledVerifier):
    """The mistake of trap 3: each root-to-leaf path draws its own samples, the longest wins."""

    def verify(self, tree: DraftTree, p: Laws, rng: Stream) -> Verdict:
        leaves = [node for node in range(len(tree)) if not tree.children(node)]
        return max((self._along(tree.path(leaf), tree, p, rng) for leaf in leaves), key=_length)

    def _along(self, path: Context, tree: DraftTree, p: Laws, rng: Stream) -> Verdict:
        for depth, node in enumerate(path):
            token = p.draw(tree.parents[node], rng)
            if token != tree.tokens[node]:
                return Verdict(path[:depth], token)
        return Verdict(path, p.draw(path[-1], rng))


def _length(verdict: Verdict) -> int:
    return len(verdict.accepted)


def test_trap_3_a_fresh_sample_per_path():
    assert worst(3, 2, lambda p, q: (SamplePerPath(), pick_tree(q, (2, 1)))) > 0.05


def mapped(q: Model, adds: bool) -> Draft:
    """One token of a four-token drafter; its ids 0 and 3 are one token of the target."""
    to_target = torch.tensor([0, 1, 2, 0])

    def draft(context: Context, stream: Stream) -> DraftTree:
        law_V = q(context)
        token = int(to_target[stream.pick(law_V)])
        mapped_V = torch.zeros(3, dtype=torch.float64)
        if adds:
            mapped_V.index_add_(0, to_target, law_V)
        else:
            for draft_id, target_id in enumerate(to_target.tolist()):
                mapped_V[target_id] = law_V[draft_id]
        return DraftTree.chain((token,), "mapped", (mapped_V,))

    return draft


@pytest.mark.parametrize("adds", [True, False])
def test_trap_4_vocabulary_maps_add(adds):
    biases = [
        bias(speculate(RejectionVerifier(), p, mapped(ToyModel(f"wide{i}", 4), adds)), p, 3)
        for i, (p, _) in enumerate(toys(3, 0.0))
    ]
    assert max(biases) < EXACT if adds else max(biases) > 0.05


class KeyedGrid:
    """A stream whose draws are inverse CDFs of uniforms on a grid, looked up by a key.

    Exact for laws and coins that are multiples of 1 / cells: each key's uniform is one choice of
    a cell, enumerated by the script below, and two draws of one key see the same uniform.
    """

    def __init__(self, script: Stream, key: Callable[[int], object], cells: int) -> None:
        self.num_draws = 0
        self._script = script
        self._key = key
        self._cells = cells
        self.uniforms: dict[object, float] = {}

    def flip(self, probability: float) -> bool:
        return self._uniform() < probability

    def pick(self, law_V: Tensor) -> int:
        return int((law_V.cumsum(dim=0) > self._uniform()).nonzero()[0])

    def _uniform(self) -> float:
        key = self._key(self.num_draws)
        self.num_draws += 1
        if key not in self.uniforms:
            cell = self._script.pick(torch.full((self._cells,), 1.0 / self._cells))
            self.uniforms[key] = (cell + 0.5) / self._cells
        return self.uniforms[key]


@pytest.mark.parametrize(
    ("key", "is_right"),
    [
        (lambda draw: draw, True),
        (lambda draw: 0 if draw < 2 else draw, False),  # draft draw and acceptance test
        (lambda draw: 1 if draw == 2 else draw, False),  # acceptance test and the draw after it
    ],
)
def test_a_uniform_is_used_once(key, is_right):
    p, q = fixed([3 / 16, 13 / 16], [11 / 16, 5 / 16]), fixed([0.5, 0.5])
    call = speculate(RejectionVerifier(), p, draw_chain(q, 1))
    found = bias(lambda stream: call(KeyedGrid(stream, key, cells=16)), p, 2)
    assert found < EXACT if is_right else found > BIASED


@pytest.mark.parametrize("has_root", [True, False])
def test_keys_without_the_root_repeat_from_call_to_call(has_root):
    """Keyed by (root position, index) draws are independent; by the index alone they are not."""
    p, q = fixed([0.25, 0.75], [0.5, 0.5], [0.75, 0.25]), fixed([0.5, 0.5])

    def call(stream: Stream) -> tuple[Context, int]:
        uniforms: dict[object, float] = {}
        tokens: Context = ()
        for _ in range(2):
            root = len(tokens) if has_root else 0
            grid = KeyedGrid(stream, lambda draw, root=root: (root, draw), cells=4)
            grid.uniforms = uniforms
            tree = pick_chain(q, 1)(tokens, grid)
            verdict = SampledVerifier().verify(tree, ToyLaws(p, tokens, tree), grid)
            tokens += (*tree.path_tokens(len(verdict.accepted) - 1), verdict.token)
        return tokens, 0

    found = bias(call, p, 3)
    assert found < EXACT if has_root else found > BIASED


class Lenient(RejectionVerifier):
    """A lossy relative: accepts with min(1, p / (0.6 q))."""

    def verify(self, tree: DraftTree, p: Laws, rng: Stream) -> Verdict:
        for node, token in enumerate(tree.tokens):
            stands = acceptance(p.log_law(node - 1), tree.law(node), token) / 0.6
            if not rng.flip(min(1.0, stands)):
                return Verdict(tuple(range(node)), p.draw(node - 1, rng))
        return Verdict(tuple(range(len(tree))), p.draw(len(tree) - 1, rng))


def test_the_enumerator_sees_lenience():
    assert worst(3, 2, lambda p, q: (Lenient(), draw_chain(q, 2))) > 0.02


def test_the_script_visits_every_branch_once():
    law = exact_law(lambda stream: (stream.flip(0.25), stream.pick(torch.tensor([0.5, 0.0, 0.5]))))
    assert law == {(True, 0): 0.125, (True, 2): 0.125, (False, 0): 0.375, (False, 2): 0.375}
