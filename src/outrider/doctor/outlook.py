"""What speculation with a draft should bring on this machine: acceptance times measured prices."""

from typing import Any, NamedTuple

import numpy as np

from outrider.control.acceptance import Forecast
from outrider.control.allocation import Ladder, evaluate
from outrider.control.cost import CostModel, PassCounts, StepPrice
from outrider.engine.calibrate import KeepsPrices
from outrider.engine.engine import Engine
from outrider.engine.llm import LLM
from outrider.errors import OutriderError

DEPTH = 8  # deepest draft that is looked at
PRICES_S = 5.0


class Outlook(NamedTuple):
    """One kind of request.

    Attributes:
        kind: "sampled" at temperature 1, or "greedy".
        joint: probability that the first d drafted tokens all stand, for d = 1, 2, ...
        num_tokens: of text that this was counted on.
        speedups: beside plain decoding, by K; empty where prices are not known.
    """

    kind: str
    joint: tuple[float, ...]
    num_tokens: int
    speedups: tuple[float, ...] = ()

    @property
    def lengths(self) -> list[float]:
        """Tokens per pass of the target, by K."""
        return [float(value) for value in 1.0 + np.cumsum(self.joint)]

    @property
    def best_depth(self) -> int:
        """K of the highest speed-up; 0 where none is above 1, or nothing is priced."""
        if not self.speedups or max(self.speedups) <= 1.0:
            return 0
        return 1 + int(np.argmax(self.speedups))

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "lengths": self.lengths, "best_depth": self.best_depth}


class Prices(NamedTuple):
    """Seconds of passes and drafting of one engine, and who drafts there."""

    cost: CostModel
    drafter: str


def read_prices(llm: LLM, budget_s: float = PRICES_S) -> Prices | None:
    """Times the engine, unless prices of it are kept; None where its drafter cannot be timed."""
    try:
        llm.calibrate(budget_s)
    except OutriderError:
        return None
    saved = _saved(llm.engine)
    if saved is None or not llm.engine.default_drafter:
        return None
    cost = CostModel()
    cost.load(saved)
    drafter = llm.engine.default_drafter
    is_timed = cost.passes.is_known and any(
        price > 0.0 for price in cost.draft_cost(drafter).prices
    )
    return Prices(cost, drafter) if is_timed else None


def priced(outlook: Outlook, prices: Prices, context: int) -> Outlook:
    """With speed-ups for one request at a time, drafting chains.

    Args:
        context: tokens in its KV cache.
    """
    is_drawn = outlook.kind == "sampled"
    forecast = Forecast([1.0] * len(outlook.joint), list(outlook.joint))
    ladder = Ladder(forecast, 1.0, 1.0, prices.drafter)
    price = StepPrice(
        prices.cost,
        PassCounts(1, context, 0, 1, int(is_drawn)),
        num_prompt=0,
        drawn_share=float(is_drawn),
        mean_context=context,
    )
    plain = evaluate([ladder], [0], 1, price)
    speedups = [
        evaluate([ladder], [depth], 1, price).goodput / plain.goodput
        for depth in range(1, len(outlook.joint) + 1)
    ]
    return outlook._replace(speedups=tuple(float(value) for value in speedups))


def _saved(engine: Engine) -> dict[str, Any] | None:
    policies = engine.controller.policies.values()
    return next((p.prices() for p in policies if isinstance(p, KeepsPrices)), None)
