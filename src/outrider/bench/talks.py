"""Talks: a feed of conversations whose users read, think, and go on from what they were told."""

import heapq
from collections import deque
from collections.abc import Mapping, Sequence as Items
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from outrider.bench.arrivals import EARLIEST_S
from outrider.bench.target import Arm, Ask, Question, Reply
from outrider.engine.prompts import Prompt
from outrider.errors import ConfigError
from outrider.request import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Habits:
    """How users talk.

    Attributes:
        num_users: at a time; whose talk ends begins the next one at once.
        num_turns: of a talk. think_s: mean pause between an answer and the next turn; pauses
            follow an exponential law.
    """

    num_users: int = 1
    num_turns: int = 4
    think_s: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_users", "num_turns"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.think_s < 0:
            raise ConfigError(f"think_s={self.think_s}: must be at least 0")


@dataclass(kw_only=True)
class _Talk:
    """One conversation under way."""

    turns: deque[Question]
    prompt: Prompt = ""

    def next(self, answer: str) -> Question:
        """The next question, behind all that was said."""
        turn = self.turns.popleft()
        self.prompt = follow(self.prompt, answer, turn.prompt)
        return replace(turn, prompt=self.prompt)


class Talks:
    """Conversations made of a data set: so many questions of one domain, one after the other.

    A turn that fails ends its talk.
    """

    def __init__(
        self,
        questions: Items[Question],
        arm: Arm,
        sampling: SamplingParams,
        habits: Habits,
        *,
        tenant: str = "",
    ) -> None:
        self._talks = deque(_talks(questions, habits.num_turns))
        self._arm, self._sampling, self._habits = arm, sampling, habits
        self._tenant = tenant
        self._random = np.random.default_rng(habits.seed)
        self._due: list[tuple[float, int, Ask]] = []
        self._open: dict[int, _Talk] = {}  # by id of the ask in flight
        self._num_asked = 0
        for _ in range(min(habits.num_users, len(self._talks))):
            self._begin()

    @property
    def due_s(self) -> float | None:
        return self._due[0][0] if self._due else None

    def take(self, now_s: float) -> Ask:
        return heapq.heappop(self._due)[2]

    def note(self, reply: Reply) -> None:
        talk = self._open.pop(id(reply.ask))
        if not reply.error and talk.turns:
            pause = float(self._random.exponential(self._habits.think_s))
            end_s = reply.last_s if reply.last_s is not None else reply.sent_s
            self._ask(talk, reply.text, max(EARLIEST_S, end_s + pause))
        elif self._talks:
            self._begin()

    def _begin(self) -> None:
        self._ask(self._talks.popleft(), "", 0.0)

    def _ask(self, talk: _Talk, answer: str, at_s: float) -> None:
        question = talk.next(answer)
        ask = Ask(
            question=question,
            sampling=self._sampling,
            arm=self._arm,
            at_s=at_s,
            tenant=self._tenant,
        )
        self._open[id(ask)] = talk
        self._num_asked += 1
        heapq.heappush(self._due, (at_s, self._num_asked, ask))


def follow(before: Prompt, answer: str, turn: Prompt) -> Prompt:
    """What is asked next: the conversation so far, the answer to it, and the next turn."""
    if not before:
        return turn
    if isinstance(before, str) and isinstance(turn, str):
        return f"{before}{answer}\n\n{turn}"
    told: list[Any] = list(before)
    if isinstance(turn, str) or not all(isinstance(part, Mapping) for part in (*told, *turn)):
        raise ConfigError("talks: give prompts that are all texts, or all conversations")
    said = [part for part in turn if isinstance(part, Mapping) and part.get("role") != "system"]
    return [*told, {"role": "assistant", "content": answer}, *said]


def _talks(questions: Items[Question], num_turns: int) -> list[_Talk]:
    by_domain: dict[str, list[Question]] = {}
    for question in questions:
        by_domain.setdefault(question.domain, []).append(question)
    return [
        _Talk(turns=deque(asked[start : start + num_turns]))
        for asked in by_domain.values()
        for start in range(0, len(asked), num_turns)
    ]
