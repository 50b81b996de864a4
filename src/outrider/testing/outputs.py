"""Whether tokens that were drawn have the law they should: statistics of many seeds.

Shape legend: V vocabulary, C tokens that can come, N nodes of a tree.
"""

import math
from collections.abc import Mapping, Sequence as Items

import torch
from torch import Tensor

from outrider.engine.engine import Engine
from outrider.models.runner import Piece
from outrider.step import DraftTree
from outrider.testing.enumerate import Context
from outrider.testing.watch import Drafted

UNLIKELY = 3.72  # standard deviations; of 10,000 right ones about one goes beyond
FEWEST = 5.0  # expected draws that a cell of its own needs


def assert_law(seen: Mapping[Context, int], law: Mapping[Context, float], told: str) -> None:
    """Chi-square of counts against the law they were drawn from; rare outcomes share a cell.

    The limit is the quantile of Wilson and Hilferty (1931).
    """
    num_draws = sum(seen.values())
    assert seen.keys() <= law.keys(), f"{told}: {seen.keys() - law.keys()} can never come out"
    cells = [(seen.get(outcome, 0), num_draws * weight) for outcome, weight in law.items()]
    often = [cell for cell in cells if cell[1] >= FEWEST]
    rare = [cell for cell in cells if cell[1] < FEWEST]
    if sum(expected for _, expected in rare) >= FEWEST:
        often.append((sum(found for found, _ in rare), sum(expected for _, expected in rare)))
    statistic = sum((found - expected) ** 2 / expected for found, expected in often)
    limit = _chi_square_limit(len(often) - 1)
    assert statistic < limit, f"{told}: chi-square {statistic:.1f} of the output beyond {limit:.1f}"


def _chi_square_limit(degrees: int) -> float:
    assert degrees > 0, "one outcome tells nothing"
    spread = 2 / (9 * degrees)
    return float(degrees * (1 - spread + UNLIKELY * math.sqrt(spread)) ** 3)


def assert_drawn_as_recorded(drafted: Items[Drafted], told: str) -> None:
    """Two sums over all draws, in order, whose terms have mean 0 given all that was drawn before.

    The log-probabilities of tokens, against their means under the recorded laws; and places of
    tokens in their laws, weighted with where the draw before for the same position was: that draw
    tells nothing about this one, unless random numbers are used again.
    """
    likely, repeated = Martingale(), Martingale()
    places: dict[tuple[str, int], float] = {}
    for at in drafted:
        for node in _draws(at.tree):
            q_V = at.tree.law(node)
            if q_V is None:
                continue
            q_C, chosen = _support(q_V.double(), at.tree.tokens[node])
            likely.add(q_C.log(), q_C, chosen)
            middle_C = q_C.cumsum(dim=0) - q_C / 2 - 0.5
            position = at.seq_id, at.num_tokens + at.tree.depth(node)
            repeated.add(middle_C * places.get(position, 0.0), q_C, chosen)
            places[position] = float(middle_C[chosen])
    assert likely.num_terms, f"{told}: no draft came with the law it was drawn from"
    for sum_, wrong in (
        (likely, "are not drawn from the laws recorded with them"),
        (repeated, "depend on earlier draws: random numbers are used again, or draws left out"),
    ):
        off = sum_.deviations
        assert abs(off) < UNLIKELY, f"{told}: drafts {wrong} ({off:+.1f} deviations)"


class Martingale:
    """A sum of scores of draws, each less its mean, in units of its standard deviation."""

    def __init__(self) -> None:
        self.num_terms = 0
        self._sum = self._variance = 0.0

    def add(self, score_C: Tensor, law_C: Tensor, chosen: int) -> None:
        mean = float(score_C @ law_C)
        self.num_terms += 1
        self._sum += float(score_C[chosen]) - mean
        self._variance += float((score_C - mean).square() @ law_C)

    @property
    def deviations(self) -> float:
        return self._sum / math.sqrt(self._variance) if self._variance > 0 else 0.0


def _draws(tree: DraftTree) -> Items[int]:
    """Nodes as often as they were drawn: of independent chains every draw counts."""
    return [node for path in tree.paths for node in path] if tree.paths else range(len(tree))


def _support(q_V: Tensor, token: int) -> tuple[Tensor, int]:
    """Probabilities of the tokens that can come, and the place of one among them."""
    at_C = q_V.nonzero()[:, 0]
    q_C = q_V[at_C]
    return q_C / q_C.sum(), int((at_C == token).nonzero())


def target_law(
    engine: Engine, prompt: Context, allowed: Context, length: int, temperature: float
) -> dict[Context, float]:
    """Law of the next `length` tokens after a prompt, when only some tokens can come."""
    tree, paths = _all_paths(allowed, length - 1)
    table, num_cached = engine.manager.open(prompt)
    assert engine.manager.reserve(table, len(prompt) + len(tree))
    piece = Piece(table, num_cached, prompt[num_cached:], tree, True)
    logits_NV = engine.runner.run([piece]).logits_NV
    engine.manager.free(table)
    laws_NC = (logits_NV[:, torch.tensor(allowed)].double() / temperature).softmax(dim=-1)
    law: dict[Context, float] = {(): 1.0}
    for _ in range(length):
        law = {
            (*path, token): weight * float(p)
            for path, weight in law.items()
            for token, p in zip(allowed, laws_NC[paths[path] + 1], strict=True)
        }
    return law


def _all_paths(allowed: Context, depth: int) -> tuple[DraftTree, dict[Context, int]]:
    """The whole tree over some tokens, and the node at the end of each path (-1: the root)."""
    node_of: dict[Context, int] = {(): -1}
    tokens: list[int] = []
    parents: list[int] = []
    level: list[Context] = [()]
    for _ in range(depth):
        level = [(*path, token) for path in level for token in allowed]
        for path in level:
            node_of[path] = len(tokens)
            tokens.append(path[-1])
            parents.append(node_of[path[:-1]])
    return DraftTree(tokens=tuple(tokens), parents=tuple(parents)), node_of
