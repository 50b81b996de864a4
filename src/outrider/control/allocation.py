"""Which draft nodes are worth their price: of all rows' nodes in order of yield, the best prefix.

Each row has a ladder: rung i makes its draft one deeper. The rungs of all rows are sorted by
committed tokens per node; along a row that falls, so what a prefix takes of a row is a draft from
its root. A drafter that needs a pass per depth makes deep rungs dear for everybody, so the search
is repeated for every deepest depth.

Source: the objective of verification budgets (vLLM's adaptive verification; AdaSpec, Li et al.
2025), with the price of drafting in it.

Shape legend: U rungs, sorted; C choices of which drafters and how deep; D depths.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence as Items
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from outrider.control.acceptance import Forecast

Floats: TypeAlias = NDArray[np.float64]
MAX_CHECKED = 64  # prefixes that are held against the latency targets
SURELY = 1.0 - 1e-12
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

    def at(self, num_nodes: float) -> float:
        """`step` of one number."""
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


Misses: TypeAlias = Callable[[Chosen], float]  # of latency targets: 1 keeps all, 2 takes twice one


def allocate(
    ladders: Items[Ladder], num_tokens: float, price: Price, misses: Misses | None = None
) -> Chosen:
    """The set of rungs with the highest goodput; plain decoding where none is better.

    Args:
        num_tokens: weighted tokens that the step commits without these drafts.
        misses: of the latency targets. A choice that keeps them, plain decoding or not, comes
            before all that do not; where none does, what misses them least.
    """
    plain = Chosen([0] * len(ladders), num_tokens, price.at(0.0))
    if len(ladders) == 1:  # a short way, for short steps
        found = [plain, *alike(ladders[0], 1, num_tokens, price)]
    else:
        found = [plain, *_Rungs(ladders).prefixes(num_tokens, price, at_all=misses is not None)]
    return _best(found, misses)


def kept(chosen: Chosen) -> float:
    """Misses of a step without targets."""
    return 1.0


def _best(found: list[Chosen], misses: Misses | None) -> Chosen:
    if misses is None:
        return max(found, key=lambda chosen: chosen.goodput)
    return min(found, key=lambda chosen: (misses(chosen), -chosen.goodput))


def alike(ladder: Ladder, num_rows: int, num_tokens: float, price: Price) -> Iterator[Chosen]:
    """What so many rows alike would bring, for every depth that all of them draft to."""
    costs = price.draft(ladder.drafter)
    call = costs.call + num_rows * (costs.row + ladder.entry)
    nodes, tokens, passes = 0.0, num_tokens, 0.0
    for depth, (reached, stands) in enumerate(zip(*ladder.forecast, strict=True), 1):
        if reached <= 0.0:
            return
        nodes += num_rows * ladder.num_nodes * reached
        tokens += num_rows * ladder.weight * stands
        passes += 1.0 - (1.0 - reached) ** num_rows
        drafting = call + costs.depth * passes + costs.node * nodes
        yield Chosen([depth] * num_rows, tokens, price.at(nodes) + drafting)


def evaluate(ladders: Items[Ladder], depths: Items[int], num_tokens: float, price: Price) -> Chosen:
    """What given depths would bring."""
    nodes, tokens, entry = 0.0, num_tokens, 0.0
    uses: dict[str, _Use] = {}
    for ladder, depth in zip(ladders, depths, strict=True):
        depth = min(depth, len(ladder.forecast.stands))
        if not depth:
            continue
        own = ladder.num_nodes * sum(ladder.forecast.reached[:depth])
        tokens += ladder.weight * sum(ladder.forecast.stands[:depth])
        nodes += own
        entry += ladder.entry
        uses.setdefault(ladder.drafter, _Use()).add(ladder.forecast.reached[:depth], own)
    seconds = price.at(nodes) + _drafting(uses, price) + entry
    return Chosen(list(depths), tokens, seconds)


def _drafting(uses: "Mapping[str, _Use]", price: Price) -> float:
    total = 0.0
    for drafter, use in uses.items():
        costs = price.draft(drafter)
        total += costs.call + costs.depth * use.num_passes
        total += costs.row * use.num_rows + costs.node * use.num_nodes
    return total


class _Use:
    """What one drafter is asked for by several rows."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.num_nodes = 0.0
        self._nobody: list[float] = []  # by depth, probability that no row comes so far

    def add(self, reached: Items[float], num_nodes: float) -> None:
        self.num_rows += 1
        self.num_nodes += num_nodes
        self._nobody += [1.0] * (len(reached) - len(self._nobody))
        for index, comes in enumerate(reached):
            self._nobody[index] *= 1.0 - comes

    @property
    def num_passes(self) -> float:
        """One for each depth that some row comes to."""
        return len(self._nobody) - sum(self._nobody)


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
                rungs.append((-lowest, which, index + 1, adds, value, drafter, entry, reached))
        rungs.sort()
        table = np.array(rungs, dtype=np.float64).reshape(len(rungs), 8)
        self.which_U = table[:, 1].astype(np.intp)
        self.depth_U = table[:, 2].astype(np.intp)
        self.nodes_U, self.value_U = table[:, 3], table[:, 4]
        self.drafter_U = table[:, 5].astype(np.intp)
        self.entry_U = table[:, 6]
        self.reached_U = table[:, 7]

    def depths_to_try(self, price: Price) -> list[int]:
        """Several, where depth has a price of its own and rows might not agree on one."""
        if not len(self.depth_U):
            return []
        deepest = int(self.depth_U.max())
        is_priced = any(price.draft(name).depth > 0.0 for name in self.drafters)
        if not is_priced or len(self.ladders) == 1:
            return [deepest]
        return [depth for depth in DEPTHS if depth < deepest] + [deepest]

    def choices(self, price: Price) -> NDArray[np.bool_]:
        """[C, U] rungs up to a depth, of all drafters together and of each alone."""
        groups = [range(len(self.drafters))]
        if len(self.drafters) > 1:
            groups += [range(number, number + 1) for number in groups[0]]
        deepest_D = np.array(self.depths_to_try(price), dtype=np.intp)
        is_deep_DU = self.depth_U <= deepest_D[:, None]
        asked = [(self.drafter_U >= g.start) & (self.drafter_U < g.stop) for g in groups]
        return np.concatenate([is_deep_DU & is_asked_U for is_asked_U in asked])

    def prefixes(self, num_tokens: float, price: Price, *, at_all: bool) -> list[Chosen]:
        """The prefix with the highest goodput, of all choices.

        Args:
            at_all: several, from which to choose by something else.
        """
        if not len(self.depth_U):
            return []
        kept_CU = self.choices(price)
        tokens_CU = num_tokens + np.cumsum(kept_CU * self.value_U, axis=1)
        nodes_CU = np.cumsum(kept_CU * self.nodes_U, axis=1)
        seconds_CU = price.step(nodes_CU) + self._drafting(kept_CU, price)
        goodput_CU = tokens_CU / seconds_CU
        ends = [int(goodput_CU.argmax())]
        if at_all:
            ends = np.argsort(-goodput_CU, axis=None, kind="stable")[:MAX_CHECKED].tolist()
        found = []
        for end in ends:
            choice, last = divmod(end, len(self.depth_U))
            taken_U = np.flatnonzero(kept_CU[choice, : last + 1])
            tokens, seconds = float(tokens_CU[choice, last]), float(seconds_CU[choice, last])
            found.append(Chosen(self._depths(taken_U), tokens, seconds))
        return found

    def _drafting(self, kept_CU: NDArray[np.bool_], price: Price) -> Floats:
        """Seconds of drafting for every prefix of every choice."""
        first_U = self.depth_U == 1
        total_CU: Floats = np.cumsum(kept_CU * self.entry_U, axis=1)
        for number, name in enumerate(self.drafters):
            own_CU = kept_CU & (self.drafter_U == number) if len(self.drafters) > 1 else kept_CU
            costs = price.draft(name)
            per_rung_U = first_U * costs.row + self.nodes_U * costs.node
            total_CU += np.logical_or.accumulate(own_CU, axis=1) * costs.call
            total_CU += np.cumsum(own_CU * per_rung_U, axis=1)
            if costs.depth > 0.0:
                total_CU += costs.depth * self._num_passes(own_CU)
        return total_CU

    def _num_passes(self, own_CU: NDArray[np.bool_]) -> Floats:
        """Expected, for every prefix: one for each depth that some row comes to."""
        if self.reached_U.min() > SURELY:
            deepest_CU: Floats = np.maximum.accumulate(own_CU * self.depth_U, axis=1)
            return deepest_CU
        total_CU = np.zeros(own_CU.shape)
        away_U = np.log1p(-np.minimum(self.reached_U, SURELY))
        for depth in range(1, int(self.depth_U.max()) + 1):
            is_here_CU = own_CU & (self.depth_U == depth)
            total_CU += 1.0 - np.exp(np.cumsum(is_here_CU * away_U, axis=1))
        return total_CU

    def _depths(self, taken_U: NDArray[np.intp]) -> list[int]:
        depths = np.zeros(len(self.ladders), dtype=np.intp)
        np.maximum.at(depths, self.which_U[taken_U], self.depth_U[taken_U])
        return [int(depth) for depth in depths]
