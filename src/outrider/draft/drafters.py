"""Drafters: the drafters of one engine, by name; hands each the rows that are planned for it."""

from collections.abc import Sequence as Items

from outrider.draft.base import Drafter
from outrider.errors import ConfigError
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, Batch, Commit, DraftTree, Plan, TargetOutput


class Drafters:
    """All that can be asked for here; every one of them sees every commit.

    Raises:
        ConfigError: one needs more of the target than tokens, which no engine hands out yet.
    """

    def __init__(self, drafters: Items[Drafter]) -> None:
        for drafter in drafters:
            if drafter.needs:
                raise ConfigError(
                    f"drafter {drafter.name!r} needs {', '.join(drafter.needs)} of the target, "
                    "which this version does not hand out: leave it out of drafters=..."
                )
        self._by_name = {drafter.name: drafter for drafter in drafters}

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Drafter:
        return self._by_name[name]

    def names(self) -> list[str]:
        return list(self._by_name)

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

    def observe(self, commits: Items[Commit], output: TargetOutput) -> None:
        for drafter in self._by_name.values():
            drafter.observe(commits, output)

    def open(self, seq: Sequence) -> None:
        if seq.speculation.drafter:
            self._by_name[seq.speculation.drafter].open(seq)

    def close(self, seq: Sequence) -> None:
        if seq.speculation.drafter:
            self._by_name[seq.speculation.drafter].close(seq)
