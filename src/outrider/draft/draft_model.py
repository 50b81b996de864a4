"""A small model of the same vocabulary drafts autoregressively, all sequences side by side.

Leviathan et al. 2022, Chen et al. 2023; algorithms.md 4.1. It keeps KV of its own in a pool of its
own; what a rejection leaves behind there is overwritten, never freed.

Shape legend: V vocabulary of the target.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.cache.table import BlockManager, BlockTable
from outrider.draft.base import Snapshot, Warmth
from outrider.errors import RequestError
from outrider.models.runner import Piece, Runner
from outrider.sampling.rng import PositionStream, RootStream, Stream
from outrider.sampling.shaper import laws_together
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, Commit, DraftTree, Plan, Row, TargetOutput

MAX_CATCH_UP_TOKENS = 2048


@dataclass(eq=False)
class DraftState:
    """KV of one sequence in the draft model's pool.

    Attributes:
        num_cached: leading tokens of the log whose draft KV is right; while drafting, those of
            the draft too.
    """

    table: BlockTable
    num_cached: int


@dataclass(eq=False, slots=True)
class Course:
    """One row while it is being drafted.

    Attributes:
        stream: what tokens are drawn from; None picks the argmax.
        laws: of the drafted tokens where they are recorded, else empty.
    """

    seq: Sequence
    state: DraftState
    depth: int
    stream: Stream | None
    tokens: list[int]
    laws: list[Tensor | None]

    @property
    def is_done(self) -> bool:
        return len(self.tokens) == self.depth

    def add(self, q_V: Tensor) -> None:
        """One more token, by its law."""
        if self.stream is None:
            self.tokens.append(int(q_V.argmax()))
            return
        self.tokens.append(self.stream.pick(q_V))
        if self.seq.speculation.draft_sample_method == "probabilistic":
            self.laws.append(q_V)


class ModelDrafter:
    """Chains of K tokens from a draft model.

    The request's own transforms (temperature, penalties, grammar ...) shape the draft law too.
    Methods: "greedy" picks the argmax; "probabilistic" draws from q with noise of its own and
    records q; "coupled" draws from q with the noise that the target will use, so that equal laws
    always agree (algorithms.md 3.3).

    Args:
        runner: the draft model; `manager` hands out the blocks of its pool.
        vocab_size: of the target. Where the two (padded) vocabularies differ in size, the draft's
            logits are cut or padded with -inf, and it reads ids beyond its own as its last one.
    """

    name = "draft_model"
    needs: tuple[str, ...] = ()
    warmth = Warmth.R1
    default_draft_tokens = 4
    max_width = 1
    draws = True

    def __init__(self, runner: Runner, manager: BlockManager, vocab_size: int) -> None:
        self.runner = runner
        self.manager = manager
        self.vocab_size = vocab_size
        self.num_forwards = 0

    def open(self, seq: Sequence) -> None:
        """Costs nothing: blocks are taken when the first draft is asked for."""

    def draft(self, rows: Items[Row], plan: Plan) -> list[DraftTree]:
        planned = zip(rows, plan, strict=True)
        courses = [self._start(row.seq, min(part.depth, part.num_nodes)) for row, part in planned]
        active = [course for course in courses if course is not None]
        self._run_first(active)
        active = [course for course in active if not course.is_done]
        while active:
            self._run_next(active)
            active = [course for course in active if not course.is_done]
        return [self._tree(course) for course in courses]

    def observe(self, commits: Items[Commit], output: TargetOutput) -> None:
        for commit in commits:
            state = commit.seq.drafter_state.get(self.name)
            if isinstance(state, DraftState):
                self._settle(state, commit)

    def close(self, seq: Sequence) -> None:
        state = seq.drafter_state.pop(self.name, None)
        if isinstance(state, DraftState):
            self.manager.free(state.table)

    def snapshot(self, seq: Sequence) -> Snapshot | None:
        state = seq.drafter_state.get(self.name)
        if not isinstance(state, DraftState) or state.num_cached == 0:
            return None
        slots = torch.tensor(state.table.slots(0, state.num_cached))
        layers = [(kv.keys[slots].cpu(), kv.values[slots].cpu()) for kv in self.runner.pool.layers]
        return Snapshot(drafter=self.name, num_tokens=state.num_cached, state=layers)

    def restore(self, seq: Sequence, snapshot: Snapshot) -> int:
        """Starts with no more than a cached prefix where the pool has no room for the snapshot."""
        self.close(seq)
        num_tokens = min(snapshot.num_tokens, len(seq.tokens) - 1)
        state = self._open_state(seq)
        if state.num_cached >= num_tokens:
            return state.num_cached
        if not self.manager.reserve(state.table, num_tokens):
            return state.num_cached
        slots = torch.tensor(state.table.slots(state.num_cached, num_tokens))
        for kv, (keys, values) in zip(self.runner.pool.layers, snapshot.state, strict=True):
            kv.keys[slots] = keys[state.num_cached : num_tokens].to(kv.keys)
            kv.values[slots] = values[state.num_cached : num_tokens].to(kv.values)
        state.num_cached = num_tokens
        return num_tokens

    def _open_state(self, seq: Sequence) -> DraftState:
        table, num_cached = self.manager.open(seq.tokens, seq.request.tenant)
        state = DraftState(table, num_cached)
        seq.drafter_state[self.name] = state
        return state

    def _start(self, seq: Sequence, depth: int) -> Course | None:
        """None where the draft model has no room: then the row is decoded plainly."""
        end = len(seq.tokens) + depth - 1
        if depth < 1 or end > self.runner.network.spec.max_positions:
            return None
        state = seq.drafter_state.get(self.name) or self._open_state(seq)
        if not self.manager.reserve(state.table, end):
            return None
        return Course(seq, state, depth, _stream(seq), [], [])

    def _run_first(self, courses: list[Course]) -> None:
        """Catches up with the token log; the last pass gives the first drafted token."""
        behind = courses
        while behind:
            budget, pieces = MAX_CATCH_UP_TOKENS, []
            for course in behind:
                piece = self._catch_up(course, budget)
                budget -= len(piece.chain)
                pieces.append(piece)
                if budget < 1:
                    break
            self._run(behind[: len(pieces)], pieces)
            behind = [course for course in behind if not course.tokens and not course.is_done]

    def _catch_up(self, course: Course, budget: int) -> Piece:
        seq, state = course.seq, course.state
        last_id = self.runner.network.spec.vocab_size - 1
        log = seq.tokens[state.num_cached : state.num_cached + budget]
        chain = [min(token, last_id) for token in log]
        reaches_end = state.num_cached + len(chain) == len(seq.tokens)
        return Piece(state.table, state.num_cached, chain, EMPTY_TREE, reaches_end)

    def _run_next(self, courses: list[Course]) -> None:
        """One more token each; the KV of drafted tokens counts as cached until commit."""
        pieces = [
            Piece(course.state.table, course.state.num_cached, course.tokens[-1:], EMPTY_TREE, True)
            for course in courses
        ]
        self._run(courses, pieces)

    def _run(self, courses: list[Course], pieces: list[Piece]) -> None:
        output = self.runner.run(pieces)
        self.num_forwards += 1
        shaped: list[tuple[Course, int]] = []
        for course, piece, row in zip(courses, pieces, output.first, strict=True):
            course.state.num_cached += len(piece.chain)
            if row >= 0 and not self._follow_argmax(course, output.argmax_N[row]):
                shaped.append((course, row))
        if shaped:
            self._draw(shaped, output.logits_NV)

    def _follow_argmax(self, course: Course, token: int) -> bool:
        """The next drafted token where the argmax of the logits is all that is asked for."""
        is_asked = course.stream is None and course.seq.shaper.is_plain_greedy
        if not is_asked or not 0 <= token < self.vocab_size:
            return False
        course.tokens.append(token)
        return True

    def _draw(self, shaped: list[tuple[Course, int]], logits_NV: Tensor) -> None:
        """The next drafted token of courses that need a law, each from its row of logits."""
        laws = self._laws_together(shaped, logits_NV)
        for course, row in shaped:
            q_V = laws.get(row)
            if q_V is None:
                q_V = self._law(course, logits_NV[row])
            if q_V is None:
                course.depth = len(course.tokens)  # nothing to propose; the target's law decides
            else:
                course.add(q_V)

    def _laws_together(
        self, shaped: list[tuple[Course, int]], logits_NV: Tensor
    ) -> dict[int, Tensor | None]:
        """By row, the laws that a temperature alone shapes, made in one go."""
        drawn = [(c, row) for c, row in shaped if c.stream and c.seq.shaper.is_only_scaled]
        if not drawn:
            return {}
        rows = [row for _, row in drawn]
        logits_RV = fit(logits_NV[rows], self.vocab_size)
        laws = laws_together(logits_RV, [course.seq.shaper for course, _ in drawn])
        return dict(zip(rows, laws, strict=True))

    def _law(self, course: Course, logits_V: Tensor) -> Tensor | None:
        """None where the settings leave no token, or the logits are no numbers."""
        seq = course.seq
        logits_V = fit(logits_V, self.vocab_size)
        try:
            mask_V = seq.grammar.mask(course.tokens) if seq.grammar is not None else None
            shaped_V: Tensor = seq.shaper.shape(logits_V, seq.tokens, course.tokens, mask_V)
        except RequestError:
            return None
        return shaped_V.softmax(dim=0)

    def _tree(self, course: Course | None) -> DraftTree:
        if course is None:
            return EMPTY_TREE
        return DraftTree.chain(course.tokens, self.name, course.laws)

    def _settle(self, state: DraftState, commit: Commit) -> None:
        """Keeps draft KV of the accepted drafts; only the bonus token stands behind them."""
        tokens = commit.seq.tokens
        state.num_cached = min(state.num_cached, len(tokens) - 1)
        self.manager.commit(state.table, tokens, state.num_cached)


def _stream(seq: Sequence) -> Stream | None:
    """Where drafts are drawn from; None picks the argmax."""
    if seq.shaper.is_greedy or seq.speculation.draft_sample_method == "greedy":
        return None
    if seq.speculation.draft_sample_method == "coupled":
        return PositionStream(seq.seed, len(seq.tokens))
    return RootStream(seq.seed, len(seq.tokens) - 1, "draft")


def fit(logits: Tensor, vocab_size: int) -> Tensor:
    """Rows (or one row) cut, or padded with -inf, to the target's vocabulary."""
    missing = vocab_size - logits.shape[-1]
    if missing <= 0:
        return logits[..., :vocab_size]
    return torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
