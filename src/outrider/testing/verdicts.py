"""check_verifier: what every rule must pass, built in or from a stranger.

Each check raises AssertionError with what broke.
"""

from itertools import product
from typing import TypeAlias

from torch import Tensor

from outrider.sampling.laws import Laws
from outrider.sampling.rng import PositionStream, RootStream, Stream
from outrider.step import EMPTY_TREE, DraftTree, Kind, Verdict
from outrider.testing.enumerate import (
    Context,
    Draft,
    Model,
    ToyLaws,
    ToyModel,
    bias,
    draw_chain,
    draw_chains,
    draw_siblings,
    exact_law,
    pick_chain,
    pick_tree,
    speculate,
)
from outrider.verify.base import Exactness, Verifier

TOLERANCE = 1e-10
SIZES = ((2, 2), (3, 2), (2, 3), (3, 3))
POINT_MASSES = 1.0  # the share of zeros that leaves each law one token


def check_verifier(verifier: Verifier) -> None:
    """Enumerates every verdict on every kind of proposal the rule accepts.

    All of them are judged (`Judged`). The law of an exact rule is the target's, that of an exact
    greedy one plain greedy decoding; an exact rule that is keyed by position gives the tokens of
    plain decoding.
    """
    _check_claims(verifier)
    rule, is_greedy = Judged(verifier), verifier.exactness is Exactness.EXACT_GREEDY
    drafts = ((kind.value, kind) for kind in sorted(verifier.accepts))
    shares = (POINT_MASSES,) if is_greedy else (0.0, 0.4, POINT_MASSES)
    for told, kind in (("nothing", None), *drafts):
        for (size, depth), zeros, seed in product(SIZES, shares, range(3)):
            p = ToyModel(f"p{seed}", size, zeros)
            q = p if seed == 2 else ToyModel(f"q{seed}", size, min(zeros, 0.4))
            call = speculate(rule, p, propose(kind, q, depth) if kind else _nothing)
            if verifier.exactness in (Exactness.EXACT, Exactness.EXACT_GREEDY):
                off = bias(call, p, depth + 2)
                named = f"{verifier.name}: law off by {off:.2e} on a {told} (V={size}, {zeros=})"
                assert off < TOLERANCE, named
            else:
                exact_law(call)
        if verifier.keyed_by == "position" and verifier.exactness is Exactness.EXACT:
            _check_same_tokens(verifier, kind)


def propose(kind: Kind, q: Model, depth: int) -> Draft:
    """A small proposal of that kind from a toy drafter, for enumeration."""
    return {
        Kind.PICKED_CHAIN: pick_chain(q, depth),
        Kind.PICKED_TREE: pick_tree(q, (2, 1)),
        Kind.DRAWN_CHAIN: draw_chain(q, depth),
        Kind.DRAWN_CHAINS: draw_chains(q, 2, min(depth, 2)),
        Kind.DRAWN_TREE: draw_siblings(q, (2, 1)),
        Kind.MIXED_TREE: draw_siblings(q, (2, 1), num_picked=1),
    }[kind]


def _nothing(context: Context, stream: object) -> DraftTree:
    return EMPTY_TREE


def _check_claims(verifier: Verifier) -> None:
    name, exactness = verifier.name, verifier.exactness
    assert isinstance(exactness, Exactness), f"{name}: exactness={exactness!r}"
    assert verifier.keyed_by in ("position", "root"), f"{name}: keyed_by={verifier.keyed_by!r}"
    is_kinds = verifier.accepts and all(isinstance(kind, Kind) for kind in verifier.accepts)
    assert is_kinds, f"{name}: accepts={verifier.accepts!r} must hold a kind or more"
    is_fair = verifier.greedy_only or exactness is not Exactness.EXACT_GREEDY
    assert is_fair, f"{name}: only greedy requests can be exact-greedy: set greedy_only"
    for option, about in verifier.options.items():
        about.check(option, about.default)


def _check_same_tokens(verifier: Verifier, kind: Kind | None) -> None:
    """Under production streams a seed gives the same tokens whatever is drafted."""
    size = 4
    for seed in range(3):
        p, q = ToyModel("p", size, 0.2), ToyModel("q", size)
        plain = _decode(verifier, p, _nothing, seed)
        drafted = _decode(verifier, p, propose(kind, q, 3) if kind else _nothing, seed)
        assert drafted == plain, f"{verifier.name}: drafts change the tokens of seed {seed}"


def _decode(verifier: Verifier, p: Model, draft: Draft, seed: int, length: int = 12) -> Context:
    tokens: Context = ()
    while len(tokens) < length:
        tree = draft(tokens, RootStream(seed, len(tokens), "draft"))
        stream = PositionStream(seed, len(tokens))
        verdict = verifier.verify(tree, ToyLaws(p, tokens, tree), stream)
        tokens += (*(tree.tokens[node] for node in verdict.accepted), verdict.token)
    return tokens[:length]


class Judged:
    """A rule, each of whose verdicts is judged: well-formed, pure, and drawn as the rule says.

    AssertionError for a path that does not lead down from the root; relaxed nodes off that path, or
    of a rule that is not lossy; a token outside the vocabulary; a second verdict on the same tree,
    laws and choices that differs from the first; in a rule that is keyed by position and exact a
    coin, or another number of picks than one per token emitted; a token that the settings forbid,
    unless the rule is synthetic.
    """

    def __init__(self, rule: Verifier) -> None:
        self._rule = rule

    def verify(self, tree: DraftTree, p: Laws, rng: Stream) -> Verdict:
        noted = Noted(rng)
        verdict = self._rule.verify(tree, p, noted)
        self._check_path(verdict, tree)
        self._check_tokens(verdict, tree, p)
        self._check_draws(verdict, noted.drawn)
        replay = Replayed(noted.drawn)
        is_pure = self._rule.verify(tree, p, replay) == verdict and not replay.drawn
        assert is_pure, f"{self._rule.name}: the same tree, laws and choices gave another verdict"
        return verdict

    def _check_path(self, verdict: Verdict, tree: DraftTree) -> None:
        name, accepted = self._rule.name, verdict.accepted
        assert not verdict.error, f"{name} fails a request over a toy: {verdict.error}"
        told = f"{name}: accepted={accepted} is no path from the root of parents={tree.parents}"
        assert isinstance(accepted, tuple), told
        assert all(0 <= node < len(tree) for node in accepted), told
        assert not accepted or accepted == tree.path(accepted[-1]), told
        is_lossy = self._rule.exactness is Exactness.LOSSY
        told = f"{name}: relaxed={verdict.relaxed} of accepted={accepted}"
        assert set(verdict.relaxed) <= set(accepted), told
        assert is_lossy or not verdict.relaxed, f"{told}: only a lossy rule relaxes"

    def _check_tokens(self, verdict: Verdict, tree: DraftTree, p: Laws) -> None:
        name, token = self._rule.name, verdict.token
        at = (-1, *verdict.accepted)
        size = len(p.law(at[-1]))
        assert 0 <= token < size, f"{name}: token {token} is outside the vocabulary of {size}"
        if self._rule.exactness is not Exactness.SYNTHETIC:
            emitted = (*(tree.tokens[node] for node in verdict.accepted), token)
            forbidden = [t for node, t in zip(at, emitted, strict=True) if not p.allows(node, t)]
            assert not forbidden, f"{name} let tokens through that the settings forbid: {forbidden}"

    def _check_draws(self, verdict: Verdict, drawn: "Drawn") -> None:
        name, rule = self._rule.name, self._rule
        if rule.keyed_by != "position" or rule.exactness is Exactness.SYNTHETIC:
            return
        num_coins = sum(isinstance(draw, bool) for draw in drawn)
        assert not num_coins, f"{name} is keyed by position, and a coupled stream has no coins"
        if rule.exactness is Exactness.EXACT:
            told = f"{name}: {len(drawn)} picks for {len(verdict.accepted) + 1} positions"
            assert len(drawn) == len(verdict.accepted) + 1, told


Drawn: TypeAlias = list[bool | int]


class Noted:
    """A stream that keeps what was drawn: coins as truth values, picks as numbers."""

    def __init__(self, stream: Stream) -> None:
        self.drawn: Drawn = []
        self._stream = stream

    def pick(self, law_V: Tensor) -> int:
        token = self._stream.pick(law_V)
        self.drawn.append(token)
        return token

    def flip(self, probability: float) -> bool:
        is_heads = self._stream.flip(probability)
        self.drawn.append(is_heads)
        return is_heads


class Replayed:
    """A stream that gives what was drawn before, in order; `drawn` is what is left."""

    def __init__(self, drawn: Drawn) -> None:
        self.drawn = list(drawn)

    def pick(self, law_V: Tensor) -> int:
        return int(self._next())

    def flip(self, probability: float) -> bool:
        return bool(self._next())

    def _next(self) -> bool | int:
        assert self.drawn, "another number of draws the second time"
        return self.drawn.pop(0)
