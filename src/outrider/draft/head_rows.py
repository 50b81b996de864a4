"""HeadRows: a head's rows of many sequences: those that have KV, and those that wait to be run.

Row t of a head pairs the feature of position t with the token at t + 1. Features come with the
target's passes and cannot be had again without one, so they are kept until their rows are run.

Shape legend: A boundaries between layers of the target, N rows of its pass, H its hidden width,
R rows of one sequence, D width of what a row is fed with.
"""

from collections.abc import Callable, Sequence as Items
from typing import Any, NamedTuple

import torch
from torch import Tensor

from outrider.cache.pool import KVPool
from outrider.cache.table import BlockManager
from outrider.draft.row_keys import FromSecond, num_common, salt_of_log
from outrider.draft.row_state import RowState
from outrider.models.runner import upload
from outrider.sequence import Sequence
from outrider.step import Commit, States, TargetOutput

MAX_WAITING = 256  # rows of a sequence; more are run at once, for their features are large


class Overdue(NamedTuple):
    """Rows that should be run now, though nobody drafts."""

    seq: Sequence
    state: RowState
    num_rows: int


class HeadRows:
    """Opens, feeds, rolls back, saves and restores the rows of sequences.

    A sequence is known here by its entry in `drafter_state`: None until its rows are first needed.

    Args:
        name: of the drafter, under which sequences keep their `RowState`.
        read: from tapped_ARH of `boundaries` to inputs_RD.

    Attributes:
        num_gaps: times that features did not come, as after a hit of the target's prefix cache.
    """

    def __init__(
        self,
        name: str,
        pool: KVPool,
        manager: BlockManager,
        boundaries: tuple[int, ...],
        read: Callable[[Tensor], Tensor],
    ) -> None:
        self.pool = pool
        self.manager = manager
        self.num_gaps = 0
        self._name = name
        self._boundaries = boundaries
        self._read = read
        self._leaders: dict[str, Sequence] = {}  # by request, whom further completions start from
        self._followers: dict[str, list[Sequence]] = {}  # those that have no rows yet

    def open(self, seq: Sequence) -> None:
        """Takes nothing: blocks are had when the first features come."""
        if seq.drafter_state.setdefault(self._name, None) is None and seq.index:
            self._followers.setdefault(seq.request.id, []).append(seq)

    def num_known(self, seq: Sequence) -> int:
        """Rows at the start of the log that another sequence has left in the pool."""
        return self.manager.match(FromSecond(seq.tokens), salt_of_log(seq))

    def state(self, seq: Sequence) -> RowState:
        """What is kept for it; at first the rows that the pool knows, or those of its prompt."""
        state: RowState | None = seq.drafter_state.get(self._name)
        if state is None:
            state = self._forked(seq)
            if state is None:
                table, num_rows = self.manager.open(FromSecond(seq.tokens), salt_of_log(seq))
                state = RowState(table, num_rows=num_rows)
            seq.drafter_state[self._name] = state
            self._follows_no_more(seq)
            if _leads(seq):
                self._leaders[seq.request.id] = seq
        return state

    @torch.inference_mode()
    def observe(
        self, commits: Items[Commit], output: TargetOutput, is_open: Callable[[Sequence], bool]
    ) -> list[Overdue]:
        """Takes over features of the committed tokens of all sequences that `is_open` says are.

        Returns:
            Rows that should be run now: more than `MAX_WAITING` wait, or the sequence has ended
            and they fill a block that a later one may find, or others will start from its prompt.
        """
        states = output.states
        if states is None:
            return []
        taken = [
            (commit, state, rows)
            for index, commit in enumerate(commits)
            if is_open(commit.seq)
            and (rows := self._new_rows(state := self.state(commit.seq), states, index, commit))
        ]
        if not taken:
            return []
        tapped_AND = self._picked(states, [row for _, _, rows in taken for row in rows])
        parts = tapped_AND.split([len(rows) for _, _, rows in taken], dim=1)
        for (_, state, _), tapped_ARH in zip(taken, parts, strict=True):
            state.add(tapped_ARH)
        overdue = [self._overdue(commit, state) for commit, state, _ in taken]
        return [part for part in overdue if part.num_rows]

    @torch.inference_mode()
    def read(self, states: Items[RowState]) -> None:
        """Makes features into what rows are fed with, of all these sequences in one go."""
        behind = [state for state in states if state.unread]
        if not behind:
            return
        parts = [torch.cat(s.unread, dim=1) if len(s.unread) > 1 else s.unread[0] for s in behind]
        inputs_ND = self._read(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])
        split = inputs_ND.split([part.shape[1] for part in parts])
        for state, inputs_RD in zip(behind, split, strict=True):
            state.waiting.append(inputs_RD)
            state.unread = []

    def num_due(self, seq: Sequence, state: RowState) -> int:
        """Rows that can be run: their features and their tokens are there."""
        return min(state.num_waiting, len(seq.tokens) - 1 - state.next_row)

    def can_draft(self, seq: Sequence, state: RowState) -> bool:
        """Whether the row that tells what follows the log is among those due."""
        num_due = self.num_due(seq, state)
        return num_due > 0 and state.next_row + num_due == len(seq.tokens) - 1

    def due(self, seq: Sequence, state: RowState, count: int) -> tuple[list[int], Tensor]:
        """Tokens and inputs_RD of the next rows to run."""
        self.read([state])
        if len(state.waiting) > 1:
            state.waiting = [torch.cat(state.waiting)]
        first = state.next_row + 1
        return seq.tokens[first : first + count], state.waiting[0][:count]

    def reserve(self, state: RowState, num_due: int, num_nodes: int = 0) -> bool:
        """Slots for so many rows more, and drafted ones behind them."""
        return self.manager.reserve(state.table, state.num_rows + num_due + num_nodes)

    def ran(self, state: RowState, count: int) -> None:
        """The next `count` rows have KV now, and were the first of `due`."""
        state.ran(count)

    def publish(self, seq: Sequence, state: RowState) -> None:
        """Full blocks of rows can be found by others; nobody may write them from now on."""
        if not state.num_skipped:
            self.manager.commit(state.table, FromSecond(seq.tokens), state.num_rows)

    def give_up(self, state: RowState) -> None:
        """Rows that wait will not be run."""
        state.skip()
        self.num_gaps += 1

    def close(self, seq: Sequence) -> None:
        if self._leaders.get(seq.request.id) is seq:
            self._hand_over(seq)
            del self._leaders[seq.request.id]
        state = seq.drafter_state.pop(self._name, None)
        if isinstance(state, RowState):
            self.manager.free(state.table)
        self._follows_no_more(seq)

    def save(self, seq: Sequence, state: RowState) -> dict[str, Any]:
        """All of it, on the host: KV of the rows, and what those that wait are fed with."""
        slots = upload(state.table.slots(0, state.num_rows), self.pool.device)
        self.read([state])
        return {
            "tokens": list(seq.tokens),
            "num_skipped": state.num_skipped,
            "layers": [(kv.keys[slots].cpu(), kv.values[slots].cpu()) for kv in self.pool.layers],
            "waiting": torch.cat(state.waiting).cpu() if state.waiting else None,
        }

    def load(self, seq: Sequence, saved: dict[str, Any]) -> int:
        """Brings back what holds for this log; returns the position of the feature to come.

        Of a log that goes another way from some token on, rows are brought back up to there. Where
        the pool has no room, rows begin with the next feature.
        """
        self.close(seq)
        state = self.state(seq)
        skipped, layers, waiting_RD = saved["num_skipped"], saved["layers"], saved["waiting"]
        num_saved, num_alike = len(layers[0][0]), num_common(saved["tokens"], seq.tokens)
        # The row in slot s stands for position s + skipped at most, and has read the token after.
        num_rows = min(num_saved, num_alike - 1 - skipped)
        if num_rows > 0 and state.num_rows < skipped + num_rows:
            self._fill(seq, state, layers, skipped, num_rows)
        if waiting_RD is not None:
            first = skipped + num_saved
            begin, end = state.next_row - first, num_alike - first
            kept_RD = waiting_RD[begin:end] if 0 <= begin < end else waiting_RD[:0]
            if len(kept_RD):
                state.waiting = [kept_RD.to(self.pool.layers[0].keys)]
                state.num_waiting = len(kept_RD)
        return state.next_position

    def _fill(
        self,
        seq: Sequence,
        state: RowState,
        layers: list[tuple[Tensor, Tensor]],
        skipped: int,
        num_rows: int,
    ) -> None:
        if skipped and state.num_rows:  # slots of shared blocks stand for other rows
            self.manager.free(state.table)
            state.num_rows = 0
        if not self.manager.reserve(state.table, num_rows):
            return
        start = state.num_rows
        slots = upload(state.table.slots(start, num_rows), self.pool.device)
        for kv, (keys, values) in zip(self.pool.layers, layers, strict=True):
            kv.keys[slots] = keys[start:num_rows].to(kv.keys)
            kv.values[slots] = values[start:num_rows].to(kv.values)
        state.num_skipped, state.num_rows = skipped, num_rows
        self.publish(seq, state)

    def _hand_over(self, leader: Sequence) -> None:
        """Others of its request that have no rows yet get those of the prompt, if all were run."""
        if leader.num_generated:
            for seq in list(self._followers.get(leader.request.id, ())):
                self.state(seq)

    def _follows_no_more(self, seq: Sequence) -> None:
        followers = self._followers.get(seq.request.id, [])
        if seq in followers:
            followers.remove(seq)
            if not followers:
                del self._followers[seq.request.id]

    def _forked(self, seq: Sequence) -> RowState | None:
        """The prompt's rows of the request's first completion, for another that begins."""
        leader = self._leaders.get(seq.request.id)
        if leader is None or leader is seq or leader.num_prompt != seq.num_prompt:
            return None
        state: RowState = leader.drafter_state[self._name]
        num_shared = min(state.num_rows, seq.num_prompt - 1)
        if state.num_skipped or num_shared <= self.num_known(seq):
            return None
        forked = self.manager.fork(state.table, num_shared)
        if forked is None:
            return None
        table, copies = forked
        for copy in copies:
            self.pool.copy_block(copy.source, copy.destination)
        return RowState(table, num_rows=num_shared)

    def _new_rows(self, state: RowState, states: States, index: int, commit: Commit) -> list[int]:
        """Rows of the pass with features that are not here yet; their positions follow."""
        start = states.num_cached[index]
        gap = start - state.next_position
        if gap > 0:
            if state.num_waiting:
                self.give_up(state)
            state.num_skipped += gap
            self.num_gaps += 1
        return _rows(states, index, commit)[max(-gap, 0) :]

    def _picked(self, states: States, rows: list[int]) -> Tensor:
        """tapped_ARH of these rows of the pass, at the boundaries that are read."""
        tapped_AND = states.tapped_AND
        if states.boundaries != self._boundaries:
            places = [states.boundaries.index(boundary) for boundary in self._boundaries]
            tapped_AND = tapped_AND[places]
        if len(rows) == tapped_AND.shape[1]:
            return tapped_AND
        return tapped_AND.index_select(1, upload(rows, tapped_AND.device))

    def _overdue(self, commit: Commit, state: RowState) -> Overdue:
        seq, num_due = commit.seq, self.num_due(commit.seq, state)
        is_first = _leads(seq) and 0 < seq.num_generated == len(commit.tokens)
        if commit.finish_reason:
            is_wanted = is_first or self._fills(state, num_due)
            return Overdue(seq, state, num_due if is_wanted else 0)
        # Requests that come while this prompt is new will find the target's blocks of it at once.
        is_shared = state.next_row < seq.num_prompt - 1 and self._fills(state, num_due - 1)
        is_now = state.num_waiting > MAX_WAITING or is_first or is_shared
        # One is left for the next draft, which wants its logits.
        return Overdue(seq, state, max(num_due - 1, 0) if is_now else 0)

    def _fills(self, state: RowState, num_due: int) -> bool:
        size = self.manager.block_size
        has_more = (state.num_rows + num_due) // size > state.num_rows // size
        return has_more and not state.num_skipped and self.manager.enable_prefix_caching


def _rows(states: States, index: int, commit: Commit) -> list[int]:
    """Rows of the pass that belong to committed tokens: the chain, and nodes that were kept."""
    start, num_chain = states.start[index], states.num_chain[index]
    nodes = commit.accepted[: commit.num_kept]
    return [*range(start, start + num_chain), *(start + num_chain + node for node in nodes)]


def _leads(seq: Sequence) -> bool:
    return seq.index == 0 and seq.request.sampling.n > 1
