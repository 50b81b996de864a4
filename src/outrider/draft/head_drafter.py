"""HeadDrafter: a head of the target drafts row by row, over keys and values of its own.

What EAGLE-1/2/3, P-EAGLE and MTP share (Li et al. 2024, "EAGLE: speculative sampling requires
rethinking feature uncertainty"; algorithms 4.4): row t pairs the feature of position t with the
token at t + 1. Rows of committed tokens read true features of the target; those of drafted tokens
read what the row before handed them, and their KV is void once the draft is done.

Shape legend: N rows of a pass, P rows of one sequence in it, D width of what a row is fed with, A
boundaries between layers of the target, R positions, H hidden width of the target.
"""

from collections.abc import Mapping, Sequence as Items

import torch
from torch import Tensor

from outrider.cache.table import BlockManager, BlockTable
from outrider.draft.base import Snapshot, Surroundings, Warmth
from outrider.draft.feeding import Fed, feed, make_ranker, needs_ranker
from outrider.draft.growth import Growth, Line, plant
from outrider.draft.head_course import HeadCourse, HeadLineCourse, HeadTreeCourse
from outrider.draft.head_rows import HeadRows, Overdue
from outrider.draft.row_keys import salt_of
from outrider.draft.row_state import RowState
from outrider.draft.warm import PrefixCache
from outrider.errors import ConfigError
from outrider.models.base import ModelSpec, ShowsStates
from outrider.models.heads.network import HeadPiece, HeadRunner, RowNetwork, ShownTarget
from outrider.models.heads.spec import Head
from outrider.request import Option
from outrider.sampling.shaper import Shaper
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, Commit, DraftTree, Plan, Row, RowPlan, TargetOutput

MAX_ROWS = 2048  # of a pass, the drafted ones left aside
MAX_RERUN = 8192  # tokens of a cached prefix that the target runs again for their features


class HeadDrafter:
    """Chains of K tokens, or trees, from a head; sample methods as of `ModelDrafter`.

    A tree costs as many passes as it is deep, and each of them runs the tree so far. With the
    method "greedy" and `width` > 1 it is EAGLE-2's: grown and cut by the products of the head's
    probabilities. A sequence whose features are not there yet, as in the step that follows a
    prefix hit, is not drafted for in that step.

    A subclass sets `name` and makes the network; it may override `course`, which says what passes
    a draft takes, and `run_pass`, which runs one.

    Args:
        runner: the head, and the pool its KV lives in; `manager` hands out the pool's blocks.
        target_manager: of the target's pool; with it, the target is asked to run again up to two
            blocks of a cached prefix whose features are gone. Without, such sequences begin cold.

    Attributes:
        boundaries: of the target's states that the head reads.
        rows: what is kept of each sequence.
        num_forwards: passes of the head since the start.
    """

    name = "head"
    needs: tuple[str, ...] = ("target states", "head")
    warmth = Warmth.R2
    default_draft_tokens = 4
    default_width = min_width = 1
    max_width = 16
    default_num_nodes: int | None = None
    sample_methods: tuple[str, ...] = ("greedy", "probabilistic", "independent", "coupled")
    options: Mapping[str, Option] = {}

    def __init__(
        self,
        runner: HeadRunner,
        manager: BlockManager,
        target_manager: BlockManager | None = None,
    ) -> None:
        self.runner = runner
        self.manager = manager
        self.boundaries = runner.network.boundaries
        self.rows = HeadRows(self.name, runner.pool, manager, self.boundaries, runner.network.read)
        self.num_forwards = 0
        self._target_manager = target_manager

    @property
    def spec(self) -> ModelSpec:
        return self.runner.network.spec

    @property
    def num_cold_starts(self) -> int:
        """Times that features of a cached prefix were missing."""
        return self.rows.num_gaps

    def open(self, seq: Sequence) -> None:
        """Costs nothing: blocks are taken when the first features come."""
        self.rows.open(seq)

    def draft(self, rows: Items[Row], plan: Plan) -> list[DraftTree]:
        planned = zip(rows, plan, strict=True)
        courses = [self._start(row.seq, part) for row, part in planned]
        begun = [course for course in courses if course is not None]
        self.rows.read([course.state for course in begun])
        self._run_first(begun)
        depth, active = 1, [course for course in begun if not course.is_done]
        while active:
            self._run(active, [course.next_piece() for course in active], depth)
            depth, active = depth + 1, [course for course in active if not course.is_done]
        for course in begun:
            self.rows.publish(course.seq, course.state)
        return [
            EMPTY_TREE if c is None else c.growth.tree(self.name) or EMPTY_TREE for c in courses
        ]

    def observe(self, commits: Items[Commit], output: TargetOutput) -> None:
        self._leave_behind(commits)
        overdue = self.rows.observe(commits, output, self._is_open)
        while overdue:
            overdue = self._run_overdue(overdue)

    def close(self, seq: Sequence) -> None:
        self.rows.close(seq)

    def snapshot(self, seq: Sequence) -> Snapshot | None:
        state = seq.drafter_state.get(self.name)
        if not isinstance(state, RowState) or not state.next_position:
            return None
        saved = self.rows.save(seq, state)
        return Snapshot(drafter=self.name, num_tokens=state.next_position, state=saved)

    def restore(self, seq: Sequence, snapshot: Snapshot) -> int:
        return self.rows.load(seq, snapshot.state)

    def prefix_cache(self, tokens: Items[int]) -> PrefixCache:
        """Row t is known by the tokens up to t + 1."""
        return PrefixCache(self.runner, self.manager, tokens[1:], salt=salt_of(tokens))

    @torch.inference_mode()
    def rerun(self, table: BlockTable, tokens: Items[int], start: int, tapped_ARH: Tensor) -> None:
        """See `MadeOfStates`."""
        inputs_RD = self.runner.network.read(tapped_ARH)
        stop = start + len(inputs_RD)
        piece = HeadPiece(table, start, tokens[start:stop], EMPTY_TREE, inputs_RD, False)
        self.run_pass([piece], 0)
        self.num_forwards += 1

    def first_missing(self, seq: Sequence) -> int | None:
        """Where features of a cached prefix are missing.

        Running it again is paid once: its rows are found by whoever comes later with that prefix.
        """
        if self._target_manager is None or self._is_beyond(seq):
            return None
        state = seq.drafter_state.get(self.name)
        known = state.next_position if isinstance(state, RowState) else self.rows.num_known(seq)
        num_hit = self._target_manager.match(seq.tokens, seq.request.tenant)
        return known if 0 < num_hit - known <= MAX_RERUN else None

    def course(self, seq: Sequence, state: RowState, growth: Growth, depth: int) -> HeadCourse:
        """Which passes feed the growth of one draft."""
        kind = HeadLineCourse if isinstance(growth, Line) else HeadTreeCourse
        return kind(seq, state, growth, self.shaper(seq, state, growth))

    def run_pass(self, pieces: list[HeadPiece], depth: int) -> tuple[TargetOutput, Tensor]:
        """One pass of the head: output as a target's, and feedback_ND of all rows.

        Args:
            depth: how many tokens are drafted already of those who are in it: 0 for the passes that
                run rows of committed tokens. Trees run their shallower nodes again.
        """
        return self.runner.run(pieces)

    def shaper(self, seq: Sequence, state: RowState, growth: Growth) -> Shaper:
        """The request's own, or what ranks greedy drafts."""
        if not needs_ranker(seq, growth):
            shaper: Shaper = seq.shaper
            return shaper
        if state.ranker is None:
            state.ranker = make_ranker(seq, self.spec.vocab_size, self.spec.eos_token_ids)
        return state.ranker

    def _is_open(self, seq: Sequence) -> bool:
        return self.name in seq.drafter_state and not self._is_beyond(seq)

    def _is_beyond(self, seq: Sequence) -> bool:
        """Whether its log has outgrown the head's positions: it will not be drafted for again."""
        return len(seq.tokens) > self.spec.max_positions

    def _leave_behind(self, commits: Items[Commit]) -> None:
        """Gives back what is held for those who have outgrown the head."""
        for commit in commits:
            if self._is_beyond(commit.seq) and commit.seq.drafter_state.get(self.name) is not None:
                self.rows.close(commit.seq)

    def _start(self, seq: Sequence, plan: RowPlan) -> HeadCourse | None:
        """None where features are missing or the head has no room: then it is decoded plainly."""
        num_rows, depth = len(seq.tokens) - 1, min(plan.depth, plan.num_nodes)
        if depth < 1 or num_rows + depth > self.spec.max_positions:
            return None
        state = self.rows.state(seq)
        num_nodes = plan.num_nodes if plan.width > 1 else depth - 1
        if not self.rows.can_draft(seq, state) or not self.rows.reserve(
            state, self.rows.num_due(seq, state), num_nodes
        ):
            return None
        return self.course(seq, state, plant(seq, plan), depth)

    def _run_first(self, courses: list[HeadCourse]) -> None:
        """Runs rows that wait; the last of them gives the first drafted token."""
        behind = courses
        while behind:
            budget, pieces = MAX_ROWS, []
            for course in behind:
                piece = self._catch_up(course, budget)
                budget -= len(piece.chain)
                pieces.append(piece)
                if budget < 1:
                    break
            self._run(behind[: len(pieces)], pieces, 0)
            for course, piece in zip(behind, pieces, strict=False):
                self.rows.ran(course.state, len(piece.chain))
            behind = [c for c in behind if self.rows.num_due(c.seq, c.state)]

    def _catch_up(self, course: HeadCourse, budget: int) -> HeadPiece:
        seq, state = course.seq, course.state
        num_due = self.rows.num_due(seq, state)
        tokens, inputs_PD = self.rows.due(seq, state, min(budget, num_due))
        if len(tokens) < num_due:
            return _piece(state, tokens, inputs_PD)
        piece = _piece(state, tokens, inputs_PD)
        return course.first_piece(piece._replace(wants_logits=True, wants_argmax=course.is_argmax))

    def _run(self, courses: list[HeadCourse], pieces: list[HeadPiece], depth: int) -> None:
        """One pass; every course that it gives logits grows by them."""
        output, feedback_ND = self.run_pass(pieces, depth)
        self.num_forwards += 1
        fed, start = [], 0
        for course, piece, first in zip(courses, pieces, output.first, strict=True):
            stop = start + len(piece.chain) + len(piece.tree)
            if first >= 0:
                course.ran(piece, feedback_ND[start:stop])
                fed.append(Fed(course, first, 1 + len(piece.tree)))
            start = stop
        feed(fed, output, self.spec.vocab_size)

    def _run_overdue(self, overdue: list[Overdue]) -> list[Overdue]:
        """One pass without logits; returns what is still to be run."""
        budget, pieces, left = MAX_ROWS, [], []
        self.rows.read([part.state for part in overdue])
        for seq, state, num_rows in overdue:
            count = min(budget, num_rows)
            if not self.rows.reserve(state, count):
                self.rows.give_up(state)  # else features would pile up
                continue
            if count:
                tokens, inputs_PD = self.rows.due(seq, state, count)
                pieces.append((seq, state, _piece(state, tokens, inputs_PD)))
            if count < num_rows:
                left.append(Overdue(seq, state, num_rows - count))
            budget -= count
        if pieces:
            self.run_pass([piece for _, _, piece in pieces], 0)
            self.num_forwards += 1
        for seq, state, piece in pieces:
            self.rows.ran(state, len(piece.chain))
            self.rows.publish(seq, state)
        return left


def _piece(state: RowState, tokens: list[int], inputs_PD: Tensor) -> HeadPiece:
    """The next rows of committed tokens, of which nobody wants logits."""
    return HeadPiece(
        state.table,
        state.num_rows,
        tokens,
        EMPTY_TREE,
        inputs_PD,
        False,
        is_behind_gap=state.num_skipped > 0,
    )


def find_head(surroundings: Surroundings, name: str) -> Head:
    """The head that a drafter of this name runs. ConfigError without one."""
    head = surroundings.heads.get(name)
    if head is None:
        raise ConfigError(
            f"drafter {name!r} runs a draft head trained for the target: name its folder or hub id "
            f"with heads=..., or leave {name!r} out of drafters=..."
        )
    return head


def find_target(surroundings: Surroundings, name: str) -> ShownTarget:
    """The target, which heads read. ConfigError if it hands out no hidden states."""
    network = surroundings.target.runner.network
    if not isinstance(network, ShowsStates) or not network.spec.hidden_size:
        raise ConfigError(
            f"drafter {name!r} reads hidden states of the target, which {network.spec.name!r} does "
            f"not hand out: run it in the lean decoder if its family is known there, or leave "
            f"{name!r} out of drafters=..."
        )
    assert isinstance(network, ShownTarget)
    return network


def with_pool(surroundings: Surroundings, network: RowNetwork) -> tuple[HeadRunner, BlockManager]:
    """The head over a pool of its own, with as many blocks as the target's."""
    assert surroundings.make_pool is not None, "an engine with heads makes pools"
    pool, manager = surroundings.make_pool(network.spec.kv_shapes)
    return HeadRunner(network, pool), manager
