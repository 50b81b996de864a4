"""Prompt lookup: propose what followed the last occurrence of the text's own ending.

Saxena 2023 (prompt lookup decoding); algorithms.md 4.9. The most recent match wins; the index is
per sequence and costs O(longest n-gram) per committed token.
"""

from collections.abc import Sequence as Items

from outrider.draft.base import Snapshot, Warmth
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, Commit, DraftTree, Plan, Row, RowPlan, TargetOutput


class NgramIndex:
    """Where each n-gram of a growing text last ended, the ending itself left out."""

    def __init__(self, shortest: int, longest: int) -> None:
        self.shortest = shortest
        self.longest = longest
        self.num_indexed = 0
        self._last_end: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Items[int]) -> None:
        """Indexes n-grams that end before the last token, so that an ending never finds itself."""
        for end in range(self.num_indexed, len(tokens) - 1):
            for n in range(self.shortest, min(self.longest, end + 1) + 1):
                self._last_end[tuple(tokens[end - n + 1 : end + 1])] = end
        self.num_indexed = max(self.num_indexed, len(tokens) - 1)

    def matches(self, tokens: Items[int]) -> list[int]:
        """Positions after earlier occurrences of the ending, longest match first."""
        ends = []
        for n in range(min(self.longest, len(tokens)), self.shortest - 1, -1):
            end = self._last_end.get(tuple(tokens[-n:]))
            if end is not None and end + 1 not in ends:
                ends.append(end + 1)
        return ends


class NgramDrafter:
    """Drafts from the sequence's own prompt and output; branches are matches of other lengths."""

    name = "ngram"
    needs: tuple[str, ...] = ()
    warmth = Warmth.R0
    default_draft_tokens = 5
    max_width = 16
    draws = False

    def open(self, seq: Sequence) -> None:
        spec = seq.speculation
        index = NgramIndex(spec.prompt_lookup_min, spec.prompt_lookup_max)
        seq.drafter_state[self.name] = index

    def draft(self, rows: Items[Row], plan: Plan) -> list[DraftTree]:
        return [self._tree(row.seq, part) for row, part in zip(rows, plan, strict=True)]

    def _tree(self, seq: Sequence, plan: RowPlan) -> DraftTree:
        index: NgramIndex = seq.drafter_state[self.name]
        index.extend(seq.tokens)
        starts = index.matches(seq.tokens)[: plan.width]
        if not starts or plan.depth < 1:
            return EMPTY_TREE
        chains = [continuation(seq.tokens, start, plan.depth) for start in starts]
        if len(chains) == 1:
            return DraftTree.chain(chains[0][: plan.num_nodes], self.name)
        return merge(chains, plan.num_nodes, self.name)

    def observe(self, commits: Items[Commit], output: TargetOutput) -> None:
        """Nothing to learn before the next draft: the index reads the token log then."""

    def close(self, seq: Sequence) -> None:
        seq.drafter_state.pop(self.name, None)

    def snapshot(self, seq: Sequence) -> Snapshot | None:
        return None

    def restore(self, seq: Sequence, snapshot: Snapshot) -> int:
        self.open(seq)
        return len(seq.tokens)


def continuation(tokens: Items[int], start: int, length: int) -> list[int]:
    """`length` tokens from `start` on; past the end it goes on with what it has just proposed."""
    drafted = list(tokens[start : start + length])
    period = len(drafted)
    while len(drafted) < length:
        drafted.append(drafted[len(drafted) - period])
    return drafted


def merge(chains: list[list[int]], num_nodes: int, source: str) -> DraftTree:
    """A tree of at most `num_nodes` nodes; equal prefixes share nodes, earlier chains lead."""
    tokens: list[int] = []
    parents: list[int] = []
    node_of: dict[tuple[int, int], int] = {}
    for chain in chains:
        parent = -1
        for token in chain:
            if (parent, token) not in node_of:
                if len(tokens) == num_nodes:
                    break
                node_of[parent, token] = len(tokens)
                tokens.append(token)
                parents.append(parent)
            parent = node_of[parent, token]
    return DraftTree(tokens=tuple(tokens), parents=tuple(parents), source=source)
