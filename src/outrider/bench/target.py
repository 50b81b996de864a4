"""What the harness asks, what comes back, and the two faces of whoever answers.

Times are seconds on one clock, counted from the start of the run.
"""

from collections.abc import Callable, Mapping, Sequence as Items
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from outrider.engine.prompts import Prompt
from outrider.request import SamplingParams, SpeculationParams


@dataclass(frozen=True, kw_only=True)
class Question:
    """One prompt of a data set.

    Attributes:
        id: unique in its data set. domain: what a result is broken down by ("" is none).
        max_tokens: what the data set says of the answer's length; None leaves it to the run.
    """

    id: str
    prompt: Prompt
    domain: str = ""
    max_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to answer: a label, and the speculation it asks for.

    Attributes:
        speculation: None leaves it to the server's own setting.
        extra: further keys of the request body, for servers that have switches of their own.
    """

    name: str
    speculation: SpeculationParams | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A question put to a target under one arm.

    Attributes:
        at_s: when it is sent (open loop); 0 sends it as soon as the concurrency allows.
        tenant: asks of different tenants share no prefix cache.
        learner: asks of different learners teach each other's policies nothing, where the target
            can keep them apart; "" is the arm's name.
    """

    question: Question
    sampling: SamplingParams
    arm: Arm
    at_s: float = 0.0
    tenant: str = ""
    learner: str = ""
    priority: int = 0


class Acceptance(NamedTuple):
    """Counts of drafted steps; sums of them are of the same form.

    Attributes:
        num_steps: target passes that emitted tokens, with a draft or without; 0 where unknown.
        num_drafts: those with a draft.
        histogram: entry a counts drafted steps that accepted a tokens; () where unknown.
    """

    num_steps: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    histogram: tuple[int, ...] = ()

    @property
    def acceptance_length(self) -> float:
        """1 + accepted / drafts, the bonus token counted; 1.0 when nothing was drafted."""
        return 1.0 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 1.0


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back to one ask.

    Attributes:
        due_s: when it was to be sent; sent_s: when it was; first_s, last_s: its first and last
            token; None where no token came.
        chunk_s: when each chunk of text arrived.
        num_tokens: emitted, as the target counts them; token_ids where it tells them.
        acceptance: None where the target does not tell it per request.
        error: why there is no answer; "" for a good one.
    """

    ask: Ask
    due_s: float
    sent_s: float
    first_s: float | None = None
    last_s: float | None = None
    chunk_s: tuple[float, ...] = ()
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_tokens: int = 0
    token_ids: tuple[int, ...] | None = None
    text: str = ""
    finish_reason: str = ""
    acceptance: Acceptance | None = None
    error: str = ""

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, from when it was due (a late client is the server's wait too)."""
        return None if self.first_s is None else self.first_s - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for fewer than two tokens."""
        if self.first_s is None or self.last_s is None or self.num_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.num_tokens - 1)

    @property
    def e2e_s(self) -> float | None:
        return None if self.last_s is None else self.last_s - self.due_s


class Target(Protocol):
    """Who answers: our engine in this process, or a server by URL."""

    name: str

    def describe(self) -> dict[str, Any]:
        """What is known of model, engine and versions; goes into every result."""
        ...

    def run(
        self,
        asks: Items[Ask],
        *,
        concurrency: int,
        tick: Callable[[Reply], None] = lambda reply: None,
    ) -> list[Reply]:
        """Answers all of them, in their order; at most `concurrency` at a time.

        An ask that cannot be answered gives a reply with `error`; only what no ask can mend (no
        server there, wrong key) raises.
        """
        ...

    def counters(self) -> Acceptance | None:
        """Speculation counters since the target's start, None where it has none."""
        ...


@runtime_checkable
class Forgets(Protocol):
    """A target whose policies learn, arm by arm, and can be made to begin anew."""

    def forget(self) -> None:
        """What policies have learned of any arm is gone."""
        ...
