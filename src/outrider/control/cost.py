"""CostModel: seconds of a step on this machine, measured on the engine itself.

    t = draft(drafter; passes, rows, nodes, lag) + pass(rows, context) + rest(rows, drawn nodes)

The pass is a table over rows (`PassTime`); drafting and the host's work are sums of prices times
counts (`LinearCost`). All of it is learned from the times of steps, and can be saved.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from outrider.control.allocation import DraftPrice, Floats
from outrider.control.linear_cost import LinearCost
from outrider.control.pass_time import PassTime

FORMAT = 3
DEAREST = 1.1  # price of a row more beside the mean one: passes grow no faster than their rows
DRAFT_SIZES = (1.0, 1.0, 0.1, 0.1, 0.005)  # per call, depth, row, node, token of lag
REST_SIZES = (1.0, 0.3, 0.3, 0.1)  # per step, sequence, law, draft node


class PassCounts(NamedTuple):
    """What the target's pass and the host's work after it are counted by.

    Attributes:
        num_rows: committed tokens and draft nodes.
        context: tokens read from the KV cache, summed over sequences.
        visits: the same, for every row of a sequence but its first.
        num_emitting: sequences that are given tokens.
        num_drawn: nodes and roots of sequences that are not greedy (each needs a law).
        num_nodes: draft nodes.
    """

    num_rows: float
    context: int
    visits: int
    num_emitting: int
    num_drawn: int
    num_nodes: int = 0

    @property
    def rest(self) -> tuple[float, ...]:
        return (1.0, self.num_emitting, self.num_drawn, self.num_nodes)


class DraftCounts(NamedTuple):
    """What drafting is counted by.

    Attributes:
        depth: deepest plan. num_rows: sequences drafted for. num_nodes: drafted.
        lag: committed tokens since these sequences were last drafted for, a usual round each left
            out.
    """

    depth: int
    num_rows: int
    num_nodes: int
    lag: int

    @property
    def features(self) -> tuple[float, ...]:
        return (1.0, self.depth, self.num_rows, self.num_nodes, self.lag)


class CostModel:
    """Seconds of steps to come, from those that were.

    Args:
        context_price: see `PassTime`.
    """

    def __init__(self, context_price: float = 1e-5) -> None:
        self.passes = PassTime(context_price)
        self.rest = LinearCost(REST_SIZES)
        self.drafts: dict[str, LinearCost] = {}

    def observe_pass(self, counts: PassCounts, forward_s: float, rest_s: float) -> None:
        self.passes.observe(counts.num_rows, counts.context, counts.visits, forward_s)
        self.rest.observe(counts.rest, rest_s)

    def observe_draft(self, drafter: str, counts: DraftCounts, seconds: float) -> None:
        self.draft_cost(drafter).observe(counts.features, seconds)

    def draft_cost(self, drafter: str) -> LinearCost:
        if drafter not in self.drafts:
            self.drafts[drafter] = LinearCost(DRAFT_SIZES)
        return self.drafts[drafter]

    def step(self, counts: PassCounts) -> float:
        """Seconds of a step without drafting."""
        rest = self.rest.predict(counts.rest)
        return self.passes.predict(counts.num_rows, counts.context, counts.visits) + rest

    def draft(self, drafter: str, counts: DraftCounts) -> float:
        return self.draft_cost(drafter).predict(counts.features)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "passes": self.passes.to_json(),
            "rest": self.rest.to_json(),
            "drafts": {name: cost.to_json() for name, cost in self.drafts.items()},
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Starts from a saved model. ValueError where it is of another form; then nothing is."""
        try:
            if saved["format"] != FORMAT:
                raise ValueError(f"format {saved['format']!r} instead of {FORMAT}")
            fresh = CostModel()
            fresh.passes.load(saved["passes"])
            fresh.rest.load(saved["rest"])
            for name, cost in saved["drafts"].items():
                fresh.draft_cost(name).load(cost)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no cost model ({error!r})") from error
        self.passes, self.rest, self.drafts = fresh.passes, fresh.rest, fresh.drafts


class StepPrice:
    """What draft nodes add to one step: a `Price` for `allocate`.

    Prompt tokens in the step are left out of what it is measured by: nodes pay what they add to
    this pass, and the pass they are held against is the one without the prompt. Else a long
    prefill would make drafts look cheap, or a table by batch size would count it as load.

    Attributes:
        prompt_s: seconds that the prompt tokens add, which are in none of the figures below.

    Args:
        counts: of the step without these drafts. num_prompt: rows of it that are prompt.
        drawn_share: of the nodes, those that need a law.
        mean_context: tokens that a draft node's row reads.
        hopeful: price what was timed little as low as would be no surprise.
    """

    def __init__(
        self,
        model: CostModel,
        counts: PassCounts,
        *,
        num_prompt: int,
        drawn_share: float,
        mean_context: float,
        hopeful: bool = False,
    ) -> None:
        self._model = model
        self._hopeful = hopeful
        self._num_rows = float(counts.num_rows)
        bare = max(counts.num_rows - num_prompt, 1.0)
        self._bare = model.step(counts._replace(num_rows=bare, visits=0))
        _, _, per_drawn, per_node = model.rest.prices
        self._node = per_node + drawn_share * per_drawn + mean_context * model.passes.visit_s
        self._drafts: dict[str, DraftPrice] = {}
        self._before = self._at(self._num_rows)
        self.prompt_s = max(model.step(counts) - self._bare, 0.0)
        self._dearest = DEAREST * self._before / max(self._num_rows, 1.0)

    def step(self, nodes_U: Floats) -> Floats:
        rows_U = self._num_rows + nodes_U
        most = int(rows_U.max(initial=self._num_rows)) + 2
        curve = self._model.passes.curve(most, hopeful=self._hopeful)
        low_U = rows_U.astype(np.intp)
        share_U = rows_U - low_U
        pass_U = curve[low_U] + share_U * (curve[low_U + 1] - curve[low_U]) - self._before
        more_U: Floats = np.minimum(pass_U, self._dearest * nodes_U) + nodes_U * self._node
        return self._bare + more_U

    def at(self, num_nodes: float) -> float:
        more = self._at(self._num_rows + num_nodes) - self._before
        return self._bare + min(more, self._dearest * num_nodes) + num_nodes * self._node

    @property
    def node_s(self) -> float:
        """Seconds that a first node more adds."""
        return self.at(1.0) - self._bare

    def _at(self, num_rows: float) -> float:
        low = int(num_rows)
        curve = self._model.passes.curve(low + 2, hopeful=self._hopeful)
        below = float(curve[low])
        return below + (num_rows - low) * (float(curve[low + 1]) - below)

    def draft(self, drafter: str) -> DraftPrice:
        found = self._drafts.get(drafter)
        if found is None:
            cost = self._model.draft_cost(drafter)
            prices = cost.lowest() if self._hopeful else cost.prices
            found = self._drafts[drafter] = DraftPrice(*prices[:4])
        return found
