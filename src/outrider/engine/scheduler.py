"""Scheduler: who runs in the next step, and with how many tokens.

One rule: a sequence has `num_cached` tokens with KV and wants all of `tokens` plus draft nodes; a
step hands out rows until it catches up. Chunked prefill, prefix hits, speculation and recomputation
after preemption are all this rule.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Container, Iterator
from typing import NamedTuple

from outrider.cache.table import BlockManager, Prefix
from outrider.control.limits import most_nodes, usable
from outrider.engine.config import EngineConfig
from outrider.sequence import Sequence, Status
from outrider.step import Batch, Row


class Refusal(NamedTuple):
    """The first of those that wait, and what was cached of its log when it found no room."""

    seq: Sequence
    num_tokens: int
    prefix: Prefix


class Scheduler:
    """Continuous batching over a fixed number of KV blocks.

    Smaller priority numbers first, then order of arrival; whoever runs moves on in every step.
    Drafts never cost anyone else rows or KV: they get, for one step, what nobody wanted for
    committed tokens. Those may preempt.

    Args:
        first_missing: position from which on a sequence that begins must be run though more of it
            is cached, None for as much as is cached.
    """

    def __init__(
        self,
        config: EngineConfig,
        manager: BlockManager,
        first_missing: Callable[[Sequence], int | None] = lambda seq: None,
    ) -> None:
        self.config = config
        self.manager = manager
        self._first_missing = first_missing
        self.running: list[Sequence] = []
        self._waiting: list[tuple[int, int, Sequence]] = []
        self._refusal: Refusal | None = None

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
        seat = bisect_left(self.running, _rank(seq), key=_rank)
        if seat < len(self.running) and self.running[seat] is seq:
            del self.running[seat]
        if seq.table is not None:
            self.manager.free(seq.table)
            seq.table = None

    def schedule(self, resting: Container[str] = ()) -> Batch:
        """Rows for one step with KV blocks reserved for their tokens and draft nodes.

        Args:
            resting: policies whose rows need no room for drafts.
        """
        block_size = self.config.block_size
        for seq in self.running:
            if seq.num_cached <= (len(seq.table.blocks) - 1) * block_size:
                self.manager.truncate(seq.table, seq.num_cached)  # the room of drafts that are gone
        rows: list[Row] = []
        preempted: list[Sequence] = []
        budget = self.config.max_num_batched_tokens
        due = list(self.running)
        for index, seq in enumerate(due):
            if seq.status is not Status.RUNNING:
                continue  # preempted for one before it
            num_later = len(due) - index - 1  # a row is left for each of them
            num_tokens = self._limit(len(seq.tokens) - seq.num_cached)
            if num_tokens > budget - num_later:
                num_tokens = budget - num_later
            if self._make_room(seq, num_tokens, preempted):
                rows.append(Row(seq, num_tokens, 0))
                budget -= num_tokens
        if not preempted:
            budget = self._admit(rows, budget)
        return Batch(self._with_drafts(rows, budget, resting), preempted)

    def _admit(self, rows: list[Row], budget: int) -> int:
        """Seats waiting sequences while rows, seats and blocks last; returns the rows left."""
        while self._waiting and budget > 0 and len(self.running) < self.config.max_num_seqs:
            seq = self._waiting[0][2]
            if not seq.is_finished:
                if not self._open(seq, budget):
                    break
                self._seat(seq)
                num_tokens = min(self._limit(seq.num_uncached), budget)
                rows.append(Row(seq, num_tokens, 0))
                budget -= num_tokens
            heapq.heappop(self._waiting)
        return budget

    def _open(self, seq: Sequence, budget: int) -> bool:
        """Takes the cached prefix and room for a first chunk; no change if there is none."""
        if self._is_refused(seq, budget):
            return False
        tenant = seq.request.tenant
        first_missing = self._first_missing(seq)
        known = seq.tokens if first_missing is None else seq.tokens[: first_missing + 1]
        prefix = self.manager.look(known, tenant)
        end = self._first_end(seq, prefix, budget)
        if not self.manager.can_open(prefix, end):
            is_whole = first_missing is None  # else more of it may come to be of use
            self._refusal = Refusal(seq, len(seq.tokens), prefix) if is_whole else None
            return False
        seq.table, seq.num_cached = self.manager.open(known, tenant)
        self.manager.reserve(seq.table, end)
        if seq.num_preemptions == 0:
            seq.num_prefix_hits = seq.num_cached
        return True

    def _is_refused(self, seq: Sequence, budget: int) -> bool:
        """Whether it would find no room again: while the same is cached, nothing is hashed."""
        refusal = self._refusal
        if refusal is None or refusal.seq is not seq or refusal.num_tokens != len(seq.tokens):
            return False
        if not self.manager.is_current(refusal.prefix):
            return False
        end = self._first_end(seq, refusal.prefix, budget)
        return not self.manager.can_open(refusal.prefix, end)

    def _first_end(self, seq: Sequence, prefix: Prefix, budget: int) -> int:
        """Positions with KV after its first chunk."""
        num_cached = len(prefix.nodes) * self.config.block_size
        return num_cached + min(self._limit(len(seq.tokens) - num_cached), budget)

    def _with_drafts(self, rows: list[Row], budget: int, resting: Container[str]) -> list[Row]:
        """The rows with draft nodes, as far as budget and free blocks go."""
        wider = []
        for row in rows:
            spec, table = row.seq.speculation, row.seq.table
            if not spec.num_draft_tokens or spec.policy in resting or not row.reaches_end:
                wider.append(row)
                continue
            end = row.seq.num_cached + row.num_tokens
            depth = usable(row.seq, self.config.max_model_len)
            if depth > spec.num_draft_tokens:
                depth = spec.num_draft_tokens
            nodes = most_nodes(spec, depth)
            if nodes > budget:
                nodes = budget
            capacity = len(table.blocks) * self.config.block_size
            if end + nodes > capacity:
                # A cached block gives way only where none is empty: drafts may be rejected.
                num_blocks = self.manager.num_empty or min(1, self.manager.num_free)
                nodes = min(nodes, capacity + num_blocks * self.config.block_size - end)
                self.manager.reserve(table, end + nodes)
            wider.append(Row(row.seq, row.num_tokens, nodes))
            budget -= nodes
        return wider

    def _make_room(self, seq: Sequence, num_tokens: int, preempted: list[Sequence]) -> bool:
        """Reserves blocks for committed tokens, taking them from the last in rank if it must."""
        end = seq.num_cached + num_tokens
        if end <= len(seq.table.blocks) * self.config.block_size:
            return True
        while not self.manager.reserve(seq.table, end):
            victim = self.running[-1]  # not yet scheduled: rows are handed out in order of rank
            self._preempt(victim)
            preempted.append(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Recompute later: KV is given up, the token log is all that is needed."""
        self.release(seq)
        seq.num_cached = 0
        seq.num_preemptions += 1
        self.add(seq)

    def _seat(self, seq: Sequence) -> None:
        seq.status = Status.RUNNING
        insort(self.running, seq, key=_rank)

    def _limit(self, num_tokens: int) -> int:
        threshold = self.config.long_prefill_token_threshold
        return min(num_tokens, threshold) if threshold else num_tokens


def _rank(seq: Sequence) -> tuple[int, int]:
    return seq.request.priority, seq.arrival
