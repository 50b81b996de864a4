"""How far a request has come: Sequence, the one mutable record of a request in flight."""

import sys
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from outrider.request import Request, Speculation


class Status(Enum):
    """Where a sequence is; `finished` ones are never scheduled again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """One completion in flight. The token log is the truth; all else here is a cache of it.

    While decoding, `num_cached == len(tokens) - 1`: the last token is the root of the next
    draft tree and has no KV yet.

    Attributes:
        id: unique in the engine, "<request>#<index>".
        index: which of the request's n completions this is.
        tokens: committed tokens, prompt first (filled by the committer).
        num_prompt: how many of them are the prompt.
        max_len: most tokens that prompt and `max_tokens` allow, the model's limit left aside.
        num_cached: tokens with KV in the target's pool, in [0, len(tokens)).
        table: the target's block table (a `cache.table.BlockTable`; owned by the scheduler).
        seed: the request's seed with the completion's index folded in.
        speculation: who drafts and verifies, resolved against this engine.
        shaper: the compiled sampling parameters (a `sampling.transforms.Shaper`).
        grammar: matcher state when the output is constrained (advanced by the committer only).
        drafter_state: what each drafter keeps for this sequence, by drafter name.
        policy_state: what policies keep for it, by whoever keeps it.
        arrived_s: when it came, by the engine's clock; 0 where it has none.
        num_prefix_hits: prompt tokens that came from the prefix cache at first admission.
        num_preemptions: times the sequence lost its KV and was recomputed.
        finish_reason: "stop", "length", "abort" or "error" once finished.
        stop_reason: the stop text or token id that ended it, if one did.
    """

    id: str
    request: Request
    index: int
    tokens: list[int]
    seed: int
    speculation: Speculation = Speculation()
    shaper: Any = None
    num_prompt: int = 0
    max_len: int = field(init=False)
    num_cached: int = 0
    status: Status = Status.WAITING
    arrival: int = 0
    arrived_s: float = 0.0
    table: Any = None
    grammar: Any = None
    drafter_state: dict[str, Any] = field(default_factory=dict)
    policy_state: dict[Any, Any] = field(default_factory=dict)
    num_prefix_hits: int = 0
    num_preemptions: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def __post_init__(self) -> None:
        self.num_prompt = self.num_prompt or len(self.tokens)
        max_tokens = self.request.sampling.max_tokens
        self.max_len = sys.maxsize if max_tokens is None else self.num_prompt + max_tokens

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_uncached(self) -> int:
        """Committed tokens whose KV is still to be computed; 1 while decoding."""
        return len(self.tokens) - self.num_cached

    @property
    def is_finished(self) -> bool:
        return self.status is Status.FINISHED
