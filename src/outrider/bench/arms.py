"""Arms: the same requests with and without speculation on one engine, in alternation.

Both arms share weights, clock, heat and allocator. Blocks run A B B A, so that a linear drift of
the machine cancels; the interval comes from resampling prompts.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence as Items
from dataclasses import dataclass
from typing import NamedTuple

from outrider.engine.llm import LLM
from outrider.engine.outputs import RequestOutput
from outrider.engine.prompts import Prompt
from outrider.request import SamplingParams, SpeculationParams

NUM_RESAMPLES = 2000
INTERVAL = 0.95
MIN_PROMPTS = 10
ORDER = (0, 1, 1, 0)


class Arm(NamedTuple):
    """One way to answer: a label, and the speculation it asks for."""

    name: str
    speculation: SpeculationParams


class Timed(NamedTuple):
    """One timed answer: seconds of the whole call, and what came out."""

    seconds: float
    output: RequestOutput

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / max(1, len(self.output.token_ids))


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times faster the second arm is: geometric mean and 95 % interval over prompts."""

    ratio: float
    low: float
    high: float
    num_prompts: int

    @property
    def verdict(self) -> str:
        """ "faster" or "slower" when the interval says so, else "undecided".

        Resampling fewer than 10 prompts gives an interval that is too narrow to say anything.
        """
        if self.num_prompts < MIN_PROMPTS:
            return "undecided"
        if self.low > 1.0:
            return "faster"
        return "slower" if self.high < 1.0 else "undecided"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a pair of arms gave, over all prompts.

    Attributes:
        tokens_per_second: of each arm, all its timed calls together.
        acceptance_length: of the second arm, weighted by draft.
        num_identical: prompts whose tokens were the same in every run of both arms.
    """

    base: Arm
    arm: Arm
    speedup: Ratio
    tokens_per_second: tuple[float, float]
    acceptance_length: float
    num_identical: int


def compare(
    llm: LLM,
    prompts: Items[Prompt],
    base: Arm,
    arm: Arm,
    sampling: SamplingParams,
    *,
    tick: Callable[[], None] = lambda: None,
    seed: int = 0,
) -> Comparison:
    """Runs both arms on every prompt and pairs them.

    Each prompt is answered once per arm untimed (prefix cache and memory warm), then A B B A.
    `tick` is called after every call, `num_calls` of them in all.
    """
    runs = [_block(llm, prompt, (base, arm), sampling, tick) for prompt in prompts]
    return Comparison(
        base=base,
        arm=arm,
        speedup=paired_ratio([_log_ratio(block) for block in runs], seed=seed),
        tokens_per_second=(_speed(runs, 0), _speed(runs, 1)),
        acceptance_length=_acceptance_length(runs),
        num_identical=sum(_is_identical(block) for block in runs),
    )


def num_calls(num_prompts: int) -> int:
    """Calls that `compare` makes: two to warm up, then A B B A, per prompt."""
    return num_prompts * (2 + len(ORDER))


def paired_ratio(log_ratios: Items[float], *, seed: int = 0) -> Ratio:
    """Geometric mean of per-prompt ratios with a percentile-bootstrap interval over prompts."""
    if not log_ratios:
        raise ValueError("no prompt was measured: give at least one")
    rng = random.Random(seed)
    means = sorted(_mean(rng.choices(log_ratios, k=len(log_ratios))) for _ in range(NUM_RESAMPLES))
    tail = (1 - INTERVAL) / 2
    return Ratio(
        ratio=math.exp(_mean(log_ratios)),
        low=math.exp(means[int(tail * NUM_RESAMPLES)]),
        high=math.exp(means[int((1 - tail) * NUM_RESAMPLES) - 1]),
        num_prompts=len(log_ratios),
    )


Block = list[tuple[int, Timed]]


def _block(
    llm: LLM,
    prompt: Prompt,
    arms: tuple[Arm, Arm],
    sampling: SamplingParams,
    tick: Callable[[], None],
) -> Block:
    for which in (0, 1):
        _answer(llm, prompt, arms[which], sampling, tick)
    return [(which, _answer(llm, prompt, arms[which], sampling, tick)) for which in ORDER]


def _answer(
    llm: LLM, prompt: Prompt, arm: Arm, sampling: SamplingParams, tick: Callable[[], None]
) -> Timed:
    """Arms have prefix caches of their own: neither profits from the other's work."""
    start = time.perf_counter()
    output = llm.generate([prompt], sampling, arm.speculation, tenant=f"arm {arm.name}")[0]
    timed = Timed(time.perf_counter() - start, output)
    tick()
    return timed


def _of(block: Block, which: int) -> Iterator[Timed]:
    return (timed for arm, timed in block if arm == which)


def _log_ratio(block: Block) -> float:
    """ln(time per token of A / of B), over the block's runs of each."""
    base, arm = (_mean([math.log(t.seconds_per_token) for t in _of(block, i)]) for i in (0, 1))
    return base - arm


def _speed(runs: list[Block], which: int) -> float:
    timed = [t for block in runs for t in _of(block, which)]
    return sum(len(t.output.token_ids) for t in timed) / sum(t.seconds for t in timed)


def _acceptance_length(runs: list[Block]) -> float:
    metrics = [t.output.metrics for block in runs for t in _of(block, 1)]
    num_drafts = sum(m.num_drafts for m in metrics)
    return 1.0 + sum(m.num_accepted_tokens for m in metrics) / num_drafts if num_drafts else 1.0


def _is_identical(block: Block) -> bool:
    first = block[0][1].output.token_ids
    return all(timed.output.token_ids == first for _, timed in block)


def _mean(values: Items[float]) -> float:
    return sum(values) / len(values)
