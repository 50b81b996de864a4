"""What every drafter offers the engine, and what it may ask for."""

from collections.abc import Callable, Mapping, Sequence as Items
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

from outrider.cache.pool import KVPool
from outrider.cache.table import BlockManager
from outrider.models.base import KVShape
from outrider.models.heads.spec import Head
from outrider.models.runner import Runner
from outrider.request import Candidate, Option, Options, Speculation
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


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """A loaded network with KV of its own, and the tokenizer it came with (None without text)."""

    runner: Runner
    manager: BlockManager
    tokenizer: Any = None


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a drafter may be built from; an engine fills in what it has.

    Attributes:
        target: the model that is sped up.
        draft: the draft model, if one is loaded. Its pool serves one drafter.
        shares_vocabulary: whether token ids mean the same in both.
        datastore: folder written by `outrider index build`, for retrieval from a corpus.
        heads: draft heads trained on top of the target, by the name of the drafter that runs them.
        make_pool: a KV pool of these shapes for a head, with as many blocks as the target's.
        drafters: those built so far, by name, for drafters that compose others.
    """

    target: ModelParts
    draft: ModelParts | None = None
    shares_vocabulary: bool = True
    datastore: str | None = None
    heads: Mapping[str, Head] = field(default_factory=dict)
    make_pool: "Callable[[tuple[KVShape, ...]], tuple[KVPool, BlockManager]] | None" = None
    drafters: Mapping[str, "Drafter"] = field(default_factory=dict)


# What a drafter may say it needs beside tokens.
NEEDS = (
    "logits",  # of the target's rows, in `observe`
    "target layers",  # to run some of the target's own, over its KV
    "target states",  # hidden states of the target's rows, in `observe`
    "head",  # trained on top of the target
    "draft model",  # of the target's vocabulary
    "draft model of another vocabulary",
    "datastore",
    "prediction",  # in the request
    "drafters",  # to compose
)


class Drafter(Protocol):
    """Proposes tokens; whatever it does, the verifier keeps the target's law.

    A class is made without arguments, unless it has a class method
    `build(surroundings: Surroundings)`, which makes one or raises ConfigError. One that has
    `settings: Mapping[str, Option]` beside `options` takes those as keyword arguments as well: what
    an engine is configured with (`drafter_settings`), and no request can change.

    Attributes:
        name: as registered.
        needs: what it asks for beside tokens, out of `NEEDS`. An engine refuses a drafter whose
            needs it cannot meet.
        warmth: what its state is made from.
        default_draft_tokens: K when the request does not say.
        default_width, min_width, max_width: branches at the root when the request does not say,
            and the bounds (1 and 1: chains only).
        default_num_nodes: most nodes when the request does not say; None is K * width.
        sample_methods: the `draft_sample_method`s it knows, out of `request.SAMPLE_METHODS`. One
            that knows "greedy" alone picks deterministically. With "probabilistic" it must record
            the law of each token; with width > 1 siblings are drawn without replacement. With
            "independent" it records `paths`. "coupled" drafts may be anything.
        options: what a request may set with `drafter_options`.
    """

    name: str
    needs: tuple[str, ...]
    warmth: Warmth
    default_draft_tokens: int
    default_width: int
    min_width: int
    max_width: int
    default_num_nodes: int | None
    sample_methods: tuple[str, ...]
    options: Mapping[str, Option]

    def open(self, seq: Sequence) -> None:
        """A new, resumed or forked sequence that may be drafted for; cheap until it is."""
        ...

    def draft(self, rows: Items[Row], plan: Plan) -> list[DraftTree]:
        """One tree per row, at most as deep, wide and large as planned; may be empty."""
        ...

    def observe(self, commits: Items[Commit], output: TargetOutput) -> None:
        """Every commit of a step, whoever drafted; sequences that are not open are skipped.

        `commits[i]` belongs to row i of the step: where `output.first[i]` is not -1, row
        `output.first[i]` of the logits is the sequence's root, and `output.first[i] + 1 + n` is
        node n of `commits[i].tree`. The token log holds the new tokens already.
        """
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


@runtime_checkable
class Composes(Protocol):
    """A drafter that asks others; the engine opens, closes and tells those itself."""

    def options_for(self, given: Options) -> Mapping[str, Option]:
        """What a request may set that gives these; RequestError if they name nobody here."""
        ...

    def parts(self, options: Options) -> tuple[str, ...]:
        """Names of the others under these options. RequestError if one is not here."""
        ...


@runtime_checkable
class DrawsByOptions(Protocol):
    """A drafter that honours a `draft_sample_method` under some of its options only."""

    def sample_methods_for(self, options: Options) -> tuple[str, ...]:
        """Those of its `sample_methods` that it honours under these options, all of them given."""
        ...


@runtime_checkable
class LooksUp(Protocol):
    """A drafter that matches n-grams, from `prompt_lookup_min` to `prompt_lookup_max` tokens."""

    def looks_up(self, options: Options) -> bool:
        """Whether it does so under these options."""
        ...


@runtime_checkable
class OffersChoice(Protocol):
    """A composition of which the policy chooses a part in each step."""

    def candidates(
        self, options: Options, num_draft_tokens: int | None, factor: int
    ) -> tuple[Candidate, ...]:
        """Whom the policy may choose, and the largest draft of each.

        Args:
            num_draft_tokens: K where the request says; else each has its own, times `factor`.
        """
        ...


@runtime_checkable
class ReadsStates(Protocol):
    """A drafter that reads hidden states of the target.

    Attributes:
        boundaries: which, rising (see `step.States`). While a sequence is open with it, `observe`
            finds them, perhaps among others, in the output's `states`.
    """

    boundaries: tuple[int, ...]


@runtime_checkable
class MissesFeatures(Protocol):
    """A drafter that loses by a cached prefix of the target whose features are gone."""

    def first_missing(self, seq: Sequence) -> int | None:
        """Position from which on the target should run the tokens of a sequence that begins.

        None where it may start behind all that it finds cached.
        """
        ...


@runtime_checkable
class EndsAtDepth(Protocol):
    """A drafter that cannot go deeper, whatever is asked for.

    Attributes:
        max_draft_tokens: its largest K.
    """

    max_draft_tokens: int


@runtime_checkable
class Checks(Protocol):
    """A drafter with settings that only go together in some ways."""

    def check(self, spec: Speculation) -> None:
        """RequestError, with value and remedy, if this drafter cannot honour all of `spec`."""
        ...
