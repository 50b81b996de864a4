"""A small model of the same vocabulary drafts chains and trees, all sequences side by side.

Leviathan et al. 2022, Chen et al. 2023. It keeps KV of its own in a pool of its
own; what a rejection leaves behind there is overwritten, never freed.
"""

from collections.abc import Mapping, Sequence as Items

from outrider.cache.table import BlockManager
from outrider.draft.base import Snapshot, Surroundings, Warmth
from outrider.draft.course import Course, LineCourse, MaskCourse, TreeCourse
from outrider.draft.draft_kv import DraftKV, DraftState
from outrider.draft.feeding import Fed, feed, make_ranker, needs_ranker
from outrider.draft.growth import Growth, Line, plant
from outrider.draft.recall import Recall
from outrider.draft.warm import PrefixCache
from outrider.errors import ConfigError, RequestError
from outrider.models.runner import Piece, Runner
from outrider.request import Option, Options, Speculation
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, Commit, DraftTree, Plan, Row, RowPlan, TargetOutput

MAX_CATCH_UP_TOKENS = 2048


class ModelDrafter:
    """Chains of K tokens, or trees, from a draft model.

    The request's own transforms (temperature, penalties, grammar ...) shape the draft law too.
    At temperature 0 every method picks; above it, by method:

    | method | chain | tree (width > 1) |
    |---|---|---|
    | greedy | argmax of each law | the likeliest nodes (`BestFirst`) |
    | coupled | drawn with the noise that the target will use | likewise, by q and that noise |
    | probabilistic | drawn, q recorded | `width` siblings and chains below (`Siblings`) |
    | independent | as probabilistic | `width` chains, each drawn as if alone (`Chains`) |

    Coupled drafts agree with the target always where the laws are equal. A tree
    costs as many passes as it is deep, and each of them runs the tree so far.

    A draft model that was trained to draft in parallel (PARD) gives all depths
    in one pass; trees grow from the same rows.

    A plan with a `StopRule` ends a chain once all of it is unlikely to stand, and each node then
    says how sure the draft model was; trees pay no heed to it. Where all depths come from one pass
    it spares the target's rows, not passes.

    The option `inner` lets n-grams of the text guess the draft model's own tokens, so that one pass
    yields several; the drafts are the same. It is for chains that take a pass per token.

    Args:
        runner: the draft model; `manager` hands out the blocks of its pool.
        vocab_size: of the target. Where the two (padded) vocabularies differ in size, the draft's
            logits are cut or padded with -inf, and it reads ids beyond its own as its last one.
        mask_token_id: what stands for tokens not known yet; None takes what the draft model's own
            configuration says, and without that it drafts token by token.

    Attributes:
        num_forwards: passes of the draft model since the start.
    """

    name = "draft_model"
    needs: tuple[str, ...] = ("draft model",)
    warmth = Warmth.R1
    default_draft_tokens = 4
    default_width = min_width = 1
    max_width = 16
    default_num_nodes: int | None = None
    sample_methods: tuple[str, ...] = ("greedy", "probabilistic", "independent", "coupled")
    options: Mapping[str, Option] = {
        "inner": Option(
            "", "who guesses the draft model's own tokens, for chains", choices=("", "ngram")
        )
    }

    def __init__(
        self,
        runner: Runner,
        manager: BlockManager,
        vocab_size: int,
        mask_token_id: int | None = None,
    ) -> None:
        self.runner = runner
        self.manager = manager
        self.vocab_size = vocab_size
        self._kv = DraftKV(runner.pool, manager)
        own = runner.network.spec.mask_token_id
        self.mask_token_id = own if mask_token_id is None else mask_token_id
        if self.mask_token_id is not None:
            self.options = {}  # one pass is all it takes
        self.num_forwards = 0

    @classmethod
    def build(cls, surroundings: Surroundings) -> "ModelDrafter":
        """ConfigError without a draft model of the target's vocabulary."""
        draft = surroundings.draft
        if draft is None or not surroundings.shares_vocabulary:
            raise ConfigError(
                "drafter 'draft_model' needs a draft model of the target's vocabulary: give "
                "draft_model=..."
            )
        vocab_size = surroundings.target.runner.network.spec.vocab_size
        return cls(draft.runner, draft.manager, vocab_size)

    def looks_up(self, options: Options) -> bool:
        return bool(options.get("inner"))

    def check(self, spec: Speculation) -> None:
        inner = spec.options.get("inner", "")
        if inner and spec.width > 1:
            raise RequestError(
                f"drafter_options['inner']={inner!r}: serves chains, not width={spec.width}; "
                "drop one of them"
            )

    def open(self, seq: Sequence) -> None:
        """Costs nothing: blocks are taken when the first draft is asked for."""

    def draft(self, rows: Items[Row], plan: Plan) -> list[DraftTree]:
        planned = zip(rows, plan, strict=True)
        courses = [self._start(row.seq, part) for row, part in planned]
        active = [course for course in courses if course is not None]
        self._run_first(active)
        active = [course for course in active if not course.is_done]
        while active:
            self._run(active, [course.next_piece() for course in active])
            active = [course for course in active if not course.is_done]
        return [self._finish(course) for course in courses]

    def observe(self, commits: Items[Commit], output: TargetOutput) -> None:
        for commit in commits:
            state = commit.seq.drafter_state.get(self.name)
            if isinstance(state, DraftState):
                self._kv.settle(state, commit)

    def close(self, seq: Sequence) -> None:
        state = seq.drafter_state.pop(self.name, None)
        if isinstance(state, DraftState):
            self.manager.free(state.table)

    def snapshot(self, seq: Sequence) -> Snapshot | None:
        state = seq.drafter_state.get(self.name)
        if not isinstance(state, DraftState) or state.num_cached == 0:
            return None
        layers = self._kv.save(state)
        return Snapshot(drafter=self.name, num_tokens=state.num_cached, state=layers)

    def restore(self, seq: Sequence, snapshot: Snapshot) -> int:
        """Starts with no more than a cached prefix where the pool has no room for the snapshot."""
        self.close(seq)
        state = self._open_state(seq)
        self._kv.load(state, snapshot.state, min(snapshot.num_tokens, len(seq.tokens) - 1))
        return state.num_cached

    def prefix_cache(self, tokens: Items[int]) -> PrefixCache:
        return PrefixCache(self.runner, self.manager, tokens)

    def _open_state(self, seq: Sequence) -> DraftState:
        state = seq.drafter_state[self.name] = self._kv.open(seq)
        return state

    def _start(self, seq: Sequence, plan: RowPlan) -> Course | None:
        """None where the draft model has no room: then the row is decoded plainly."""
        num_tokens, depth = len(seq.tokens), min(plan.depth, plan.num_nodes)
        if depth < 1 or num_tokens + depth - 1 > self.runner.network.spec.max_positions:
            return None
        state = seq.drafter_state.get(self.name) or self._open_state(seq)
        is_tree = plan.width > 1 and self.mask_token_id is None
        if not self._kv.reserve(state, num_tokens, plan.num_nodes if is_tree else depth - 1):
            return None
        return self._course(seq, state, plant(seq, plan), depth)

    def _course(self, seq: Sequence, state: DraftState, growth: Growth, depth: int) -> Course:
        about, shaper = self.runner.network.spec, seq.shaper
        num_ids = about.vocab_size
        if needs_ranker(seq, growth):
            made = state.ranker or make_ranker(seq, self.vocab_size, about.eos_token_ids)
            shaper = state.ranker = made
        if self.mask_token_id is not None:
            mask, size = self.mask_token_id, self.vocab_size
            return MaskCourse(seq, state, growth, shaper, mask=mask, depth=depth, vocab_size=size)
        if not isinstance(growth, Line):
            return TreeCourse(seq, state, growth, shaper, root=min(seq.tokens[-1], num_ids - 1))
        recall = None
        if seq.speculation.options.get("inner"):
            recall = state.recall = state.recall or _recall(seq)
        return LineCourse(
            seq,
            state,
            growth,
            shaper,
            vocab_size=self.vocab_size,
            num_ids=num_ids,
            recall=recall,
        )

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
            behind = [c for c in behind if c.state.num_cached < len(c.seq.tokens)]

    def _catch_up(self, course: Course, budget: int) -> Piece:
        seq, state = course.seq, course.state
        last_id = self.runner.network.spec.vocab_size - 1
        log = seq.tokens[state.num_cached : state.num_cached + budget]
        chain = [min(token, last_id) for token in log]
        reaches_end = state.num_cached + len(chain) == len(seq.tokens)
        nodes = course.first_nodes() if reaches_end else EMPTY_TREE
        return Piece(state.table, state.num_cached, chain, nodes, reaches_end)

    def _run(self, courses: list[Course], pieces: list[Piece]) -> None:
        """One pass; every course that it gives logits grows by them."""
        output = self.runner.run(pieces)
        self.num_forwards += 1
        fed: list[Fed] = []
        for course, piece, first in zip(courses, pieces, output.first, strict=True):
            course.state.num_cached = piece.num_cached + len(piece.chain)
            if first >= 0:
                fed.append(Fed(course, first, 1 + len(piece.tree.tokens)))
        feed(fed, output, self.vocab_size)

    def _finish(self, course: Course | None) -> DraftTree:
        if course is None:
            return EMPTY_TREE
        course.state.ran = course.ran()
        tree = course.growth.tree(self.name)
        return tree if tree.tokens else EMPTY_TREE


def _recall(seq: Sequence) -> Recall:
    return Recall(seq.speculation.prompt_lookup_min, seq.speculation.prompt_lookup_max)
