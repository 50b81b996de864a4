"""SyntheticVerifier: accepts by a schedule and reads no token. For benchmarks: the text is garbage.

Shape legend: K draft length.
"""

from collections.abc import Mapping
from typing import Literal

from outrider.errors import RequestError
from outrider.request import MAX_DRAFT_TOKENS, Option
from outrider.sampling.laws import Laws
from outrider.sampling.rng import Stream
from outrider.step import DraftTree, Verdict
from outrider.verify.base import ALL_KINDS, Exactness

DEFAULT_GEOMETRIC = 0.7


class SyntheticVerifier:
    """Accepts the first i drafts with joint probability r_i.

    It measures a system apart from its drafter. E[acceptance length] = 1 + sum_{i<=K} r_i. Each
    sequence tosses coins of its own, with r_i / r_{i-1}, down the first child of every node; the
    bonus token is the target's argmax. An accepted token may end the sequence (`ignore_eos`), or
    break a grammar, which fails the request.

    Args:
        rates: "r_1, r_2, ..", falling; positions behind the last are never accepted.
        length: mean acceptance length, in [1, K + 1], with the least variance: so many sure drafts,
            then one with the remaining fraction. A shorter tree is accepted whole.
        geometric: r_i = geometric ** i.

    Where none is set geometric is 0.7; rates of '0' accept nothing.

    Raises:
        RequestError: more than one of them is set ("" and 0 are unset), or it is no schedule.
    """

    name = "synthetic"
    exactness = Exactness.SYNTHETIC
    keyed_by: Literal["position", "root"] = "root"
    accepts = ALL_KINDS
    greedy_only = False
    options: Mapping[str, Option] = {
        "rates": Option("", "joint acceptance rates, as in '0.8, 0.6, 0.4'; '' is unset"),
        "length": Option(
            0.0, "mean acceptance length; 0 is unset", low=0.0, high=MAX_DRAFT_TOKENS + 1
        ),
        "geometric": Option(
            0.0, "each draft's acceptance rate; 0 is unset: 0.7 where all are", low=0.0, high=1.0
        ),
    }

    def __init__(
        self,
        *,
        rates: str = "",
        length: float = 0.0,
        geometric: float = 0.0,
    ) -> None:
        if sum(bool(setting) for setting in (rates, length, geometric)) > 1:
            raise RequestError(
                f"rates={rates!r}, length={length}, geometric={geometric}: set one of them only"
            )
        if not (rates or length):
            geometric = geometric or DEFAULT_GEOMETRIC
        self.rates = _schedule(rates, length, geometric)

    def verify(self, tree: DraftTree, p: Laws, rng: Stream) -> Verdict:
        accepted, last, before = [], -1, 1.0
        for node, rate in zip(_first_children(tree), self.rates, strict=False):
            if not rng.flip(rate / before):
                break
            accepted.append(node)
            last, before = node, rate
        return Verdict(tuple(accepted), p.argmax(last))


def _schedule(rates: str, length: float, geometric: float) -> tuple[float, ...]:
    """Joint rates of the positions; the last is not 0, behind it all are."""
    if rates:
        joint = _parsed(rates)
    elif length:
        if length < 1.0:
            raise RequestError(f"length={length}: the bonus token counts; use 1 or more")
        joint = [min(1.0, max(0.0, length - 1.0 - i)) for i in range(MAX_DRAFT_TOKENS)]
    else:
        joint = [geometric**i for i in range(1, MAX_DRAFT_TOKENS + 1)]
    return tuple(rate for rate in joint if rate > 0.0)


def _parsed(rates: str) -> list[float]:
    try:
        joint = [float(rate) for rate in rates.split(",")]
    except ValueError:
        joint = [-1.0]
    if not all(0.0 <= b <= a <= 1.0 for a, b in zip([1.0, *joint], joint, strict=False)):
        raise RequestError(
            f"rates={rates!r}: give falling numbers in [0, 1] with commas between, as in "
            "'0.8, 0.6, 0.4'"
        )
    return joint


def _first_children(tree: DraftTree) -> list[int]:
    """Nodes of the path that takes the first child everywhere."""
    path: list[int] = []
    for node, parent in enumerate(tree.parents):
        if parent == (path[-1] if path else -1):
            path.append(node)
    return path
