"""Metrics: what Prometheus may know of the server, under our names and under vLLM's.

Numbers only: no text, no key, no tenant. Buckets are vLLM's, so that dashboards merge.
"""

import time
from collections.abc import Callable, Iterator, Sequence as Items
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from outrider.engine.engine import Engine
from outrider.serve.gate import Gate
from outrider.stream.events import Committed, Event, RequestMetrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
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


class Metrics:
    """Counters and histograms of one server, in a registry of their own.

    Args:
        clock: seconds that never go back.
    """

    def __init__(
        self,
        engine: Engine,
        gate: Gate,
        model_name: str,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.registry = CollectorRegistry()
        self.clock = clock
        self.ours = Ours(self.registry, model_name)
        self.vllm = VLLM(self.registry, model_name)
        self.registry.register(State(engine, gate, model_name))

    def watch(self, num_prompt_tokens: int, num_completions: int = 1) -> "Watch":
        """Begins to observe one request, which has just arrived."""
        return Watch(self, num_prompt_tokens, num_completions)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)


class Watch:
    """One request under observation, from its arrival to `close`."""

    def __init__(self, metrics: Metrics, num_prompt_tokens: int, num_completions: int) -> None:
        self._families = (metrics.ours, metrics.vllm)
        self._clock = metrics.clock
        self._ours = metrics.ours
        self._num_prompt_tokens = num_prompt_tokens
        self._num_open = num_completions
        self._start = self._clock()
        self._last: dict[int, float] = {}  # completion -> when its last token came
        self._is_admitted = False

    def admit(self) -> None:
        """It has passed the gate."""
        self._is_admitted = True
        for family in self._families:
            family.queued(self._clock() - self._start)

    def take(self, event: Event) -> None:
        """Counts one event."""
        if not isinstance(event, Committed):
            return
        now = self._clock()
        if event.token_ids:
            self._time(event, now)
            for family in self._families:
                family.step(event)
        if event.finish_reason is not None and event.metrics is not None:
            self._num_open -= 1
            for family in self._families:
                family.finished(event.finish_reason, event.metrics, event.index)
            if not self._num_open:
                for family in self._families:
                    family.ended(now - self._start)

    def close(self) -> None:
        """Nobody listens any more."""
        if self._num_open and self._is_admitted:
            self._ours.aborted.inc()
        self._num_open = 0

    def _time(self, event: Committed, now: float) -> None:
        last = self._last.get(event.index)
        for family in self._families:
            if not self._last:
                family.began(now - self._start, self._num_prompt_tokens)
            elif last is not None:
                family.followed(now - last, len(event.token_ids))
        self._last[event.index] = now


class _Family:
    """Metrics of one prefix; every one carries the labels of the server."""

    def __init__(self, registry: CollectorRegistry, prefix: str, labels: dict[str, str]) -> None:
        self._registry = registry
        self._prefix = prefix
        self._labels = labels

    def counter(self, name: str, help: str, *labels: str) -> Any:
        """A counter; one with further labels is called with their values."""
        names = [*self._labels, *labels]
        made = Counter(self._prefix + name, help, names, registry=self._registry)
        return _Labelled(made, self._labels) if labels else made.labels(*self._labels.values())

    def histogram(self, name: str, help: str, buckets: Items[float]) -> Histogram:
        made = Histogram(
            self._prefix + name, help, [*self._labels], registry=self._registry, buckets=buckets
        )
        return made.labels(*self._labels.values())


class _Labelled:
    """A counter whose further labels are given at each use; looked up once each."""

    def __init__(self, counter: Counter, labels: dict[str, str]) -> None:
        self._counter = counter
        self._labels = tuple(labels.values())
        self._known: dict[tuple[object, ...], Counter] = {}

    def __call__(self, *values: object) -> Counter:
        if values not in self._known:
            self._known[values] = self._counter.labels(*self._labels, *map(str, values))
        return self._known[values]


class Ours(_Family):
    """`outrider_*`: per drafter and per promise what vLLM's names have in one sum."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        super().__init__(registry, "outrider_", {"model_name": model_name})
        counter, histogram = self.counter, self.histogram
        self.completions = counter(
            "completions",
            "Answers by how they ended and what their text is promised to be.",
            "finish_reason", "exactness", "verifier",
        )  # fmt: skip
        self.aborted = counter("requests_aborted", "Requests whose client left, or out of time.")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = counter("prompt_tokens_cached", "Those whose KV was in the cache.")
        self.tokens = counter("generation_tokens", "Tokens of answers.")
        self.steps = counter("completion_steps", "Target passes that gave an answer tokens.")
        self.drafts = counter("drafts", "Drafts verified.", "drafter")
        self.draft_tokens = counter("draft_tokens", "Drafted tokens verified.", "drafter")
        self.accepted = counter("accepted_tokens", "Drafted tokens that stood.", "drafter")
        self.accepted_at = counter(
            "accepted_tokens_per_pos", "Drafts that stood beyond a position.", "drafter", "position"
        )
        self.queue_s = histogram("queue_time_seconds", "Wait for a place.", REQUEST_S)
        self.first_s = histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", FIRST_TOKEN_S
        )
        self.inter_s = histogram(
            "inter_token_latency_seconds",
            "Per token: the time since the tokens before, shared by those that came together.",
            INTER_TOKEN_S,
        )
        self.request_s = histogram(
            "e2e_request_latency_seconds", "From arrival to the last token.", REQUEST_S
        )

    def queued(self, seconds: float) -> None:
        self.queue_s.observe(seconds)

    def began(self, seconds: float, num_prompt_tokens: int) -> None:
        self.first_s.observe(seconds)
        self.prompt_tokens.inc(num_prompt_tokens)

    def followed(self, seconds: float, num_tokens: int) -> None:
        for _ in range(num_tokens):
            self.inter_s.observe(seconds / num_tokens)

    def step(self, event: Committed) -> None:
        self.tokens.inc(len(event.token_ids))
        self.steps.inc()
        if event.num_drafted:
            self.drafts(event.source).inc()
            self.draft_tokens(event.source).inc(event.num_drafted)
            self.accepted(event.source).inc(event.num_accepted)
            for position in range(event.num_accepted):
                self.accepted_at(event.source, position).inc()

    def finished(self, reason: str, metrics: RequestMetrics, index: int) -> None:
        self.completions(reason, metrics.exactness, metrics.verifier).inc()
        if index == 0:
            self.cached_tokens.inc(metrics.num_cached_tokens)

    def ended(self, seconds: float) -> None:
        self.request_s.observe(seconds)


class VLLM(_Family):
    """`vllm:*`: the names that dashboards know; meanings are vLLM's."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        super().__init__(registry, "vllm:", {"model_name": model_name, "engine": "0"})
        counter, histogram = self.counter, self.histogram
        self.success = counter("request_success", "Finished requests.", "finished_reason")
        self.prompt_tokens = counter("prompt_tokens", "Prefill tokens processed.")
        self.cached_tokens = counter("prompt_tokens_cached", "Prompt tokens found cached.")
        self.tokens = counter("generation_tokens", "Generation tokens processed.")
        self.drafts = counter("spec_decode_num_drafts", "Drafts.")
        self.draft_tokens = counter("spec_decode_num_draft_tokens", "Draft tokens.")
        self.accepted = counter("spec_decode_num_accepted_tokens", "Accepted tokens.")
        self.accepted_at = counter(
            "spec_decode_num_accepted_tokens_per_pos",
            "Accepted tokens per draft position.",
            "position",
        )
        self.queue_s = histogram("request_queue_time_seconds", "Time in WAITING.", REQUEST_S)
        self.first_s = histogram("time_to_first_token_seconds", "First token.", FIRST_TOKEN_S)
        self.inter_s = histogram(
            "inter_token_latency_seconds", "Between outputs of a request.", INTER_TOKEN_S
        )
        self.request_s = histogram("e2e_request_latency_seconds", "Whole request.", REQUEST_S)

    def queued(self, seconds: float) -> None:
        self.queue_s.observe(seconds)

    def began(self, seconds: float, num_prompt_tokens: int) -> None:
        self.first_s.observe(seconds)
        self.prompt_tokens.inc(num_prompt_tokens)

    def followed(self, seconds: float, num_tokens: int) -> None:
        self.inter_s.observe(seconds)

    def step(self, event: Committed) -> None:
        self.tokens.inc(len(event.token_ids))
        if event.num_drafted:
            self.drafts.inc()
            self.draft_tokens.inc(event.num_drafted)
            self.accepted.inc(event.num_accepted)
            for position in range(event.num_accepted):
                self.accepted_at(position).inc()

    def finished(self, reason: str, metrics: RequestMetrics, index: int) -> None:
        self.success(reason).inc()
        if index == 0:
            self.cached_tokens.inc(metrics.num_cached_tokens)

    def ended(self, seconds: float) -> None:
        self.request_s.observe(seconds)


class State(Collector):
    """What engine and gate count themselves, read when Prometheus asks."""

    def __init__(self, engine: Engine, gate: Gate, model_name: str) -> None:
        self._engine = engine
        self._gate = gate
        self._ours = {"model_name": model_name}
        self._vllm = {**self._ours, "engine": "0"}

    def collect(self) -> Iterator[Metric]:
        yield from self._of_vllm()
        yield from self._of_ours()

    def _of_vllm(self) -> Iterator[Metric]:
        scheduler, manager = self._engine.scheduler, self._engine.manager
        num_waiting = scheduler.num_waiting + self._gate.num_waiting
        labels = self._vllm
        yield _gauge("vllm:num_requests_running", "Now running.", labels, len(scheduler.running))
        yield _gauge("vllm:num_requests_waiting", "Now waiting.", labels, num_waiting)
        yield _gauge("vllm:kv_cache_usage_perc", "1 is full.", labels, manager.usage)
        yield _counter(
            "vllm:prefix_cache_queries", "Prompt tokens looked up.", labels, manager.queries
        )
        yield _counter("vllm:prefix_cache_hits", "Those found.", labels, manager.hits)
        num_preemptions = self._engine.stats.num_preemptions
        yield _counter("vllm:num_preemptions", "Preemptions.", labels, num_preemptions)

    def _of_ours(self) -> Iterator[Metric]:
        gate, manager, stats = self._gate, self._engine.manager, self._engine.stats
        labels = self._ours
        yield _gauge("outrider_requests_running", "Past the gate.", labels, gate.num_running)
        yield _gauge("outrider_requests_waiting", "Before the gate.", labels, gate.num_waiting)
        yield _gauge("outrider_draining", "1 while it stops.", labels, gate.is_draining)
        yield _gauge("outrider_kv_blocks", "KV blocks there are.", labels, manager.num_blocks)
        yield _gauge("outrider_kv_blocks_used", "Held by requests.", labels, manager.num_used)
        yield _counter(
            "outrider_prefix_cache_queries", "Prompt tokens looked up.", labels, manager.queries
        )
        yield _counter("outrider_prefix_cache_hits", "Those found.", labels, manager.hits)
        yield _counter("outrider_target_passes", "Passes of the target.", labels, stats.num_steps)
        rejected = CounterMetricFamily(
            "outrider_requests_rejected", "Refused at the gate.", labels=[*labels, "reason"]
        )
        for reason, count in gate.rejected.items():
            rejected.add_metric([*labels.values(), reason], count)
        yield rejected


def _gauge(name: str, help: str, labels: dict[str, str], value: float) -> GaugeMetricFamily:
    made = GaugeMetricFamily(name, help, labels=[*labels])
    made.add_metric([*labels.values()], value)
    return made


def _counter(name: str, help: str, labels: dict[str, str], value: float) -> CounterMetricFamily:
    made = CounterMetricFamily(name, help, labels=[*labels])
    made.add_metric([*labels.values()], value)
    return made
