"""Prompt lookup: propose what followed the last occurrence of the text's own ending.

Saxena 2023 (prompt lookup decoding). The most recent match wins; the index is
per sequence and costs O(longest n-gram) per committed token.
"""

from collections.abc import Mapping, Sequence as Items

from outrider.draft.base import Snapshot, Warmth
from outrider.request import Option, Options
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, Commit, DraftTree, Plan, Row, RowPlan, TargetOutput

TOKEN_BITS = 32


class NgramIndex:
    """After which position each n-gram of a growing text last stood.

    Attributes:
        matches: positions after earlier occurrences of the text's ending, longest match first.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self.shortest = shortest
        self.longest = longest
        self.num_indexed = 0
        self.matches: list[int] = []
        self._after: dict[int, int] = {}  # n-grams, last token first, behind a one

    def extend(self, tokens: Items[int]) -> None:
        """Enters the n-grams that end in new tokens; what the last ones replace are the matches."""
        after, matches, shortest = self._after, self.matches, self.shortest
        for stop in range(self.num_indexed + 1, len(tokens) + 1):
            matches, ngram = [], 1
            for length in range(1, min(self.longest, stop) + 1):
                ngram = ngram << TOKEN_BITS | tokens[stop - length]
                if length >= shortest:
                    earlier = after.get(ngram)
                    if earlier is not None:
                        if earlier in matches:
                            matches.remove(earlier)
                        matches.append(earlier)
                    after[ngram] = stop
        self.num_indexed, self.matches = len(tokens), matches[::-1]


class NgramDrafter:
    """Drafts from the sequence's own prompt and output; branches are matches of other lengths."""

    name = "ngram"
    needs: tuple[str, ...] = ()
    warmth = Warmth.R0
    default_draft_tokens = 5
    default_width = min_width = 1
    max_width = 16
    default_num_nodes: int | None = None
    sample_methods: tuple[str, ...] = ("greedy",)
    options: Mapping[str, Option] = {}

    def looks_up(self, options: Options) -> bool:
        return True

    def open(self, seq: Sequence) -> None:
        spec = seq.speculation
        index = NgramIndex(spec.prompt_lookup_min, spec.prompt_lookup_max)
        seq.drafter_state[self.name] = index

    def draft(self, rows: Items[Row], plan: Plan) -> list[DraftTree]:
        return [self._tree(row.seq, part) for row, part in zip(rows, plan, strict=True)]

    def _tree(self, seq: Sequence, plan: RowPlan) -> DraftTree:
        index: NgramIndex = seq.drafter_state[self.name]
        index.extend(seq.tokens)
        starts = index.matches[: plan.width]
        if not starts or plan.depth < 1:
            return EMPTY_TREE
        if len(starts) == 1:
            depth = min(plan.depth, plan.num_nodes)
            return DraftTree.chain(continuation(seq.tokens, starts[0], depth), self.name)
        chains = [continuation(seq.tokens, start, plan.depth) for start in starts]
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
