"""TraversalVerifier: leaves of a tree are tested before their parents, which inherit what is owed.

Shape legend: V vocabulary.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from outrider.request import Option
from outrider.sampling.laws import Laws
from outrider.sampling.rng import Stream
from outrider.step import DraftTree, Verdict
from outrider.verify.base import ALL_KINDS, Exactness
from outrider.verify.block import excess, remaining_weight, weigh


class TraversalVerifier:
    """Traversal verification, from the leaves up (Weng et al. 2025).

    Block verification on trees: on a chain it is that rule. It accepts no less than recursive
    rejection of the same tree. Independently drawn chains are read as the tree of their distinct
    prefixes; there recursive rejection with the duplicates accepts sometimes more, sometimes less.

    Invariant: given the path down to it and the siblings refused before it, a node or something
    below it stands with probability `weight`, and what follows the node then has the law `left`;
    so the output law is the target's.
    """

    name = "traversal"
    exactness = Exactness.EXACT
    keyed_by: Literal["position", "root"] = "root"
    accepts = ALL_KINDS
    greedy_only = False
    options: Mapping[str, Option] = {}

    def verify(self, tree: DraftTree, p: Laws, rng: Stream) -> Verdict:
        remaining = Remaining(tree, p)
        while True:
            leaf = remaining.first_leaf()
            if leaf < 0 or rng.flip(remaining.weight(leaf)):
                return Verdict(tree.path(leaf), remaining.draw(leaf, rng))
            remaining.drop(leaf)


class Remaining:
    """What is left of one draft tree while its leaves are refused one after another.

    Numbers of a node hold until one of its children is dropped. They may be kept: of a node's
    children only the first that is left has been looked at, and that is the one dropped.
    """

    def __init__(self, tree: DraftTree, p: Laws) -> None:
        self._tree = tree
        self._p = p
        self._children: list[list[int]] = [[] for _ in range(len(tree) + 1)]  # root's stand last
        for node, parent in reversed(list(enumerate(tree.parents))):
            self._children[parent].append(node)  # in reverse, so that the first is popped
        self._weights = {-1: 1.0}
        self._left: dict[int, Tensor] = {}
        self._refused: dict[int, list[int]] = {}

    def first_leaf(self) -> int:
        """Down the first children; -1 when none is left. Below weight 0 nothing can stand."""
        node = -1
        while self._children[node] and self.weight(node) > 0:
            node = self._children[node][-1]
        return node

    def weight(self, node: int) -> float:
        if node not in self._weights:
            up = self._tree.parents[node]
            self._weights[node] = weigh(
                self.weight(up), self._target(up), self._drawn_from(node), self._tree.tokens[node]
            )
        return self._weights[node]

    def draw(self, node: int, rng: Stream) -> int:
        """A token from the law owed after the node."""
        if node in self._left:
            return rng.pick(self._left[node])
        return self._p.draw(node, rng)

    def drop(self, leaf: int) -> None:
        """Takes the leaf, and all below it, off the tree; its parent owes what it did not give."""
        up, token = self._tree.parents[leaf], self._tree.tokens[leaf]
        target_V, q_V, weight = self._target(up), self._drawn_from(leaf), self.weight(up)
        rest_V = excess(weight, target_V, q_V, token)
        rest = float(rest_V.sum())
        self._left[up] = rest_V.div_(rest) if rest > 0 else target_V
        self._weights[up] = remaining_weight(weight, rest)
        self._refused.setdefault(up, []).append(token)
        self._children[up].pop()

    def _target(self, node: int) -> Tensor:
        return self._left[node] if node in self._left else self._p.law(node)

    def _drawn_from(self, node: int) -> Tensor | None:
        """The law of a node given the siblings refused before it.

        Independent chains record plain q; a further distinct token then comes from the rest of q.
        """
        q_V = self._tree.law(node)
        refused = self._refused.get(self._tree.parents[node])
        if q_V is None or not refused or not self._tree.paths:
            return q_V
        rest_V = q_V.to(torch.float64, copy=True)
        rest_V[refused] = 0.0
        total = float(rest_V.sum())
        return rest_V.div_(total) if total > 0 else rest_V
