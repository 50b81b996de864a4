"""Grid: what is swept, and the cells that come of it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from outrider.bench.ab import check_prompts
from outrider.bench.calibration.calibrate import with_depth
from outrider.bench.calibration.prediction import Predicted, Residual
from outrider.bench.calibration.steps import Totals
from outrider.bench.pairs import Pair
from outrider.bench.result import content_hash
from outrider.bench.statistics import EPS
from outrider.bench.target import Arm, Question
from outrider.request import OFF, SpeculationParams

DEPTHS = (1, 2, 4, 8)
CONCURRENCIES = (1, 4, 16)
ADAPTIVE = "adaptive"
BASE = Arm(name=OFF, speculation=SpeculationParams(method=OFF))


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """What is swept.

    Attributes:
        arms: drafters, without K; one that leaves speculation to a server has no K.
        depths: K of each. base: what all are held against.
        contexts: tokens before the answer; None leaves prompts as they are.
        with_controller: also measure each arm under the adaptive policy, up to the largest K.
        budget_s: shared by the loads.
    """

    arms: tuple[Arm, ...]
    questions: tuple[Question, ...]
    base: Arm = BASE
    depths: tuple[int, ...] = DEPTHS
    concurrencies: tuple[int, ...] = CONCURRENCIES
    temperatures: tuple[float, ...] = (0.0,)
    contexts: tuple[int | None, ...] = (None,)
    max_tokens: int = 64
    ignore_eos: bool = False
    with_controller: bool = True
    eps: float = EPS
    budget_s: float = 300.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_prompts(len(self.questions), max(self.concurrencies))

    @property
    def loads(self) -> list["Place"]:
        return [
            Place(temperature, context, concurrency)
            for temperature in self.temperatures
            for context in self.contexts
            for concurrency in self.concurrencies
        ]

    def fixed(self) -> Iterator["Variant"]:
        """Every arm at every K; one that says its K, or leaves it to a server, as it is."""
        for arm in self.arms:
            if arm.speculation is None or arm.speculation.num_draft_tokens is not None:
                k = None if arm.speculation is None else arm.speculation.num_draft_tokens
                yield Variant(arm.name, k, arm)
                continue
            for k in self.depths:
                asked = with_depth(arm.speculation, k)
                named = replace(arm, name=f"{arm.name} K={k}", speculation=asked)
                yield Variant(arm.name, k, named)

    def adaptive(self) -> Iterator["Variant"]:
        """Every arm up to the largest K, as far as the policy thinks."""
        for arm in self.arms if self.with_controller else ():
            if arm.speculation is not None:
                most = arm.speculation.num_draft_tokens or max(self.depths)
                asked = replace(arm.speculation, num_draft_tokens=most, policy=ADAPTIVE)
                named = replace(arm, name=f"{arm.name} {ADAPTIVE}", speculation=asked)
                yield Variant(arm.name, None, named, True)

    def identity(self) -> dict[str, Any]:
        """What a measured load depends on, for the journal."""
        return {
            "base": self.base,
            "arms": self.arms,
            "questions": content_hash(self.questions),
            "depths": self.depths,
            "concurrencies": self.concurrencies,
            "temperatures": self.temperatures,
            "contexts": self.contexts,
            "max_tokens": self.max_tokens,
            "ignore_eos": self.ignore_eos,
            "with_controller": self.with_controller,
            "seed": self.seed,
        }


class Place(NamedTuple):
    """A load: where a cell lies, but for method and K."""

    temperature: float
    context: int | None
    concurrency: int

    @property
    def key(self) -> str:
        return (
            f"temperature {self.temperature:g}, context {self.context}, {self.concurrency} at once"
        )


class Variant(NamedTuple):
    """One arm of a load. `k` is None where a server or the adaptive policy decides."""

    method: str
    k: int | None
    arm: Arm
    is_adaptive: bool = False


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One K of one method at one load.

    Attributes:
        predicted: None without a calibration. pair: against plain decoding; None where it was not
            measured. to_best: of the adaptive policy, against the best fixed K measured here.
        steps: what its steps held and took; None where the target does not tell.
        plain_steps: the same of plain decoding.
        acceptance_length, tokens_per_pass: as counted in this cell.
    """

    place: Place
    variant: Variant
    predicted: Predicted | None = None
    pair: Pair | None = None
    to_best: Pair | None = None
    residual: Residual | None = None
    steps: Totals | None = None
    plain_steps: Totals | None = None
    acceptance_length: float | None = None
    tokens_per_pass: float | None = None

    @property
    def ratio(self) -> float | None:
        return None if self.pair is None else self.pair.ratio.ratio

    @property
    def speedup(self) -> float | None:
        """As measured, else as predicted."""
        guess = None if self.predicted is None else self.predicted.speedup
        return guess if self.ratio is None else self.ratio

    @property
    def needed(self) -> float | None:
        """Tokens per pass at which this draft neither gains nor loses, as measured if it was."""
        if (
            self.steps
            and self.plain_steps
            and self.steps.num_tokens
            and self.plain_steps.num_tokens
        ):
            step_s = self.steps.seconds / self.steps.num_sequences
            return step_s / (self.plain_steps.seconds / self.plain_steps.num_sequences)
        return None if self.predicted is None else self.predicted.needed

    def to_json(self) -> dict[str, Any]:
        pair, guess, residual = self.pair, self.predicted, self.residual
        return {
            "method": self.variant.method,
            **self.place._asdict(),
            "num_draft_tokens": self.variant.k,
            "ratio": self.ratio,
            "interval": None if pair is None else pair.ratio.interval,
            "interval_note": None if pair is None else pair.interval_note,
            "verdict": None if pair is None else pair.verdict,
            "null_interval": None if pair is None else pair.null.interval,
            "num_blocks": None if pair is None else pair.ratio.num_blocks,
            "predicted": None if guess is None else guess.speedup,
            "residual": None if residual is None else residual.relative,
            "residual_term": None if residual is None else residual.term,
            "residual_terms": None if residual is None else residual.terms,
            "needed_tokens_per_pass": self.needed,
            "tokens_per_pass": self.tokens_per_pass,
            "expected_tokens_per_pass": None if guess is None else guess.tokens,
            "acceptance_length": self.acceptance_length,
        }
