"""Medusa: heads on the target's last hidden state guess several tokens at once, each on its own.

Cai et al. 2024. One row of features gives the laws of all depths: that at depth d is the same
whatever was drafted above it, but for what the request's settings make of it along a path.

Shape legend: R sequences, K depths, N rows of logits (sequence after sequence, depth by depth), M
of them, D hidden width of the target, V vocabulary.
"""

from collections.abc import Mapping, Sequence as Items
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from outrider.draft.base import Snapshot, Surroundings, Warmth
from outrider.draft.feeding import (
    Fed,
    MarginalGrower,
    by_depth,
    feed,
    make_ranker,
    needs_ranker,
)
from outrider.draft.growth import Growth, plant
from outrider.draft.head_drafter import find_head, find_target
from outrider.models.base import ModelSpec
from outrider.models.heads.medusa_network import MedusaNetwork
from outrider.models.runner import upload
from outrider.ops.base import Ops
from outrider.request import Option
from outrider.sampling.shaper import Shaper
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, Commit, DraftTree, Plan, Row, RowPlan, States, TargetOutput


class Heads(Protocol):
    """What drafts; see `MedusaNetwork`."""

    spec: ModelSpec
    ops: Ops
    num_heads: int
    boundaries: tuple[int, ...]

    def forward(self, states_RD: Tensor, num_heads: int) -> Tensor: ...


@dataclass(eq=False, slots=True)
class LastState:
    """What is kept of one sequence.

    Attributes:
        state_D: of the last position that a pass of the target has run; None before one has.
        position: its place in the sequence.
        ranker: shapes what greedy drafts rank by, once one has.
    """

    state_D: Tensor | None = None
    position: int = -1
    ranker: Shaper | None = None


class MedusaDrafter:
    """Chains and trees from Medusa heads; all sequences, and all depths, in one pass of the heads.

    The request's own transforms (temperature, penalties, grammar ...) shape the draft law too. At
    temperature 0 every method picks; above it, by method:

    | method | chain | tree (width > 1) |
    |---|---|---|
    | greedy | argmax of each law | the likeliest nodes |
    | coupled | drawn with the noise that the target will use | likewise, by q and that noise |
    | probabilistic | drawn, q recorded | `width` siblings and chains below (`Siblings`) |
    | independent | as probabilistic | `width` chains, each drawn as if alone (`Chains`) |

    No draft is deeper than there are heads, whatever K a request names. A sequence whose last pass
    was not seen, as after preemption, is not drafted for until the next one gives its state.
    A plan with a `StopRule` ends a chain early, which spares rows of the target.

    Attributes:
        boundaries: see `ReadsStates`.
        num_forwards: passes of the heads since the start.
    """

    name = "medusa"
    needs: tuple[str, ...] = ("target states", "head")
    warmth = Warmth.R2
    default_draft_tokens = 4
    # The published tree has 63 nodes, up to 10 wide, for GPUs that verify them for nothing. Nodes
    # are K * width here, for that is how policies price a tree that is planned less deep.
    default_width = 4
    min_width = 1
    max_width = 16
    default_num_nodes: int | None = None
    sample_methods: tuple[str, ...] = ("greedy", "probabilistic", "independent", "coupled")
    options: Mapping[str, Option] = {}

    def __init__(self, network: Heads) -> None:
        self.network = network
        self.boundaries = network.boundaries
        self.default_draft_tokens = self.max_draft_tokens = network.num_heads
        self.num_forwards = 0

    @classmethod
    def build(cls, surroundings: Surroundings) -> "MedusaDrafter":
        """ConfigError without heads, or with a target that hands out no hidden states."""
        head, target = find_head(surroundings, cls.name), find_target(surroundings, cls.name)
        return cls(MedusaNetwork(head, target, target.ops))

    def open(self, seq: Sequence) -> None:
        seq.drafter_state[self.name] = LastState()

    def draft(self, rows: Items[Row], plan: Plan) -> list[DraftTree]:
        planned = zip(rows, plan, strict=True)
        begun = [self._start(row.seq, part) for row, part in planned]
        active = [course for course in begun if course is not None]
        if active:
            self._grow(active)
        trees = [EMPTY_TREE if c is None else c.grower.growth.tree(self.name) for c in begun]
        return [tree or EMPTY_TREE for tree in trees]

    @torch.inference_mode()
    def observe(self, commits: Items[Commit], output: TargetOutput) -> None:
        if output.states is None:
            return
        found = [
            (state, *_last_row(output.states, index, commit))
            for index, commit in enumerate(commits)
            if commit.tokens
            and isinstance(state := commit.seq.drafter_state.get(self.name), LastState)
        ]
        if not found:
            return
        tapped_ND = output.states.tapped_AND[output.states.boundaries.index(self.boundaries[0])]
        # A copy, so that the states of the whole pass can go.
        states_RD = tapped_ND[upload([row for _, row, _ in found], tapped_ND.device)]
        for (state, _, position), state_D in zip(found, states_RD.unbind(), strict=True):
            state.state_D, state.position = state_D, position

    def close(self, seq: Sequence) -> None:
        seq.drafter_state.pop(self.name, None)

    def snapshot(self, seq: Sequence) -> Snapshot | None:
        state = seq.drafter_state.get(self.name)
        if not isinstance(state, LastState) or state.state_D is None or not _is_fresh(state, seq):
            return None
        kept_D = state.state_D.to("cpu", copy=True)  # a view would carry its neighbours along
        return Snapshot(drafter=self.name, num_tokens=len(seq.tokens), state=kept_D)

    def restore(self, seq: Sequence, snapshot: Snapshot) -> int:
        """Of use only while the log is as long as it was: a pass gives the state of what is new."""
        state = seq.drafter_state[self.name] = LastState()
        if snapshot.num_tokens != len(seq.tokens):
            return 0
        spec = self.network.spec
        state.state_D = snapshot.state.to(spec.device, spec.dtype)
        state.position = len(seq.tokens) - 2
        return len(seq.tokens)

    def _start(self, seq: Sequence, plan: RowPlan) -> "Course | None":
        state = seq.drafter_state.get(self.name)
        depth = min(plan.depth, plan.num_nodes, self.network.num_heads)
        if depth < 1 or not isinstance(state, LastState):
            return None
        if state.state_D is None or not _is_fresh(state, seq):
            return None
        growth = by_depth(seq, plant(seq, plan._replace(depth=depth)))
        grower = MarginalGrower(seq, growth, self._shaper(seq, state, growth))
        grower.vocab_size = self.network.spec.vocab_size
        return Course(grower, state.state_D, depth)

    def _shaper(self, seq: Sequence, state: LastState, growth: Growth) -> Shaper:
        """The request's own, or what ranks greedy drafts."""
        if not needs_ranker(seq, growth):
            shaper: Shaper = seq.shaper
            return shaper
        if state.ranker is None:
            spec = self.network.spec
            state.ranker = make_ranker(seq, spec.vocab_size, spec.eos_token_ids)
        return state.ranker

    def _grow(self, courses: "list[Course]") -> None:
        """One pass, as deep as the deepest; then each course grows by the rows of its own."""
        depth = max(course.depth for course in courses)
        states_RD = torch.stack([course.state_D for course in courses])
        logits_NV = self.network.forward(states_RD, depth).flatten(0, 1)
        self.num_forwards += 1
        first = range(0, len(logits_NV), depth)
        fed = [Fed(c.grower, row, c.depth) for c, row in zip(courses, first, strict=True)]
        is_asked = any(course.grower.is_argmax for course in courses)
        argmax_N = self.network.ops.argmax(logits_NV) if is_asked else []
        output = TargetOutput(logits_NV, list(first), argmax_N)
        feed(fed, output, self.network.spec.vocab_size)


class Course(NamedTuple):
    """The draft of one row, what it is made from, and how many depths it may have."""

    grower: MarginalGrower
    state_D: Tensor
    depth: int


def _last_row(states: States, index: int, commit: Commit) -> tuple[int, int]:
    """The row of the last position that was run for good, and that position."""
    end, position = states.num_chain[index] - 1, states.num_cached[index]
    kept = commit.accepted[: commit.num_kept]
    row = end + 1 + kept[-1] if kept else end
    return states.start[index] + row, position + end + len(kept)


def _is_fresh(state: LastState, seq: Sequence) -> bool:
    """Whether it is the state that the root, the newest token, came from."""
    return state.position == len(seq.tokens) - 2
