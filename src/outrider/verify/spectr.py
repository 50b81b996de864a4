"""SpectrVerifier: independently drawn chains compete at every node for the target's next token.

Shape legend: V vocabulary, M candidates at a node.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from outrider.request import Option
from outrider.sampling.laws import Laws
from outrider.sampling.rng import Stream
from outrider.step import DraftTree, Kind, Verdict
from outrider.verify.base import Exactness
from outrider.verify.block import correction, weigh

TOLERANCE = 1e-4  # of the division factor, which is rounded up
ROUNDING = 1e-12
INDEPENDENT = frozenset({Kind.DRAWN_CHAIN, Kind.DRAWN_CHAINS})


class SpectrVerifier:
    """k-SEQ at every node of M chains (Sun et al. 2023, algorithm 2).

    The candidates at a node are the next tokens of the chains that are still on the accepted path,
    duplicates included, in draw order; each stands with min(1, p / (r q)). The least valid r looks
    at as many candidates as it divides by: expected_tries(r) = r. It takes O(V log 1/tolerance).
    Invariant: the output law is the target's; on one chain this is token rejection.
    """

    name = "spectr"
    exactness = Exactness.EXACT
    keyed_by: Literal["position", "root"] = "root"
    accepts = INDEPENDENT
    greedy_only = False
    options: Mapping[str, Option] = {}

    def verify(self, tree: DraftTree, p: Laws, rng: Stream) -> Verdict:
        chains, last = chains_of(tree), -1
        accepted: tuple[int, ...] = ()
        while True:
            depth = len(accepted)
            chains = tuple(chain for chain in chains if len(chain) > depth)
            if not chains:
                return Verdict(accepted, p.draw(last, rng))
            children = [chain[depth] for chain in chains]
            hit, token = _try(children, tree, p.law(last), rng)
            if hit < 0:
                return Verdict(accepted, token)
            accepted, last = (*accepted, hit), hit
            chains = tuple(chain for chain in chains if chain[depth] == hit)


def chains_of(tree: DraftTree) -> tuple[tuple[int, ...], ...]:
    """The chains in draw order, each as its nodes; a single one may come without `paths`."""
    if tree.paths or not tree.tokens:
        return tree.paths
    assert tree.is_chain, "independently drawn chains are told by DraftTree.paths"
    return (tuple(range(len(tree))),)


def dense(q_V: Tensor | None, p_V: Tensor, token: int) -> Tensor:
    """q as numbers like those of p; None is the point mass at the token."""
    if q_V is not None:
        assert q_V.shape == p_V.shape, f"q over {len(q_V)} tokens, p over {len(p_V)}"
        return q_V.to(p_V)
    point_V = torch.zeros_like(p_V)
    point_V[token] = 1.0
    return point_V


def division_factor(p_V: Tensor, q_V: Tensor, num_candidates: int) -> float:
    """The least r in [1, M] with expected_tries(r) <= r, from above; any r below it is biased."""
    low, high = 1.0, float(num_candidates)
    if expected_tries(p_V, q_V, low, num_candidates) <= low + ROUNDING:
        return low
    while high - low > TOLERANCE:
        r = (low + high) / 2
        if expected_tries(p_V, q_V, r, num_candidates) <= r:
            high = r
        else:
            low = r
    return high


def expected_tries(p_V: Tensor, q_V: Tensor, r: float, num_candidates: int) -> float:
    """Mean number of candidates looked at, P_acc / beta: beta is the chance that one stands."""
    beta = float(torch.minimum(q_V, p_V / r).sum())
    return sum((1.0 - beta) ** i for i in range(num_candidates))


def _try(children: list[int], tree: DraftTree, p_V: Tensor, rng: Stream) -> tuple[int, int]:
    """The first child that stands and its token, or -1 and a token of what is left of p."""
    first = tree.tokens[children[0]]
    q_V = dense(tree.law(children[0]), p_V, first)
    r = division_factor(p_V, q_V, len(children))
    for child in children:
        token = tree.tokens[child]
        if rng.flip(weigh(1.0 / r, p_V, q_V, token)):
            return child, token
    taken_V = torch.minimum(q_V, p_V / r) * expected_tries(p_V, q_V, r, len(children))
    return -1, rng.pick(correction(1.0, p_V, taken_V, first))
