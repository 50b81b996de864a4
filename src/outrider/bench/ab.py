"""A/B: two or more arms on one target, in blocks whose order cancels drift, beside a null arm.

A block puts the same questions to every arm, there and back: A N B B N A, N being the first arm
once more. What N seems to gain over A is noise. The run stops when it is precise, or when its
budget is over, never because of what it found.
"""

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence as Items
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from outrider.bench.blocks import FAILED, NULL, Block, Clusters, Run, take, unmarked
from outrider.bench.histogram import since, total
from outrider.bench.journal import Journal
from outrider.bench.result import content_hash
from outrider.bench.statistics import EPS, MIN_PROMPTS, half_width, is_stationary, noise
from outrider.bench.target import Arm, Ask, Forgets, Question, Target
from outrider.errors import ConfigError
from outrider.request import SamplingParams

BUDGET_S = 120.0
# Of eps. Stopped there, equal arms are told equal in 99.7 % of runs: 1 - 0.4 is 2.9 of the
# deviations of which 0.4 is 1.96.
PRECISION = 0.4
BATCHES_IN_FLIGHT = 2  # prompts of a block per request in flight: the last ones run with few others
MIN_WARM_UPS, MAX_WARM_UPS = 4, 16
WARM_UP_SHARE = 0.25  # of the budget
MAX_FAILED = 3  # blocks, one after the other


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared, on what, and how precisely.

    Attributes:
        arms: the first is the base of the null arm.
        batch: questions of a block; None is 1 at concurrency 1, else twice the concurrency.
        budget_s: no block is begun after it; it holds for blocks of earlier runs too.
        num_rounds: also stop when every question was asked in so many blocks.
    """

    arms: tuple[Arm, ...]
    questions: tuple[Question, ...]
    sampling: SamplingParams
    concurrency: int = 1
    batch: int | None = None
    eps: float = EPS
    budget_s: float = BUDGET_S
    num_rounds: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)

    @property
    def batch_size(self) -> int:
        if self.batch is not None:
            return self.batch
        most = BATCHES_IN_FLIGHT * self.concurrency if self.concurrency > 1 else 1
        return min(most, len(self.questions))

    @property
    def target_half_width(self) -> float:
        return PRECISION * math.log1p(self.eps)

    def identity(self) -> dict[str, Any]:
        """What a block depends on: equal plans may share a journal."""
        return {
            "arms": self.arms,
            "questions": content_hash(self.questions),
            "sampling": self.sampling,
            "concurrency": self.concurrency,
            "batch": self.batch_size,
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All blocks of a plan, and how the run went.

    Attributes:
        blocks: in order, those that cannot be used too.
        stopped: "precision", "budget" or "rounds".
        num_warm_ups: rounds of all arms that were not measured; is_steady: whether the time per
            token had stopped to change by then.
    """

    plan: Plan
    blocks: tuple[Block, ...]
    stopped: str
    num_warm_ups: int
    is_steady: bool

    @property
    def usable(self) -> tuple[Block, ...]:
        """Blocks that every arm answered."""
        return tuple(block for block in self.blocks if not block.left_out)

    @property
    def calm(self) -> tuple[Block, ...]:
        """Of those, the ones in which no arm took much longer on one way than on the other.

        How the block speaks has no part in it: of two independent errors with one spread, the
        difference says nothing of the mean.
        """
        arms = (NULL, *range(len(self.plan.arms)))
        return unmarked(self.usable, *([b.swing(arm) for b in self.usable] for arm in arms))

    @property
    def kept(self) -> tuple[Block, ...]:
        """Of those, the ones in which the null arm is not far off: the verdict's."""
        return unmarked(self.calm, [block.log_ratio(0, NULL) for block in self.calm])

    def clusters(self, base: int, arm: int, domain: Items[str] | None = None) -> list[list[float]]:
        """Log ratios by prompt; by block where a block is a batch, for batches change.

        The null arm keeps the blocks in which it is far off, or it would make itself quiet.

        Args:
            domain: ids of questions; only blocks on these.
        """
        found = Clusters()
        for block in self.calm if arm == NULL else self.kept:
            if domain is None or set(block.questions) <= set(domain):
                found.add(block, base, arm)
        return found.logs

    @property
    def left_out(self) -> dict[str, int]:
        """Blocks that could not be used, by reason."""
        return dict(Counter(block.left_out for block in self.blocks if block.left_out))


class Progressed(NamedTuple):
    """Where a run stands.

    Attributes:
        half_width: the widest pair's, that is to come down to `goal`.
    """

    seconds: float
    num_blocks: int
    half_width: float
    goal: float


def measure(
    target: Target,
    plan: Plan,
    *,
    journal: Journal | None = None,
    clock: Callable[[], float] = time.perf_counter,
    tick: Callable[[Progressed], None] = lambda progressed: None,
) -> Measured:
    """Warms up, then runs blocks until the ratios are precise or the budget is over.

    Args:
        journal: holds the blocks of an interrupted run of this plan, and takes the new ones.
        clock: seconds, for the budget; the arms are timed by the target's own.

    Raises:
        ConfigError: an arm cannot be answered at all, or answers fail one after the other.
    """
    kept = Journal(None, {}) if journal is None else journal
    return _Measurement(target, plan, kept, clock, tick).to_the_end()


class _Measurement:
    """One call of `measure`: its blocks so far, and whether they are enough."""

    def __init__(
        self,
        target: Target,
        plan: Plan,
        journal: Journal,
        clock: Callable[[], float],
        tick: Callable[[Progressed], None],
    ) -> None:
        self._target, self._plan, self._journal = target, plan, journal
        self._clock, self._tick = clock, tick
        self._start_s = clock()
        self._blocks: list[Block] = []
        self._ratios = [Clusters() for _ in plan.arms]  # the null arm's first, then each arm's
        self._useless: set[str] = set()
        self._num_failed = 0
        self._reads_counters = False

    def to_the_end(self) -> Measured:
        if isinstance(self._target, Forgets):
            self._target.forget()
        num_warm_ups, is_steady = self._warm_up()
        stopped = self._run_blocks()
        return Measured(
            plan=self._plan,
            blocks=tuple(self._blocks),
            stopped=stopped,
            num_warm_ups=num_warm_ups,
            is_steady=is_steady,
        )

    def _warm_up(self) -> tuple[int, bool]:
        """All arms on the same questions until their time per token rises and falls no more."""
        questions, logs = self._answerable(), list[float]()
        limit_s, is_steady = WARM_UP_SHARE * self._plan.budget_s, False
        while not is_steady and len(logs) < MAX_WARM_UPS and self._seconds() <= limit_s:
            runs = [self._answer(arm, questions, "warm-up", len(logs)) for arm in self._arms]
            times = [run.seconds_per_token for run in runs if run.seconds_per_token]
            logs.append(sum(map(math.log, times)) / max(1, len(times)))
            is_steady = is_stationary(logs[-MIN_WARM_UPS:])
        return len(logs), is_steady

    def _answerable(self) -> Items[Question]:
        """The first questions that every arm answers.

        Raises:
            ConfigError: the first few all fail.
        """
        size, runs = self._plan.batch_size, list[Run]()
        for at in range(0, min(MAX_FAILED, len(self._plan.questions) // size) * size, size):
            questions = self._plan.questions[at : at + size]
            runs = [self._answer(arm, questions, "first", 0) for arm in self._arms]
            if not any(run.error for run in runs):
                return questions
        raise _failed(runs, self._plan)

    @property
    def _arms(self) -> list[int]:
        return [0, NULL, *range(1, len(self._plan.arms))]

    def _run_blocks(self) -> str:
        for key, number, questions in self._schedule():
            if key in self._journal:
                self._take(Block.from_json(self._journal[key]))
                continue
            if stopped := self._stops(number):
                return stopped
            block = self._block(number, questions, turn=len(self._blocks))
            self._take(Block.from_json(self._journal.add(key, block)))
            if self._num_failed >= MAX_FAILED:
                raise _failed(block.runs, self._plan)
        return "rounds"

    def _take(self, block: Block) -> None:
        """A question that cannot be used is not asked again."""
        self._blocks.append(block)
        if block.left_out:
            self._num_failed += block.left_out == FAILED
            if len(block.questions) == 1:
                self._useless.update(block.questions)
            return
        self._num_failed = 0
        for arm, ratios in enumerate(self._ratios):
            ratios.add(block, 0, arm or NULL)

    def _schedule(self) -> Iterator[tuple[str, int, list[Question]]]:
        """Key, round and questions of every block: each round is another order of all of them."""
        number = 0
        while self._plan.num_rounds is None or number < self._plan.num_rounds:
            questions = [q for q in self._plan.questions if q.id not in self._useless]
            if not questions:
                raise ConfigError(f"no question can be used: {self._reasons()}")
            random.Random(f"{self._plan.seed} {number}").shuffle(questions)
            size = self._plan.batch_size
            for at in range(0, max(1, len(questions) - size + 1), size):
                yield f"{number}.{at // size}", number, questions[at : at + size]
            number += 1

    def _stops(self, number: int) -> str:
        """Why it is enough, before a block of round `number`; "" where it is not.

        The first round is finished in any case that the budget allows: all questions count.
        """
        width = self._half_width()
        now_s = self._seconds()
        self._tick(Progressed(now_s, len(self._blocks), width, self._plan.target_half_width))
        if number > 0 and width <= self._plan.target_half_width:
            return "precision"
        return "budget" if self._blocks and now_s >= self._plan.budget_s else ""

    def _seconds(self) -> float:
        """Since the start, with what the blocks of an earlier run took."""
        earlier = self._blocks[: self._journal.num_resumed]
        spent = sum(run.seconds for block in earlier for run in block.runs)
        return self._clock() - self._start_s + spent

    def _half_width(self) -> float:
        """The widest of all arms against the base and of the null arm.

        Where prompts differ by more than their noise, asking them again would not narrow the
        interval: then the noise alone has to be small enough.
        """
        if len(self._ratios[0].logs) < min(MIN_PROMPTS, len(self._plan.questions)):
            return math.inf
        return max(min(half_width(one.logs), noise(one.logs)) for one in self._ratios)

    def _block(self, number: int, questions: Items[Question], turn: int) -> Block:
        """There and back; who stands outside changes from block to block."""
        arms = self._arms
        order = arms[turn % len(arms) :] + arms[: turn % len(arms)]
        runs = [
            self._answer(arm, questions, f"{number} {way}", number)
            for way, there in (("there", order), ("back", order[::-1]))
            for arm in there
        ]
        return Block(round=number, questions=tuple(q.id for q in questions), runs=tuple(runs))

    def _answer(self, arm: int, questions: Items[Question], part: str, number: int) -> Run:
        """One arm's run.

        Each arm has a tenant of its own in each round, there and back: who remembers answers has
        never seen this one, though all others of the round. It has policies of its own too, for the
        whole run, the null arm among them: no arm pays for what another learns.
        """
        asks = [
            Ask(
                question=question,
                sampling=self._sampling(question, number),
                arm=self._plan.arms[max(arm, 0)],
                tenant=f"ab {arm} {part}",
                learner=f"ab {arm}",
            )
            for question in questions
        ]
        before = self._target.counters() if self._reads_counters else None
        replies = self._target.run(asks, concurrency=self._plan.concurrency)
        acceptance = total(reply.acceptance for reply in replies)
        if acceptance is None and self._reads_counters:
            acceptance = since(before, self._target.counters())
        self._reads_counters = acceptance is None or self._reads_counters
        return take(arm, replies, acceptance, is_batch=self._plan.concurrency > 1)

    def _sampling(self, question: Question, number: int) -> SamplingParams:
        """The same for all arms; another seed for each question and round."""
        sampling, most = self._plan.sampling, question.max_tokens
        if most is not None and sampling.max_tokens is not None:
            most = min(most, sampling.max_tokens)
        seed = int(content_hash(self._plan.seed, question.id, number), 16) >> 1
        return replace(sampling, seed=seed, max_tokens=most or sampling.max_tokens)

    def _reasons(self) -> dict[str, int]:
        return dict(Counter(block.left_out for block in self._blocks if block.left_out))


def _failed(runs: Items[Run], plan: Plan) -> ConfigError:
    arm, error = next(((run.arm, run.error) for run in runs if run.error), (0, FAILED))
    return ConfigError(f"arm {plan.arms[max(arm, 0)].name!r} fails: {error}")


def _check(plan: Plan) -> None:
    names = [arm.name for arm in plan.arms]
    for name, value, is_right, remedy in (
        ("arms", names, len(names) >= 2, "give at least two"),
        ("arms", names, len(set(names)) == len(names), "give each a name of its own"),
        ("questions", len(plan.questions), len(plan.questions) >= 1, "give at least one"),
        ("concurrency", plan.concurrency, plan.concurrency >= 1, "must be at least 1"),
        ("eps", plan.eps, 0 < plan.eps < 1, "must lie between 0 and 1, such as 0.02"),
        ("budget_s", plan.budget_s, plan.budget_s >= 0, "must not be negative"),
        ("num_rounds", plan.num_rounds, _is_count(plan.num_rounds), "must be at least 1"),
    ):
        if not is_right:
            raise ConfigError(f"{name}={value!r}: {remedy}")
    check_prompts(len(plan.questions), plan.concurrency)
    least = max(1, plan.concurrency)
    if not least <= plan.batch_size <= len(plan.questions) or (
        plan.concurrency == 1 and plan.batch_size != 1
    ):
        most = len(plan.questions)
        needed = "1, each is timed alone" if least == 1 else f"{least} to {most}, all there are"
        raise ConfigError(
            f"batch={plan.batch_size}: at concurrency {plan.concurrency} prompts of a block may be "
            f"{needed}"
        )


def check_prompts(count: int, concurrency: int) -> None:
    """ConfigError where so many cannot be in flight: none is asked twice in a block."""
    if count < concurrency:
        raise ConfigError(
            f"concurrency {concurrency} needs as many prompts, there are {count}: raise --limit or "
            f"give more --prompts, or stay at --concurrency {count} and below"
        )


def _is_count(value: int | None) -> bool:
    return value is None or value >= 1
