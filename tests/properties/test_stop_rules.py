"""Chains that end by confidence keep the target's law; a rule that may drop what it drew does not.

The stop rule is the shipped one, in the shipped chain, inside the enumerator.
"""

import pytest

from outrider.draft.growth import Line
from outrider.sampling.rng import Stream
from outrider.step import DraftTree, StopRule
from outrider.testing import ToyModel, bias, exact_law, speculate
from outrider.testing.enumerate import Context, Draft, Model
from outrider.verify.block import BlockVerifier
from outrider.verify.gbv import GbvVerifier
from outrider.verify.greedy import GreedyVerifier
from outrider.verify.rejection import RejectionVerifier
from outrider.verify.sampled import SampledVerifier
from outrider.verify.spectr import SpectrVerifier
from outrider.verify.traversal import TraversalVerifier
from outrider.verify.tree import TreeVerifier

EXACT = 1e-12
BY_TOKEN = [RejectionVerifier(), BlockVerifier(), TreeVerifier(), TraversalVerifier()]
BY_CHAIN = [GbvVerifier(), GbvVerifier(rule="recursive"), SpectrVerifier()]
SIZES = [(2, 2), (3, 3), (2, 4)]
RULES = {  # such that chains end at every depth
    "as it is": StopRule(0.45, 1.0, 0.0),
    "calibrated": StopRule(0.4, 0.7, 0.3, 0.6),
    "after the first": StopRule(1.0, 1.0, 0.0),
}


def stopped(
    q: Model,
    length: int,
    stop: StopRule | None,
    kind: type[Line] = Line,
    *,
    draws: bool = True,
    num_paths: int = 0,
) -> Draft:
    """A chain of the laws of q, ended by the rule, as draft models grow it."""

    def draft(context: Context, stream: Stream) -> DraftTree:
        source = stream if draws else None
        line = kind(length, source, is_recorded=True, num_paths=num_paths, stop=stop)
        while line.wanted():
            line.take([q(context + tuple(line.tokens))])
        tree = line.tree("toy")
        tree.check()
        return tree

    return draft


def toys(size, zeros=0.0):
    return [(ToyModel(f"p{i}", size, zeros), ToyModel(f"q{i}", size, zeros)) for i in range(8)]


def depths(size, length, stop):
    """How long drafts come out, over all toys."""
    return {
        len(tree)
        for _, q in toys(size)
        for tree in exact_law(lambda stream, q=q: stopped(q, length, stop)((), stream))
    }


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("zeros", [0.0, 0.5])
@pytest.mark.parametrize(("size", "length"), SIZES)
@pytest.mark.parametrize("verifier", [*BY_TOKEN, SampledVerifier()], ids=lambda v: v.name)
def test_drawn_chains_that_stop_leave_the_law_alone(verifier, size, length, zeros, name):
    for p, q in toys(size, zeros):
        draft = stopped(q, length, RULES[name])
        assert bias(speculate(verifier, p, draft), p, length + 2) < EXACT


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("verifier", BY_CHAIN, ids=["selection", "recursive", "spectr"])
def test_chains_told_as_independent_ones_too(verifier, name):
    for p, q in toys(3, 0.3):
        draft = stopped(q, 3, RULES[name], num_paths=1)
        assert bias(speculate(verifier, p, draft), p, 5) < EXACT


@pytest.mark.parametrize("verifier", [*BY_TOKEN, SampledVerifier()], ids=lambda v: v.name)
def test_call_after_call_too(verifier):
    for p, q in toys(2, 0.3)[:4]:
        draft = stopped(q, 3, RULES["as it is"])
        assert bias(speculate(verifier, p, draft, num_calls=2), p, 6) < EXACT


@pytest.mark.parametrize("verifier", [*BY_TOKEN, SampledVerifier()], ids=lambda v: v.name)
def test_picked_chains_that_stop_leave_the_law_alone(verifier):
    for p, q in toys(3, 0.3):
        draft = stopped(q, 3, RULES["as it is"], draws=False)
        assert bias(speculate(verifier, p, draft), p, 5) < EXACT


def test_greedy_ids_are_those_of_plain_decoding():
    for p, q in toys(3):
        call = speculate(GreedyVerifier(), p, stopped(q, 3, RULES["as it is"]), num_calls=2)
        for tokens, _ in exact_law(call):
            assert all(token == int(p(tokens[:i]).argmax()) for i, token in enumerate(tokens))


def test_the_toys_stop_at_every_depth():
    assert depths(3, 3, RULES["as it is"]) == {1, 2, 3}
    assert depths(2, 4, RULES["as it is"]) == {2, 3, 4}
    assert depths(3, 3, RULES["calibrated"]) == {2, 3}
    assert depths(3, 3, RULES["after the first"]) == {1}


class DropsTheUnlikely(Line):
    """The mistake of trap 2: goes by the token that was drawn, and may leave that token out."""

    def take(self, laws):
        super().take(laws)
        drawn = float(laws[0][self.tokens[-1]])
        if self.stop is not None and self._survival_by_tokens(drawn) < self.stop.floor:
            for part in (self.tokens, self._laws, self._confidence):
                part.pop()
            self.depth = len(self.tokens)

    def _survival_by_tokens(self, drawn):
        before = [float(q_V[t]) for q_V, t in zip(self._laws, self.tokens, strict=True)][:-1]
        survival = self.stop.acceptance(drawn)
        for probability in before:
            survival *= self.stop.acceptance(probability)
        return survival


class LooksAtDrawnToken(Line):
    """Leaves out a token by its own probability alone."""

    def take(self, laws):
        super().take(laws)
        if float(laws[0][self.tokens[-1]]) < 0.3:
            for part in (self.tokens, self._laws, self._confidence):
                part.pop()
            self.depth = len(self.tokens)


@pytest.mark.parametrize("mutant", [DropsTheUnlikely, LooksAtDrawnToken])
@pytest.mark.parametrize("verifier", BY_TOKEN, ids=lambda v: v.name)
def test_a_rule_that_drops_what_it_drew_is_found(verifier, mutant):
    found = max(
        bias(speculate(verifier, p, stopped(q, 3, RULES["as it is"], mutant)), p, 5)
        for p, q in toys(3)
    )
    assert found > 0.05


def test_a_line_stops_where_the_product_says():
    """By hand: 0.9, then 0.9 * 0.6, then 0.9 * 0.6 * 0.5 is below 0.3: that token is the last."""
    confidence, line = [0.9, 0.6, 0.5, 0.9], Line(4, stop=StopRule(0.3, 1.0, 0.0))
    for value in confidence:
        if line.wanted():
            line.add(7, value)
    assert line.tree("x").confidence == (0.9, 0.6, 0.5)
    assert len(line.tree("x")) == 3


def test_without_a_rule_a_line_is_as_it_was():
    q = ToyModel("q", 3)
    bare = exact_law(lambda stream: stopped(q, 3, None)((), stream))
    told = exact_law(lambda stream: stopped(q, 3, StopRule(0.0, 1.0, 0.0))((), stream))
    assert {tree.tokens: w for tree, w in bare.items()} == {t.tokens: w for t, w in told.items()}
    assert all(tree.confidence == () for tree in bare)
    for tree in told:
        assert tree.confidence == tuple(float(q_V.max()) for q_V in tree.laws)
