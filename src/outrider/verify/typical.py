"""TypicalVerifier: a draft stands while the target finds it likely enough. Lossy.

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
from outrider.verify.base import ALL_KINDS, Exactness

FLOOR = 1e-5  # added to p inside the logarithm of the entropy, as in the paper's code


class TypicalVerifier:
    """Typical acceptance (Cai et al. 2024, Medusa, section 2.3).

    A token stands if p > min(epsilon, delta * exp(-H)): an unsure target lets more pass. Of the
    longest paths that stand the likeliest is taken, then the target's argmax. The laws that drafts
    were drawn from are not looked at, and nothing is drawn. Not the target's law; at temperature 0
    p is a point mass, and this is greedy decoding. Without drafts every token is the argmax:
    drafts that are not, and stand, are the relaxed ones.

    Args:
        epsilon: no token above this probability is refused.
        delta: share of exp(-H), about the probability of a typical token, that is asked for.
    """

    name = "typical"
    exactness = Exactness.LOSSY
    keyed_by: Literal["position", "root"] = "root"
    accepts = ALL_KINDS
    greedy_only = False
    options: Mapping[str, Option] = {
        "epsilon": Option(0.09, "probability that is always enough", low=0.0, high=1.0),
        "delta": Option(0.3, "share of exp(-entropy) that is enough", low=0.0, high=1.0),
    }

    def __init__(self, *, epsilon: float = 0.09, delta: float = 0.3) -> None:
        self.epsilon = epsilon
        self.delta = delta

    def verify(self, tree: DraftTree, p: Laws, rng: Stream) -> Verdict:
        standing = {-1: (0, 0.0)}  # node -> (depth, log-probability of its path)
        laws: dict[int, tuple[Tensor, float]] = {}
        for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
            if parent not in standing:
                continue
            if parent not in laws:
                p_V = p.law(parent)
                laws[parent] = p_V, self.threshold(p_V)
            p_V, threshold = laws[parent]
            probability = float(p_V[token])
            if probability > threshold:
                depth, likelihood = standing[parent]
                standing[node] = depth + 1, likelihood + math.log(probability)
        best = max(standing, key=lambda node: standing[node])
        path = tree.path(best)
        relaxed = tuple(n for n in path if tree.tokens[n] != p.argmax(tree.parents[n]))
        return Verdict(path, p.argmax(best), relaxed=relaxed)

    def threshold(self, p_V: Tensor) -> float:
        """What a token's probability must exceed; 0 <= threshold <= epsilon."""
        entropy = -float((p_V * (p_V + FLOOR).log()).sum())
        return min(self.epsilon, self.delta * math.exp(-entropy))
