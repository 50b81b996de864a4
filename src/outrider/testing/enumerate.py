"""The exact output law of a drafter and a verifier, by enumeration of every random choice.

A verifier makes finitely many random choices. It is run once for each combination of them; the
probabilities along a run are multiplied, equal outcomes added up. Small vocabularies (V <= 4) and
short drafts (K <= 4) take seconds; a right rule is off by rounding, a wrong one by 1e-2.

Shape legend: V vocabulary.
"""

import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from outrider.sampling.laws import Laws
from outrider.sampling.rng import Stream
from outrider.step import DraftTree, Verdict

Context: TypeAlias = tuple[int, ...]
Model: TypeAlias = Callable[[Context], Tensor]
Draft: TypeAlias = Callable[[Context, Stream], DraftTree]
Call: TypeAlias = Callable[[Stream], tuple[Context, int]]
Outcome = TypeVar("Outcome")


class Script:
    """A stream that replays choices, and notes every choice it could have made instead."""

    def __init__(self, choices: Sequence[int] = ()) -> None:
        self.choices = list(choices)
        self.weight = 1.0
        self.untried: list[list[int]] = []
        self._at = 0

    def pick(self, law_V: Tensor) -> int:
        return self._choose(law_V.tolist())

    def flip(self, probability: float) -> bool:
        heads = min(1.0, max(0.0, probability))
        return self._choose([heads, 1.0 - heads]) == 0

    def _choose(self, law: list[float]) -> int:
        if self._at == len(self.choices):
            first, *others = [choice for choice, weight in enumerate(law) if weight > 0]
            self.untried += [[*self.choices, other] for other in others]
            self.choices.append(first)
        choice = self.choices[self._at]
        self._at += 1
        self.weight *= law[choice]
        return choice


def exact_law(experiment: Callable[[Script], Outcome]) -> dict[Outcome, float]:
    """{outcome: probability} over every branch of the experiment's random choices."""
    law: dict[Outcome, float] = defaultdict(float)
    todo: list[list[int]] = [[]]
    while todo:
        stream = Script(todo.pop())
        outcome = experiment(stream)
        law[outcome] += stream.weight
        todo += stream.untried
    return dict(law)


class ToyModel:
    """A random next-token law for every context; `zeros` is the share of tokens it forbids."""

    def __init__(self, name: str, size: int, zeros: float = 0.0) -> None:
        self._name = name
        self._size = size
        self._zeros = zeros
        self._laws: dict[Context, Tensor] = {}

    def __call__(self, context: Context) -> Tensor:
        if context not in self._laws:
            self._laws[context] = self._draw(context)
        return self._laws[context]

    def _draw(self, context: Context) -> Tensor:
        rng = np.random.default_rng(zlib.crc32(repr((self._name, context)).encode()))
        law_V = np.exp(rng.normal(size=self._size))
        is_forbidden_V = rng.random(self._size) < self._zeros
        is_forbidden_V[rng.integers(self._size)] = False
        law_V[is_forbidden_V] = 0.0
        return torch.from_numpy(law_V / law_V.sum())


class ToyLaws:
    """`Laws` of a toy target over one tree that hangs on a context."""

    def __init__(self, p: Model, context: Context, tree: DraftTree) -> None:
        self._p = p
        self._context = context
        self._tree = tree

    def law(self, node: int) -> Tensor:
        return self._p(self._context + self._tree.path_tokens(node))

    def log_law(self, node: int) -> Tensor:
        return self.law(node).log()

    def own_law(self, node: int) -> Tensor:
        return self.law(node)

    def allows(self, node: int, token: int) -> bool:
        return float(self.law(node)[token]) > 0.0

    def argmax(self, node: int) -> int:
        return int(self.law(node).argmax())

    def draw(self, node: int, stream: Stream) -> int:
        return stream.pick(self.law(node))


def draw_chain(q: Model, length: int) -> Draft:
    """Drafts a chain drawn token by token from q, laws recorded (kind S1)."""
    return draw_tree(q, (1,) * length)


def pick_chain(q: Model, length: int) -> Draft:
    """Drafts the greedy chain of q (kind D1)."""
    return pick_tree(q, (1,) * length)


def draw_tree(q: Model, widths: Sequence[int]) -> Draft:
    """Drafts `widths[d]` i.i.d. draws from q below every node of depth d, duplicates kept."""

    def draft(context: Context, stream: Stream) -> DraftTree:
        return _grow(
            context, widths, lambda path, width: [stream.pick(q(path)) for _ in range(width)], q
        )

    return draft


def draw_chains(q: Model, num_chains: int, length: int) -> Draft:
    """Drafts chains drawn independently from q (kind S2); equal prefixes share nodes."""

    def draft(context: Context, stream: Stream) -> DraftTree:
        nodes: dict[Context, int] = {}
        parents: list[int] = []
        laws: list[Tensor | None] = []
        paths: list[tuple[int, ...]] = []
        for _ in range(num_chains):
            chain: Context = ()
            for _ in range(length):
                q_V = q(context + chain)
                below = (*chain, stream.pick(q_V))
                if below not in nodes:
                    parents.append(nodes.get(chain, -1))
                    laws.append(q_V)
                    nodes[below] = len(nodes)
                chain = below
            paths.append(tuple(nodes[chain[: i + 1]] for i in range(length)))
        return DraftTree(
            tokens=tuple(path[-1] for path in nodes),
            parents=tuple(parents),
            laws=tuple(laws),
            paths=tuple(paths),
            source="toy",
        )

    return draft


def draw_siblings(q: Model, widths: Sequence[int], num_picked: int = 0) -> Draft:
    """Drafts `widths[d]` siblings without replacement below every node of depth d (kind S3).

    Args:
        num_picked: how many of them, the first, are not drawn but the likeliest (a mixed tree).
    """

    def draft(context: Context, stream: Stream) -> DraftTree:
        tokens: list[int] = []
        parents: list[int] = []
        laws: list[Tensor | None] = []
        level: list[tuple[int, Context]] = [(-1, context)]
        for width in widths:
            below: list[tuple[int, Context]] = []
            for parent, path in level:
                left_V = q(path).clone()
                for i in range(min(width, int((left_V > 0).sum()))):
                    law_V = left_V / left_V.sum()
                    token = int(law_V.argmax()) if i < num_picked else stream.pick(law_V)
                    left_V[token] = 0.0
                    below.append((len(tokens), (*path, token)))
                    tokens.append(token)
                    parents.append(parent)
                    laws.append(None if i < num_picked else law_V)
            level = below
        return DraftTree(
            tokens=tuple(tokens), parents=tuple(parents), laws=tuple(laws), source="toy"
        )

    return draft


def pick_tree(q: Model, widths: Sequence[int]) -> Draft:
    """Drafts the `widths[d]` most likely tokens of q below every node of depth d (kind D2)."""

    def draft(context: Context, stream: Stream) -> DraftTree:
        return _grow(context, widths, lambda path, width: q(path).topk(width).indices.tolist())

    return draft


class Rule(Protocol):
    """What is enumerated of a verifier."""

    def verify(self, tree: DraftTree, p: Laws, rng: Stream) -> Verdict: ...


def speculate(verifier: Rule, p: Model, draft: Draft, num_calls: int = 1) -> Call:
    """Consecutive calls, each drafting after what the one before emitted.

    The call returns all tokens emitted and how many of them were accepted drafts.
    """

    def call(stream: Stream) -> tuple[Context, int]:
        tokens: Context = ()
        num_accepted = 0
        for _ in range(num_calls):
            tree = draft(tokens, stream)
            laws: Laws = ToyLaws(p, tokens, tree)
            verdict = verifier.verify(tree, laws, stream)
            tokens += (*(tree.tokens[node] for node in verdict.accepted), verdict.token)
            num_accepted += len(verdict.accepted)
        return tokens, num_accepted

    return call


def bias(call: Call, p: Model, length: int) -> float:
    """Total variation between p's law over `length` tokens and that of what the call emits.

    Emissions that are shorter are continued by plain sampling from p.
    """
    seen = _continued(exact_law(lambda stream: call(stream)[0]), p, length)
    true = _continued({(): 1.0}, p, length)
    return sum(abs(seen.get(key, 0.0) - true.get(key, 0.0)) for key in seen | true) / 2


def expected_accepted(call: Call) -> float:
    """E[tau], the mean number of accepted draft tokens."""
    law = exact_law(lambda stream: call(stream)[1])
    return sum(weight * num_accepted for num_accepted, weight in law.items())


def _continued(law: Mapping[Context, float], p: Model, length: int) -> dict[Context, float]:
    """The law of the first `length` tokens when p goes on where an outcome ends."""
    full: dict[Context, float] = defaultdict(float)
    todo = list(law.items())
    while todo:
        tokens, weight = todo.pop()
        if len(tokens) >= length:
            full[tokens[:length]] += weight
        else:
            todo += [((*tokens, x), weight * p_x) for x, p_x in enumerate(p(tokens).tolist())]
    return dict(full)


def _grow(
    context: Context,
    widths: Sequence[int],
    children: Callable[[Context, int], list[int]],
    q: Model | None = None,
) -> DraftTree:
    """Level by level, `children(path, width)` below every node; q is recorded if given."""
    tokens: list[int] = []
    parents: list[int] = []
    laws: list[Tensor | None] = []
    level: list[tuple[int, Context]] = [(-1, context)]
    for width in widths:
        below: list[tuple[int, Context]] = []
        for parent, path in level:
            for token in children(path, width):
                below.append((len(tokens), (*path, token)))
                tokens.append(token)
                parents.append(parent)
                laws.append(q(path) if q else None)
        level = below
    return DraftTree(tokens=tuple(tokens), parents=tuple(parents), laws=tuple(laws), source="toy")
