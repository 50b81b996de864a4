"""GreedyVerifier: drafts stand while they are the target's argmax."""

from collections.abc import Mapping
from typing import Literal

from outrider.request import Option
from outrider.sampling.laws import Laws
from outrider.sampling.rng import Stream
from outrider.step import DraftTree, Verdict
from outrider.verify.base import ALL_KINDS, Exactness
from outrider.verify.sampled import walk


class GreedyVerifier:
    """Exact match at temperature 0; invariant: token ids equal greedy decoding."""

    name = "greedy"
    exactness = Exactness.EXACT_GREEDY
    keyed_by: Literal["position", "root"] = "position"
    accepts = ALL_KINDS
    greedy_only = True
    options: Mapping[str, Option] = {}

    def verify(self, tree: DraftTree, p: Laws, rng: Stream) -> Verdict:
        return walk(tree, p.argmax)
