"""Load: many requests at once on one target, in closed or open loop."""

from collections.abc import Callable, Sequence as Items
from dataclasses import dataclass, replace
from typing import Protocol

from outrider.bench import arrivals
from outrider.bench.feed import Feed, Listed
from outrider.bench.histogram import since
from outrider.bench.saturation import Watched
from outrider.bench.talks import Habits, Talks
from outrider.bench.target import Acceptance, Arm, Ask, Question, Reply, Target
from outrider.errors import ConfigError
from outrider.request import SamplingParams

UNBOUNDED = 100_000  # requests in flight of an open loop


class Server(Target, Protocol):
    """A target that also takes feeds; both of ours do."""

    def serve(
        self,
        feed: Feed,
        *,
        concurrency: int,
        tick: Callable[[Reply], None] = lambda reply: None,
    ) -> list[Reply]:
        """Answers what a feed asks, until it ends; replies in the order in which they came."""
        ...


@dataclass(frozen=True, kw_only=True)
class Level:
    """One load.

    Attributes:
        name: told in results, unique among levels.
        rate: mean requests per second; None in a closed loop.
        concurrency: requests in flight at most; None in an open loop.
        at_s: when each request comes; () for one after the other, as there is room.
        habits: of users who talk; then `at_s` is of no use.
        until_s: no request is sent later.
        is_filler: prompts are pieces of text that nobody would ask; acceptance is then withheld.
    """

    name: str
    questions: tuple[Question, ...]
    at_s: tuple[float, ...] = ()
    rate: float | None = None
    concurrency: int | None = None
    habits: Habits | None = None
    until_s: float | None = None
    is_filler: bool = False

    def __post_init__(self) -> None:
        if not self.questions:
            raise ConfigError(f"load {self.name!r}: no prompts; give at least one")
        if self.at_s and len(self.at_s) != len(self.questions):
            raise ConfigError(f"load {self.name!r}: give a time for each prompt")

    @property
    def is_open(self) -> bool:
        """Whether requests come at their own pace, however slowly they are answered."""
        return bool(self.at_s)

    def feed(self, arm: Arm, sampling: SamplingParams) -> Watched:
        keeps_pace = self.is_open and self.concurrency is None
        return Watched(self._asks(arm, sampling), until_s=self.until_s, finds_saturation=keeps_pace)

    def _asks(self, arm: Arm, sampling: SamplingParams) -> Feed:
        tenant = f"{arm.name}, {self.name}"
        if self.habits is not None:
            return Talks(self.questions, arm, sampling, self.habits, tenant=tenant)
        times = self.at_s or (0.0,) * len(self.questions)
        return Listed(
            Ask(
                question=question,
                sampling=_limited(sampling, question),
                arm=arm,
                at_s=at_s,
                tenant=tenant,
            )
            for question, at_s in zip(self.questions, times, strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One level under one arm.

    Attributes:
        counted: what the target's own counters gained meanwhile; None where it has none.
        stopped: why no more was asked: "saturated", "time", or "" for the end of the list.
        is_saturated: whether more came than was served. is_short: open loop over so soon that
            nobody can tell.
    """

    level: Level
    arm: Arm
    replies: tuple[Reply, ...]
    counted: Acceptance | None = None
    stopped: str = ""
    is_saturated: bool = False
    is_short: bool = False


def closed_loop(
    questions: Items[Question], concurrency: int, num_requests: int, until_s: float | None = None
) -> Level:
    return Level(
        name=f"concurrency {concurrency}",
        questions=repeated(questions, num_requests),
        concurrency=concurrency,
        until_s=until_s,
    )


def open_loop(
    questions: Items[Question],
    rate: float,
    num_requests: int,
    *,
    burstiness: float | None = 1.0,
    seed: int = 0,
    until_s: float | None = None,
) -> Level:
    """Requests at a rate; burstiness None sends one every 1 / rate seconds."""
    if burstiness is None:
        times = arrivals.constant(rate, num_requests)
    else:
        times = arrivals.gamma(rate, num_requests, burstiness=burstiness, seed=seed)
    return Level(
        name=f"rate {rate:g}",
        questions=repeated(questions, num_requests),
        at_s=tuple(times),
        rate=rate,
        until_s=until_s,
    )


def repeated(questions: Items[Question], num: int) -> tuple[Question, ...]:
    """So many, from the beginning again if need be; then each has a name of its own."""
    count = len(questions)
    if not count:
        raise ConfigError("no prompts: give at least one")
    return tuple(_again(questions[i % count], i // count) for i in range(num))


def measure(
    target: Server,
    level: Level,
    arm: Arm,
    sampling: SamplingParams,
    *,
    tick: Callable[[Reply], None] = lambda reply: None,
) -> Measured:
    """Puts a load on a target and waits for the last answer."""
    feed = level.feed(arm, sampling)
    before = target.counters()
    replies = target.serve(feed, concurrency=level.concurrency or UNBOUNDED, tick=tick)
    stopped = "saturated" if feed.is_saturated else "time" if feed.is_late else ""
    feed.conclude()
    return Measured(
        level=level,
        arm=arm,
        replies=tuple(replies),
        counted=since(before, target.counters()),
        stopped=stopped,
        is_saturated=feed.is_saturated,
        is_short=level.is_open and feed.is_short,
    )


def _again(question: Question, round: int) -> Question:
    return replace(question, id=f"{question.id}, round {round + 1}") if round else question


def _limited(sampling: SamplingParams, question: Question) -> SamplingParams:
    """What the data set says of an answer's length bounds it further."""
    told, asked = question.max_tokens, sampling.max_tokens
    if told is None or (asked is not None and asked <= told):
        return sampling
    return replace(sampling, max_tokens=told, min_tokens=min(sampling.min_tokens, told))
