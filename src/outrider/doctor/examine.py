"""Which conventions a head was trained with: it is run with others, and the fits are compared."""

from collections.abc import Callable, Iterator, Sequence as Items
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from outrider.doctor.evidence import Evidence
from outrider.doctor.guessers import Guesser
from outrider.doctor.scores import Along, Difference, Score, difference, score_text, total
from outrider.doctor.switches import Switch, changes
from outrider.errors import OutriderError
from outrider.models.heads.spec import Conventions

NUM_DEPTHS = 3
MOST_RUNS = 32
DECLARED = "as declared"
FIRST_SHARE = 4  # of the prompts, one of so many is looked at before the others
HOPELESS = 0.05  # of overlap below the declared way, and surely so, ends a run there

Make = Callable[[Conventions], Guesser]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to run the head.

    Attributes:
        changes: of the declared conventions.
        kinds: of the switches that were turned.
        score: on all texts, or on the first of them where `is_cut`; None where `refusal` says why
            the head cannot be run so.
        difference: from the declared way, on the same texts; None where that cannot be run.
    """

    name: str
    conventions: Conventions
    changes: dict[str, Any]
    kinds: frozenset[str] = frozenset()
    score: Score | None = None
    difference: Difference | None = None
    is_cut: bool = False
    refusal: str = ""

    @property
    def value(self) -> float:
        """Of rows that may win."""
        return self.score.value if self.score and not self.is_cut else -1.0


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What came out of running a head in several ways.

    Attributes:
        rows: in the order in which they were run; the declared one first.
        winner: clearly better than the declared one; None if none is.
    """

    rows: tuple[Row, ...]
    winner: Row | None

    @property
    def declared(self) -> Row:
        return self.rows[0]

    @property
    def best(self) -> Row:
        """The winner, or else the declared row."""
        return self.winner or self.declared


def examine(
    declared: Conventions,
    make: Make,
    switches: Items[Switch],
    evidence: Items[Evidence],
    *,
    num_depths: int = NUM_DEPTHS,
    refusal: str = "",
    most_runs: int = MOST_RUNS,
    tick: Callable[[int, str], None] = lambda done, name: None,
) -> Findings:
    """Runs the head as declared, with each switch alone, and with those together that helped.

    Where something is found, the other switches are tried once more on top of it: one fault may
    hide another.

    Args:
        make: the head with other conventions; raises `OutriderError` where that cannot be.
        refusal: why the declared conventions cannot be run; `declared` is then the nearest to them
            that can, and wins unless another does.
    """
    num_tried = max(1, min(len(switches), most_runs))
    trials = _Trials(declared, make, evidence, num_depths, most_runs, num_tried, tick)
    if refusal:
        trials.refuse(declared, refusal)
    base = trials.run(declared, frozenset())
    trials.base = None if refusal else base
    _each_alone(trials, switches, base)
    _together(trials, switches, base)
    best = _best(trials, base)
    while best is not base and trials.has_room:
        others = [switch for switch in switches if switch.kind not in best.kinds]
        _each_alone(trials, others, best)
        _together(trials, switches, best)
        better = _best(trials, base)
        if better is best:
            break
        best = better
    is_found = bool(refusal) or (best is not base)
    return Findings(rows=tuple(trials.rows), winner=best if is_found else None)


def name_of(changed: dict[str, Any]) -> str:
    """How a row is called."""
    return ", ".join(f"{name}={_short(value)}" for name, value in changed.items()) or DECLARED


@dataclass(kw_only=False)
class _Trials:
    """Runs that were made, each way once."""

    declared: Conventions
    make: Make
    evidence: Items[Evidence]
    num_depths: int
    most_runs: int
    num_tried: int  # of which one may be better by chance
    tick: Callable[[int, str], None]
    rows: list[Row] = field(default_factory=list)
    base: Row | None = None
    _by_way: dict[Conventions, Row] = field(default_factory=dict)
    _first: tuple[Score, Score] | None = None  # of the declared way: first prompts, all

    @property
    def has_room(self) -> bool:
        return len(self._by_way) < self.most_runs

    def refuse(self, way: Conventions, refusal: str) -> None:
        """Notes that what the files declare cannot be read."""
        self.rows.append(Row(name=DECLARED, conventions=way, changes={}, refusal=refusal))

    def run(self, way: Conventions, kinds: frozenset[str]) -> Row:
        """A row for this way; the one there is where it was run before."""
        if way in self._by_way:
            return self._by_way[way]
        changed = changes(way, self.declared)
        name = name_of(changed)
        if not changed and self.rows:
            name = f"vocabulary_map={way.vocabulary_map}"  # what else can be read
        self.tick(len(self._by_way), name)
        row = self._measured(name, way, changed, kinds)
        self._by_way[way] = row
        self.rows.append(row)
        return row

    def _measured(
        self, name: str, way: Conventions, changed: dict[str, Any], kinds: frozenset[str]
    ) -> Row:
        row = Row(name=name, conventions=way, changes=changed, kinds=kinds)
        try:
            guesser = self.make(way)
        except OutriderError as error:
            return _with(row, refusal=str(error))
        first, rest = self._parts()
        told = self._told(guesser, first)
        if self._first is None:
            own = [*told, *self._told(guesser, rest)]
            self._first = total(told), total(own)
            return _with(row, score=self._first[1])
        early = difference(total(told), self._first[0])
        if early.high < -HOPELESS:
            return _with(row, score=total(told), difference=early, is_cut=True)
        score = total([*told, *self._told(guesser, rest)])
        found = difference(score, self._first[1], num_tried=self.num_tried)
        return _with(row, score=score, difference=found)

    def _parts(self) -> tuple[list[Evidence], list[Evidence]]:
        prompts = sorted({one.text.prompt for one in self.evidence})
        early = set(prompts[: max(2, len(prompts) // FIRST_SHARE)])
        return (
            [one for one in self.evidence if one.text.prompt in early],
            [one for one in self.evidence if one.text.prompt not in early],
        )

    def _told(self, guesser: Guesser, evidence: Items[Evidence]) -> list[tuple[int, Along]]:
        return [(one.text.prompt, follow(guesser, one, self.num_depths)) for one in evidence]


def follow(guesser: Guesser, evidence: Evidence, num_depths: int) -> Along:
    """A draft led along one text."""
    tokens = evidence.text.tokens
    usable = min(num_depths, len(tokens) - 1)  # a text may be shorter than a draft
    return score_text(evidence, guesser.guess(tokens, evidence.states, usable), num_depths)


def _each_alone(trials: _Trials, switches: Items[Switch], on: Row) -> None:
    for switch in switches:
        way = switch.turn(on.conventions)
        if way is not None and trials.has_room:
            trials.run(way, on.kinds | {switch.kind})


def _together(trials: _Trials, switches: Items[Switch], on: Row) -> None:
    """All sets of two and more that helped, of each kind the one that helped most."""
    helped: dict[str, tuple[float, Switch]] = {}
    for switch in switches:
        way = switch.turn(on.conventions)
        row = trials._by_way.get(way) if way is not None else None
        gain = _gain(row, on)
        if gain > helped.get(switch.kind, (0.0, switch))[0]:
            helped[switch.kind] = (gain, switch)
    best_first = [switch for _, switch in sorted(helped.values(), key=lambda one: -one[0])]
    for chosen in _sets(best_first):
        way = on.conventions
        for switch in chosen:
            way = switch.turn(way) or way
        if trials.has_room:
            trials.run(way, on.kinds | {switch.kind for switch in chosen})


def _sets(switches: list[Switch]) -> Iterator[tuple[Switch, ...]]:
    for size in range(2, len(switches) + 1):
        yield from combinations(switches, size)


def _gain(row: Row | None, on: Row) -> float:
    """How much a row is better than another; 0 unless the interval leaves nothing out."""
    if row is None or row.score is None or row.is_cut or on.score is None:
        return 0.0
    found = difference(row.score, on.score)
    return found.value if found.low > 0.0 else 0.0


def _best(trials: _Trials, base: Row) -> Row:
    """Of rows that are clearly better than the declared one, the simplest that no other beats.

    The highest score alone would gather switches that make no difference.
    """
    clear = [row for row in trials.rows if row.difference and row.difference.is_clear]
    for row in sorted(clear, key=lambda row: (len(row.kinds), -row.value)):
        if not any(_beats(other, row, trials.num_tried) for other in clear):
            return row
    return base


def _beats(other: Row, row: Row, num_tried: int) -> bool:
    assert other.score is not None
    assert row.score is not None
    return difference(other.score, row.score, num_tried=num_tried).is_clear


def _with(row: Row, **values: Any) -> Row:
    return Row(**{**vars(row), **values})


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        same = len(set(value)) == 1 and isinstance(value[0], str)
        return str(value[0]) if same else "-".join(map(str, value))
    return str(value)
