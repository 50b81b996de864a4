"""BlockVerifier: every prefix of a drawn chain is tested as a whole, the longest that stands wins.

Shape legend: V vocabulary, K draft length.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from outrider.request import Option
from outrider.sampling.laws import Laws
from outrider.sampling.rng import Stream
from outrider.step import DraftTree, Verdict
from outrider.verify.base import CHAINS, Exactness


class BlockVerifier:
    """Block verification of chains (Sun et al. 2024, algorithm 2).

    Invariant: the output law is the target's. The prefix of length i stands in the end with
    probability weight_i, so E[accepted] = sum_i E_q[weight_i]: never less than token rejection,
    and the same where q is a point mass.
    """

    name = "block"
    exactness = Exactness.EXACT
    keyed_by: Literal["position", "root"] = "root"
    accepts = CHAINS
    greedy_only = False
    options: Mapping[str, Option] = {}

    def verify(self, tree: DraftTree, p: Laws, rng: Stream) -> Verdict:
        assert tree.is_chain, "block verifies chains; the engine refuses other trees"
        p_rows, tokens = _rows(tree, p), tree.tokens
        q_rows = [tree.law(node) for node in range(len(tree))]
        n, weight = longest_block(rng, p_rows, q_rows, tokens)
        accepted = tuple(range(n))
        if n == len(tree):
            return Verdict(accepted, p.draw(n - 1, rng))
        return Verdict(accepted, rng.pick(correction(weight, p_rows[n], q_rows[n], tokens[n])))


def longest_block(
    rng: Stream,
    p_rows: Sequence[Tensor],
    q_rows: Sequence[Tensor | None],
    tokens: Sequence[int],
    start: int = 0,
) -> tuple[int, float]:
    """How many of K tokens stand (at least `start`, which are granted), and the weight there.

    Prefixes are tested by coins of their own, the longest first: the first that stands is the
    longest that does. Short of K, the next token's law is `correction(weight, ...)` of that row.

    Args:
        p_rows: [V] float64, row i after tokens[:i]; may end at the first token that p forbids.
        q_rows: K laws [V], the tokens were drawn from them; None is a point mass.
    """
    weights = _weights(p_rows, q_rows, tokens, start)
    for n in reversed(range(start + 1, start + len(weights))):
        weight = weights[n - start]
        if n < len(tokens):
            rest = float(excess(weight, p_rows[n], q_rows[n], tokens[n]).sum())
            stands = rng.flip(remaining_weight(weight, rest))
        else:
            stands = rng.flip(weight)
        if stands:
            return n, weight
    return start, 1.0


def weigh(weight: float, p_V: Tensor, q_V: Tensor | None, token: int) -> float:
    """min(1, weight p/q) at the token: 0 where p forbids it, whatever q says."""
    p = weight * float(p_V[token])
    q = 1.0 if q_V is None else float(q_V[token])
    if p <= 0.0:
        return 0.0
    return p / q if p < q else 1.0


def excess(weight: float, p_V: Tensor, q_V: Tensor | None, token: int) -> Tensor:
    """(weight p - q)+ [V], float64; None is the point mass at the token."""
    rest_V = p_V * weight
    if q_V is None:
        rest_V[token] = 0.0
        return rest_V
    assert q_V.shape == p_V.shape, f"q over {len(q_V)} tokens, p over {len(p_V)}"
    return rest_V.sub_(q_V.to(rest_V.device)).clamp_(min=0.0)


def remaining_weight(weight: float, rest: float) -> float:
    """The weight of a prefix once the candidate after it is refused; `rest` sums its excess."""
    room = rest + (1.0 - weight)  # in this order the ratio never exceeds 1
    return rest / room if room > 0 else 1.0


def correction(weight: float, p_V: Tensor, q_V: Tensor | None, token: int) -> Tensor:
    """norm(weight p - q)+ [V], what follows a refused candidate; p if rounding leaves nothing."""
    rest_V = excess(weight, p_V, q_V, token)
    total = float(rest_V.sum())
    return rest_V.div_(total) if total > 0 else p_V


def _weights(
    p_rows: Sequence[Tensor], q_rows: Sequence[Tensor | None], tokens: Sequence[int], start: int
) -> list[float]:
    """Of the prefixes from `start` on, while they are positive; the first weighs 1."""
    weights = [1.0]
    for i in range(start, len(tokens)):
        weight = weigh(weights[-1], p_rows[i], q_rows[i], tokens[i])
        if weight == 0.0:
            break
        weights.append(weight)
    return weights


def _rows(tree: DraftTree, p: Laws) -> list[Tensor]:
    """p before each token, down to the first that it forbids: no later prefix can stand."""
    rows: list[Tensor] = []
    for node, token in enumerate(tree.tokens):
        rows.append(p.law(node - 1))
        if rows[-1][token] == 0.0:
            break
    return rows
