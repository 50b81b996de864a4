"""Votes: what follows a text's ending in a corpus, as the best tree; the plain form.

He et al. 2023 (arXiv:2311.08252). All places where the longest ending of the text stands vote with
what follows there; the heaviest nodes of the trie of their continuations are the tree.
`native/` holds the fast one.
"""

import heapq
from collections.abc import Iterator, Sequence as Items
from itertools import count, pairwise
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from outrider.draft.datastore import END, Datastore, Integers


class Ask(NamedTuple):
    """How far a draft may go.

    Attributes:
        shortest: least length of an ending. max_occurrences: places that vote.
        depth: longest path. width: most children of any node. num_nodes: of all.
    """

    depth: int
    width: int
    num_nodes: int
    shortest: int = 1
    max_occurrences: int = 5000


class Branches(NamedTuple):
    """A draft, parents before children; -1 is the root."""

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()


class Votes(Protocol):
    """A corpus that can be asked what comes next."""

    def search(self, context: Items[int], shortest: int = 1) -> tuple[int, int, int]:
        """As `Datastore.search`."""
        ...

    def draft(self, context: Items[int], ask: Ask) -> Branches:
        """The heaviest nodes of the trie of what follows the longest ending."""
        ...


class PlainVotes:
    """A draft costs 50 to 250 microseconds, most of it for single calls of numpy."""

    def __init__(self, datastore: Datastore) -> None:
        self.datastore = datastore

    def search(self, context: Items[int], shortest: int = 1) -> tuple[int, int, int]:
        return self.datastore.search(context, shortest)

    def draft(self, context: Items[int], ask: Ask) -> Branches:
        length, low, high = self.datastore.search(context, ask.shortest)
        if not length or ask.depth < 1:
            return Branches()
        votes = self.datastore.continuations(low, high, ask.max_occurrences, ask.depth)
        return heaviest(votes, ask.num_nodes, ask.width)


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


def heaviest(votes: Integers, num_nodes: int, width: int) -> Branches:
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
    return Branches(tuple(tokens), tuple(parents))


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
