"""What every drafter offers the engine, and what it may ask for."""

from collections.abc import Sequence as Items
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from outrider.sequence import Sequence
from outrider.step import Commit, DraftTree, Plan, Row, TargetOutput


class Warmth(StrEnum):
    """What it takes to bring a drafter's state back for a token log."""

    R0 = "R0"  # tokens alone
    R1 = "R1"  # tokens and compute of the draft model
    R2 = "R2"  # hidden states of the target


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A drafter's state for one sequence, outside the engine.

    Attributes:
        drafter: whose it is.
        num_tokens: committed tokens it covers.
        state: what `restore` needs; plain containers and CPU tensors.
    """

    drafter: str
    num_tokens: int
    state: Any


class Drafter(Protocol):
    """Proposes tokens; whatever it does, the verifier keeps the target's law.

    Attributes:
        name: as registered.
        needs: what of the target it asks for beside tokens, by name; () is nothing. An engine
            refuses a drafter whose needs it cannot meet.
        warmth: what its state is made from.
        default_draft_tokens: K when the request does not say.
        max_width: most branches it can draw at the root (1: chains only).
        draws: whether it can sample from a law of its own and record it ("probabilistic",
            "coupled"); otherwise its picks are deterministic.
    """

    name: str
    needs: tuple[str, ...]
    warmth: Warmth
    default_draft_tokens: int
    max_width: int
    draws: bool

    def open(self, seq: Sequence) -> None:
        """A new, resumed or forked sequence that may be drafted for; cheap until it is."""
        ...

    def draft(self, rows: Items[Row], plan: Plan) -> list[DraftTree]:
        """One tree per row, at most as deep, wide and large as planned; may be empty."""
        ...

    def observe(self, commits: Items[Commit], output: TargetOutput) -> None:
        """Every commit of a step, whoever drafted; sequences that are not open are skipped."""
        ...

    def close(self, seq: Sequence) -> None:
        """The sequence finished or lost its place; give back what is held for it."""
        ...

    def snapshot(self, seq: Sequence) -> Snapshot | None:
        """The state of an open sequence, or None when it can be rebuilt from tokens for free."""
        ...

    def restore(self, seq: Sequence, snapshot: Snapshot) -> int:
        """Takes the state back; returns the number of committed tokens it is ready for."""
        ...
