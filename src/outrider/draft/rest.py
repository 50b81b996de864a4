"""REST: a draft is what most often followed the text's ending in a corpus.

He et al. 2023 (arXiv:2311.08252). All places where the longest ending of the
text stands in the corpus vote with what follows there; the heaviest nodes of the trie of their
continuations are the tree.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence as Items
from itertools import count, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from outrider.draft.base import Snapshot, Surroundings, Warmth
from outrider.draft.datastore import END, LONGEST, Datastore, Integers
from outrider.errors import ConfigError
from outrider.request import Option
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, Commit, DraftTree, Plan, Row, RowPlan, TargetOutput

BUILD = "`outrider index build CORPUS --model MODEL --output FOLDER`"
# Rows cost little on a GPU; on a CPU every row is paid for.
GPU_NODES = 64
CPU_NODES = 8


class RestDrafter:
    """Drafts from a datastore; needs no state of a sequence but its tokens.

    Args:
        num_nodes: nodes of a tree where the request does not say.
    """

    name = "rest"
    needs: tuple[str, ...] = ("datastore",)
    warmth = Warmth.R0
    default_draft_tokens = 10
    default_width = max_width = 16
    min_width = 1
    default_num_nodes: int | None = CPU_NODES
    sample_methods: tuple[str, ...] = ("greedy",)
    options: Mapping[str, Option] = {
        "min_match": Option(2, "shortest ending of the text that is looked up", 1, LONGEST),
        "max_occurrences": Option(5000, "most places in the corpus that vote", 1, 1_000_000),
    }

    def __init__(self, datastore: Datastore, num_nodes: int = CPU_NODES) -> None:
        self.datastore = datastore
        self.default_num_nodes = num_nodes

    @classmethod
    def build(cls, surroundings: Surroundings) -> "RestDrafter":
        """ConfigError without a datastore of the target's vocabulary."""
        folder = surroundings.datastore
        if folder is None:
            raise ConfigError(
                f"drafter 'rest' needs a datastore: make one with {BUILD} and give datastore=FOLDER"
            )
        datastore = Datastore.load(folder)
        _check_vocabulary(datastore, folder, surroundings)
        device = surroundings.target.runner.network.spec.device
        return cls(datastore, CPU_NODES if device.type == "cpu" else GPU_NODES)

    def open(self, seq: Sequence) -> None:
        """Nothing to prepare: the token log is the question, the corpus the answer."""

    def draft(self, rows: Items[Row], plan: Plan) -> list[DraftTree]:
        return [self._tree(row.seq, part) for row, part in zip(rows, plan, strict=True)]

    def _tree(self, seq: Sequence, plan: RowPlan) -> DraftTree:
        options = seq.speculation.options
        length, low, high = self.datastore.search(seq.tokens, int(options["min_match"]))
        if not length or plan.depth < 1:
            return EMPTY_TREE
        most = int(options["max_occurrences"])
        votes = self.datastore.continuations(low, high, most, plan.depth)
        return heaviest(votes, plan.num_nodes, plan.width, self.name)

    def observe(self, commits: Items[Commit], output: TargetOutput) -> None:
        """The corpus does not learn."""

    def close(self, seq: Sequence) -> None:
        """Nothing is held."""

    def snapshot(self, seq: Sequence) -> Snapshot | None:
        return None

    def restore(self, seq: Sequence, snapshot: Snapshot) -> int:
        return len(seq.tokens)


class Candidate(NamedTuple):
    """A node of the trie that may be taken next; the order is that of the heap.

    Attributes:
        weight: minus the votes that pass through it.
        depth: nodes above it. age: settles ties, and no two are equal.
        parent: its parent's index in the tree, -1 for the root.
        voters: rows of the votes that pass through it.
    """

    weight: int
    depth: int
    age: int
    token: int
    parent: int
    voters: NDArray[np.intp]


def heaviest(votes: Integers, num_nodes: int, width: int, source: str) -> DraftTree:
    """The nodes of a trie that most votes pass through; of equals the shallower, then the first.

    A child weighs no more than its parent, so the best come out of one search from the root.

    Args:
        votes: one continuation per row, at least one, padded with `END`.
        width: most children of any node, so 1 is the heaviest chain.
    """
    tokens: list[int] = []
    parents: list[int] = []
    ages = count()
    heap = list(_children(votes, np.arange(len(votes)), 0, -1, min(width, num_nodes), ages))
    while heap and len(tokens) < num_nodes:
        _, depth, _, token, parent, voters = heapq.heappop(heap)
        tokens.append(token)
        parents.append(parent)
        most = min(width, num_nodes - len(tokens))
        if most and depth + 1 < votes.shape[1]:
            for child in _children(votes, voters, depth + 1, len(tokens) - 1, most, ages):
                heapq.heappush(heap, child)
    return DraftTree(tokens=tuple(tokens), parents=tuple(parents), source=source)


def _children(
    votes: Integers,
    voters: NDArray[np.intp],
    depth: int,
    parent: int,
    most: int,
    ages: Iterator[int],
) -> Iterator[Candidate]:
    """The heaviest nodes below one, best first; voters whose document ends here are silent."""
    for weight, token, group in _groups(votes[voters, depth], voters, most):
        yield Candidate(-weight, depth, next(ages), token, parent, group)


def _groups(
    column: Integers, voters: NDArray[np.intp], most: int
) -> list[tuple[int, int, NDArray[np.intp]]]:
    """Voters by their token: how many, for which, and who; most first, then by token."""
    if len(column) == 1:
        return [] if column[0] == END else [(1, int(column[0]), voters)]
    order = column.argsort(kind="stable")
    column, voters = column[order], voters[order]
    cuts = [0, *(np.flatnonzero(column[1:] != column[:-1]) + 1).tolist(), len(column)]
    runs = [(start - stop, start, stop) for start, stop in pairwise(cuts) if column[start] != END]
    return [(-less, int(column[at]), voters[at:stop]) for less, at, stop in sorted(runs)[:most]]


def _check_vocabulary(datastore: Datastore, folder: str, surroundings: Surroundings) -> None:
    """Token ids must mean the same in the corpus and in the target."""
    header, tokenizer = datastore.header, surroundings.target.tokenizer
    spec = surroundings.target.runner.network.spec
    if header.vocab_size > spec.vocab_size or (
        tokenizer is not None and tokenizer.fingerprint() != header.fingerprint
    ):
        raise ConfigError(
            f"datastore {folder!r} was made with another tokenizer than that of {spec.name!r}: "
            f"make one for it with {BUILD}"
        )
