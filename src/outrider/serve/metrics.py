"""Metrics: what Prometheus may know of the server, under our names and under vLLM's.

Numbers only: no text, no key, no tenant. Buckets are vLLM's, so that dashboards merge. Events are
counted in plain numbers, which become families when somebody reads: readers are few.
"""

import math
import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from outrider.control.base import KeepsBalance
from outrider.control.controller import Controller
from outrider.engine.engine import Engine
from outrider.serve.gate import Gate
from outrider.serve.tally import Families, Tally, of_ours, of_vllm
from outrider.stream.events import Committed, Event

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


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
        self.tally = Tally()
        self.registry.register(State(self.tally, engine, gate, model_name))

    def watch(self, num_prompt_tokens: int, num_completions: int = 1) -> "Watch":
        """Begins to observe one request, which has just arrived."""
        return Watch(self.tally, self.clock, num_prompt_tokens, num_completions)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)


class Watch:
    """One request under observation, from its arrival to `close`."""

    def __init__(
        self,
        tally: Tally,
        clock: Callable[[], float],
        num_prompt_tokens: int,
        num_completions: int,
    ) -> None:
        self._tally = tally
        self._clock = clock
        self._num_prompt_tokens = num_prompt_tokens
        self._num_open = num_completions
        self._start = self._clock()
        self._last: dict[int, float] = {}  # completion -> when its last token came
        self._is_admitted = False

    def admit(self) -> None:
        """It has passed the gate."""
        self._is_admitted = True
        self._tally.queue_s.observe(self._clock() - self._start)

    def take(self, event: Event) -> None:
        """Counts one event."""
        if not isinstance(event, Committed):
            return
        now, tally = self._clock(), self._tally
        if event.token_ids:
            self._time(event, now)
            tally.step(event)
        if event.finish_reason is not None and event.metrics is not None:
            self._num_open -= 1
            tally.finished(event.finish_reason, event.metrics, event.index)
            if not self._num_open:
                tally.request_s.observe(now - self._start)

    def close(self) -> None:
        """Nobody listens any more."""
        if self._num_open and self._is_admitted:
            self._tally.num_aborted += 1
        self._num_open = 0

    def _time(self, event: Committed, now: float) -> None:
        last = self._last.get(event.index)
        if not self._last:
            self._tally.began(now - self._start, self._num_prompt_tokens)
        elif last is not None:
            self._tally.followed(now - last, len(event.token_ids))
        self._last[event.index] = now


class State(Collector):
    """The tally, and what engine, gate and policy count themselves, read when Prometheus asks."""

    def __init__(self, tally: Tally, engine: Engine, gate: Gate, model_name: str) -> None:
        self._tally = tally
        self._engine = engine
        self._gate = gate
        self._ours = Families("outrider_", {"model_name": model_name})
        self._vllm = Families("vllm:", {"model_name": model_name, "engine": "0"})

    def collect(self) -> Iterator[Metric]:
        yield from of_ours(self._tally, self._ours)
        yield from of_vllm(self._tally, self._vllm)
        yield from self._state_for_vllm()
        yield from self._state()
        yield from self._speculation()

    def _state_for_vllm(self) -> Iterator[Metric]:
        gauge, counter = self._vllm.gauge, self._vllm.counter
        scheduler, manager = self._engine.scheduler, self._engine.manager
        num_waiting = scheduler.num_waiting + self._gate.num_waiting
        yield gauge("num_requests_running", "Now running.", len(scheduler.running))
        yield gauge("num_requests_waiting", "Now waiting.", num_waiting)
        yield gauge("kv_cache_usage_perc", "1 is full.", manager.usage)
        yield counter("prefix_cache_queries", "Prompt tokens looked up.", manager.queries)
        yield counter("prefix_cache_hits", "Those found.", manager.hits)
        yield counter("num_preemptions", "Preemptions.", self._engine.stats.num_preemptions)

    def _state(self) -> Iterator[Metric]:
        gauge, counter = self._ours.gauge, self._ours.counter
        gate, manager, stats = self._gate, self._engine.manager, self._engine.stats
        yield gauge("requests_running", "Past the gate.", gate.num_running)
        yield gauge("requests_waiting", "Before the gate.", gate.num_waiting)
        yield gauge("draining", "1 while it stops.", gate.is_draining)
        yield gauge("kv_blocks", "KV blocks there are.", manager.num_blocks)
        yield gauge("kv_blocks_used", "Held by requests.", manager.num_used)
        yield counter("prefix_cache_queries", "Prompt tokens looked up.", manager.queries)
        yield counter("prefix_cache_hits", "Those found.", manager.hits)
        yield counter("target_passes", "Passes of the target.", stats.num_steps)
        rejected = {(reason,): count for reason, count in gate.rejected.items()}
        meaning = "Refused at the gate."
        yield self._ours.counters("requests_rejected", meaning, ("reason",), rejected)

    def _speculation(self) -> Iterator[Metric]:
        """How far drafts go, what steps take, and what the policies make of it."""
        controller = self._engine.controller
        depths = {(str(d),): n for d, n in enumerate(self._engine.stats.depths) if n}
        meaning = "Steps of answers by how deep their draft went; 0 is plain."
        yield self._ours.counters("spec_depth", meaning, ("depth",), depths)
        parts = {(part,): seconds for part, seconds in controller.seconds._asdict().items()}
        meaning = "Time of steps: drafting, the target's pass, and the rest."
        yield self._ours.counters("step_seconds", meaning, ("part",), parts)
        yield from self._balances(controller)

    def _balances(self, controller: Controller) -> Iterator[Metric]:
        """By policy; NaN is not known yet."""
        found = {
            (name,): policy.balance()
            for name, policy in controller.policies.items()
            if isinstance(policy, KeepsBalance)
        }
        expected = {name: _known(balance.expected) for name, balance in found.items()}
        measured = {name: _known(balance.measured) for name, balance in found.items()}
        shut = {name: float(balance.num_shut) for name, balance in found.items()}
        gauges, label = self._ours.gauges, ("policy",)
        meaning = "Expected goodput over plain decoding's."
        yield gauges("controller_expected_speedup", meaning, label, expected)
        yield gauges("controller_advantage", "The same, measured of late.", label, measured)
        meaning = "Times that speculation was ended because it lost."
        yield self._ours.counters("controller_shut", meaning, label, shut)


def _known(value: float | None) -> float:
    return math.nan if value is None else value
