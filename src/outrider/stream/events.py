"""Events: what a step tells the clients. Committed text is final; a tail is only expected."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple, TypeAlias


@dataclass(frozen=True, kw_only=True)
class DrafterMetrics:
    """How the drafts of one drafter fared in one completion.

    Acceptance at a position is `stood / tried` there. It is not biased by how deep each draft
    went, nor by where the answer ended: a token is tried only if the draft came so far, all before
    it stood, and the answer went on.

    Attributes:
        num_drafts, num_draft_tokens, num_accepted_tokens: as in `RequestMetrics`, of this drafter.
        tried: entry i counts the drafts of at least i + 1 tokens whose first i stood; of a tree
            its longest path counts.
        stood: of those, the drafts whose token i + 1 stood as well.
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    tried: tuple[int, ...] = ()
    stood: tuple[int, ...] = ()

    @property
    def acceptance(self) -> tuple[float, ...]:
        """By position, the share of tried tokens that stood."""
        return tuple(stood / tried for stood, tried in zip(self.stood, self.tried, strict=True))

    def __add__(self, other: "DrafterMetrics") -> "DrafterMetrics":
        """Of both, as if they were one drafter."""
        return DrafterMetrics(
            num_drafts=self.num_drafts + other.num_drafts,
            num_draft_tokens=self.num_draft_tokens + other.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens + other.num_accepted_tokens,
            tried=_sums(self.tried, other.tried),
            stood=_sums(self.stood, other.stood),
        )


@dataclass(frozen=True, kw_only=True)
class RequestMetrics:
    """What one completion cost and how well its drafts were guessed.

    Attributes:
        num_prompt_tokens, num_cached_tokens: prompt, and how much of it the prefix cache held.
        num_steps: target passes that emitted tokens; num_drafts: those that carried a draft.
        num_draft_tokens, num_accepted_tokens: nodes drafted; nodes on accepted paths.
        num_relaxed_tokens: emitted tokens that stand only because the rule is a lossy one.
        accepted_histogram: entry a counts the drafted steps that accepted a tokens.
        by_drafter: the same by whose drafts they were, for methods that have several drafters; and
            how often a token was tried at each position, which the histogram does not tell.
        drafter, verifier, exactness: who guessed, which rule decided, and what that promises
            ("exact", "exact-greedy", "lossy" or "synthetic").
        verifier_options: settings of the rule that the request gave, the others being the usual
            (of `fly`, the reading).
        num_preemptions: times the KV was given up and computed again.
    """

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_steps: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_relaxed_tokens: int = 0
    accepted_histogram: tuple[int, ...] = ()
    by_drafter: Mapping[str, DrafterMetrics] = field(default_factory=dict)
    drafter: str = ""
    verifier: str = ""
    exactness: str = ""
    verifier_options: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    num_preemptions: int = 0

    @property
    def acceptance_length(self) -> float:
        """1 + accepted / drafts, the bonus token counted; 1.0 when nothing was drafted."""
        return 1.0 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 1.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted tokens; 0.0 when nothing was drafted."""
        drafted = self.num_draft_tokens
        return self.num_accepted_tokens / drafted if drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Emitted tokens per target pass, steps without a draft counted."""
        return self.num_generated_tokens / self.num_steps if self.num_steps else 0.0

    @property
    def joint_acceptance(self) -> tuple[float, ...]:
        """Share of drafted steps that accepted at least i tokens, for i = 1, 2, ..."""
        histogram, total = self.accepted_histogram, self.num_drafts
        return tuple(sum(histogram[i:]) / total for i in range(1, len(histogram)))


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """Raw log-probability (nats, before any transform) of an emitted token and of the likeliest."""

    token_id: int
    logprob: float
    top: dict[int, float]


class StepTree(NamedTuple):
    """The draft of one step, for clients that want to see it.

    Attributes:
        tokens: ids of the nodes. parents: of each node, -1 for the root.
        accepted: nodes of the accepted path, from a child of the root downwards.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    accepted: tuple[int, ...]


class Committed(NamedTuple):
    """Verified tokens; numbered, append-only. Texts of all events, joined, are the output.

    With a commit unit an event may hold the tokens of several steps, or text whose tokens come
    with a later one (`stream.units`); counts are then sums.

    Attributes:
        index: which of the request's n completions.
        offset: tokens of this completion committed before these.
        num_drafted, num_accepted: draft nodes of this step, and those on the accepted path.
        num_from_draft: leading tokens here that were drafted; the rest came from the target.
        source: drafter of the step, "" when it was plain.
        finish_reason: None until the last event: "stop", "length", "abort" or "error".
        stop_reason: the stop text or token that ended the output.
        error: why, when the finish reason is "error".
        metrics: with the finish reason.
        tree: the draft of this one step, where the request asks for steps and there was one.
    """

    request_id: str
    index: int = 0  # type: ignore[assignment]  # hides tuple.index
    offset: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    num_drafted: int = 0
    num_accepted: int = 0
    num_from_draft: int = 0
    source: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str = ""
    metrics: RequestMetrics | None = None
    tree: StepTree | None = None


@dataclass(frozen=True, kw_only=True)
class Tail:
    """What is at present expected to follow the committed text; replaces any earlier tail.

    A state, not an operation: it may be dropped, and the next `Committed` of the same completion
    that has text makes it void. Only clients that asked get one.

    Attributes:
        index: which of the request's n completions.
        token_ids: the tokens it reads, the held back ones of a commit unit first.
        text: whole characters, with no stop text that may have begun; "" clears the last tail.
        committed_chars: code points of committed text before it.
        stability: probability that all of it stands.
        source: "draft", "tree", "retrieval" or "prediction", by how the drafts came about;
            "deferred" for verified text that a commit unit holds back, and for a clearing tail.
        version: rises with each tail of the completion.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    committed_chars: int
    stability: float
    source: str
    version: int


Event: TypeAlias = Committed | Tail


def _sums(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip_longest(first, second, fillvalue=0))
