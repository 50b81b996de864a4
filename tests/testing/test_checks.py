"""The conformance suite itself: for each defect a small broken part that must be caught."""

from collections.abc import Callable, Mapping

import pytest
import torch

from outrider.cache.table import BlockManager
from outrider.draft.base import Snapshot, Warmth
from outrider.request import Option
from outrider.sampling.rng import RootStream
from outrider.step import EMPTY_TREE, DraftTree, Kind, Verdict
from outrider.testing import (
    ScriptedDrafter,
    check_drafter,
    check_verifier,
    junk,
    junk_tree,
    tiny_engine,
)
from outrider.verify.base import ALL_KINDS, Exactness
from outrider.verify.rejection import RejectionVerifier
from outrider.verify.sampled import walk

VOCAB = 256
TOKENS = (20, 21, 22)


def caught(make: Callable[[], object], match: str, **more) -> None:
    with pytest.raises(AssertionError, match=match):
        check_drafter(make, **more)


# Drafters: what they propose.


class Lengths(ScriptedDrafter):
    """Chains of right and wrong guesses, and of the size that is asked for, give or take."""

    def __init__(self, *, deeper=0, token=None, source="scripted", width=0):
        super().__init__(self._propose_chain)
        self.deeper, self.token, self.source, self.width = deeper, token, source, width
        self.max_width = 2

    def _propose_chain(self, seq, plan):
        if self.width:
            width = min(plan.num_nodes, plan.width + self.width)
            return DraftTree(tokens=(30,) * width, parents=(-1,) * width, source=self.source)
        depth = min(plan.depth + self.deeper, plan.num_nodes)
        token = seq.tokens[-1] if self.token is None else self.token
        return DraftTree.chain([token] * depth, self.source)


def test_right_ones_pass():
    check_drafter(lambda: ScriptedDrafter(junk_tree(VOCAB)))
    check_drafter(Lengths)


def test_a_drafter_that_never_drafts_fails_unless_it_may():
    def silent():
        return ScriptedDrafter(lambda seq, plan: EMPTY_TREE)

    caught(silent, "scripted never drafted anything")
    check_drafter(silent, must_draft=False)


@pytest.mark.parametrize(("broken", "match"), [
    ({"token": VOCAB}, r"256.* outside the vocabulary of 256"),
    ({"token": -1}, r"-1.* outside the vocabulary of 256"),
    ({"width": 1}, "drafted 2 wide; planned were 1"),
    ({"source": "somebody"}, "source='somebody' is no drafter here"),
])  # fmt: skip
def test_trees_that_break_the_plan(broken, match):
    caught(lambda: Lengths(**broken), match)


def test_more_nodes_or_levels_than_planned():
    def too_many(seq, plan):
        return junk(VOCAB)(seq, plan._replace(depth=plan.depth + 1, num_nodes=plan.num_nodes + 1))

    caught(lambda: ScriptedDrafter(too_many), "more than was planned")
    caught(lambda: Lengths(deeper=1), "drafted 4 deep; planned were 3", speculation={"width": 2})


def test_a_tree_too_few_and_a_hand_in_the_sequence():
    class Short(ScriptedDrafter):
        def draft(self, rows, plan):
            return super().draft(rows, plan)[1:]

    def writes(seq, plan):
        seq.tokens.append(9)
        return EMPTY_TREE

    def turns(seq, plan):
        seq.seed += 1
        return EMPTY_TREE

    caught(lambda: Short(junk(VOCAB)), r"\d trees for \d rows")
    caught(lambda: ScriptedDrafter(writes), "wrote into the token log")
    caught(lambda: ScriptedDrafter(turns), "changed the output of .'r0', 0.")


# Drafters: what they hold.


class Holding(ScriptedDrafter):
    """Two blocks and a state per open sequence, given back."""

    def __init__(self):
        super().__init__(self._read)
        self.manager = BlockManager(64, 4)

    def open(self, seq):
        table, _ = self.manager.open(seq.tokens)
        assert self.manager.reserve(table, 8)
        seq.drafter_state[self.name] = table

    def _read(self, seq, plan):
        assert seq.drafter_state[self.name] is not None
        return DraftTree.chain(seq.tokens[:1], self.name)

    def close(self, seq):
        self.manager.free(seq.drafter_state.pop(self.name))


class ForgetsAborts(Holding):
    def close(self, seq):
        table = seq.drafter_state.pop(self.name)
        if seq.finish_reason != "abort":
            self.manager.free(table)


class ForgetsThePreempted(Holding):
    def close(self, seq):
        if seq.is_finished:
            super().close(seq)


class KeepsSequences(Holding):
    def __init__(self):
        super().__init__()
        self.mine = []

    def open(self, seq):
        super().open(seq)
        self.mine.append(seq)


class KeepsNames(Holding):
    def __init__(self):
        super().__init__()
        self.mine = {}

    def open(self, seq):
        super().open(seq)
        self.mine[seq.id] = 1


class OnePerRequest(Holding):
    """Completions of one prompt share a state: the first that ends takes it from the others."""

    def __init__(self):
        super().__init__()
        self.mine = {}

    def open(self, seq):
        self.mine[seq.request.id] = 1

    def _read(self, seq, plan):
        assert seq.request.id in self.mine, "no state"
        return DraftTree.chain(seq.tokens[:1], self.name)

    def close(self, seq):
        self.mine.pop(seq.request.id, None)


class ClosesItsPart(ScriptedDrafter):
    """A composer that closes what the engine closes."""

    name = "whole"

    def __init__(self, part):
        super().__init__(junk(VOCAB), self.name)
        self.part = part

    @classmethod
    def build(cls, surroundings):
        return cls(surroundings.drafters["ngram"])

    def parts(self, options):
        return ("ngram",)

    def close(self, seq):
        self.part.close(seq)


def test_one_that_gives_everything_back_passes():
    check_drafter(Holding)


@pytest.mark.parametrize(("make", "match"), [
    (ForgetsAborts, "KV blocks are still held after the last close"),
    (ForgetsThePreempted, "outlives the close"),
    (KeepsSequences, "still refers to .*r0#0"),
    (KeepsNames, "mine still knows .*r0#0"),
    (OnePerRequest, "no state"),
])  # fmt: skip
def test_what_is_not_given_back(make, match):
    caught(make, match)


# Drafters: what they leave behind.


class Counting(ScriptedDrafter):
    """Drafts how many tokens it has read, and saves that."""

    warmth = Warmth.R1

    def __init__(self):
        super().__init__(self._count)

    def open(self, seq):
        seq.drafter_state[self.name] = 0

    def _count(self, seq, plan):
        seq.drafter_state[self.name] = len(seq.tokens)
        return DraftTree.chain([len(seq.tokens)] * min(plan.depth, plan.num_nodes), self.name)

    def close(self, seq):
        del seq.drafter_state[self.name]

    def snapshot(self, seq):
        state = seq.drafter_state[self.name]
        return Snapshot(drafter=self.name, num_tokens=state, state=state) if state else None

    def restore(self, seq, snapshot):
        seq.drafter_state[self.name] = snapshot.state
        return snapshot.num_tokens


class ReadyForTooMuch(Counting):
    def restore(self, seq, snapshot):
        super().restore(seq, snapshot)
        return len(seq.tokens) + 1


class ReadyForNothingSaid(Counting):
    def restore(self, seq, snapshot):
        super().restore(seq, snapshot)


class RestoresNothing(Counting):
    """What it drafts depends on a state that is gone after a restore."""

    def _count(self, seq, plan):
        seq.drafter_state[self.name] += 1
        return DraftTree.chain(
            [seq.drafter_state[self.name]] * min(plan.depth, plan.num_nodes), self.name
        )

    def restore(self, seq, snapshot):
        return len(seq.tokens)


class RestoresWhatItCounted(RestoresNothing):
    restore = Counting.restore


class SavesForAnother(Counting):
    def snapshot(self, seq):
        state = seq.drafter_state[self.name]
        return Snapshot(drafter="another", num_tokens=1, state=state) if state else None


class SavesTheFuture(Counting):
    def snapshot(self, seq):
        return Snapshot(drafter=self.name, num_tokens=len(seq.tokens) + 1, state=1)


def test_snapshots_that_hold_pass():
    check_drafter(Counting)
    check_drafter(RestoresWhatItCounted)


@pytest.mark.parametrize(("make", "match"), [
    (ReadyForTooMuch, r"ready for \d+ of \d+ tokens after a restore"),
    (ReadyForNothingSaid, "ready for None of"),
    (RestoresNothing, "drafts .* after a restore, .* without"),
    (SavesForAnother, "a snapshot of drafter 'another'"),
    (SavesTheFuture, r"a snapshot covers (\d+) of"),
])  # fmt: skip
def test_snapshots_that_do_not(make, match):
    caught(make, match)


def test_a_state_that_cannot_leave_the_process():
    class SavesALiveThing(Counting):
        def snapshot(self, seq):
            return Snapshot(drafter=self.name, num_tokens=1, state=(i for i in "ab"))

    with pytest.raises(TypeError, match="pickle"):
        check_drafter(SavesALiveThing)


# Drafters: what they record.


class Drawing(ScriptedDrafter):
    """Draws from a law that depends on the last token and the depth; a tree is one level.

    The ways in which a subclass is wrong are its methods.
    """

    sample_methods = ("greedy", "probabilistic", "independent")
    max_width = 2

    def __init__(self):
        super().__init__(self._grow, name="drawing")

    def law(self, last, depth):
        weights = torch.tensor([7, 11, 13]).mul(last + 3 * depth).sin().exp().double()
        q_V = torch.zeros(VOCAB, dtype=torch.float64)
        q_V[list(TOKENS)] = weights / weights.sum()
        return q_V

    def stream(self, seq, depth=0, before=None):
        """What the token at a depth is drawn from; `before` is what the one above it was."""
        return before or RootStream(seq.seed, len(seq.tokens) - 1, "draft")

    def pick(self, q_V, stream):
        return stream.pick(q_V)

    def record(self, q_V, before_V):
        """What is recorded for a token from q; `before_V` is the law of the token before it."""
        return q_V

    def next_sibling(self, q_V, token):
        q_V = q_V.clone()
        q_V[token] = 0.0
        return q_V / q_V.sum()

    def keeps(self, q_V, token):
        """Whether a drawn token is drafted at all."""
        return True

    def _grow(self, seq, plan):
        method = seq.speculation.draft_sample_method
        if seq.shaper.is_greedy and method == "independent":
            return EMPTY_TREE
        if seq.shaper.is_greedy or method == "greedy":
            return DraftTree.chain([20] * min(plan.depth, plan.num_nodes), self.name)
        if plan.width == 1:
            return self._chain(seq, min(plan.depth, plan.num_nodes), method == "independent")
        return self._chains(seq, plan) if method == "independent" else self._siblings(seq, plan)

    def _chain(self, seq, length, is_alone):
        tokens, laws, before_V, stream = [], [], None, None
        for depth in range(length):
            stream = self.stream(seq, depth, stream)
            q_V = self.law(tokens[-1] if tokens else seq.tokens[-1], depth)
            token = self.pick(q_V, stream)
            if not self.keeps(q_V, token):
                break
            tokens.append(token)
            laws.append(self.record(q_V, q_V if before_V is None else before_V))
            before_V = q_V
        tree = DraftTree.chain(tokens, self.name, laws)
        if is_alone and tokens:
            tree.paths = (tuple(range(len(tokens))),)
        return tree

    def _siblings(self, seq, plan):
        stream, q_V = self.stream(seq), self.law(seq.tokens[-1], 0)
        tokens, laws = [], []
        for _ in range(min(2, plan.num_nodes)):
            tokens.append(self.pick(q_V, stream))
            laws.append(self.record(q_V, q_V))
            q_V = self.next_sibling(q_V, tokens[-1])
        parents = (-1,) * len(tokens)
        return DraftTree(tokens=tuple(tokens), parents=parents, laws=tuple(laws), source=self.name)

    def _chains(self, seq, plan):
        stream, q_V = self.stream(seq), self.law(seq.tokens[-1], 0)
        drawn = [self.pick(q_V, stream) for _ in range(2)]
        tokens = tuple(dict.fromkeys(drawn))
        if len(tokens) > plan.num_nodes:
            return EMPTY_TREE
        laws, parents = (self.record(q_V, q_V),) * len(tokens), (-1,) * len(tokens)
        paths = tuple((tokens.index(token),) for token in drawn)
        return DraftTree(tokens=tokens, parents=parents, laws=laws, paths=paths, source=self.name)


class DrawsSharper(Drawing):
    """At half the temperature that it records."""

    def pick(self, q_V, stream):
        return stream.pick(q_V**2 / (q_V**2).sum())


class PicksTheLikeliest(Drawing):
    """And records the law that it did not draw from."""

    def pick(self, q_V, stream):
        return int(q_V.argmax())


class RecordsTheRowBefore(Drawing):
    def record(self, q_V, before_V):
        return before_V


class DropsTheUnlikely(Drawing):
    """Stops before a token because of what it is (trap 2)."""

    def keeps(self, q_V, token):
        return float(q_V[token]) > 0.3


class UsesNoiseAgain(Drawing):
    """Uniforms keyed by a draft's own position come again after a rejection (1.4)."""

    def stream(self, seq, depth=0, before=None):
        return RootStream(seq.seed, len(seq.tokens) + depth, "draft")


class UsesTheVerifiersNoise(Drawing):
    def stream(self, seq, depth=0, before=None):
        return before or RootStream(seq.seed, len(seq.tokens) - 1, "verify")


class DrawsSiblingsFromTheFirstLaw(Drawing):
    """Without replacement, but records the law of the first for all."""

    def _siblings(self, seq, plan):
        tree = super()._siblings(seq, plan)
        tree.laws = tree.laws[:1] * len(tree)
        return tree


class LeavesDuplicatesOut(Drawing):
    """Lists a chain once that was drawn twice."""

    def _chains(self, seq, plan):
        tree = super()._chains(seq, plan)
        tree.paths = tuple(dict.fromkeys(tree.paths))
        return tree


class RecordsNothing(Drawing):
    def record(self, q_V, before_V):
        return None


class RecordsScores(Drawing):
    def record(self, q_V, before_V):
        return 2.0 * q_V


class RecordsAnotherVocabulary(Drawing):
    def record(self, q_V, before_V):
        return q_V[:100] / q_V[:100].sum()


class RecordsTheImpossible(Drawing):
    def pick(self, q_V, stream):
        stream.pick(q_V)
        return 23


class ChainsOfUnequalLength(Drawing):
    def _chains(self, seq, plan):
        q_V = self.law(0, 0)
        return DraftTree(
            tokens=(20, 21, 22), parents=(-1, 0, -1), laws=(q_V,) * 3, paths=((0, 1), (2,)),
            source=self.name,
        )  # fmt: skip


class ChainsBesideTheTree(Drawing):
    def _chains(self, seq, plan):
        tree = super()._chains(seq, plan)
        return EMPTY_TREE if len(tree) < 2 else DraftTree(
            tokens=tree.tokens, parents=(-1, 0), laws=tree.laws, paths=((0,), (1,)),
            source=self.name,
        )  # fmt: skip


NOT_DRAWN = "not drawn from the laws recorded"
NOT_THE_LAW = "chi-square .* of the output beyond"
USED_BEFORE = "depend on earlier draws"


def test_one_that_records_what_it_draws_from_passes():
    check_drafter(Drawing)


@pytest.mark.parametrize(("make", "match", "method", "width"), [
    (DrawsSharper, NOT_DRAWN, "probabilistic", 1),
    (DrawsSharper, NOT_DRAWN, "probabilistic", 2),
    (DrawsSharper, NOT_DRAWN, "independent", 2),
    (PicksTheLikeliest, NOT_DRAWN, "probabilistic", 1),
    (RecordsTheRowBefore, NOT_DRAWN, "probabilistic", 1),
    (DropsTheUnlikely, NOT_DRAWN, "probabilistic", 1),
    (UsesNoiseAgain, USED_BEFORE, "probabilistic", 1),
    (UsesTheVerifiersNoise, NOT_THE_LAW, "probabilistic", 1),
    (DrawsSiblingsFromTheFirstLaw, "probability 0|" + NOT_DRAWN, "probabilistic", 2),
    (LeavesDuplicatesOut, USED_BEFORE, "independent", 2),
    (RecordsNothing, "no draft came with the law", "probabilistic", 1),
    (RecordsScores, "is no law", "probabilistic", 1),
    (RecordsAnotherVocabulary, r"a law over \[100\], not over 256", "probabilistic", 1),
    (RecordsTheImpossible, "token 23 has probability 0", "probabilistic", 1),
    (ChainsOfUnequalLength, r"unequal lengths \[1, 2\]", "independent", 2),
    (ChainsBesideTheTree, "no path down from the root", "independent", 2),
])  # fmt: skip
def test_what_is_recorded_must_be_what_was_drawn_from(make, match, method, width):
    caught(make, match, speculation={"draft_sample_method": method, "width": width})


def test_engines_take_names_classes_and_functions():
    names = tiny_engine(
        drafters=[Holding, lambda: ScriptedDrafter(junk(VOCAB)), "suffix"]
    ).drafters.names()
    assert names == ["ngram", "draft_model", "scripted", "suffix"]


def test_a_composer_leaves_opening_and_closing_to_the_engine():
    with pytest.raises((AssertionError, KeyError)):
        check_drafter(ClosesItsPart)


# Verifiers.


class Rule:
    """Node-wise sampling, right in everything."""

    name, exactness, keyed_by = "rule", Exactness.EXACT, "position"
    accepts, greedy_only = ALL_KINDS, False
    options: Mapping[str, Option] = {}

    def verify(self, tree, p, rng):
        return walk(tree, lambda node: p.draw(node, rng))


class Greedy(Rule):
    exactness, greedy_only = Exactness.EXACT_GREEDY, True

    def verify(self, tree, p, rng):
        return walk(tree, p.argmax)


class GreedyByDraws(Greedy):
    """A greedy draw leaves the stream alone: at temperature 0 this is right."""

    def verify(self, tree, p, rng):
        return walk(tree, lambda node: p.draw(node, rng))


class Lossy(Rule):
    """Believes the first branch as long as it is not forbidden."""

    exactness, keyed_by = Exactness.LOSSY, "root"

    def verify(self, tree, p, rng):
        path = []
        for node, parent in enumerate(tree.parents):
            last = path[-1] if path else -1
            if parent == last and p.allows(last, tree.tokens[node]):
                path.append(node)
        return Verdict(tuple(path), p.argmax(path[-1] if path else -1))


def test_right_rules_pass():
    for rule in (Rule(), Greedy(), GreedyByDraws(), Lossy()):
        check_verifier(rule)


class GreedyTakesTheSecond(Greedy):
    """The correction is the likeliest token that was not drafted."""

    def verify(self, tree, p, rng):
        accepted, token = walk(tree, p.argmax)[:2]
        return Verdict(accepted[:1], token)


class GreedyBelievesOne(Greedy):
    def verify(self, tree, p, rng):
        accepted = (0,) if tree.tokens else ()
        return Verdict(accepted, p.argmax(accepted[-1] if accepted else -1))


class GreedyForAll(Greedy):
    greedy_only = False


class TossesACoin(Rule):
    def verify(self, tree, p, rng):
        rng.flip(0.5)
        return super().verify(tree, p, rng)


class DrawsOnceMore(Rule):
    def verify(self, tree, p, rng):
        verdict = super().verify(tree, p, rng)
        p.draw(-1, rng)
        return verdict


class DrawsEveryNode(Rule):
    """One draw per node, all in advance."""

    def verify(self, tree, p, rng):
        drawn = {node: p.draw(node, rng) for node in range(-1, len(tree))}
        return walk(tree, drawn.__getitem__)


class LetsDraftsTurnTheNoise(Rule):
    """The law is right; the tokens are no function of the seed."""

    def verify(self, tree, p, rng):
        shift = tree.tokens[0] if tree.tokens else 0

        def draw(node):
            p_V = p.law(node)
            return (rng.pick(p_V.roll(shift)) - shift) % len(p_V)

        return walk(tree, draw)


class Skips(Rule):
    """Leaves a node of the path out."""

    def verify(self, tree, p, rng):
        accepted, token, *_ = super().verify(tree, p, rng)
        return Verdict(accepted[1:], token)


class SkipsLossy(Lossy):
    def verify(self, tree, p, rng):
        accepted, token, *_ = super().verify(tree, p, rng)
        return Verdict(accepted[1:], token)


class UpsideDown(Lossy):
    def verify(self, tree, p, rng):
        accepted, token, *_ = super().verify(tree, p, rng)
        return Verdict(accepted[::-1], token)


class TakesAllSiblings(Lossy):
    accepts = frozenset({Kind.PICKED_TREE})

    def verify(self, tree, p, rng):
        return Verdict(tuple(tree.children(-1)), p.argmax(-1))


class NodesThatAreNotThere(Lossy):
    def verify(self, tree, p, rng):
        return Verdict((len(tree),), p.argmax(-1))


class TokensThatAreNotThere(Lossy):
    def verify(self, tree, p, rng):
        return Verdict((), len(p.law(-1)))


class BelievesAnything(Lossy):
    """Lets a draft stand that a grammar forbids."""

    def verify(self, tree, p, rng):
        path = tree.path(len(tree) - 1)
        return Verdict(path, p.argmax(path[-1] if path else -1))


class Remembers(Lossy):
    num_calls = 0

    def verify(self, tree, p, rng):
        self.num_calls += 1
        return Lossy.verify(self, tree, p, rng) if self.num_calls % 3 else Verdict((), p.argmax(-1))


class TakesTheTargetsLawForTheResidual(RejectionVerifier):
    def verify(self, tree, p, rng):
        return next(
            (
                Verdict(tuple(range(node)), rng.pick(p.law(node - 1)))
                for node, token in enumerate(tree.tokens)
                if not rng.flip(min(1.0, self._ratio(p, tree, node, token)))
            ),
            None,
        ) or Verdict(tuple(range(len(tree))), p.draw(len(tree) - 1, rng))

    def _ratio(self, p, tree, node, token):
        q_V = tree.law(node)
        return float(p.law(node - 1)[token]) / (1.0 if q_V is None else float(q_V[token]))


class NeedsADraft(Lossy):
    def verify(self, tree, p, rng):
        assert tree.tokens, "nothing was drafted"
        return super().verify(tree, p, rng)


class TakesNothing(Rule):
    accepts = frozenset()


@pytest.mark.parametrize(("rule", "match"), [
    (GreedyTakesTheSecond, "forbid"),
    (GreedyBelievesOne, "forbid|law off by"),
    (GreedyForAll, "set greedy_only"),
    (TossesACoin, "no coins"),
    (DrawsOnceMore, r"2 picks for 1 positions"),
    (DrawsEveryNode, r"\d picks for \d positions"),
    (LetsDraftsTurnTheNoise, "drafts change the tokens of seed 0"),
    (Skips, "is no path from the root|law off by"),
    (SkipsLossy, "is no path from the root"),
    (UpsideDown, "is no path from the root"),
    (TakesAllSiblings, "is no path from the root"),
    (NodesThatAreNotThere, "is no path from the root"),
    (TokensThatAreNotThere, r"token 2 is outside the vocabulary of 2"),
    (BelievesAnything, "tokens through that the settings forbid"),
    (Remembers, "gave another verdict"),
    (TakesTheTargetsLawForTheResidual, "law off by"),
    (NeedsADraft, "nothing was drafted"),
    (TakesNothing, "must hold a kind or more"),
])  # fmt: skip
def test_broken_rules_are_caught(rule, match):
    with pytest.raises(AssertionError, match=match):
        check_verifier(rule())
