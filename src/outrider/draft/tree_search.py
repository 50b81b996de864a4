"""Draft trees of a given size whose nodes are the likeliest, level by level or depth by depth.

Shape legend: V vocabulary, R nodes of one depth.
"""

import heapq
from collections.abc import Callable, Sequence as Items
from typing import Self, TypeAlias

import torch
from torch import Tensor

from outrider.step import DraftTree

Noise: TypeAlias = Callable[[int, int], Tensor]
Ranked: TypeAlias = tuple[int, float]  # token, log-probability
# Negative logarithm of its product, depth, ranks on its path, and the logarithm of its parent's.
Candidate: TypeAlias = tuple[float, int, tuple[int, ...], float]
NEVER = float("-inf")


class BestFirst:
    """The `num_nodes` best nodes by the product of the draft's probabilities along their paths.

    A node is worth no more than its parent, so the best nodes form a tree, and expected accepted
    tokens, the sum of these products, are the most that any tree of that size has (EAGLE-2, Li et
    al. 2024; OPT-Tree, Wang et al. 2024). Each round expands those that are
    still among the best of what is known: who falls out never comes back, for a round only adds
    rivals. Children are the `width` likeliest tokens, down to `depth`.

    With noise, siblings are the tokens with the largest log q + g, one g per depth. The target will
    take the largest log p + g; how likely that is each of them depends on how far p is from q, for
    which softmax(log q + g) stands in: it has their order, and is the surer the further the first
    is ahead.

    Args:
        noise: (depth of the parent, V) -> g_V; None ranks by q alone.

    Attributes:
        level: depths that are done.
    """

    def __init__(self, width: int, depth: int, num_nodes: int, noise: Noise | None = None) -> None:
        self.width = min(width, num_nodes)
        self.depth = depth
        self.num_nodes = num_nodes
        self.noise = noise
        self.level = 0
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._values: list[float] = []  # logarithms of the products
        self._frontier = [-1]

    def wanted(self) -> list[int]:
        return self._frontier

    def take(self, laws: Items[Tensor | None]) -> None:
        num_old = len(self._tokens)
        asked = zip(self._frontier, laws, strict=True)
        found = [(node, q_V) for node, q_V in asked if q_V is not None]
        best = likeliest([q_V for _, q_V in found], self.width, self.level, self.noise)
        for (node, _), (tokens, values) in zip(found, best, strict=True):
            self._branch(node, tokens, values)
        num_kept_old = self._keep_best(num_old)
        self.level += 1
        is_deepest = self.level == self.depth
        self._frontier = [] if is_deepest else list(range(num_kept_old, len(self._tokens)))

    def _branch(self, node: int, tokens: Items[int], values: Items[float]) -> None:
        above = self._values[node] if node >= 0 else 0.0
        for token, value in zip(tokens, values, strict=True):
            if value > NEVER:
                self._tokens.append(token)
                self._parents.append(node)
                self._values.append(above + min(value, 0.0))

    def _keep_best(self, num_old: int) -> int:
        """Drops all but the best; of equals the older stay. Returns how many of the old are left.

        Nodes stand in the order they came in, so that parents precede their children.
        """
        ranked = sorted(range(len(self._tokens)), key=lambda node: -self._values[node])
        kept = sorted(ranked[: self.num_nodes])
        place = {-1: -1} | {node: index for index, node in enumerate(kept)}
        self._tokens = [self._tokens[node] for node in kept]
        self._values = [self._values[node] for node in kept]
        self._parents = [place[self._parents[node]] for node in kept]
        return sum(node < num_old for node in kept)

    def path_tokens(self, node: int) -> Items[int]:
        return path_tokens(self._tokens, self._parents, node)

    def tree(self, source: str) -> DraftTree:
        return DraftTree(tokens=tuple(self._tokens), parents=tuple(self._parents), source=source)


class ProductTree:
    """What `BestFirst` finds where one law serves all nodes of a depth, from one law per depth.

    Then ranks are all that matters: the best node that is left goes in, and its next sibling and
    its first child become candidates (DDTree, arXiv 2604.12989). The trees are the same, node for
    node.

    Args:
        width, depth, num_nodes, noise: see `BestFirst`.
    """

    def __init__(self, width: int, depth: int, num_nodes: int, noise: Noise | None = None) -> None:
        self.width = min(width, num_nodes)
        self.noise = noise
        self._depth = depth
        self._num_nodes = num_nodes
        self._levels: list[list[Ranked]] = []

    @classmethod
    def like(cls, tree: BestFirst) -> Self:
        """The one that takes the place of a tree which has not grown yet."""
        assert not tree.level
        return cls(tree.width, tree.depth, tree.num_nodes, tree.noise)

    def wanted(self) -> list[int]:
        """The end of the likeliest path, whose nodes count as -1, 0, 1 ... here."""
        return [len(self._levels) - 1] if len(self._levels) < self._depth else []

    def take(self, laws: Items[Tensor | None]) -> None:
        (q_V,) = laws
        if q_V is None:
            self._depth = len(self._levels)
            return
        ((tokens, values),) = likeliest([q_V], self.width, len(self._levels), self.noise)
        self.add(tokens, values)

    def add(self, tokens: Items[int], values: Items[float]) -> None:
        """The next level, if one is wanted: its likeliest tokens, log-probabilities falling."""
        if not self.wanted():
            return
        ranked = zip(tokens[: self.width], values, strict=False)
        level = [(token, min(value, 0.0)) for token, value in ranked if value > NEVER]
        if level:
            self._levels.append(level)
        else:
            self._depth = len(self._levels)

    def path_tokens(self, node: int) -> Items[int]:
        return [level[0][0] for level in self._levels[: node + 1]]

    def tree(self, source: str) -> DraftTree:
        """Level by level, below each parent by rank."""
        paths = sorted(self._best(), key=lambda ranks: (len(ranks), ranks))
        places = {ranks: node for node, ranks in enumerate(paths)}
        return DraftTree(
            tokens=tuple(self._levels[len(ranks) - 1][ranks[-1]][0] for ranks in paths),
            parents=tuple(places.get(ranks[:-1], -1) for ranks in paths),
            source=source,
        )

    def _best(self) -> list[tuple[int, ...]]:
        """The ranks that lead to each of the best nodes; of equals, those that come first."""
        found: list[tuple[int, ...]] = []
        heap: list[Candidate] = []
        self._offer(heap, (0,), 0.0)
        while heap and len(found) < self._num_nodes:
            worth, _, ranks, above = heapq.heappop(heap)
            self._offer(heap, (*ranks, 0), -worth)
            self._offer(heap, (*ranks[:-1], ranks[-1] + 1), above)
            found.append(ranks)
        return found

    def _offer(self, heap: list[Candidate], ranks: tuple[int, ...], above: float) -> None:
        depth, rank = len(ranks), ranks[-1]
        if depth <= len(self._levels) and rank < len(self._levels[depth - 1]):
            value = above + self._levels[depth - 1][rank][1]
            heapq.heappush(heap, (-value, depth, ranks, above))


def likeliest(
    laws: list[Tensor], width: int, level: int, noise: Noise | None
) -> list[tuple[list[int], list[float]]]:
    """The best children of the nodes of one depth: tokens, and logarithms of what each is worth.

    Args:
        laws: q_V of each node.
    """
    if not laws:
        return []
    log_RV = torch.stack(laws).log()
    if noise is not None:
        log_RV += noise(level, log_RV.shape[1]).to(log_RV.device)
        log_RV = log_RV.log_softmax(dim=1)
    best = log_RV.topk(min(width, log_RV.shape[1]))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def path_tokens(tokens: Items[int], parents: Items[int], node: int) -> tuple[int, ...]:
    """Tokens from the root's child down to `node`; none for the root."""
    path: list[int] = []
    while node >= 0:
        path.append(tokens[node])
        node = parents[node]
    return tuple(reversed(path))
