"""CascadeDrafter: asks several drafters in turn, cheap ones first, until one has a good draft."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence as Items
from typing import Protocol, runtime_checkable

from outrider.draft.base import Composes, Drafter, Snapshot, Surroundings, Warmth
from outrider.errors import ConfigError, RequestError, unknown
from outrider.request import MAX_DRAFT_TOKENS, SAMPLE_METHODS, Option, Options
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, Commit, DraftTree, Plan, Row, RowPlan, TargetOutput

LOOKUPS = ("suffix", "ngram")
MODELS = ("draft_model", "translate")
OWN_OPTIONS = {
    "parts": Option("", "drafters to ask, in order, comma-separated; empty: what suits the engine"),
    "min_score": Option(
        2.0,
        "expected accepted tokens from which a draft is taken without asking on",
        low=0.0,
        high=MAX_DRAFT_TOKENS,
    ),
}


@runtime_checkable
class Confident(Protocol):
    """A drafter that knows how good its last draft of a sequence is."""

    def confidence(self, seq: Sequence) -> float:
        """Expected accepted tokens; a function of the text, never of tokens that were drawn."""
        ...


class CascadeDrafter:
    """Hybrid routing (Oliaro et al. 2024): first come, first good enough.

    A part is asked for the rows that nobody before it settled. A draft settles a row if its drafter
    rates it at `min_score` expected accepted tokens or more, or rates no drafts. Where no draft
    does, the first that is not empty is used. The default of 2 is what a draft model with K = 4
    brings at an acceptance of 3/4 per token: below it the draft model is the better guess, above it
    the lookup is, and free. (K itself, the usual rule elsewhere, asks for a lookup that is sure of
    every token.)

    Each tree keeps the name of its drafter as its source. A part that cannot draw as wide, or in
    the way, that is asked for drafts as near to it as it can. A part that is not asked falls behind
    and catches up when it is. The options of all parts are options here.

    Args:
        drafters: whom a request may compose, by name; those that compose others do not count.

    Raises:
        ConfigError: there is nobody to ask.
    """

    name = "cascade"
    needs: tuple[str, ...] = ("drafters",)
    warmth = Warmth.R1
    default_draft_tokens = 5
    default_width = min_width = 1
    max_width = 16
    default_num_nodes: int | None = None
    sample_methods: tuple[str, ...] = SAMPLE_METHODS
    own_options: Mapping[str, Option] = OWN_OPTIONS
    options: Mapping[str, Option] = OWN_OPTIONS

    def __init__(self, drafters: Mapping[str, Drafter]) -> None:
        self._drafters = {n: d for n, d in drafters.items() if not isinstance(d, Composes)}
        if not self._drafters:
            raise ConfigError(
                f"drafter {self.name!r} asks other drafters: name some beside it, as in "
                f"drafters=('suffix', 'ngram', {self.name!r})"
            )
        known = {method for d in self._drafters.values() for method in d.sample_methods}
        self.sample_methods = tuple(method for method in SAMPLE_METHODS if method in known)
        self._usual = self.usual_parts(self._drafters)
        self.options = self.options_for({})

    @classmethod
    def build(cls, surroundings: Surroundings) -> "CascadeDrafter":
        """ConfigError where there is nothing to compose."""
        return cls(surroundings.drafters)

    def options_for(self, given: Options) -> dict[str, Option]:
        """Own options and those of the parts that `given` names, or of the usual ones."""
        options = dict(self.own_options)
        for name in self.parts(given):
            for option, about in self._drafters[name].options.items():
                if options.setdefault(option, about) != about:
                    raise RequestError(
                        f"parts={','.join(self.parts(given))!r}: the option {option!r} means "
                        f"another thing for {name} than for a part before it; leave one out"
                    )
        if not any(isinstance(self._drafters[name], Confident) for name in self.parts(given)):
            options.pop("min_score", None)  # nobody rates drafts
        return options

    @staticmethod
    def usual_parts(names: Iterable[str]) -> tuple[str, ...]:
        """A lookup, then a draft model; two lookups where there is no draft model."""
        there = tuple(names)
        lookups = [name for name in LOOKUPS if name in there]
        models = [name for name in MODELS if name in there]
        usual = (*lookups[:1], *models[:1]) if models else tuple(lookups)
        return usual or there[:1]

    def parts(self, options: Options) -> tuple[str, ...]:
        """RequestError if one is not here."""
        told = str(options.get("parts", ""))
        names = tuple(part.strip() for part in told.split(",") if part.strip())
        for name in names:
            if name not in self._drafters:
                raise RequestError(unknown("part of a cascade", name, list(self._drafters)))
            if names.count(name) > 1:
                raise RequestError(f"parts={told!r}: names {name} twice; once will do")
        return names or self._usual

    def open(self, seq: Sequence) -> None:
        """Its parts are opened by the engine; it keeps nothing itself."""

    def draft(self, rows: Items[Row], plan: Plan) -> list[DraftTree]:
        trees = [EMPTY_TREE] * len(rows)
        asking, stage = list(range(len(rows))), 0
        while asking:
            unsettled: list[int] = []
            for name, at in _by_part(rows, asking, stage).items():
                drafted = self._ask(name, [rows[i] for i in at], [plan[i] for i in at])
                for i, tree in zip(at, drafted, strict=True):
                    if self._settles(name, rows[i].seq, tree):
                        trees[i] = tree
                        continue
                    if tree.tokens and not trees[i].tokens:
                        trees[i] = tree
                    unsettled.append(i)
            asking, stage = unsettled, stage + 1
        return trees

    def _ask(self, name: str, rows: list[Row], plan: Plan) -> list[DraftTree]:
        part = self._drafters[name]
        return part.draft(
            rows,
            [RowPlan(name, p.depth, _width(part, p.width), p.num_nodes, p.stop) for p in plan],
        )

    def _settles(self, name: str, seq: Sequence, tree: DraftTree) -> bool:
        if not tree.tokens:
            return False
        part = self._drafters[name]
        if not isinstance(part, Confident):
            return True
        return part.confidence(seq) >= float(seq.speculation.options["min_score"])

    def observe(self, commits: Items[Commit], output: TargetOutput) -> None:
        """Its parts are told by the engine."""

    def close(self, seq: Sequence) -> None:
        """Its parts are closed by the engine."""

    def snapshot(self, seq: Sequence) -> Snapshot | None:
        return None

    def restore(self, seq: Sequence, snapshot: Snapshot) -> int:
        return len(seq.tokens)


def _by_part(rows: Items[Row], asking: list[int], stage: int) -> dict[str, list[int]]:
    """Of the rows that still ask, by the part they ask next; who has none left asks no more."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for i in asking:
        parts = rows[i].seq.speculation.parts
        if stage < len(parts):
            groups[parts[stage]].append(i)
    return groups


def _width(part: Drafter, width: int) -> int:
    return max(min(width, part.max_width), part.min_width)
