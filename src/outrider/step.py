"""What one verb hands the next: Row, Batch, Plan, DraftTree, TargetOutput, Verdict, Commit.

Shape legend: N rows of one forward pass (all sequences), M nodes of one draft tree, V vocabulary,
D hidden width, A boundaries between layers of the target.
"""

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import NamedTuple, TypeAlias

import torch

from outrider.sequence import Sequence


class Kind(StrEnum):
    """What a proposal is, by how its tokens came about.

    Picked tokens are functions of the text alone; drawn ones come from a law recorded with them.
    """

    PICKED_CHAIN = "picked chain"
    PICKED_TREE = "picked tree"
    DRAWN_CHAIN = "drawn chain"
    DRAWN_CHAINS = "independently drawn chains"
    DRAWN_TREE = "tree of siblings drawn without replacement"
    MIXED_TREE = "tree of picked and drawn siblings"


class Row(NamedTuple):
    """One sequence's share of a step.

    Attributes:
        num_tokens: committed tokens to run, from `seq.num_cached` on.
        max_draft_nodes: draft nodes that KV slots and token budget leave room for.
    """

    seq: Sequence
    num_tokens: int
    max_draft_nodes: int

    @property
    def reaches_end(self) -> bool:
        """Whether this step computes the logits of the last committed token."""
        return self.num_tokens == self.seq.num_uncached


class Batch(NamedTuple):
    """What the scheduler chose to run; blocks are reserved. `preempted` lost their KV for it."""

    rows: list[Row]
    preempted: list[Sequence]


LEAST_SURE, MOST_SURE = 0.2, 1.0 - 1e-4  # confidence beyond counts as this: it tells no more
DEEPEST = 16  # likewise of depths
LOG_DEPTH = (0.0, *(math.log(depth) for depth in range(1, DEEPEST + 1)))


class StopRule(NamedTuple):
    """When a chain ends before its planned depth: once all of it is too unlikely to stand.

    After each token the drafter multiplies what is expected of the tokens so far; once the product
    is below the floor it drafts no more. The token that took it there is kept. So whether a token
    is drafted depends on the tokens before it and on the laws those were picked from, never on
    itself: what every rule of verification needs.

    Source: stopping by the probability that all so far stands, SpecDec++ (Huang et al. 2024); a
    logistic curve over the logit of the largest probability and the position, vLLM's adaptive
    verification.

    Attributes:
        floor: least probability that all so far stands at which one more is drafted; 0 never ends
            a chain, but has the drafter say how sure it was.
        slope, intercept: of acceptance over confidence, both as logits, for the first token.
        gain: added to the intercept times ln(depth): where many tokens stand, the text is easy.
    """

    floor: float
    slope: float
    intercept: float
    gain: float = 0.0

    def acceptance(self, confidence: float, depth: int = 1) -> float:
        """Probability that a token stands if all before it do.

        Args:
            confidence: the largest probability of the law it came from.
            depth: 1 for the first token.
        """
        intercept = self.intercept + self.gain * LOG_DEPTH[min(depth, DEEPEST)]
        return 0.5 + 0.5 * math.tanh(0.5 * (self.slope * logit(confidence) + intercept))


def logit(confidence: float) -> float:
    """ln(c / (1 - c)), for c bounded to what tells anything."""
    bounded = min(max(LEAST_SURE, confidence), MOST_SURE)
    return math.log(bounded / (1.0 - bounded))


class RowPlan(NamedTuple):
    """How far to speculate for one row; zero nodes is plain decoding.

    Attributes:
        drafter: name of the drafter, "" for none.
        depth: longest path drafted.
        width: branches at the root (1 is a chain).
        num_nodes: most nodes in the tree.
        stop: when a chain ends before that; a drafter that does not know how sure it is of a token,
            and one that drafts a wider tree, pays no heed to it.
    """

    drafter: str = ""
    depth: int = 0
    width: int = 1
    num_nodes: int = 0
    stop: StopRule | None = None


Plan: TypeAlias = list[RowPlan]


@dataclass(kw_only=True, slots=True, unsafe_hash=True)
class DraftTree:
    """Proposed tokens with parents; topological order, siblings in the order they were drawn.

    Nobody changes one. It is not frozen because one is made for each row of each step, and a frozen
    one takes three times as long to make.

    Attributes:
        tokens: M token ids.
        parents: M indices of parent nodes, -1 for the root (the last committed token).
        laws: per node the law it was drawn from, given the siblings before it: a dense [V]
            tensor, or None for a deterministic pick (point mass). Shorter than `tokens` is not
            allowed; () means every node is a point mass.
        paths: for independently drawn chains, one tuple of node indices per chain, in draw order;
            equal prefixes share nodes, equal chains are listed as often as they were drawn.
        source: name of the drafter.
        confidence: per node the largest probability of the law it was picked from; for a greedy
            request that is the drafter's law at temperature 1. () where the plan had no stop rule,
            or the drafter makes no estimate.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    laws: tuple[torch.Tensor | None, ...] = ()
    paths: tuple[tuple[int, ...], ...] = ()
    source: str = ""
    confidence: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def chain(
        cls,
        tokens: Items[int],
        source: str,
        laws: Items[torch.Tensor | None] = (),
        confidence: Items[float] = (),
    ) -> "DraftTree":
        """A tree of degree one."""
        return cls(
            tokens=tuple(tokens),
            parents=_chain_parents(len(tokens)),
            laws=tuple(laws),
            source=source,
            confidence=tuple(confidence),
        )

    @property
    def is_chain(self) -> bool:
        return self.parents == _chain_parents(len(self.parents))

    def law(self, node: int) -> torch.Tensor | None:
        return self.laws[node] if self.laws else None

    def children(self, node: int) -> list[int]:
        """Nodes below `node` (-1: the root), in draw order."""
        return [child for child, parent in enumerate(self.parents) if parent == node]

    def path(self, node: int) -> tuple[int, ...]:
        """Nodes from the root's child down to `node`; empty for the root."""
        nodes: list[int] = []
        while node >= 0:
            nodes.append(node)
            node = self.parents[node]
        return tuple(reversed(nodes))

    def depth(self, node: int) -> int:
        """1 for a child of the root, 0 for the root."""
        return len(self.path(node))

    def path_tokens(self, node: int) -> tuple[int, ...]:
        return tuple(self.tokens[i] for i in self.path(node))

    def check(self) -> None:
        """AssertionError where the tree breaks its own rules (a drafter's bug, not a user's)."""
        assert len(self.parents) == len(self.tokens), "one parent per token"
        if not self.is_chain:
            for node, parent in enumerate(self.parents):
                assert -1 <= parent < node, "parents before children"
        assert len(self.laws) in (0, len(self.tokens)), "one law per token, or none at all"
        assert len(self.confidence) in (0, len(self.tokens)), "sure of each token, or of none"


@cache
def _chain_parents(length: int) -> tuple[int, ...]:
    return tuple(range(-1, length - 1))


EMPTY_TREE = DraftTree()


class States(NamedTuple):
    """Hidden states of the target in one pass, handed out because a drafter reads them.

    Attributes:
        boundaries: which, rising: 0 is the embedding, j the residual stream before layer j, the
            last one the state before the final norm.
        tapped_AND: by boundary, all rows of the pass; per batch row its committed tokens and then
            its draft nodes, in batch order.
        start: per batch row, where its rows begin.
        num_chain: per batch row, how many committed tokens were run.
        num_cached: per batch row, position of the first of them.
    """

    boundaries: tuple[int, ...]
    tapped_AND: torch.Tensor
    start: list[int]
    num_chain: list[int]
    num_cached: list[int]


class TargetOutput(NamedTuple):
    """What the target said in one pass.

    Attributes:
        logits_NV: raw logits of the rows that were asked for: per batch row that reaches the
            end, its last committed token and then its draft nodes, in batch order.
        first: per batch row, where its logits begin in `logits_NV`; -1 if it asked for none.
        argmax_N: argmax token of each row of `logits_NV`, on the host; -1 where the logits are no
            numbers.
        states: where a drafter that is in use asked for some.
    """

    logits_NV: torch.Tensor
    first: list[int]
    argmax_N: list[int]
    states: States | None = None


class Verdict(NamedTuple):
    """Which guesses stand: a root-to-node path, and the token the target adds after it.

    Attributes:
        accepted: node indices, from a child of the root downwards.
        token: the bonus token (after a rejection also called the correction).
        error: why this one request cannot go on, if it cannot (then the rest is void).
        relaxed: accepted nodes that stand only because the rule is a lossy one.
    """

    accepted: tuple[int, ...]
    token: int
    error: str = ""
    relaxed: tuple[int, ...] = ()


class Commit(NamedTuple):
    """What one step added to one sequence.

    Attributes:
        tokens: new tokens, cut at a stop (so perhaps fewer than accepted + 1).
        num_drafted, num_accepted: nodes of the draft tree; nodes on the accepted path before
            the cut.
        num_kept: accepted nodes whose tokens were really committed.
        accepted: the accepted path as node indices.
        finish_reason: set when these are the sequence's last tokens.
        logprobs: per new token, if asked for: (its log-probability, {token id: log-probability}).
        error: why the sequence could not go on, with finish reason "error".
        num_relaxed: of the kept nodes, those that stand only because the rule is a lossy one.
    """

    seq: Sequence
    tree: DraftTree = EMPTY_TREE
    tokens: tuple[int, ...] = ()
    num_drafted: int = 0
    num_accepted: int = 0
    num_kept: int = 0
    accepted: tuple[int, ...] = ()
    finish_reason: str | None = None
    logprobs: tuple[tuple[float, dict[int, float]], ...] = ()
    error: str = ""
    num_relaxed: int = 0
