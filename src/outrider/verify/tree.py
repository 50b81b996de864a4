"""TreeVerifier: at each node the candidates are tried one by one, each on what the last left over.

Shape legend: V vocabulary.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from outrider.request import Option
from outrider.sampling.laws import Laws
from outrider.sampling.rng import Stream
from outrider.step import DraftTree, Verdict
from outrider.verify.base import ALL_KINDS, Exactness
from outrider.verify.block import correction, weigh


class TreeVerifier:
    """Recursive rejection, from the root down (Miao et al. 2023).

    Chen et al. 2024 (Sequoia) try siblings drawn without replacement; here a candidate may come
    from any law, a point mass too, as long as it is the law given the candidates before it.

    Invariant: with `left` the law still owed at a node, candidate x of q stands with
    min(1, left(x)/q(x)), else norm(left - q)+ is owed; so each token's law is the target's.
    """

    name = "tree"
    exactness = Exactness.EXACT
    keyed_by: Literal["position", "root"] = "root"
    accepts = ALL_KINDS
    greedy_only = False
    options: Mapping[str, Option] = {}

    def verify(self, tree: DraftTree, p: Laws, rng: Stream) -> Verdict:
        accepted: tuple[int, ...] = ()
        while True:
            node = accepted[-1] if accepted else -1
            candidates = _candidates(tree, accepted)
            if not candidates:
                return Verdict(accepted, p.draw(node, rng))
            hit, left_V = _first_hit(candidates, tree, p.law(node), rng)
            if hit is None:
                return Verdict(accepted, rng.pick(left_V))
            accepted = (*accepted, hit)


def _first_hit(
    candidates: list[int], tree: DraftTree, left_V: Tensor, rng: Stream
) -> tuple[int | None, Tensor]:
    """The first candidate that stands, or None and the law that is owed after all of them."""
    for node in candidates:
        q_V, token = tree.law(node), tree.tokens[node]
        if rng.flip(weigh(1.0, left_V, q_V, token)):
            return node, left_V
        left_V = correction(1.0, left_V, q_V, token)
    return None, left_V


def _candidates(tree: DraftTree, accepted: tuple[int, ...]) -> list[int]:
    """Nodes to try after the accepted path; of independent chains as often as they were drawn."""
    depth = len(accepted)
    if not tree.paths:
        return tree.children(accepted[-1] if accepted else -1)
    return [path[depth] for path in tree.paths if path[:depth] == accepted and len(path) > depth]
