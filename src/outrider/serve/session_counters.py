"""Counters: what the sessions of a server have been through, and how Prometheus reads it."""

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

NAMES = {
    "turns": "Turns that became part of a session.",
    "aborted_turns": "Turns that were broken off.",
    "restores": "Turns before which kept state was loaded.",
    "cold_starts": "Turns of sessions with a past, none of whose KV was there.",
    "half_warm_hits": "Turns whose KV was there and whose drafter was not ready.",
    "warmth_regressions": "Drafters that did worse after a restore than before it.",
    "rebuilt_tokens": "Tokens whose draft KV was computed anew for that.",
}


@dataclass
class Counters:
    """Since the server began; what each counts is said in `NAMES`."""

    turns: int = 0
    aborted_turns: int = 0
    restores: int = 0
    cold_starts: int = 0
    half_warm_hits: int = 0
    warmth_regressions: int = 0
    rebuilt_tokens: int = 0


class SessionMetrics(Collector):
    """`outrider_session_*`, read when Prometheus asks."""

    def __init__(self, counters: Counters, model_name: str) -> None:
        self._counters = counters
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        for name, meaning in NAMES.items():
            family = CounterMetricFamily(f"outrider_session_{name}", meaning, labels=["model_name"])
            family.add_metric([self._model_name], getattr(self._counters, name))
            yield family
