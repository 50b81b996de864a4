"""Which draft nodes are worth their price: of all rows' nodes in order of yield, the best prefix.

Each row has a ladder: rung i makes its draft one deeper. The rungs of all rows are sorted by
committed tokens per node; along a row that falls, so what a prefix takes of a row is a draft from
its root. A drafter that needs a pass per depth makes deep rungs dear for everybody, so the search
is repeated for every deepest depth.

Source: the objective of verification budgets (vLLM's adaptive verification; AdaSpec, Li et al.
2025), with the price of drafting in it.

Shape legend: U rungs, sorted.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence as Items
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from outrider.control.acceptance import Forecast

Floats: TypeAlias = NDArray[np.float64]
MAX_CHECKED = 64  # prefixes that are asked whether they keep the latency targets
DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)  # that may be the deepest of a step


class Ladder(NamedTuple):
    """What one row's draft would bring, depth by depth.

    Attributes:
        forecast: for depths 1 to the deepest that may be planned.
        num_nodes: nodes that a depth adds, where it is reached.
        weight: of the row's tokens beside those of others.
        drafter: who would draft.
        entry: seconds that drafting for this row at all adds.
    """

    forecast: Forecast
    num_nodes: float
    weight: float
    drafter: str
    entry: float = 0.0


class DraftPrice(NamedTuple):
    """Seconds of drafting: per call, per depth, per row and per node."""

    call: float
    depth: float
    row: float
    node: float


class Price(Protocol):
    """Seconds of a step."""

    def step(self, nodes_U: Floats) -> Floats:
        """With so many draft nodes beside what the step holds anyway, drafting left out."""
        ...

    def draft(self, drafter: str) -> DraftPrice: ...


class Chosen(NamedTuple):
    """A set of rungs.

    Attributes:
        depths: per ladder; 0 is plain decoding.
        tokens: weighted, expected to be committed by the step.
        seconds: of the whole step.
    """

    depths: list[int]
    tokens: float
    seconds: float

    @property
    def goodput(self) -> float:
        return self.tokens / self.seconds


def allocate(
    ladders: Items[Ladder],
    num_tokens: float,
    price: Price,
    is_allowed: Callable[[Chosen], bool] = lambda chosen: True,
) -> Chosen:
    """The set of rungs with the highest goodput; plain decoding where none is better.

    Args:
        num_tokens: weighted tokens that the step commits without these drafts.
        is_allowed: whether a choice keeps the latency targets; plain decoding is not asked about.
    """
    plain = Chosen([0] * len(ladders), num_tokens, float(price.step(np.zeros(1))[0]))
    rungs = _Rungs(ladders)
    found = [plain]
    for kept_U in rungs.choices(price):
        found += rungs.prefixes(kept_U, num_tokens, price, plain, is_allowed)
    return max(found, key=lambda chosen: chosen.goodput)


def evaluate(ladders: Items[Ladder], depths: Items[int], num_tokens: float, price: Price) -> Chosen:
    """What given depths would bring."""
    nodes, tokens, entry = 0.0, num_tokens, 0.0
    uses: dict[str, list[float]] = {}
    for ladder, depth in zip(ladders, depths, strict=True):
        depth = min(depth, len(ladder.forecast.stands))
        if not depth:
            continue
        own = ladder.num_nodes * sum(ladder.forecast.reached[:depth])
        tokens += ladder.weight * sum(ladder.forecast.stands[:depth])
        nodes += own
        entry += ladder.entry
        use = uses.setdefault(ladder.drafter, [0.0, 0.0, 0.0])
        use[0], use[1], use[2] = max(use[0], depth), use[1] + 1, use[2] + own
    seconds = float(price.step(np.array([nodes]))[0]) + _drafting(uses, price) + entry
    return Chosen(list(depths), tokens, seconds)


def _drafting(uses: Mapping[str, Items[float]], price: Price) -> float:
    total = 0.0
    for drafter, (depth, rows, nodes) in uses.items():
        costs = price.draft(drafter)
        total += costs.call + costs.depth * depth + costs.row * rows + costs.node * nodes
    return total


class _Rungs:
    """The rungs of all ladders in the order in which they are taken."""

    def __init__(self, ladders: Items[Ladder]) -> None:
        self.ladders = ladders
        self.drafters = list(dict.fromkeys(ladder.drafter for ladder in ladders))
        number = {name: i for i, name in enumerate(self.drafters)}
        rungs = []
        for which, ladder in enumerate(ladders):
            lowest, drafter = float("inf"), number[ladder.drafter]
            forecast, size, weight = ladder.forecast, ladder.num_nodes, ladder.weight
            for index, reached in enumerate(forecast.reached):
                if reached <= 0.0:
                    break
                adds, value = size * reached, weight * forecast.stands[index]
                lowest = min(lowest, value / adds)  # never before the rung below it
                entry = ladder.entry if index == 0 else 0.0
                rungs.append((-lowest, which, index + 1, adds, value, drafter, entry))
        rungs.sort()
        table = np.array(rungs, dtype=np.float64).reshape(len(rungs), 7)
        self.which_U = table[:, 1].astype(np.intp)
        self.depth_U = table[:, 2].astype(np.intp)
        self.nodes_U, self.value_U = table[:, 3], table[:, 4]
        self.drafter_U = table[:, 5].astype(np.intp)
        self.entry_U = table[:, 6]

    def depths_to_try(self, price: Price) -> list[int]:
        """Several, where depth has a price of its own and rows might not agree on one."""
        if not len(self.depth_U):
            return []
        deepest = int(self.depth_U.max())
        is_priced = any(price.draft(name).depth > 0.0 for name in self.drafters)
        if not is_priced or len(self.ladders) == 1:
            return [deepest]
        return [depth for depth in DEPTHS if depth < deepest] + [deepest]

    def choices(self, price: Price) -> Iterator[NDArray[np.intp]]:
        """Rungs up to a depth, of all drafters together and of each alone."""
        groups = [range(len(self.drafters))]
        if len(self.drafters) > 1:
            groups += [range(number, number + 1) for number in groups[0]]
        for group in groups:
            is_asked_U = (self.drafter_U >= group.start) & (self.drafter_U < group.stop)
            for deepest in self.depths_to_try(price):
                yield np.flatnonzero(is_asked_U & (self.depth_U <= deepest))

    def prefixes(
        self,
        kept_U: NDArray[np.intp],
        num_tokens: float,
        price: Price,
        plain: Chosen,
        is_allowed: Callable[[Chosen], bool],
    ) -> list[Chosen]:
        """The best allowed prefix of some rungs, if it beats plain decoding."""
        tokens_U = num_tokens + np.cumsum(self.value_U[kept_U])
        seconds_U = price.step(np.cumsum(self.nodes_U[kept_U])) + self._drafting(kept_U, price)
        goodput_U = tokens_U / seconds_U
        for end in np.argsort(-goodput_U, kind="stable")[:MAX_CHECKED]:
            if goodput_U[end] <= plain.goodput:
                break
            taken_U = kept_U[: end + 1]
            chosen = Chosen(self._depths(taken_U), float(tokens_U[end]), float(seconds_U[end]))
            if is_allowed(chosen):
                return [chosen]
        return []

    def _drafting(self, kept_U: NDArray[np.intp], price: Price) -> Floats:
        """Seconds of drafting for every prefix."""
        total_U = np.cumsum(self.entry_U[kept_U])
        depth_U, nodes_U = self.depth_U[kept_U], self.nodes_U[kept_U]
        for number, name in enumerate(self.drafters):
            own_U = self.drafter_U[kept_U] == number
            costs = price.draft(name)
            is_used_U = np.logical_or.accumulate(own_U)
            deepest_U = np.maximum.accumulate(np.where(own_U, depth_U, 0))
            total_U += is_used_U * costs.call + deepest_U * costs.depth
            total_U += np.cumsum(own_U & (depth_U == 1)) * costs.row
            total_U += np.cumsum(np.where(own_U, nodes_U, 0.0)) * costs.node
        return total_U

    def _depths(self, taken_U: NDArray[np.intp]) -> list[int]:
        depths = np.zeros(len(self.ladders), dtype=np.intp)
        np.maximum.at(depths, self.which_U[taken_U], self.depth_U[taken_U])
        return [int(depth) for depth in depths]
