"""CautiousVerifier: an exact rule that lets a few drafts stand at most."""

from collections.abc import Mapping
from typing import Literal

from outrider.request import Option
from outrider.sampling.laws import Laws
from outrider.sampling.rng import Stream
from outrider.step import DraftTree, Verdict
from outrider.verify.base import ALL_KINDS, Exactness


class CautiousVerifier:
    """A token of the target's own law per node; drafts stand while they guess it.

    Args:
        most: drafts that may stand in one step.
    """

    name, exactness = "cautious", Exactness.EXACT
    keyed_by: Literal["position", "root"] = "position"
    accepts = ALL_KINDS
    greedy_only = False
    options: Mapping[str, Option] = {"most": Option(2, "drafts that may stand", low=0, high=64)}

    def __init__(self, most: int = 2) -> None:
        self.most = most

    def verify(self, tree: DraftTree, p: Laws, rng: Stream) -> Verdict:
        accepted: list[int] = []
        while True:
            last = accepted[-1] if accepted else -1
            token = p.draw(last, rng)
            hits = [child for child in tree.children(last) if tree.tokens[child] == token]
            if not hits or len(accepted) == self.most:
                return Verdict(tuple(accepted), token)
            accepted.append(hits[0])
