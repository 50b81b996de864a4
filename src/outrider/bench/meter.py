"""Meter: what the steps of an engine held and took, shared out to classes of tokens.

In a step all rows read the same weights, so that time is shared by rows; attention reads the KV
cache, so that time is shared by what was read; drafting is decoding's alone.

Shape legend: N steps, F features.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from outrider.bench.calibration.steps import Watcher
from outrider.control.base import Step
from outrider.engine.engine import Engine
from outrider.step import Commit, Row
from outrider.stream.events import Event

PROMPT, CACHED, OUTPUT = "uncached prompt", "cached prompt", "output"
CLASSES = (PROMPT, CACHED, OUTPUT)


class Held(NamedTuple):
    """What one step held.

    Attributes:
        prompt_rows: prompt tokens run. output_rows: generated tokens and draft nodes run.
        prompt_read: tokens of KV read for prompts, those of the prefix cache left out, which are
            `cached_read`; output_read: for generated tokens. Once per sequence.
        draft_s: seconds of drafting; 0 where the engine has no clock.
    """

    prompt_rows: int = 0
    output_rows: int = 0
    prompt_read: int = 0
    cached_read: int = 0
    output_read: int = 0
    draft_s: float = 0.0

    @property
    def rows(self) -> int:
        return self.prompt_rows + self.output_rows

    @property
    def read(self) -> int:
        return self.prompt_read + self.cached_read + self.output_read

    def plus(self, other: "Held") -> "Held":
        return Held._make(mine + its for mine, its in zip(self, other, strict=True))


class Fit(NamedTuple):
    """Seconds of a step without drafting: per step, per row, per token of KV read.

    Attributes:
        r2: share of the variance over steps that it explains.
    """

    step_s: float
    row_s: float
    read_s: float
    r2: float

    def read_share(self, held: Held) -> float:
        """Of a step's time, that of reading the KV cache."""
        read = self.read_s * held.read
        total = self.step_s + self.row_s * held.rows + read
        return read / total if total > 0.0 else 0.0


class Shared(NamedTuple):
    """Seconds by class; with `idle_s` they add up to `wall_s`.

    Attributes:
        idle_s: between steps: waiting for requests, and the work of whoever asks.
        fit: None where no step held anything.
    """

    seconds: dict[str, float]
    idle_s: float
    wall_s: float
    fit: Fit | None

    @property
    def busy_s(self) -> float:
        return sum(self.seconds.values())


class Meter(Watcher):
    """Watches an engine's steps while `metering`.

    Args:
        clock: seconds; need not be the engine's.
    """

    name = "meter"

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._held: Held | None = None
        self._steps: list[tuple[Held, float]] = []
        self._wall_s = 0.0

    @contextmanager
    def metering(self, engine: Engine) -> Iterator["Meter"]:
        """Times every step whole, scheduling and handing out included; once per meter."""
        step = engine.step

        def timed() -> list[Event]:
            self._held, start_s = None, self._clock()
            events = step()
            if self._held is not None:
                self._steps.append((self._held, self._clock() - start_s))
            return events

        with self.attached(engine):
            engine.step = timed  # type: ignore[method-assign]  # hides the class's, until deleted
            start_s = self._clock()
            try:
                yield self
            finally:
                self._wall_s = self._clock() - start_s
                del engine.step

    def observe(self, step: Step) -> None:
        held = Held(draft_s=step.times.draft if step.times else 0.0)
        for row, commit in zip(step.batch.rows, step.commits, strict=True):
            held = held.plus(_held(row, commit))
        self._held = held

    def shared(self) -> Shared:
        """All steps so far, shared out."""
        seconds = dict.fromkeys(CLASSES, 0.0)
        if not self._steps:
            return Shared(seconds, self._wall_s, self._wall_s, None)
        fit = fit_steps(self._steps)
        for held, step_s in self._steps:
            for name, part in share_out(held, step_s, fit.read_share(held)).items():
                seconds[name] += part
        return Shared(seconds, self._wall_s - sum(seconds.values()), self._wall_s, fit)


def share_out(held: Held, step_s: float, read_share: float) -> dict[str, float]:
    """One step's seconds by class; they add up to it.

    Args:
        read_share: of what is not drafting, the time of reading the KV cache.
    """
    draft_s = min(held.draft_s, step_s)
    rest_s = step_s - draft_s
    read_s = rest_s * read_share if held.read else 0.0
    per_row = (rest_s - read_s) / max(held.rows, 1)
    per_read = read_s / max(held.read, 1)
    return {
        PROMPT: per_row * held.prompt_rows + per_read * held.prompt_read,
        CACHED: per_read * held.cached_read,
        OUTPUT: per_row * held.output_rows + per_read * held.output_read + draft_s,
    }


def fit_steps(steps: list[tuple[Held, float]]) -> Fit:
    """Least squares with no price below 0: of all sets of prices, the best that obeys."""
    x_NF = np.array([(1.0, held.rows, held.read) for held, _ in steps])
    y_N = np.array([max(step_s - held.draft_s, 0.0) for held, step_s in steps])
    best, best_error = np.zeros(3), float(y_N @ y_N)
    for size in (1, 2, 3):
        for chosen in itertools.combinations(range(3), size):
            prices_F = np.zeros(3)
            prices_F[list(chosen)] = np.linalg.lstsq(x_NF[:, chosen], y_N, rcond=None)[0]
            error = float(((y_N - x_NF @ prices_F) ** 2).sum())
            if (prices_F >= 0.0).all() and error < best_error * (1 - 1e-9):
                best, best_error = prices_F, error
    spread = float(((y_N - y_N.mean()) ** 2).sum())
    step_s, row_s, read_s = best.tolist()
    return Fit(step_s, row_s, read_s, 1.0 - best_error / spread if spread > 0.0 else 0.0)


def _held(row: Row, commit: Commit) -> Held:
    """Of one row; the sequence has its new tokens already."""
    seq, num_tokens, _ = row
    if commit.tokens or commit.finish_reason:
        start = len(seq.tokens) - len(commit.tokens) - num_tokens
    else:
        start = seq.num_cached - num_tokens
    prompt_rows = max(0, min(seq.num_prompt, start + num_tokens) - start)
    output_rows = num_tokens - prompt_rows + len(commit.tree)
    if not prompt_rows:
        return Held(0, output_rows, output_read=start + output_rows)
    cached = min(seq.num_prefix_hits, start)
    return Held(prompt_rows, output_rows, start + prompt_rows + output_rows - cached, cached)
