"""Scheduler: who runs in the next step, and with how many tokens.

One rule: a sequence has `num_cached` tokens with KV and wants all of `tokens` plus draft nodes; a
step hands out rows until it catches up. Chunked prefill, prefix hits, speculation and recomputation
after preemption are all this rule.
"""

import heapq
from collections.abc import Iterator

from outrider.cache.table import BlockManager
from outrider.engine.config import EngineConfig
from outrider.sequence import Sequence, Status
from outrider.step import Batch, Row


class Scheduler:
    """Continuous batching over a fixed number of KV blocks.

    Smaller priority numbers first, then order of arrival. Drafts never cost anyone else KV: they
    get blocks that are free, while committed tokens may preempt.
    """

    def __init__(self, config: EngineConfig, manager: BlockManager) -> None:
        self.config = config
        self.manager = manager
        self.running: list[Sequence] = []
        self._waiting: list[tuple[int, int, Sequence]] = []

    @property
    def num_waiting(self) -> int:
        return sum(1 for _ in self.waiting())

    def waiting(self) -> Iterator[Sequence]:
        """Those that wait, in no particular order."""
        return (entry[2] for entry in self._waiting if not entry[2].is_finished)

    def has_work(self) -> bool:
        return bool(self.running) or any(True for _ in self.waiting())

    def add(self, seq: Sequence) -> None:
        seq.status = Status.WAITING
        heapq.heappush(self._waiting, (*_rank(seq), seq))

    def adopt(self, seq: Sequence) -> bool:
        """Lets a fork, which has its KV already, run from the next step on, if there is a seat."""
        if len(self.running) >= self.config.max_num_seqs:
            return False
        self._seat(seq)
        return True

    def release(self, seq: Sequence) -> None:
        """A finished sequence gives back its seat and its blocks; full ones stay cached."""
        if seq in self.running:
            self.running.remove(seq)
        if seq.table is not None:
            self.manager.free(seq.table)
            seq.table = None

    def schedule(self) -> Batch:
        """Rows for one step with KV blocks reserved for their tokens and draft nodes."""
        rows: list[Row] = []
        preempted: list[Sequence] = []
        budget = self.config.max_num_batched_tokens
        for seq in list(self.running):
            if budget < 1:
                break
            if seq.status is not Status.RUNNING:
                continue  # preempted for one before it
            scheduled = {row.seq.id for row in rows}
            if not self._make_room(seq, min(self._wanted(seq), budget), scheduled, preempted):
                continue
            rows.append(self._row(seq, budget))
            budget -= rows[-1].num_tokens + rows[-1].max_draft_nodes
        if not preempted:
            self._admit(rows, budget)
        return Batch(rows, preempted)

    def _admit(self, rows: list[Row], budget: int) -> None:
        """Seats waiting sequences while rows, seats and blocks last."""
        while self._waiting and budget > 0 and len(self.running) < self.config.max_num_seqs:
            seq = self._waiting[0][2]
            if not seq.is_finished:
                if not self._open(seq, budget):
                    return
                self._seat(seq)
                rows.append(self._row(seq, budget))
                budget -= rows[-1].num_tokens + rows[-1].max_draft_nodes
            heapq.heappop(self._waiting)

    def _open(self, seq: Sequence, budget: int) -> bool:
        """Takes the cached prefix and room for a first chunk; no change if there is none."""
        tenant = seq.request.tenant
        table, num_cached = self.manager.open(seq.tokens, tenant)
        chunk = min(self._limit(len(seq.tokens) - num_cached), budget)
        if not self.manager.reserve(table, num_cached + chunk):
            self.manager.free(table)
            return False
        seq.table, seq.num_cached = table, num_cached
        if seq.num_preemptions == 0:
            seq.num_prefix_hits = num_cached
        return True

    def _row(self, seq: Sequence, budget: int) -> Row:
        num_tokens = min(self._wanted(seq), budget)
        row = Row(seq, num_tokens, 0)
        spec = seq.speculation
        if not spec.drafter or not row.reaches_end:
            return row
        nodes = min(spec.num_draft_tokens * spec.width, budget - num_tokens)
        end = seq.num_cached + num_tokens
        free = self.manager.num_free + len(seq.table.blocks)
        nodes = max(0, min(nodes, free * self.config.block_size - end))
        if nodes and not self.manager.reserve(seq.table, end + nodes):
            nodes = 0
        return Row(seq, num_tokens, nodes)

    def _make_room(
        self, seq: Sequence, num_tokens: int, scheduled: set[str], preempted: list[Sequence]
    ) -> bool:
        """Reserves blocks for committed tokens, taking them from the last in rank if it must."""
        while not self.manager.reserve(seq.table, seq.num_cached + num_tokens):
            if self._take_back_draft_room(scheduled):
                continue
            victim = max((s for s in self.running if s.id not in scheduled), key=_rank)
            self._preempt(victim)
            preempted.append(victim)
            if victim is seq:
                return False
        return True

    def _take_back_draft_room(self, scheduled: set[str]) -> bool:
        """Blocks that others keep for drafts to come go first; whether there were any."""
        num_free = self.manager.num_free
        for seq in self.running:
            if seq.id not in scheduled:
                self.manager.truncate(seq.table, seq.num_cached)
        return self.manager.num_free > num_free

    def _preempt(self, seq: Sequence) -> None:
        """Recompute later: KV is given up, the token log is all that is needed."""
        self.release(seq)
        seq.num_cached = 0
        seq.num_preemptions += 1
        self.add(seq)

    def _seat(self, seq: Sequence) -> None:
        seq.status = Status.RUNNING
        self.running.append(seq)
        self.running.sort(key=_rank)

    def _wanted(self, seq: Sequence) -> int:
        return self._limit(seq.num_uncached)

    def _limit(self, num_tokens: int) -> int:
        threshold = self.config.long_prefill_token_threshold
        return min(num_tokens, threshold) if threshold else num_tokens


def _rank(seq: Sequence) -> tuple[int, int]:
    return seq.request.priority, seq.arrival
