"""StepLog: what the engine's own steps held and took, summed by the speculation asked for."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

from outrider.control.acceptance import Forecast
from outrider.control.base import Step, StepTimes
from outrider.control.fixed import OffPolicy
from outrider.engine.engine import Engine
from outrider.request import SpeculationParams
from outrider.step import Commit, Row, RowPlan


@dataclass
class Depths:
    """Of drafts planned so deep, how many came so far, and how many stood so far; from depth 1.

    Attributes:
        num_nodes: drafted, of all depths together.
    """

    planned: list[int] = field(default_factory=list)
    reached: list[int] = field(default_factory=list)
    stood: list[int] = field(default_factory=list)
    num_nodes: int = 0

    @property
    def deepest(self) -> int:
        """Deepest plan."""
        return len(self.planned)

    @property
    def nodes_per_depth(self) -> float:
        """Nodes that one depth of a draft adds; 1 for a chain."""
        reached = sum(self.reached)
        return self.num_nodes / reached if reached else 1.0

    def forecast(self) -> Forecast:
        """Shares of plans, which never rise with depth."""
        shares: tuple[list[float], list[float]] = ([], [])
        for counts, falling in zip((self.reached, self.stood), shares, strict=True):
            lowest = 1.0
            for count, planned in zip(counts, self.planned, strict=True):
                lowest = min(lowest, count / planned)
                falling.append(lowest)
        return Forecast(*shares)

    def add(self, part: RowPlan, commit: Commit) -> None:
        """What became of one row's plan."""
        drafted = commit.num_drafted if commit.tree.is_chain else part.depth
        while len(self.planned) < part.depth:
            for counts in (self.planned, self.reached, self.stood):
                counts.append(0)
        for index in range(part.depth):
            self.planned[index] += 1
            self.reached[index] += index < drafted
            self.stood[index] += index < commit.num_accepted
        self.num_nodes += commit.num_drafted


@dataclass
class Totals:
    """Sums over steps in which every sequence decodes; steps that read prompts are kept apart.

    Attributes:
        num_sequences: that were given tokens, summed over steps; num_tokens: those tokens.
        num_drafts: drafts, `num_draft_tokens` their nodes; planned_depth: their depths, summed.
        context: tokens in the KV cache, summed over sequences and steps.
        draft_s, pass_s, rest_s: as `StepTimes`. between_s: from the end of the step before to the
            end of this one, less those three: scheduling, planning, handing out text.
        num_prompt_steps, prompt_s: the steps kept apart, and all seconds of them.
    """

    num_steps: int = 0
    num_sequences: int = 0
    num_tokens: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    planned_depth: int = 0
    context: int = 0
    draft_s: float = 0.0
    pass_s: float = 0.0
    rest_s: float = 0.0
    between_s: float = 0.0
    num_prompt_steps: int = 0
    prompt_s: float = 0.0
    depths: Depths = field(default_factory=Depths)

    @property
    def seconds(self) -> float:
        return self.draft_s + self.pass_s + self.rest_s + self.between_s

    @property
    def mean_batch(self) -> float:
        """Sequences per step."""
        return self.num_sequences / max(self.num_steps, 1)

    @property
    def mean_context(self) -> float:
        """Tokens in the KV cache per sequence."""
        return self.context / max(self.num_sequences, 1)

    @property
    def tokens_per_pass(self) -> float:
        """Per sequence, steps without a draft included."""
        return self.num_tokens / max(self.num_sequences, 1)

    @property
    def mean_depth(self) -> float:
        """Drafted depth as planned, over all sequences and steps."""
        return self.planned_depth / max(self.num_sequences, 1)

    def take(self, step: Step, times: StepTimes, between_s: float) -> None:
        self.num_steps += 1
        self.draft_s += times.draft
        self.pass_s += times.forward
        self.rest_s += times.rest
        self.between_s += between_s
        for row, part, commit in zip(step.batch.rows, step.plan, step.commits, strict=True):
            self.num_sequences += 1
            self.num_tokens += len(commit.tokens)
            self.context += len(row.seq.tokens) - len(commit.tokens)
            if part.num_nodes and not commit.error:
                self.planned_depth += part.depth
                self.num_drafts += commit.num_drafted > 0
                self.num_draft_tokens += commit.num_drafted
                self.depths.add(part, commit)


class Watcher(OffPolicy):
    """A policy that no request names: it decides nothing and sees every step."""

    name = "watcher"

    @contextmanager
    def attached(self, engine: Engine) -> Iterator[Self]:
        """Sees the engine's steps meanwhile."""
        policies = engine.controller.policies
        assert self.name not in policies, f"somebody called {self.name!r} watches already"
        policies[self.name] = self
        try:
            yield self
        finally:
            del policies[self.name]


class StepLog(Watcher):
    """Sums of steps by the speculation that their requests ask for.

    Steps with requests of several kinds are left out.

    Args:
        clock: the one that the engine was given.
    """

    name = "step log"

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._totals: dict[int, tuple[SpeculationParams, Totals]] = {}
        self._ended_s = clock()

    def of(self, asked: SpeculationParams) -> Totals | None:
        """Steps of requests that asked for this; None where there were none."""
        return next((found for params, found in self._totals.values() if params == asked), None)

    def observe(self, step: Step) -> None:
        now_s = self._clock()
        asked = step.batch.rows[0].seq.request.speculation
        is_one = all(row.seq.request.speculation is asked for row in step.batch.rows)
        if step.times is not None and is_one:
            totals = self._of(asked)
            if all(map(_decodes, step.batch.rows, step.commits)):
                between_s = now_s - self._ended_s - step.times.total
                totals.take(step, step.times, max(between_s, 0.0))
            else:
                totals.num_prompt_steps += 1
                totals.prompt_s += step.times.total
        self._ended_s = self._clock()

    def _of(self, asked: SpeculationParams) -> Totals:
        found = self._totals.get(id(asked))
        if found is None:
            found = self._totals[id(asked)] = (asked, self.of(asked) or Totals())
        return found[1]


def _decodes(row: Row, commit: Commit) -> bool:
    """Whether the row was one token, generated before."""
    return row.num_tokens == 1 and 0 < len(commit.tokens) < row.seq.num_generated
