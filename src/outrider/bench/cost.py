"""Cost: the seconds and tokens that a bill is written from, measured by class of token.

Our own engine tells what every step held (`Meter`). A server tells only when it answered: there
the price of a class is what the run takes longer once its tokens are asked for too.
"""

import math
import time
from collections.abc import Callable, Sequence as Items
from dataclasses import dataclass, replace
from typing import Any

from outrider.bench.arrivals import closed, gamma
from outrider.bench.energy import EnergyMeter, Spent
from outrider.bench.inprocess import InProcess
from outrider.bench.meter import CACHED, OUTPUT, PROMPT, Fit, Meter
from outrider.bench.result import content_hash
from outrider.bench.target import Arm, Ask, Question, Reply, Target
from outrider.errors import ConfigError
from outrider.request import SamplingParams

NUM_WARM_UPS = 2
STEPS, DIFFERENCE = "step by step", "by difference"


@dataclass(frozen=True, kw_only=True)
class Slo:
    """Latency that an answer has to keep to be worth anything; None asks for none."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    @property
    def is_set(self) -> bool:
        return self.ttft_s is not None or self.tpot_s is not None

    def is_kept(self, reply: Reply) -> bool:
        is_slow_first = self.ttft_s is not None and (reply.ttft_s or 0.0) > self.ttft_s
        is_slow = self.tpot_s is not None and (reply.tpot_s or 0.0) > self.tpot_s
        return not (is_slow_first or is_slow)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked, and what the machine costs.

    Attributes:
        dollars_per_hour: None tells seconds alone.
        repeat: rounds over the questions, one begun when the one before has ended: from the second
            on the prefix cache has the prompts.
        request_rate: per second, Poisson; None asks as soon as there is room.
    """

    arms: tuple[Arm, ...]
    questions: tuple[Question, ...]
    sampling: SamplingParams
    dollars_per_hour: float | None = None
    concurrency: int = 8
    repeat: int = 2
    request_rate: float | None = None
    slo: Slo = Slo()
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.questions:
            raise ConfigError("no prompt: the data set is empty")
        if self.dollars_per_hour is not None and not 0.0 < self.dollars_per_hour < math.inf:
            raise ConfigError(
                f"dollars_per_hour={self.dollars_per_hour}: give what the machine costs, above 0, "
                "or leave it out to be told seconds"
            )

    def identity(self) -> dict[str, Any]:
        """What an arm's bill depends on, its price left aside."""
        return {
            "arms": self.arms,
            "questions": content_hash(self.questions),
            "sampling": self.sampling,
            "concurrency": self.concurrency,
            "repeat": self.repeat,
            "request_rate": self.request_rate,
            "slo": self.slo,
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True)
class Bill:
    """What one arm's run took and gave.

    Attributes:
        method: how seconds were told apart.
        seconds: by class; with `idle_s` they add up to `wall_s`.
        idle_s: None on a server, whose idle time cannot be seen: it is in the classes.
        tokens: by class, of answers that came; by difference, an answer's first token is part of
            its prompt. tokens_in_slo: of those that kept the limits.
        joules: of the whole machine, None where `power_valid` is false; by_counter: each.
    """

    arm: str
    method: str
    wall_s: float
    seconds: dict[str, float]
    idle_s: float | None
    tokens: dict[str, int]
    tokens_in_slo: dict[str, int]
    num_answers: int
    num_in_slo: int
    num_failed: int
    first_error: str = ""
    acceptance_length: float | None = None
    fit: Fit | None = None
    joules: float | None = None
    power_valid: bool = False
    power_why_not: str = ""
    joules_by_counter: dict[str, float]

    @property
    def utilisation(self) -> float | None:
        """Share of the wall time in which the engine worked."""
        if self.idle_s is None or not self.wall_s:
            return None
        return 1.0 - self.idle_s / self.wall_s


def measure(
    target: Target,
    plan: Plan,
    arm: Arm,
    energy: EnergyMeter,
    *,
    tick: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Bill:
    """Runs one arm, after a short warm-up that is not counted.

    Args:
        tick: called after every answer, `num_ticks(target, plan)` times.
    """
    warm = replace(plan, questions=plan.questions[:NUM_WARM_UPS], request_rate=None)
    for reply in target.run(_asks(warm, arm, "warm-up"), concurrency=plan.concurrency):
        if reply.error:
            raise ConfigError(f"arm {arm.name!r} cannot be served: {reply.error}")

    def note(reply: Reply) -> None:
        energy.poll()
        tick()

    energy.start()
    if isinstance(target, InProcess):
        return _step_by_step(target, plan, arm, energy, note, clock)
    return _by_difference(target, plan, arm, energy, note, clock)


def num_ticks(target: Target, plan: Plan) -> int:
    """Answers that `measure` waits for, of one arm."""
    rounds = plan.repeat if isinstance(target, InProcess) else 3
    return len(plan.questions) * rounds


def _step_by_step(
    target: InProcess,
    plan: Plan,
    arm: Arm,
    energy: EnergyMeter,
    note: Callable[[Reply], None],
    clock: Callable[[], float],
) -> Bill:
    meter = Meter(clock)
    replies: list[Reply] = []
    with meter.metering(target.llm.engine):
        for _ in range(plan.repeat):
            asks = _asks(plan, arm, "cost")
            replies += target.run(asks, concurrency=plan.concurrency, tick=note)
    spent, shared = energy.stop(), meter.shared()
    return _bill(
        plan,
        arm,
        replies,
        spent,
        method=STEPS,
        wall_s=shared.wall_s,
        seconds=shared.seconds,
        idle_s=shared.idle_s,
        fit=shared.fit,
    )


def _by_difference(
    target: Target,
    plan: Plan,
    arm: Arm,
    energy: EnergyMeter,
    note: Callable[[Reply], None],
    clock: Callable[[], float],
) -> Bill:
    """Three rounds: prompts alone, the same again from the prefix cache, the same with answers.

    Nobody prefills without a first token, so that one is part of the prompt.
    """
    alone = replace(plan.sampling, max_tokens=1, min_tokens=0)
    rounds = (replace(plan, sampling=alone), replace(plan, sampling=alone), plan)
    times: list[float] = []
    answers: list[list[Reply]] = []
    for one in rounds:
        asks = _asks(replace(one, request_rate=None), arm, "cost")
        start_s = clock()
        answers.append(target.run(asks, concurrency=plan.concurrency, tick=note))
        times.append(clock() - start_s)
    spent = energy.stop()
    return _bill(
        plan,
        arm,
        [reply for replies in answers for reply in replies],
        spent,
        method=DIFFERENCE,
        wall_s=sum(times),
        seconds=split_rounds(times, [_tokens(replies) for replies in answers]),
        idle_s=None,
    )


def split_rounds(times: Items[float], tokens: Items[dict[str, int]]) -> dict[str, float]:
    """Seconds by class from those of the three rounds; they add up to them.

    The first round's prompts say what an uncached token takes; what the second took beyond its
    uncached ones is the cached ones'; what the third took beyond the second is the output's.
    """
    fresh_s, again_s, full_s = times
    per_token = fresh_s / max(tokens[0][PROMPT], 1)
    uncached_s = min(per_token * tokens[1][PROMPT], again_s) if tokens[1][CACHED] else again_s
    output_s = max(full_s - again_s, 0.0)
    twice = again_s + full_s - output_s
    share = uncached_s / again_s if again_s else 1.0
    return {PROMPT: fresh_s + twice * share, CACHED: twice * (1.0 - share), OUTPUT: output_s}


def _asks(plan: Plan, arm: Arm, name: str) -> list[Ask]:
    """One round; arms share no prefix cache, so that none profits from another's work."""
    num, rate = len(plan.questions), plan.request_rate
    times = closed(num) if rate is None else gamma(rate, num, seed=plan.seed)
    return [
        Ask(
            question=question,
            sampling=plan.sampling,
            arm=arm,
            at_s=at_s,
            tenant=f"{name} of {arm.name}",
        )
        for question, at_s in zip(plan.questions, times, strict=True)
    ]


def _bill(plan: Plan, arm: Arm, replies: Items[Reply], spent: Spent, **measured: Any) -> Bill:
    good = [reply for reply in replies if not reply.error]
    kept = [reply for reply in good if plan.slo.is_kept(reply)]
    errors = [reply.error for reply in replies if reply.error]
    num_free = 1 if measured["method"] == DIFFERENCE else 0
    return Bill(
        arm=arm.name,
        tokens=_tokens(good, num_free),
        tokens_in_slo=_tokens(kept, num_free),
        num_answers=len(good),
        num_in_slo=len(kept),
        num_failed=len(errors),
        first_error=errors[0] if errors else "",
        acceptance_length=_acceptance_length(good),
        joules=spent.joules,
        power_valid=spent.is_valid,
        power_why_not=spent.why_not,
        joules_by_counter=spent.by_counter,
        **measured,
    )


def _tokens(replies: Items[Reply], num_free: int = 0) -> dict[str, int]:
    """By class; failed answers have none, and rejected drafts never were any.

    Args:
        num_free: first tokens of every answer that are not counted.
    """
    good = [reply for reply in replies if not reply.error]
    cached = sum(reply.num_cached_tokens for reply in good)
    return {
        PROMPT: sum(reply.num_prompt_tokens for reply in good) - cached,
        CACHED: cached,
        OUTPUT: sum(max(reply.num_tokens - num_free, 0) for reply in good),
    }


def _acceptance_length(replies: Items[Reply]) -> float | None:
    told = [reply.acceptance for reply in replies if reply.acceptance is not None]
    num_drafts = sum(one.num_drafts for one in told)
    if not num_drafts:
        return None
    return 1.0 + sum(one.num_accepted_tokens for one in told) / num_drafts
