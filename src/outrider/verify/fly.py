"""FlyVerifier: a mismatch stands if the drafts after it go on matching the target. Lossy.

Shape legend: V vocabulary, K draft length.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from outrider.errors import RequestError
from outrider.request import MAX_DRAFT_TOKENS, Option
from outrider.sampling.laws import Laws
from outrider.sampling.rng import Stream
from outrider.step import DraftTree, Verdict
from outrider.verify.base import CHAINS, Exactness
from outrider.verify.rejection import acceptance, residual

READINGS = ("strict", "released", "paper")


class FlyVerifier:
    """Loosely speculative decoding of chains (Li et al. 2025, FLy).

    A draft matches where token rejection accepts it: u < p/q, at temperature 0 equality with the
    argmax. A mismatch is tolerated if the target is unsure there (entropy of its own law at least
    `theta`), if the settings leave the token some chance (`Laws.allows`), and if the drafts after
    it, which the same pass read, match; then the walk goes on behind them. Else it is refused as
    token rejection refuses it. One coin per position; not the target's law.

    Readings of the paper: "strict" (vLLM) takes the entropy in nats over the three likeliest tokens
    and W = min(window, K - 1) matches after the mismatch; "released" (the authors' code) the same
    entropy, its window counts the mismatch, so one match less; "paper" the whole entropy divided by
    log V, and `window` matches. All ask that i + W < K.

    Raises:
        RequestError: an unknown reading, or a window that leaves no token to match.
    """

    name = "fly"
    exactness = Exactness.LOSSY
    keyed_by: Literal["position", "root"] = "root"
    accepts = CHAINS
    greedy_only = False
    options: Mapping[str, Option] = {
        "reading": Option("strict", "which form of the rule", choices=READINGS),
        "theta": Option(0.3, "entropy from which on a mismatch may be tolerated", low=0.0),
        "window": Option(6, "drafts that must match after it", low=1, high=MAX_DRAFT_TOKENS),
    }

    def __init__(self, *, reading: str = "strict", theta: float = 0.3, window: int = 6) -> None:
        self.options["reading"].check("reading", reading)
        if reading == "released" and window < 2:
            raise RequestError(
                f"window={window}: in reading 'released' the mismatch is part of it; use 2 or more"
            )
        self.reading = reading
        self.theta = theta
        self.window = window

    def verify(self, tree: DraftTree, p: Laws, rng: Stream) -> Verdict:
        assert tree.is_chain, "fly verifies chains; the engine refuses other trees"
        n, relaxed = 0, []
        while n < len(tree):
            if _matches(n, tree, p, rng):
                n += 1
            elif self._is_confirmed(n, tree, p, rng):
                relaxed.append(n)
                n += 1 + self._followers(len(tree))
            else:
                token = _correction(n, tree, p, rng)
                return Verdict(tuple(range(n)), token, relaxed=tuple(relaxed))
        return Verdict(tuple(range(n)), p.draw(n - 1, rng), relaxed=tuple(relaxed))

    def _is_confirmed(self, node: int, tree: DraftTree, p: Laws, rng: Stream) -> bool:
        """Whether the mismatch may stand and every draft of the window behind it matches."""
        followers = range(node + 1, node + 1 + self._followers(len(tree)))
        return (
            node + self._window(len(tree)) < len(tree)
            and self.is_unsure(p.own_law(node - 1))
            and p.allows(node - 1, tree.tokens[node])
            and all(_matches(follower, tree, p, rng) for follower in followers)
        )

    def is_unsure(self, own_V: Tensor) -> bool:
        """The gate: whether the entropy of the target's own law reaches theta."""
        if self.reading == "paper":
            return _entropy(own_V) / math.log(len(own_V)) >= self.theta
        return _entropy(own_V.topk(min(3, len(own_V))).values) >= self.theta

    def _window(self, num_drafted: int) -> int:
        """W; a chain of one has no draft to confirm its token, so that W is at least 1."""
        if self.reading == "strict":
            return max(1, min(self.window, num_drafted - 1))
        return self.window

    def _followers(self, num_drafted: int) -> int:
        """Matches that must follow a mismatch."""
        return self._window(num_drafted) - (self.reading == "released")


def _matches(node: int, tree: DraftTree, p: Laws, rng: Stream) -> bool:
    return rng.flip(acceptance(p.log_law(node - 1), tree.law(node), tree.tokens[node]))


def _correction(node: int, tree: DraftTree, p: Laws, rng: Stream) -> int:
    return rng.pick(residual(p.law(node - 1), tree.law(node), tree.tokens[node]))


def _entropy(weights_V: Tensor) -> float:
    """-sum p log p in nats; 0 log 0 is 0."""
    return -float(torch.special.xlogy(weights_V, weights_V).sum())
