"""What a policy is told, and what it answers: rooms in, row plans out; steps and their times."""

from collections.abc import Callable, Mapping, Sequence as Items
from typing import Any, NamedTuple, Protocol, runtime_checkable

from outrider.request import Candidate, Option, Options
from outrider.sequence import Sequence
from outrider.step import Batch, Commit, Plan, RowPlan

PLAIN = RowPlan()


class Room(NamedTuple):
    """One row that may be drafted for, and the most that could be used.

    Attributes:
        depth: longest path that could be committed, at most the request's K.
        num_nodes: most nodes of its tree that there is room for.
    """

    seq: Sequence
    depth: int
    num_nodes: int

    def plan(self, depth: int, candidate: Candidate | None = None) -> RowPlan:
        """A draft of this depth by a candidate (None: the first), as far as there is room."""
        spec = self.seq.speculation
        usual = Candidate(spec.drafter, spec.num_draft_tokens, spec.width, spec.num_nodes)
        drafter, most, width, nodes = candidate or usual
        depth = min(depth, most, self.depth)
        if depth < most:
            nodes = min(depth * width, nodes)
        nodes = min(nodes, self.num_nodes)
        return RowPlan(drafter, min(depth, nodes), width, nodes) if nodes > 0 else PLAIN


class Load(NamedTuple):
    """What a step holds whatever the policy answers.

    Attributes:
        num_rows: committed tokens in the target's pass. num_prompt: of those, prompt tokens (or
            recomputed ones).
        num_emitting: sequences that will be given a token. num_drawn: of those, not greedy.
        context: tokens read from the KV cache, summed over sequences. visits: the same, for
            every row of a sequence but its first.
        planned: what other policies have planned.
        prefilling: sequences without a first token yet, with the prompt tokens that will be left.
    """

    num_rows: int
    num_prompt: int
    num_emitting: int
    num_drawn: int
    context: int
    visits: int
    planned: Items[tuple[Sequence, RowPlan]] = ()
    prefilling: Items[tuple[Sequence, int]] = ()


class StepTimes(NamedTuple):
    """Seconds of one step: drafting; the target's pass; verifying, committing and the rest."""

    draft: float
    forward: float
    rest: float

    @property
    def total(self) -> float:
        return self.draft + self.forward + self.rest


class Step(NamedTuple):
    """One step as it came to pass. `times` is None where the engine was given no clock."""

    batch: Batch
    plan: Plan
    commits: Items[Commit]
    times: StepTimes | None


class Facts(NamedTuple):
    """What a policy may be built from.

    Attributes:
        clock: seconds, rising; None where the engine has none.
        context_price: seconds of reading a token's KV beside those of a pass of one row, by bytes.
    """

    clock: Callable[[], float] | None = None
    context_price: float = 1e-5


class Policy(Protocol):
    """Decides how far to speculate, for the rows of the requests that name it.

    A class is made without arguments, unless it has a class method `build(facts: Facts)`. What a
    policy decides changes speed only: every rule keeps the target's law for any plan.

    Attributes:
        name: as registered.
        needs_clock: whether it goes by the times of steps.
        options: what a request may set with `policy_options`.
    """

    name: str
    needs_clock: bool
    options: Mapping[str, Option]

    def rests(self, num_rows: int) -> bool:
        """Whether it drafts nothing in this step, so that it need not be asked.

        Args:
            num_rows: sequences in the step.
        """
        ...

    def plan(self, rooms: Items[Room], load: Callable[[], Load]) -> list[RowPlan]:
        """One plan per room, with at most its depth and nodes.

        Args:
            load: tells of the whole step, with the plans of policies that were asked before
                (those that need a clock are asked last).
        """
        ...

    def observe(self, step: Step) -> None:
        """Every step of the engine, whoever planned it."""
        ...

    def explain(self) -> dict[str, Any]:
        """Why K is what it is now: JSON-like, for people."""
        ...


class Balance(NamedTuple):
    """What speculation is worth beside plain decoding.

    Attributes:
        expected: goodput of what was decided last, over plain decoding's; None before.
        measured: the same as measured of late; None where nothing was.
        num_shut: how often speculation was ended because it lost.
    """

    expected: float | None
    measured: float | None
    num_shut: int


@runtime_checkable
class KeepsBalance(Protocol):
    """A policy that holds what it does against plain decoding."""

    def balance(self) -> Balance:
        """As it is now; a few numbers are read, so any thread may ask."""
        ...


@runtime_checkable
class NamesDepth(Protocol):
    """A policy whose settings say how far it may draft."""

    def most_depth(self, options: Options) -> int:
        """The largest K that it may plan."""
        ...


@runtime_checkable
class ChecksOptions(Protocol):
    """A policy whose settings only go together in some ways."""

    def check(self, options: Options) -> None:
        """RequestError, with value and remedy, for settings that it cannot honour."""
        ...
