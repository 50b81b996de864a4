"""Drafters: the drafters of one engine, by name; hands each the rows that are planned for it."""

from collections import Counter
from collections.abc import Sequence as Items

from outrider.draft.base import NEEDS, Drafter, MissesFeatures, ReadsStates
from outrider.errors import ConfigError
from outrider.request import OFF
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, Batch, Commit, DraftTree, Plan, RowPlan, TargetOutput


class Drafters:
    """All that can be asked for here; one sees every commit while a sequence is open with it.

    Raises:
        ConfigError: one needs what no engine hands out, or two have one name.
    """

    def __init__(self, drafters: Items[Drafter]) -> None:
        self._by_name: dict[str, Drafter] = {}
        self._num_open: Counter[str] = Counter()
        self._taps: dict[str, tuple[int, ...]] = {}
        for drafter in drafters:
            _check_needs(drafter)
            if drafter.name in self._by_name:
                raise ConfigError(f"two drafters are named {drafter.name!r}: leave one out")
            self._by_name[drafter.name] = drafter
            if isinstance(drafter, ReadsStates):
                self._taps[drafter.name] = drafter.boundaries

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Drafter:
        return self._by_name[name]

    def names(self) -> list[str]:
        return list(self._by_name)

    def taps(self) -> tuple[int, ...]:
        """Boundaries between the target's layers that drafters in use now want to see, rising."""
        wanted: set[int] = set()
        for name, boundaries in self._taps.items():
            if self._num_open[name]:
                wanted.update(boundaries)
        return tuple(sorted(wanted)) if wanted else ()

    def first_missing(self, seq: Sequence) -> int | None:
        """Position from which on a sequence that begins should be run, whatever is cached of it.

        None where its drafters do not mind.
        """
        found = [
            position
            for name in self._asked_by(seq)
            if isinstance(drafter := self._by_name[name], MissesFeatures)
            and (position := drafter.first_missing(seq)) is not None
        ]
        return min(found, default=None)

    def draft(self, batch: Batch, plan: Plan) -> list[DraftTree]:
        """One tree per row of the batch, empty for plain decoding."""
        trees = [EMPTY_TREE] * len(batch.rows)
        for name in dict.fromkeys(part.drafter for part in plan if part.num_nodes):
            at = [i for i, part in enumerate(plan) if part.num_nodes and part.drafter == name]
            rows, parts = batch.rows, plan
            if len(at) < len(plan):
                rows, parts = [rows[i] for i in at], [plan[i] for i in at]
            drafted = self._by_name[name].draft(rows, parts)
            for i, tree in zip(at, drafted, strict=True):
                tree.check()
                assert len(tree) <= plan[i].num_nodes, f"{name} drafted more than was planned"
                trees[i] = tree
        return trees

    def followed(self, plan: Plan, trees: Items[DraftTree]) -> Plan:
        """What of a plan was tried: no drafter reads states that no pass has shown it yet."""
        if not self._taps:
            return plan
        return [
            RowPlan() if part.num_nodes and part.drafter in self._taps and not len(tree) else part
            for part, tree in zip(plan, trees, strict=True)
        ]

    def observe(self, commits: Items[Commit], output: TargetOutput) -> None:
        for name, num_open in self._num_open.items():
            if num_open:
                self._by_name[name].observe(commits, output)

    def open(self, seq: Sequence) -> None:
        for name in self._asked_by(seq):
            self._num_open[name] += 1
            self._by_name[name].open(seq)

    def close(self, seq: Sequence) -> None:
        for name in self._asked_by(seq):
            self._num_open[name] -= 1
            self._by_name[name].close(seq)

    def _asked_by(self, seq: Sequence) -> Items[str]:
        """Who drafts for a sequence: parts before the whole that composes them.

        Where its policy never drafts, those that would learn from it all the same are left; who
        reads states of the target would have each pass hand them out for nothing.
        """
        spec = seq.speculation
        if not spec.drafter:
            return ()
        names = (*spec.parts, spec.drafter)
        if spec.policy != OFF:
            return names
        return [name for name in names if name not in self._taps]


def _check_needs(drafter: Drafter) -> None:
    for need in drafter.needs:
        if need not in NEEDS:
            raise ConfigError(
                f"drafter {drafter.name!r} needs {need!r}, which this version does not hand out "
                f"(it hands out {', '.join(NEEDS)}): leave it out of drafters=..."
            )
