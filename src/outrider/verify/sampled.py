"""SampledVerifier: one target sample per visited node; drafts stand while they guess it."""

from collections.abc import Callable, Mapping
from typing import Literal

from outrider.request import Option
from outrider.sampling.laws import Laws
from outrider.sampling.rng import Stream
from outrider.step import DraftTree, Verdict
from outrider.verify.base import ALL_KINDS, Exactness


class SampledVerifier:
    """Node-wise sampling: exact match with the target's own draw, down any tree.

    Invariant: every emitted token is a draw from p after the tokens before it, whatever was
    proposed, so the output law is the target's. Under a `PositionStream` the tokens themselves
    are those of plain decoding (drafter-invariant sampling, Daliri et al. 2024); then a drafter
    that reads the same noise guesses better.
    """

    name = "sampled"
    exactness = Exactness.EXACT
    keyed_by: Literal["position", "root"] = "position"
    accepts = ALL_KINDS
    greedy_only = False
    options: Mapping[str, Option] = {}

    def verify(self, tree: DraftTree, p: Laws, rng: Stream) -> Verdict:
        return walk(tree, lambda node: p.draw(node, rng))


def walk(tree: DraftTree, token_after: Callable[[int], int]) -> Verdict:
    """Down the tree while a child holds the target's token; a token that no child holds ends it.

    One pass is enough: parents stand before their children, and the first of equal siblings wins.
    """
    accepted: list[int] = []
    last, token = -1, token_after(-1)
    for node, drafted in enumerate(tree.tokens):
        if drafted == token and tree.parents[node] == last:
            accepted.append(node)
            last, token = node, token_after(node)
    return Verdict(tuple(accepted), token)
