"""FixedController: speculate as far as each request asks, limited only by what cannot be used."""

from collections.abc import Sequence as Items

from outrider.request import Speculation
from outrider.sequence import Sequence
from outrider.step import Batch, Commit, Plan, Row, RowPlan

PLAIN = RowPlan()


class FixedController:
    """K as asked for. A drafted token that could never be committed is not drafted.

    Args:
        max_model_len: longest sequence the engine allows.
    """

    def __init__(self, max_model_len: int) -> None:
        self.max_model_len = max_model_len

    def plan(self, batch: Batch) -> Plan:
        return [self._plan_row(row) for row in batch.rows]

    def observe(self, commits: Items[Commit]) -> None:
        """Nothing to learn: the policy is fixed."""

    def _plan_row(self, row: Row) -> RowPlan:
        seq, _, max_draft_nodes = row
        spec = seq.speculation
        if not max_draft_nodes or not spec.drafter or not row.reaches_end:
            return PLAIN
        depth = usable(seq, self.max_model_len)
        if depth > spec.num_draft_tokens:
            depth = spec.num_draft_tokens
        num_nodes = most_nodes(spec, depth)
        if num_nodes > max_draft_nodes:
            num_nodes = max_draft_nodes
        if num_nodes < 1:
            return PLAIN
        if depth > num_nodes:
            depth = num_nodes
        return RowPlan(spec.drafter, depth, spec.width, num_nodes)


def most_nodes(spec: Speculation, depth: int) -> int:
    """Nodes of the largest tree that a request wants at a depth of at most its K."""
    if depth == spec.num_draft_tokens or not depth:
        return spec.num_nodes if depth else 0
    return min(depth * spec.width, spec.num_nodes)


def usable(seq: Sequence, max_model_len: int | None) -> int:
    """Most draft tokens that can be committed beside the bonus token."""
    max_len = seq.max_len
    if max_model_len is not None and max_model_len < max_len:
        max_len = max_model_len
    return max(max_len - len(seq.tokens) - 1, 0)
