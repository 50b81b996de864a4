"""BlockVerifier: exact law, expected acceptance in closed form, known mistakes, and its edges."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from outrider.sampling.laws import Laws
from outrider.sampling.rng import RootStream, Stream
from outrider.step import DraftTree, Kind, Verdict
from outrider.testing import (
    ToyLaws,
    ToyModel,
    bias,
    check_verifier,
    draw_chain,
    exact_law,
    pick_chain,
    speculate,
)
from outrider.testing.enumerate import Context, Draft, Model
from outrider.verify.base import Verifier
from outrider.verify.block import BlockVerifier, correction, excess, longest_block, weigh
from outrider.verify.rejection import RejectionVerifier
from tests.verify.toy_problems import BIASED, EXACT, accepted_on_average, law, toys

SIZES = [(2, 2), (3, 2), (2, 3), (3, 3)]


def fixed(*weights: float) -> Model:
    """The same law everywhere."""
    law_V = law(*weights)
    return lambda context: law_V


# The law of the output.


def test_it_passes_what_every_verifier_must():
    check_verifier(BlockVerifier())


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize(("size", "length"), SIZES)
def test_the_output_law_is_the_target_s(size, length, zeros):
    for p, q in toys(size, zeros):
        for draft in (draw_chain(q, length), pick_chain(q, length)):
            assert bias(speculate(BlockVerifier(), p, draft), p, length + 2) < EXACT


@pytest.mark.parametrize(("size", "length"), [(2, 2), (3, 1), (2, 3)])
def test_consecutive_calls_leave_the_target_law_alone(size, length):
    for p, q in toys(size, 0.3)[:4]:
        call = speculate(BlockVerifier(), p, draw_chain(q, length), num_calls=2)
        assert bias(call, p, length + 3) < EXACT


@pytest.mark.parametrize(
    ("p", "q"),
    [
        (fixed(0.0, 1.0, 0.0), fixed(0.4, 0.3, 0.3)),
        (fixed(0.4, 0.3, 0.3), fixed(0.0, 1.0, 0.0)),
        (fixed(0.1 + 0.2, 0.7, 0.0), fixed(0.3, 0.7, 0.0)),  # equal but for rounding
        (fixed(0.4, 0.6, 0.0, 0.0), fixed(0.0, 0.0, 0.5, 0.5)),
        (fixed(1e-9, 1 - 1e-9, 0.0), fixed(1 - 1e-9, 0.0, 1e-9)),
    ],
)
def test_adversarial_laws(p, q):
    assert bias(speculate(BlockVerifier(), p, draw_chain(q, 3)), p, 5) < EXACT


class ByDefinition(BlockVerifier):
    """The rule as the paper states it: prefixes from the shortest on, a coin for every one."""

    def verify(self, tree: DraftTree, p: Laws, rng: Stream) -> Verdict:
        num_tokens = len(tree)
        weight, accepted, kept = 1.0, 0, 1.0
        for i, token in enumerate(tree.tokens):
            q_V = tree.law(i)
            weight = min(1.0, weight * float(p.law(i - 1)[token]) / float(q_V[token]))
            chance = weight
            if i + 1 < num_tokens:
                rest = float((weight * p.law(i) - tree.law(i + 1)).clamp(min=0).sum())
                room = rest + 1.0 - weight
                chance = rest / room if room > 0 else 1.0
            if rng.flip(chance):
                accepted, kept = i + 1, weight
        if accepted == num_tokens:
            return Verdict(tuple(range(accepted)), p.draw(accepted - 1, rng))
        rest_V = (kept * p.law(accepted - 1) - tree.law(accepted)).clamp(min=0)
        return Verdict(tuple(range(accepted)), rng.pick(rest_V / rest_V.sum()))


@pytest.mark.parametrize(("size", "length"), SIZES)
def test_the_longest_first_is_the_definition(size, length):
    for p, q in toys(size, 0.3):
        fast = exact_law(speculate(BlockVerifier(), p, draw_chain(q, length)))
        slow = exact_law(speculate(ByDefinition(), p, draw_chain(q, length)))
        off = max(abs(fast.get(key, 0.0) - slow.get(key, 0.0)) for key in fast | slow)
        assert off < EXACT


# How many drafts stand.


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize(("size", "length"), SIZES)
def test_it_accepts_as_often_as_the_closed_form(size, length, zeros):
    for p, q in toys(size, zeros):
        seen = accepted_on_average(BlockVerifier(), p, draw_chain(q, length))
        assert seen == pytest.approx(sum_of_weights(p, q, length), abs=EXACT)


def sum_of_weights(
    p: Model, q: Model, length: int, path: Context = (), weight: float = 1.0
) -> float:
    """sum_i E_q[weight_i] below a path, with weight_i = min(1, weight_{i-1} p/q)."""
    if length == 0:
        return 0.0
    total = 0.0
    for x, q_x in enumerate(q(path).tolist()):
        if q_x > 0:
            below = min(1.0, weight * float(p(path)[x]) / q_x)
            total += q_x * (below + sum_of_weights(p, q, length - 1, (*path, x), below))
    return total


@pytest.mark.parametrize(("size", "length"), SIZES)
def test_it_accepts_no_less_than_token_rejection(size, length):
    gains = []
    for p, q in toys(size) + toys(size, 0.4):
        rejection, block = (
            accepted_on_average(rule, p, draw_chain(q, length))
            for rule in (RejectionVerifier(), BlockVerifier())
        )
        gains.append(block - rejection)
    assert min(gains) > -EXACT
    assert max(gains) > 0.005


def test_the_published_example():
    p, q = fixed(1 / 3, 2 / 3), fixed(2 / 3, 1 / 3)
    assert accepted_on_average(RejectionVerifier(), p, draw_chain(q, 2)) == pytest.approx(10 / 9)
    assert accepted_on_average(BlockVerifier(), p, draw_chain(q, 2)) == pytest.approx(11 / 9)


def test_point_masses_gain_nothing_and_lose_nothing():
    for p, q in toys(3):
        rejection, block = (
            accepted_on_average(rule, p, pick_chain(q, 3))
            for rule in (RejectionVerifier(), BlockVerifier())
        )
        assert block == pytest.approx(rejection, abs=EXACT)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_perfect_drafter_is_always_believed(length):
    for p, _ in toys(3, 0.3):
        law = exact_law(speculate(BlockVerifier(), p, draw_chain(p, length)))
        assert {accepted for _, accepted in law} == {length}


# Mutants: each known mistake is built once, and the enumeration must see it.


def worst(make: Callable[[Model, Model], tuple[Verifier, Draft]], length: int = 3) -> float:
    """Largest bias of a mutant (verifier, draft) over the toys."""
    return max(
        bias(speculate(verifier, p, draft), p, length + 2)
        for p, q in toys(3)
        for verifier, draft in [make(p, q)]
    )


def recorded_as(q: Model, draft: Draft) -> Draft:
    """The same tokens, with the rows of q recorded as if they were the laws drawn from."""

    def mutant(context: Context, stream: Stream) -> DraftTree:
        tree = draft(context, stream)
        laws = [q(context + tree.path_tokens(tree.parents[i])) for i in range(len(tree))]
        return DraftTree.chain(tree.tokens, "mutant", laws)

    return mutant


def test_a_draw_at_half_the_temperature_with_the_row_of_the_whole():
    def mutant(p: Model, q: Model) -> tuple[Verifier, Draft]:
        def sharp(context: Context) -> Tensor:
            return (q(context).log() / 0.5).softmax(dim=0)

        return BlockVerifier(), recorded_as(q, draw_chain(sharp, 3))

    assert worst(mutant) > 0.1


def test_a_greedy_draft_with_its_softmax_row():
    assert worst(lambda p, q: (BlockVerifier(), recorded_as(q, pick_chain(q, 3)))) > 0.3


@pytest.mark.parametrize(("keeps_it", "is_right"), [(True, True), (False, False)])
def test_an_unlikely_token_may_end_a_draft_but_not_be_dropped(keeps_it, is_right):
    def stopping(q: Model) -> Draft:
        def draft(context: Context, stream: Stream) -> DraftTree:
            tree = draw_chain(q, 3)(context, stream)
            drawn = [float(tree.laws[i][token]) for i, token in enumerate(tree.tokens)]
            end = next((i for i, probability in enumerate(drawn) if probability < 0.3), 3)
            end = min(3, end + keeps_it)
            return DraftTree.chain(tree.tokens[:end], "stopping", tree.laws[:end])

        return draft

    found = worst(lambda p, q: (BlockVerifier(), stopping(q)))
    assert found < EXACT if is_right else found > 0.05


class Uniform:
    """One uniform number, known ever more narrowly by draws that all share it."""

    def __init__(self, script: Stream) -> None:
        self._script = script
        self._low, self._high = 0.0, 1.0

    def flip(self, probability: float) -> bool:
        return self.pick(law(probability, 1.0 - probability)) == 0

    def pick(self, law_V: Tensor) -> int:
        """Where the number lies in the cumulated law, given what is known of it."""
        edges = [0.0, *law_V.cumsum(dim=0).tolist()[:-1], 1.0]
        parts = [(max(self._low, low), min(self._high, high)) for low, high in pairwise(edges)]
        overlap_V = law(*(max(0.0, high - low) for low, high in parts))
        token = self._script.pick(overlap_V / overlap_V.sum())
        self._low, self._high = parts[token]
        return token


class OneUniform(BlockVerifier):
    """All tests of a call look at the same uniform."""

    def verify(self, tree: DraftTree, p: Laws, rng: Stream) -> Verdict:
        class Coins(Uniform):
            def pick(self, law_V: Tensor) -> int:
                return rng.pick(law_V) if len(law_V) == 3 else super().pick(law_V)

        return super().verify(tree, p, Coins(rng))


def test_one_uniform_for_all_prefixes():
    assert worst(lambda p, q: (OneUniform(), draw_chain(q, 3))) > BIASED


@pytest.mark.parametrize(
    ("verifier", "is_right"), [(RejectionVerifier(), True), (BlockVerifier(), False)]
)
def test_a_draft_keyed_by_its_own_position_draws_again_what_was_refused(verifier, is_right):
    """Harmless where no decision depends on later tokens, so only under token rejection."""

    def call_with(p: Model, q: Model) -> Callable[[Stream], tuple[Context, int]]:
        def call(stream: Stream) -> tuple[Context, int]:
            uniforms: dict[int, Uniform] = {}

            def draft(context: Context, _: Stream) -> DraftTree:
                tokens: Context = ()
                for position in range(len(context), len(context) + 2):
                    uniform = uniforms.setdefault(position, Uniform(stream))
                    tokens += (uniform.pick(q(context + tokens)),)
                laws = [q(context + tokens[:i]) for i in range(2)]
                return DraftTree.chain(tokens, "keyed", laws)

            return speculate(verifier, p, draft, num_calls=2)(stream)

        return call

    found = max(bias(call_with(p, q), p, 3) for p, q in toys(2))
    assert found < EXACT if is_right else found > BIASED


# Edges.


@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [
        (0.2, 0.4, 0.25),
        (0.4, 0.1, 1.0),
        (0.0, 0.4, 0.0),
        (0.4, 0.0, 1.0),
        (0.0, 0.0, 0.0),  # never emit what the target forbids
        (1e-300, 1e-3, 5e-298),
        (1.0, 5e-324, 1.0),
    ],
)
def test_the_weight_is_the_ratio_of_the_laws(p, q, expected):
    assert weigh(0.5, law(p, 1 - p), law(q, 1 - q), 0) == pytest.approx(expected, rel=1e-12)


def test_the_weight_of_a_point_mass_is_p():
    assert weigh(0.5, law(0.25, 0.75), None, 1) == pytest.approx(0.375)
    assert weigh(1.0, law(0.0, 1.0), None, 0) == 0.0


def test_excess_and_correction_are_positive_parts():
    p_V, q_V = law(0.5, 0.3, 0.2), law(0.1, 0.6, 0.3)
    assert excess(0.8, p_V, q_V, 1).tolist() == pytest.approx([0.3, 0.0, 0.0])
    assert correction(0.8, p_V, q_V, 1).tolist() == [1.0, 0.0, 0.0]
    assert correction(0.8, p_V, None, 0).tolist() == pytest.approx([0.0, 0.6, 0.4])
    assert torch.equal(correction(1.0, p_V, p_V, 0), p_V)
    assert p_V.tolist() == [0.5, 0.3, 0.2]


def test_a_float32_law_is_read_in_float64():
    rest_V = correction(1.0, law(0.7, 0.2, 0.1), law(0.1, 0.2, 0.7, dtype=torch.float32), 2)
    assert rest_V.dtype == torch.float64
    assert rest_V.tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-7)


def test_a_law_over_another_vocabulary_is_a_bug_of_the_drafter():
    with pytest.raises(AssertionError, match="q over 2 tokens, p over 3"):
        excess(1.0, law(0.2, 0.3, 0.5), law(0.5, 0.5), 0)


def test_branches_are_refused():
    tree = DraftTree(tokens=(0, 1), parents=(-1, -1))
    laws = ToyLaws(fixed(0.5, 0.5), (), tree)
    with pytest.raises(AssertionError, match="chains"):
        BlockVerifier().verify(tree, laws, RootStream(0, 0, "verify"))
    assert Kind.DRAWN_TREE not in BlockVerifier().accepts


def test_granted_tokens_are_not_tested_again():
    rows = [law(0.0, 1.0), law(0.5, 0.5)]
    for root in range(20):
        n, _ = longest_block(RootStream(1, root, "verify"), rows, [None, None], (0, 1), start=1)
        assert n in (1, 2)
    assert longest_block(RootStream(1, 0, "verify"), rows[:1], [None, None], (0, 1)) == (0, 1.0)


class Counted(ToyLaws):
    """Notes the nodes whose laws are asked for."""

    def __init__(self, p: Model, tree: DraftTree) -> None:
        super().__init__(p, (), tree)
        self.asked: list[int] = []

    def law(self, node: int) -> Tensor:
        self.asked.append(node)
        return super().law(node)


def test_laws_below_a_forbidden_token_are_not_asked_for():
    tree = DraftTree.chain((1, 0, 1, 1), "test", (law(0.5, 0.5),) * 4)
    p = Counted(lambda context: law(0.0, 1.0), tree)
    BlockVerifier().verify(tree, p, RootStream(0, 0, "verify"))
    assert p.asked == [-1, 0]


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
@pytest.mark.parametrize("nearness", [0.0, 0.9, 1.0])
def test_large_float32_laws_stay_numbers(sharpness, nearness):
    size, length = 50_000, 7
    generator = torch.Generator().manual_seed(5)
    p_logits, noise = torch.randn(2, length + 1, size, generator=generator) * sharpness
    q_logits = nearness * p_logits + (1 - nearness) * noise
    p_rows, q_rows = p_logits.double().softmax(dim=1), q_logits.softmax(dim=1)
    p_rows[:, :100] = 0.0
    p_rows /= p_rows.sum(dim=1, keepdim=True)
    for root in range(3):
        tokens = [RootStream(3, root, "draft").pick(q_rows[i]) for i in range(length)]
        tree = DraftTree.chain(tokens, "test", list(q_rows[:length]))
        laws = ToyLaws(lambda context: p_rows[len(context)], (), tree)
        verdict = BlockVerifier().verify(tree, laws, Careful(3, root, "verify"))
        assert verdict.token >= 100
        assert all(tokens[node] >= 100 for node in verdict.accepted)


def test_production_streams_reach_the_target_law():
    """Two positions with real uniforms: draft and verify purposes of the same roots."""
    p, q = ToyModel("p", 3, 0.2), ToyModel("q", 3)
    num_calls, counts = 4000, torch.zeros(9, dtype=torch.float64)
    for root in range(num_calls):
        draft = draw_chain(q, 2)((), RootStream(7, root, "draft"))
        rng = RootStream(7, root, "verify")
        verdict = BlockVerifier().verify(draft, ToyLaws(p, (), draft), rng)
        tokens = (*(draft.tokens[node] for node in verdict.accepted), verdict.token)
        while len(tokens) < 2:
            tokens += (rng.pick(p(tokens)),)
        counts[3 * tokens[0] + tokens[1]] += 1
    true = torch.cat([p(())[x] * p((x,)) for x in range(3)])
    deviations = (counts / num_calls - true).abs() / (true * (1 - true) / num_calls).sqrt()
    assert float(deviations[true > 0].max()) < 4
    assert float(counts[true == 0].sum()) == 0
