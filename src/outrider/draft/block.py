"""Block drafter: a head drafts all tokens of a block in one pass (DFlash, DSpark).

Chen et al. 2026, "DFlash: block diffusion for flash speculative decoding"; trees of the likeliest
nodes as in DDTree; algorithms 4.6, checkpoints 5.4 and 5.5.

Shape legend: N rows of a pass, R slots, V vocabulary of the target, K depths drafted, M width of
what a finish remembers.
"""

from collections.abc import Mapping, Sequence as Items
from typing import NamedTuple

import torch
from torch import Tensor

from outrider.cache.pool import KVPool
from outrider.cache.table import BlockManager
from outrider.draft.base import Surroundings
from outrider.draft.block_course import Asked, PathGrower, Step, SureLine
from outrider.draft.feeding import Fed, Grower, MarginalGrower, by_depth, feed
from outrider.draft.growth import Line, plant
from outrider.draft.head_drafter import HeadDrafter, find_head, find_target
from outrider.draft.row_state import RowState
from outrider.errors import ConfigError
from outrider.models.heads.block_network import BlockNetwork, BlockOutput
from outrider.models.heads.network import HeadPiece, HeadRunner
from outrider.models.heads.spec import Family
from outrider.request import Option
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, DraftTree, Plan, Row, RowPlan, TargetOutput

MAX_ROWS = 2048  # of a pass over context rows


class Draft(NamedTuple):
    """One row while it is drafted, down to `depth`."""

    grower: Grower
    state: RowState
    depth: int


class BlockDrafter(HeadDrafter):
    """Chains of up to `num_drafts` tokens, or trees, from one pass; methods as of `ModelDrafter`.

    DFlash gives one law per depth, whatever is drafted before it: the draft's law is their product,
    and with the method "greedy" and `width` > 1 the tree is the likeliest under it, at no further
    pass. DSpark corrects each law by the token before, which takes a product of low rank per depth.
    Where its head estimates whether a token stands, a chain's confidence is that estimate.

    Drafts are no deeper than a block, whatever is planned. A sequence whose features are not all
    there, as in the step that ends a prompt, is not drafted for in that step.

    Attributes:
        num_forwards: passes of the head since the start, those over context rows included.
    """

    name = "block"
    default_draft_tokens = 15
    options: Mapping[str, Option] = {}

    def __init__(
        self,
        network: BlockNetwork,
        pool: KVPool,
        manager: BlockManager,
        target_manager: BlockManager | None = None,
    ) -> None:
        super().__init__(HeadRunner(network, pool), manager, target_manager)
        self.network = network
        self.default_draft_tokens = self.max_draft_tokens = network.num_drafts

    @classmethod
    def build(cls, surroundings: Surroundings) -> "BlockDrafter":
        """ConfigError without a head of this kind, or a target that shows its states."""
        head = find_head(surroundings, cls.name)
        if head.spec.family is not Family.BLOCK:
            raise ConfigError(
                f"the head {head.spec.source!r} is of the family {head.spec.family}, which drafter "
                f"{cls.name!r} does not run: name a DFlash or DSpark head, or leave {cls.name!r} "
                "out of drafters=..."
            )
        target = find_target(surroundings, cls.name)
        network = BlockNetwork(head, target, target.ops)
        assert surroundings.make_pool is not None, "an engine with heads makes pools"
        pool, manager = surroundings.make_pool(network.spec.kv_shapes)
        return cls(network, pool, manager, surroundings.target.manager)

    def draft(self, rows: Items[Row], plan: Plan) -> list[DraftTree]:
        planned = zip(rows, plan, strict=True)
        drafts = [self._begin(row.seq, part) for row, part in planned]
        begun = [draft for draft in drafts if draft is not None]
        self._write_context(begun)
        if begun:
            self._grow(begun)
        return [EMPTY_TREE if d is None else d.grower.growth.tree(self.name) for d in drafts]

    def _begin(self, seq: Sequence, plan: RowPlan) -> Draft | None:
        """None where features are missing or the head has no room: then it is decoded plainly."""
        root = len(seq.tokens) - 1
        room = self.spec.max_positions - root
        depth = min(plan.depth, plan.num_nodes, self.network.num_drafts, room)
        if depth < 1:
            return None
        state = self.rows.state(seq)
        num_due = self.rows.num_due(seq, state)
        if state.next_row + num_due != root or not self.rows.reserve(state, num_due):
            return None
        return Draft(self._grower(seq, state, plan, depth), state, depth)

    def _grower(self, seq: Sequence, state: RowState, plan: RowPlan, depth: int) -> Grower:
        network, spec = self.network, self.spec
        growth = plant(seq, plan._replace(depth=depth))
        shaper = self.shaper(seq, state, growth)
        if network.finish is None:
            grower = MarginalGrower(seq, by_depth(seq, growth), shaper)
            grower.vocab_size = spec.vocab_size
            return grower
        if network.finish.has_estimate and isinstance(growth, Line) and growth.stop is not None:
            growth = SureLine(growth)
        width = network.finish.memory_width
        memory_M = torch.zeros(width, dtype=spec.dtype, device=spec.device)
        return PathGrower(seq, growth, shaper, memory_M)

    def _write_context(self, drafts: list[Draft]) -> None:
        """Writes keys and values of all rows that wait."""
        behind = [(draft.grower.seq, draft.state) for draft in drafts]
        while behind := [(seq, state) for seq, state in behind if self.rows.num_due(seq, state)]:
            budget, pieces = MAX_ROWS, []
            for seq, state in behind:
                count = min(budget, self.rows.num_due(seq, state))
                if count:
                    tokens, inputs_PD = self.rows.due(seq, state, count)
                    pieces.append(
                        HeadPiece(state.table, state.num_rows, tokens, EMPTY_TREE, inputs_PD, False)
                    )
                    budget -= count
            self.run_pass(pieces, 0)
            self.num_forwards += 1
            for (seq, state), piece in zip(behind, pieces, strict=False):
                self.rows.ran(state, len(piece.chain))
                self.rows.publish(seq, state)

    def _run_block(self, drafts: list[Draft], depth: int) -> BlockOutput:
        """One pass for all of them, with laws for so many depths."""
        self.num_forwards += 1
        return self.network.draft(
            [draft.grower.seq.tokens[-1] for draft in drafts],
            [draft.state.table for draft in drafts],
            [draft.state.num_rows for draft in drafts],
            depth,
            self.runner.pool.layers,
        )

    def _grow(self, drafts: list[Draft]) -> None:
        depth = max(draft.depth for draft in drafts)
        output = self._run_block(drafts, depth)
        begun = [(draft.grower, index * depth) for index, draft in enumerate(drafts)]
        if self.network.finish is None:
            fed = [
                Fed(grower, first, draft.depth)
                for draft, (grower, first) in zip(drafts, begun, strict=True)
            ]
            self._feed(fed, self.network.scatter(output.logits_RU))
        active = [(g, first) for g, first in begun if isinstance(g, PathGrower)]
        self._follow_argmax([(g, first) for g, first in active if g.is_argmax], output, depth)
        while active := [(g, first) for g, first in active if not g.is_done]:
            self._round(active, output)

    def _follow_argmax(
        self, lines: list[tuple[PathGrower, int]], output: BlockOutput, depth: int
    ) -> None:
        """Chains of argmax tokens, all depths in one go: nothing is asked of the device between."""
        if not lines:
            return
        told_3BK = self.network.follow(
            output,
            [first for _, first in lines],
            [grower.seq.tokens[-1] for grower, _ in lines],
            depth,
            wants_peaks=any(grower.needs_peaks for grower, _ in lines),
        )
        for (grower, _), *told in zip(lines, *told_3BK.tolist(), strict=True):
            tokens, sure, peaks = told
            grower.follow([Step(int(t), s, p) for t, s, p in zip(tokens, sure, peaks, strict=True)])

    def _round(self, active: list[tuple[PathGrower, int]], output: BlockOutput) -> None:
        """One more depth of drafts whose laws depend on the token before."""
        fed: list[Fed] = []
        asked: list[Asked] = []
        slots: list[int] = []
        for grower, first in active:
            wanted = grower.begin()
            fed.append(Fed(grower, len(asked), len(wanted)))
            asked += wanted
            slots += [first + each.depth for each in wanted]
        memory_RM = torch.stack([each.memory_M for each in asked])
        told = self.network.correct(output, slots, [each.previous for each in asked], memory_RM)
        memories = told.memory_RM.unbind()
        sure = [1.0] * len(asked) if told.sure_R is None else told.sure_R.tolist()
        for (grower, _), (_, first, count) in zip(active, fed, strict=True):
            grower.remember(memories[first : first + count], sure[first : first + count])
        self._feed(fed, told.logits_RV)

    def _feed(self, fed: list[Fed], logits_RV: Tensor) -> None:
        is_asked = any(part.grower.is_argmax for part in fed)
        argmax_R = self.network.ops.argmax(logits_RV) if is_asked else []
        firsts = [part.first for part in fed]
        feed(fed, TargetOutput(logits_RV, firsts, argmax_R), self.spec.vocab_size)
