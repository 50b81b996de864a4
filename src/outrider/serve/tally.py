"""Tally: plain numbers about requests, counted on the event loop, and how Prometheus reads them."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence as Items
from itertools import accumulate
from typing import Any, TypeAlias

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.utils import floatToGoString

from outrider.stream.events import Committed, RequestMetrics

FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
# vLLM's begin at 10 ms; runs of accepted tokens arrive closer.
INTER_TOKEN_S = (
    0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5,
    7.5, 10, 20, 40, 80,
)  # fmt: skip
REQUEST_S = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
Labels: TypeAlias = Mapping[str, str]
ByLabels: TypeAlias = Mapping[Any, float]  # keys are tuples of label values, of any length


class Buckets:
    """A histogram of seconds.

    Args:
        bounds: upper ends, rising; what is longer falls into one more.
    """

    def __init__(self, bounds: Items[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        """The same value, so many times."""
        self.counts[bisect_left(self.bounds, seconds)] += times
        self.sum += times * seconds


class Drafts:
    """What became of one drafter's drafts; `accepted_at[i]` of them stood beyond position i."""

    __slots__ = ("accepted_at", "num_accepted", "num_drafted", "num_drafts")

    def __init__(self) -> None:
        self.num_drafts = self.num_drafted = self.num_accepted = 0
        self.accepted_at: list[int] = []

    def count(self, num_drafted: int, num_accepted: int) -> None:
        self.num_drafts += 1
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        accepted_at = self.accepted_at
        while len(accepted_at) < num_accepted:
            accepted_at.append(0)
        for position in range(num_accepted):
            accepted_at[position] += 1


class Tally:
    """Of one server, since it began. One thread counts and reads.

    Attributes:
        completions: answers by (finish reason, exactness, verifier).
        relaxed: tokens that stand only by a lossy rule, by (verifier,).
        arrival_s: from one arrival of an answer's tokens to the next. token_s: per token, the time
            shared by those that came together.
    """

    def __init__(self) -> None:
        self.num_prompt_tokens = self.num_cached_tokens = 0
        self.num_tokens = self.num_steps = 0
        self.num_aborted = 0
        self.drafts: dict[str, Drafts] = {}
        self.completions: dict[tuple[str, ...], float] = {}
        self.relaxed: dict[tuple[str, ...], float] = {}
        self.queue_s = Buckets(REQUEST_S)
        self.first_s = Buckets(FIRST_TOKEN_S)
        self.arrival_s = Buckets(INTER_TOKEN_S)
        self.token_s = Buckets(INTER_TOKEN_S)
        self.request_s = Buckets(REQUEST_S)

    def began(self, seconds: float, num_prompt_tokens: int) -> None:
        """The first token of a request came."""
        self.first_s.observe(seconds)
        self.num_prompt_tokens += num_prompt_tokens

    def followed(self, seconds: float, num_tokens: int) -> None:
        """Further tokens of an answer came, so long after those before."""
        self.arrival_s.observe(seconds)
        self.token_s.observe(seconds / num_tokens, num_tokens)

    def step(self, event: Committed) -> None:
        self.num_tokens += len(event.token_ids)
        self.num_steps += 1
        if event.num_drafted:
            drafts = self.drafts.get(event.source)
            if drafts is None:
                drafts = self.drafts[event.source] = Drafts()
            drafts.count(event.num_drafted, event.num_accepted)

    def finished(self, reason: str, metrics: RequestMetrics, index: int) -> None:
        """A completion ended."""
        key = (reason, metrics.exactness, metrics.verifier)
        self.completions[key] = self.completions.get(key, 0) + 1
        if metrics.num_relaxed_tokens:
            rule = (metrics.verifier,)
            self.relaxed[rule] = self.relaxed.get(rule, 0) + metrics.num_relaxed_tokens
        if index == 0:
            self.num_cached_tokens += metrics.num_cached_tokens


class Families:
    """Metrics of one prefix; every one carries the labels of the server."""

    def __init__(self, prefix: str, labels: Labels) -> None:
        self._prefix = prefix
        self._names = list(labels)
        self._values = list(labels.values())

    def gauge(self, name: str, meaning: str, value: float) -> Metric:
        return self.gauges(name, meaning, (), {(): value})

    def gauges(self, name: str, meaning: str, labels: Items[str], values: ByLabels) -> Metric:
        """A gauge by further labels; `values` by theirs."""
        made = GaugeMetricFamily(self._prefix + name, meaning, labels=[*self._names, *labels])
        for further, value in values.items():
            made.add_metric([*self._values, *further], value)
        return made

    def counter(self, name: str, meaning: str, value: float) -> Metric:
        return self.counters(name, meaning, (), {(): value})

    def counters(self, name: str, meaning: str, labels: Items[str], values: ByLabels) -> Metric:
        """A counter by further labels; `values` by theirs."""
        made = CounterMetricFamily(self._prefix + name, meaning, labels=[*self._names, *labels])
        for further, value in values.items():
            made.add_metric([*self._values, *further], value)
        return made

    def histogram(self, name: str, meaning: str, buckets: Buckets) -> Metric:
        made = HistogramMetricFamily(self._prefix + name, meaning, labels=self._names)
        ends = [_text(bound) for bound in (*buckets.bounds, float("inf"))]
        cumulated = list(zip(ends, accumulate(buckets.counts), strict=True))
        made.add_metric(self._values, cumulated, sum_value=buckets.sum)
        return made


def _text(bound: float) -> str:
    return str(floatToGoString(bound))  # type: ignore[no-untyped-call]


def of_ours(tally: Tally, families: Families) -> Iterator[Metric]:
    """`outrider_*`: per drafter and per promise what vLLM's names have in one sum."""
    counter, counters, histogram = families.counter, families.counters, families.histogram
    drafts = tally.drafts
    yield counters(
        "completions",
        "Answers by how they ended and what their text is promised to be.",
        ("finish_reason", "exactness", "verifier"),
        tally.completions,
    )
    meaning = "Requests whose client left, or out of time."
    yield counter("requests_aborted", meaning, tally.num_aborted)
    yield counter("prompt_tokens", "Tokens of prompts.", tally.num_prompt_tokens)
    meaning = "Those whose KV was in the cache."
    yield counter("prompt_tokens_cached", meaning, tally.num_cached_tokens)
    yield counter("generation_tokens", "Tokens of answers.", tally.num_tokens)
    meaning = "Target passes that gave an answer tokens."
    yield counter("completion_steps", meaning, tally.num_steps)
    for name, meaning, attribute in (
        ("drafts", "Drafts verified.", "num_drafts"),
        ("draft_tokens", "Drafted tokens verified.", "num_drafted"),
        ("accepted_tokens", "Drafted tokens that stood.", "num_accepted"),
    ):
        values = {(drafter,): getattr(found, attribute) for drafter, found in drafts.items()}
        yield counters(name, meaning, ("drafter",), values)
    at = {
        (drafter, str(position)): count
        for drafter, found in drafts.items()
        for position, count in enumerate(found.accepted_at)
    }
    meaning = "Drafts that stood beyond a position."
    yield counters("accepted_tokens_per_pos", meaning, ("drafter", "position"), at)
    meaning = "Tokens that stand only by a lossy rule."
    yield counters("spec_relaxed_tokens", meaning, ("verifier",), tally.relaxed)
    yield histogram("queue_time_seconds", "Wait for a place.", tally.queue_s)
    meaning = "From arrival to the first token."
    yield histogram("time_to_first_token_seconds", meaning, tally.first_s)
    meaning = "Per token: the time since the tokens before, shared by those that came together."
    yield histogram("inter_token_latency_seconds", meaning, tally.token_s)
    meaning = "From arrival to the last token."
    yield histogram("e2e_request_latency_seconds", meaning, tally.request_s)


def of_vllm(tally: Tally, families: Families) -> Iterator[Metric]:
    """`vllm:*`: the names that dashboards know; meanings are vLLM's."""
    counter, counters, histogram = families.counter, families.counters, families.histogram
    drafts = list(tally.drafts.values())
    ended: dict[tuple[str, ...], float] = {}
    for (reason, *_), count in tally.completions.items():
        ended[(reason,)] = ended.get((reason,), 0) + count
    yield counters("request_success", "Finished requests.", ("finished_reason",), ended)
    yield counter("prompt_tokens", "Prefill tokens processed.", tally.num_prompt_tokens)
    meaning = "Prompt tokens found cached."
    yield counter("prompt_tokens_cached", meaning, tally.num_cached_tokens)
    yield counter("generation_tokens", "Generation tokens processed.", tally.num_tokens)
    prefix = "spec_decode_num_"
    yield counter(prefix + "drafts", "Drafts.", sum(one.num_drafts for one in drafts))
    yield counter(prefix + "draft_tokens", "Draft tokens.", sum(one.num_drafted for one in drafts))
    num_accepted = sum(one.num_accepted for one in drafts)
    yield counter(prefix + "accepted_tokens", "Accepted tokens.", num_accepted)
    at: dict[tuple[str, ...], float] = {}
    for one in drafts:
        for position, count in enumerate(one.accepted_at):
            at[(str(position),)] = at.get((str(position),), 0) + count
    meaning = "Accepted tokens per draft position."
    yield counters(prefix + "accepted_tokens_per_pos", meaning, ("position",), at)
    yield histogram("request_queue_time_seconds", "Time in WAITING.", tally.queue_s)
    yield histogram("time_to_first_token_seconds", "First token.", tally.first_s)
    meaning = "Between outputs of a request."
    yield histogram("inter_token_latency_seconds", meaning, tally.arrival_s)
    yield histogram("e2e_request_latency_seconds", "Whole request.", tally.request_s)
