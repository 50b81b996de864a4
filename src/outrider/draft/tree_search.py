"""BestFirst: the draft tree of a given size whose nodes are the likeliest, found level by level.

Shape legend: V vocabulary.
"""

from collections.abc import Callable, Sequence as Items
from typing import TypeAlias

from torch import Tensor

from outrider.step import DraftTree

Noise: TypeAlias = Callable[[int, int], Tensor]


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
    """

    def __init__(self, width: int, depth: int, num_nodes: int, noise: Noise | None = None) -> None:
        self._width = min(width, num_nodes)
        self._depth = depth
        self._num_nodes = num_nodes
        self._noise = noise
        self._level = 0
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._values: list[float] = []  # logarithms of the products
        self._frontier = [-1]

    def wanted(self) -> list[int]:
        return self._frontier

    def take(self, laws: Items[Tensor | None]) -> None:
        num_old = len(self._tokens)
        for node, q_V in zip(self._frontier, laws, strict=True):
            if q_V is not None:
                self._branch(node, q_V)
        num_kept_old = self._keep_best(num_old)
        self._level += 1
        is_deepest = self._level == self._depth
        self._frontier = [] if is_deepest else list(range(num_kept_old, len(self._tokens)))

    def _branch(self, node: int, q_V: Tensor) -> None:
        log_V = q_V.log()
        if self._noise is not None:
            log_V += self._noise(self._level, len(log_V)).to(log_V.device)
            log_V = log_V.log_softmax(dim=0)
        best = log_V.topk(min(self._width, len(log_V)))
        above = self._values[node] if node >= 0 else 0.0
        for token, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            if value > float("-inf"):
                self._tokens.append(token)
                self._parents.append(node)
                self._values.append(above + min(value, 0.0))

    def _keep_best(self, num_old: int) -> int:
        """Drops all but the best; of equals the older stay. Returns how many of the old are left.

        Nodes stand in the order they came in, so that parents precede their children.
        """
        ranked = sorted(range(len(self._tokens)), key=lambda node: -self._values[node])
        kept = sorted(ranked[: self._num_nodes])
        place = {-1: -1} | {node: index for index, node in enumerate(kept)}
        self._tokens = [self._tokens[node] for node in kept]
        self._values = [self._values[node] for node in kept]
        self._parents = [place[self._parents[node]] for node in kept]
        return sum(node < num_old for node in kept)

    def path_tokens(self, node: int) -> Items[int]:
        return path_tokens(self._tokens, self._parents, node)

    def tree(self, source: str) -> DraftTree:
        return DraftTree(tokens=tuple(self._tokens), parents=tuple(self._parents), source=source)


def path_tokens(tokens: Items[int], parents: Items[int], node: int) -> tuple[int, ...]:
    """Tokens from the root's child down to `node`; none for the root."""
    path: list[int] = []
    while node >= 0:
        path.append(tokens[node])
        node = parents[node]
    return tuple(reversed(path))
