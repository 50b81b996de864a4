"""EchoDrafter: repeats the last tokens, as in rulers, tables and stammering."""

from collections.abc import Mapping, Sequence as Items

from outrider.draft.base import Snapshot, Warmth
from outrider.request import Option
from outrider.sequence import Sequence
from outrider.step import Commit, DraftTree, Plan, Row, RowPlan, TargetOutput


class EchoDrafter:
    """Goes on as the text did `period` tokens before. The token log is all it reads."""

    name, warmth = "echo", Warmth.R0
    needs: tuple[str, ...] = ()
    default_draft_tokens = 4
    default_width = min_width = max_width = 1
    default_num_nodes: int | None = None
    sample_methods: tuple[str, ...] = ("greedy",)
    options: Mapping[str, Option] = {"period": Option(1, "tokens that repeat", low=1, high=64)}

    def draft(self, rows: Items[Row], plan: Plan) -> list[DraftTree]:
        return [self._chain(row.seq, part) for row, part in zip(rows, plan, strict=True)]

    def _chain(self, seq: Sequence, part: RowPlan) -> DraftTree:
        last = seq.tokens[-int(seq.speculation.options["period"]) :]
        depth = min(part.depth, part.num_nodes)
        return DraftTree.chain([last[i % len(last)] for i in range(depth)], self.name)

    def open(self, seq: Sequence) -> None: ...

    def observe(self, commits: Items[Commit], output: TargetOutput) -> None: ...

    def close(self, seq: Sequence) -> None: ...

    def snapshot(self, seq: Sequence) -> Snapshot | None: ...

    def restore(self, seq: Sequence, snapshot: Snapshot) -> int:
        return len(seq.tokens)
