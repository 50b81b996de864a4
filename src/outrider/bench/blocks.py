"""Blocks: the same questions put to every arm, there and back, and what the times say."""

import math
from collections.abc import Iterator, Mapping, Sequence as Items
from dataclasses import dataclass
from typing import Any

from outrider.bench.result import content_hash
from outrider.bench.statistics import marked
from outrider.bench.target import Acceptance, Reply

NULL = -1  # the first arm once more
FAILED = "an answer failed"
TOO_SHORT = "fewer than 2 tokens came"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One arm's answers to the questions of a block.

    Attributes:
        arm: its place among the arms, or NULL.
        seconds_per_token: at concurrency 1 the time per token after the first, else the time of
            the whole batch per token; None where the run is of no use.
        seconds: from sending the first question to the last token.
        ttft_s: mean over the answers. answers: a hash of each answer.
        left_out: why the run is of no use.
    """

    arm: int
    seconds_per_token: float | None
    seconds: float
    num_tokens: int
    ttft_s: float | None = None
    answers: tuple[str, ...] = ()
    acceptance: Acceptance | None = None
    left_out: str = ""
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Block:
    """The runs of all arms on the same questions, in the order in which they were made."""

    round: int
    questions: tuple[str, ...]
    runs: tuple[Run, ...]

    @property
    def left_out(self) -> str:
        """Why the block cannot be used; "" where it can."""
        return next((run.left_out for run in self.runs if run.left_out), "")

    def log_ratio(self, base: int, arm: int) -> float:
        """ln of how many times as fast `arm` was as `base`, of the mean logarithms of both."""
        return self._log_time(base) - self._log_time(arm)

    def swing(self, arm: int) -> float:
        """ln of how much longer an arm took back than there."""
        there, back = (math.log(run.seconds_per_token or math.nan) for run in self.of(arm))
        return back - there

    def of(self, arm: int) -> Iterator[Run]:
        return (run for run in self.runs if run.arm == arm)

    def _log_time(self, arm: int) -> float:
        logs = [math.log(run.seconds_per_token) for run in self.of(arm) if run.seconds_per_token]
        return sum(logs) / len(logs)

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> "Block":
        runs = tuple(_run_from_json(run) for run in held["runs"])
        return cls(round=held["round"], questions=tuple(held["questions"]), runs=runs)


class Clusters:
    """Log ratios of blocks: those on the same question together, of a batch each by itself."""

    def __init__(self) -> None:
        self._found: dict[object, list[float]] = {}

    @property
    def logs(self) -> list[list[float]]:
        return list(self._found.values())

    def add(self, block: Block, base: int, arm: int) -> None:
        key = block.questions[0] if len(block.questions) == 1 else len(self._found)
        self._found.setdefault(key, []).append(block.log_ratio(base, arm))


def take(arm: int, replies: Items[Reply], acceptance: Acceptance | None, *, is_batch: bool) -> Run:
    """A run out of its replies; one prompt is timed after its first token, a batch as a whole."""
    errors = [reply.error for reply in replies if reply.error]
    ends = [reply.last_s for reply in replies if reply.last_s is not None]
    seconds = max(ends, default=0.0) - min(reply.sent_s for reply in replies)
    num_tokens = sum(reply.num_tokens for reply in replies)
    per_token = replies[0].tpot_s
    if is_batch:
        per_token = seconds / num_tokens if num_tokens else None
    waits = [reply.ttft_s for reply in replies if reply.ttft_s is not None]
    left_out = FAILED if errors else "" if per_token else TOO_SHORT
    return Run(
        arm=arm,
        seconds_per_token=None if left_out else per_token,
        seconds=max(0.0, seconds),
        num_tokens=num_tokens,
        ttft_s=sum(waits) / len(waits) if waits else None,
        answers=tuple(content_hash(reply.token_ids or reply.text) for reply in replies),
        acceptance=acceptance,
        left_out=left_out,
        error=errors[0] if errors else "",
    )


def unmarked(blocks: Items[Block], *values: Items[float]) -> tuple[Block, ...]:
    """Blocks that none of these mark."""
    far = [any(marks) for marks in zip(*map(marked, values), strict=True)]
    return tuple(block for block, is_far in zip(blocks, far, strict=True) if not is_far)


def _run_from_json(held: Mapping[str, Any]) -> Run:
    acceptance = held["acceptance"]
    if acceptance is not None:
        acceptance = Acceptance(**{**acceptance, "histogram": tuple(acceptance["histogram"])})
    return Run(**{**held, "answers": tuple(held["answers"]), "acceptance": acceptance})
