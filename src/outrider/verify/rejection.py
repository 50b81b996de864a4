"""RejectionVerifier: a drawn token stands with probability min(1, p/q), else the residual decides.

Shape legend: V vocabulary.
"""

import math
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from outrider.request import Option
from outrider.sampling.laws import Laws
from outrider.sampling.rng import Stream
from outrider.step import DraftTree, Verdict
from outrider.verify.base import CHAINS, Exactness


class RejectionVerifier:
    """Token rejection on chains (Leviathan et al. 2023, algorithm 1; Chen et al. 2023).

    Invariant: accept x with min(1, p(x)/q(x)), else emit from norm(p - q)+: the token at each
    position then has the law p, provided that x was drawn from the q recorded with it.
    """

    name = "rejection"
    exactness = Exactness.EXACT
    keyed_by: Literal["position", "root"] = "root"
    accepts = CHAINS
    greedy_only = False
    options: Mapping[str, Option] = {}

    def verify(self, tree: DraftTree, p: Laws, rng: Stream) -> Verdict:
        assert tree.is_chain, "rejection verifies chains; the engine refuses other trees"
        for node, token in enumerate(tree.tokens):
            q_V = tree.law(node)
            if not rng.flip(acceptance(p.log_law(node - 1), q_V, token)):
                return Verdict(tuple(range(node)), rng.pick(residual(p.law(node - 1), q_V, token)))
        last = len(tree) - 1
        return Verdict(tuple(range(len(tree))), p.draw(last, rng))


def acceptance(log_p_V: Tensor, q_V: Tensor | None, token: int) -> float:
    """min(1, p/q) at the token, in log space; a token the target forbids never stands."""
    log_p = float(log_p_V[token])
    if q_V is None:
        return math.exp(log_p)
    assert q_V.shape == log_p_V.shape, f"q over {len(q_V)} tokens, p over {len(log_p_V)}"
    if log_p == -math.inf:
        return 0.0
    q = float(q_V[token])
    return math.exp(min(0.0, log_p - math.log(q))) if q > 0 else 1.0


def residual(p_V: Tensor, q_V: Tensor | None, token: int) -> Tensor:
    """norm(p - q)+, or p when rounding leaves nothing; q of a point mass is 1 at the token."""
    if q_V is None:
        rest_V = p_V.clone()
        rest_V[token] = 0.0
    else:
        rest_V = (p_V - q_V.to(p_V)).clamp(min=0.0)
    total = float(rest_V.sum())
    return rest_V / total if total > 0 else p_V
