"""Drafters that follow a script: junk, trees, or exactly what they are told."""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence as Items

from outrider.draft.base import Snapshot, Warmth
from outrider.request import Option
from outrider.sequence import Sequence
from outrider.step import Commit, DraftTree, Plan, Row, RowPlan, TargetOutput

Propose = Callable[[Sequence, RowPlan], DraftTree]


class ScriptedDrafter:
    """Drafts what `propose(sequence, plan)` returns; notes what it is told.

    Attributes:
        opened, closed: ids of sequences, in order.
        num_observed: tokens seen in commits, by sequence id.
    """

    needs: tuple[str, ...] = ()
    warmth = Warmth.R0
    default_draft_tokens = 4
    default_width = min_width = 1
    max_width = 16
    default_num_nodes: int | None = None
    sample_methods: tuple[str, ...] = ("greedy",)
    options: Mapping[str, Option] = {}

    def __init__(self, propose: Propose, name: str = "scripted") -> None:
        self.name = name
        self.opened: list[str] = []
        self.closed: list[str] = []
        self._observed: list[tuple[str, int]] = []
        self._propose = propose

    @property
    def num_observed(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for name, count in self._observed:
            counts[name] += count
        return dict(counts)

    def open(self, seq: Sequence) -> None:
        self.opened.append(seq.id)

    def draft(self, rows: Items[Row], plan: Plan) -> list[DraftTree]:
        return [self._propose(row.seq, part) for row, part in zip(rows, plan, strict=True)]

    def observe(self, commits: Items[Commit], output: TargetOutput) -> None:
        self._observed += [(commit.seq.id, len(commit.tokens)) for commit in commits]

    def close(self, seq: Sequence) -> None:
        self.closed.append(seq.id)

    def snapshot(self, seq: Sequence) -> Snapshot | None:
        return None

    def restore(self, seq: Sequence, snapshot: Snapshot) -> int:
        return len(seq.tokens)


def junk(vocab_size: int, seed: int = 0) -> Propose:
    """Chains of random tokens."""
    rng = random.Random(seed)

    def propose(seq: Sequence, plan: RowPlan) -> DraftTree:
        depth = min(plan.depth, plan.num_nodes)
        return DraftTree.chain([rng.randrange(vocab_size) for _ in range(depth)], "scripted")

    return propose


def junk_tree(vocab_size: int, truth: Items[int] = (), seed: int = 0) -> Propose:
    """Random trees, as wide as planned; where `truth` holds the sequence's tokens, some are right.

    Args:
        truth: prompt and output of the sequence, if known.
    """
    rng = random.Random(seed)

    def propose(seq: Sequence, plan: RowPlan) -> DraftTree:
        tokens: list[int] = []
        parents: list[int] = []
        depths: list[int] = []
        for _ in range(plan.num_nodes):
            parent = rng.randrange(-1, len(tokens))
            depth = 1 + (depths[parent] if parent >= 0 else 0)
            if depth > plan.depth or (parent < 0 and parents.count(-1) == plan.width):
                continue
            at = len(seq.tokens) + depth - 1
            is_true = at < len(truth) and rng.random() < 0.7
            tokens.append(truth[at] if is_true else rng.randrange(vocab_size))
            parents.append(parent)
            depths.append(depth)
        return DraftTree(tokens=tuple(tokens), parents=tuple(parents), source="scripted")

    return propose


def oracle(truth: Items[int]) -> Propose:
    """Chains that are always right: `truth` is prompt and output of the sequence."""

    def propose(seq: Sequence, plan: RowPlan) -> DraftTree:
        start, depth = len(seq.tokens), min(plan.depth, plan.num_nodes)
        return DraftTree.chain(list(truth[start : start + depth]), "scripted")

    return propose
