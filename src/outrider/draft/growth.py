"""How a draft grows out of laws, whoever makes them: a line, drawn siblings, or drawn chains.

Shape legend: V vocabulary.
"""

from collections.abc import Sequence as Items
from typing import Protocol

import torch
from torch import Tensor

from outrider.draft.drawing import draft_stream
from outrider.draft.tree_search import BestFirst, path_tokens
from outrider.sampling.rng import PositionStream, RootStream, Stream
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, DraftTree, RowPlan, StopRule

RECORDED = ("probabilistic", "independent")


class Growth(Protocol):
    """A draft in the making: it names the nodes whose laws it wants, and adds nodes below them."""

    def wanted(self) -> list[int]:
        """Nodes (-1: the root) whose laws come next; none when the draft is complete."""
        ...

    def take(self, laws: Items[Tensor | None]) -> None:
        """One law per wanted node; None where no token can follow."""
        ...

    def path_tokens(self, node: int) -> Items[int]:
        """Tokens from the root's child down to `node`."""
        ...

    def tree(self, source: str) -> DraftTree:
        """What has grown so far."""
        ...


class Line:
    """A chain: of each law the argmax, or a draw.

    Args:
        stream: what tokens are drawn from; None picks the argmax.
        is_recorded: whether drawn tokens keep their laws.
        num_paths: how many independent chains it stands for, all of them equal.
        stop: ends the chain early; then each law tells how sure the draft model is. The rule looks
            at laws and at what is drafted already, so a drawn chain stays lawful.
    """

    def __init__(
        self,
        depth: int,
        stream: Stream | None = None,
        *,
        is_recorded: bool = False,
        num_paths: int = 0,
        stop: StopRule | None = None,
    ) -> None:
        self.depth = depth
        self.stream = stream
        self.stop = stop
        self.tokens: list[int] = []
        self._laws: list[Tensor | None] = []
        self._is_recorded = is_recorded and stream is not None
        self._num_paths = num_paths
        self._confidence: list[float] = []
        self._survival = 1.0

    def wanted(self) -> list[int]:
        return [len(self.tokens) - 1] if len(self.tokens) < self.depth else []

    def take(self, laws: Items[Tensor | None]) -> None:
        (q_V,) = laws
        if q_V is None:
            self.depth = len(self.tokens)  # nothing to propose; the target's law decides
            return
        token = int(q_V.argmax()) if self.stream is None else self.stream.pick(q_V)
        if self._is_recorded:
            self._laws.append(q_V)
        self.add(token, 1.0 if self.stop is None else float(q_V.max()))

    def add(self, token: int, confidence: float) -> None:
        """One token more, and the last if all so far is too unlikely to stand.

        Args:
            confidence: the largest probability of the token's law; matters to a stop rule only.
        """
        self.tokens.append(token)
        if self.stop is None:
            return
        self._confidence.append(confidence)
        self._survival *= self.stop.acceptance(confidence, len(self.tokens))
        if self._survival < self.stop.floor:
            self.depth = len(self.tokens)

    def path_tokens(self, node: int) -> Items[int]:
        return self.tokens[: node + 1]

    def tree(self, source: str) -> DraftTree:
        if not self._num_paths or not self.tokens:
            return DraftTree.chain(self.tokens, source, self._laws, self._confidence)
        nodes = tuple(range(len(self.tokens)))
        return DraftTree(
            tokens=tuple(self.tokens),
            parents=tuple(node - 1 for node in nodes),
            laws=tuple(self._laws),
            paths=(nodes,) * self._num_paths,
            source=source,
            confidence=tuple(self._confidence),
        )


class Siblings:
    """Siblings below the root drawn without replacement, and one drawn chain below each.

    The shape is settled by the root's law before anything is drawn:
    `width` siblings, or as many as the law has tokens; what is left of `num_nodes` then lengthens
    the chain of the first sibling down to `depth`, then that of the second, and so on: whoever is
    drawn first is the likeliest to stand. A node's law is that given the siblings before it.
    Uniforms are used level by level, within a level in the order of the siblings.
    """

    def __init__(self, width: int, depth: int, num_nodes: int, stream: Stream) -> None:
        self._width = width
        self._depth = depth
        self._num_nodes = num_nodes
        self._stream = stream
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._laws: list[Tensor | None] = []
        self._ends = {-1: 1}  # node -> how many nodes its chain still gets

    def wanted(self) -> list[int]:
        return list(self._ends)

    def take(self, laws: Items[Tensor | None]) -> None:
        ends, self._ends = self._ends, {}
        for (node, num_left), q_V in zip(ends.items(), laws, strict=True):
            if q_V is None:
                continue
            if node < 0:
                self._branch(q_V)
            else:
                self._add(node, self._stream.pick(q_V), q_V, num_left - 1)

    def _branch(self, q_V: Tensor) -> None:
        count = min(self._width, self._num_nodes, int((q_V > 0).sum()))
        left = self._num_nodes - count
        for token, law_V in draw_siblings(q_V, count, self._stream):
            length = min(self._depth - 1, left)
            left -= length
            self._add(-1, token, law_V, length)

    def _add(self, parent: int, token: int, law_V: Tensor, num_left: int) -> None:
        if num_left:
            self._ends[len(self._tokens)] = num_left
        self._tokens.append(token)
        self._parents.append(parent)
        self._laws.append(law_V)

    def path_tokens(self, node: int) -> Items[int]:
        return path_tokens(self._tokens, self._parents, node)

    def tree(self, source: str) -> DraftTree:
        tokens, parents, laws = tuple(self._tokens), tuple(self._parents), tuple(self._laws)
        return DraftTree(tokens=tokens, parents=parents, laws=laws, source=source)


class Chains:
    """Chains of one length, each drawn as if alone; equal prefixes share nodes.

    Where the draft model has no law after some path, the drafter's law is a point mass on token 0:
    so all chains stay equally long, and what is recorded is still what was drawn from.
    """

    def __init__(self, num_chains: int, length: int, stream: Stream) -> None:
        self._length = length
        self._stream = stream
        self._paths: list[tuple[int, ...]] = [()] * num_chains
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._laws: list[Tensor | None] = []
        self._node_of: dict[tuple[int, int], int] = {}

    def wanted(self) -> list[int]:
        if len(self._paths[0]) == self._length:
            return []
        return list(dict.fromkeys(path[-1] if path else -1 for path in self._paths))

    def take(self, laws: Items[Tensor | None]) -> None:
        if not self._tokens and laws[0] is None:
            self._length = 0
            return
        law_after = dict(zip(self.wanted(), laws, strict=True))
        self._paths = [self._longer(path, law_after) for path in self._paths]

    def _longer(
        self, path: tuple[int, ...], law_after: dict[int, Tensor | None]
    ) -> tuple[int, ...]:
        parent = path[-1] if path else -1
        q_V = law_after[parent]
        if q_V is None:
            assert self._laws[0] is not None, "drawn chains record every law"
            q_V = torch.zeros_like(self._laws[0])
            q_V[0] = 1.0
        token = self._stream.pick(q_V)
        node = self._node_of.setdefault((parent, token), len(self._tokens))
        if node == len(self._tokens):
            self._tokens.append(token)
            self._parents.append(parent)
            self._laws.append(q_V)
        return (*path, node)

    def path_tokens(self, node: int) -> Items[int]:
        return path_tokens(self._tokens, self._parents, node)

    def tree(self, source: str) -> DraftTree:
        if not self._tokens:
            return EMPTY_TREE
        return DraftTree(
            tokens=tuple(self._tokens),
            parents=tuple(self._parents),
            laws=tuple(self._laws),
            paths=tuple(self._paths),
            source=source,
        )


def plant(seq: Sequence, plan: RowPlan) -> Growth:
    """How the draft that a request asks for grows; at temperature 0 every method picks."""
    method, first = seq.speculation.draft_sample_method, len(seq.tokens)
    depth, width, num_nodes = min(plan.depth, plan.num_nodes), plan.width, plan.num_nodes
    if width == 1:
        is_alone = method == "independent"
        return Line(
            depth,
            draft_stream(seq, method),
            is_recorded=method in RECORDED,
            num_paths=1 if is_alone else 0,
            stop=plan.stop,
        )
    if seq.shaper.is_greedy and method == "independent" and not seq.shaper.is_plain_greedy:
        # The rule is asked then, and it wants paths: draws from a point mass are all equal.
        return Line(depth, num_paths=width)
    if seq.shaper.is_greedy or method == "greedy":
        return BestFirst(width, depth, num_nodes)
    if method == "coupled":
        noise = PositionStream(seq.seed, first).noise
        return BestFirst(width, depth, num_nodes, lambda level, size: noise(first + level, size))
    stream = RootStream(seq.seed, first - 1, "draft")
    if method == "independent":
        num_chains = min(width, num_nodes)
        return Chains(num_chains, min(depth, num_nodes // num_chains), stream)
    return Siblings(width, depth, num_nodes, stream)


def draw_siblings(q_V: Tensor, count: int, stream: Stream) -> list[tuple[int, Tensor]]:
    """Tokens drawn one after another without replacement, each with the law it was drawn from."""
    drawn: list[tuple[int, Tensor]] = []
    for _ in range(count):
        if drawn:
            q_V = q_V.clone()
            q_V[drawn[-1][0]] = 0.0
            q_V /= q_V.sum()
        drawn.append((stream.pick(q_V), q_V))
    return drawn
