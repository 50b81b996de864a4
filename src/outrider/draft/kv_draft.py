"""kv_draft: a small head drafts from the target's own keys and values, and keeps none of its own.

The relative of this in production is the MTP assistant of Gemma 4 in vLLM and SGLang: attention
layers with queries only over frozen KV of the target. No memory, nothing to roll back, nothing to
warm but the target's last state. Heads may have keys and values of drafted tokens too, which live
as long as one draft (see `KVNetwork`).

No speed is promised. KVShot ("When Hidden States Drift", arXiv 2604.26412), which gives drafters
projections of the target's KV, is largely a negative result: acceptance falls less with depth than
EAGLE-3's but starts lower unless the drafter is deep, and end to end nothing was gained.

Shape legend: R rows of a pass, H hidden width of the target.
"""

from collections.abc import Mapping, Sequence as Items
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from outrider.draft.base import Snapshot, Surroundings, Warmth
from outrider.draft.feeding import (
    NO_PEAKS,
    Fed,
    Grower,
    argmax_line,
    feed,
    make_ranker,
    needs_ranker,
)
from outrider.draft.growth import Growth, Line, plant
from outrider.draft.head_drafter import find_head
from outrider.errors import ConfigError
from outrider.models.base import ModelSpec
from outrider.models.heads.kv_head import KVHeadSpec
from outrider.models.heads.kv_network import KVNetwork, KVRunner, as_lean
from outrider.models.heads.network import HeadPiece
from outrider.models.runner import upload
from outrider.request import Option
from outrider.sampling.shaper import Shaper
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, Commit, DraftTree, Plan, Row, RowPlan, States, TargetOutput


@dataclass(eq=False, slots=True)
class LastFeature:
    """What is kept of one sequence.

    Attributes:
        state_H: the target's, of the last position that it has run; None before.
        feature_H: what the head reads of it; None until a draft wants it.
        position: its place in the sequence.
        ranker: what greedy drafts rank by, made when first needed: it follows the token log.
    """

    state_H: Tensor | None = None
    feature_H: Tensor | None = None
    position: int = -1
    ranker: Shaper | None = None


class KVDrafter:
    """Chains of K tokens, or trees; sample methods as of `ModelDrafter`.

    A tree costs as many passes of the head as it is deep, and each of them runs the tree so far. A
    sequence whose last pass was not seen, as after a prefix hit, is not drafted for until the next
    one gives its feature; the KV is there by then in any case.

    Attributes:
        boundaries: of the target's states that the head reads.
        num_forwards: passes of the head since the start.
    """

    name = "kv_draft"
    needs: tuple[str, ...] = ("target states", "head")
    warmth = Warmth.R2
    default_draft_tokens = 4
    default_width = min_width = 1
    max_width = 16
    default_num_nodes: int | None = None
    sample_methods: tuple[str, ...] = ("greedy", "probabilistic", "independent", "coupled")
    options: Mapping[str, Option] = {}

    def __init__(self, runner: KVRunner) -> None:
        self.runner = runner
        self.boundaries = runner.network.boundaries
        self.num_forwards = 0

    @classmethod
    def build(cls, surroundings: Surroundings) -> "KVDrafter":
        """ConfigError without a head, or where the target's KV cannot be read."""
        head = find_head(surroundings, cls.name)
        if not isinstance(head.spec, KVHeadSpec):
            raise ConfigError(
                f"drafter {cls.name!r} runs heads that read the target's KV; {head.spec.source!r} "
                f"is of the family {head.spec.family}"
            )
        target = surroundings.target.runner
        network = KVNetwork(head, as_lean(target.network, cls.name))
        return cls(KVRunner(network, target.pool))

    @property
    def spec(self) -> ModelSpec:
        return self.runner.network.spec

    def open(self, seq: Sequence) -> None:
        seq.drafter_state[self.name] = LastFeature()

    def draft(self, rows: Items[Row], plan: Plan) -> list[DraftTree]:
        self._read([row.seq.drafter_state.get(self.name) for row in rows])
        planned = zip(rows, plan, strict=True)
        courses = [self._start(row.seq, part) for row, part in planned]
        active = [course for course in courses if course is not None]
        while active:
            self._run(active)
            active = [course for course in active if not course.is_done]
        trees = [course.growth.tree(self.name) if course else EMPTY_TREE for course in courses]
        return [tree if tree.tokens else EMPTY_TREE for tree in trees]

    @torch.inference_mode()
    def observe(self, commits: Items[Commit], output: TargetOutput) -> None:
        states = output.states
        if states is None:
            return
        found = [
            (state, _last_row(states, index, commit))
            for index, commit in enumerate(commits)
            if isinstance(state := commit.seq.drafter_state.get(self.name), LastFeature)
        ]
        if not found:
            return
        tapped_ND = states.tapped_AND[states.boundaries.index(self.boundaries[0])]
        # A copy, so that the states of the whole pass can go.
        rows_R = upload([last.row for _, last in found], tapped_ND.device)
        states_RH = tapped_ND.index_select(0, rows_R)
        for (state, last), state_H in zip(found, states_RH.unbind(), strict=True):
            state.state_H, state.feature_H, state.position = state_H, None, last.position

    def close(self, seq: Sequence) -> None:
        seq.drafter_state.pop(self.name, None)

    def snapshot(self, seq: Sequence) -> Snapshot | None:
        """The feature alone: whoever restores must have the target's KV too."""
        state = seq.drafter_state.get(self.name)
        self._read([state])
        if not isinstance(state, LastFeature) or state.feature_H is None:
            return None
        kept_H = state.feature_H.to("cpu", copy=True)  # a view would carry its neighbours along
        return Snapshot(drafter=self.name, num_tokens=state.position + 1, state=kept_H)

    def restore(self, seq: Sequence, snapshot: Snapshot) -> int:
        """Of use while all but the last token are those of then; else the next pass brings it."""
        state = seq.drafter_state[self.name] = LastFeature()
        if snapshot.num_tokens != len(seq.tokens) - 1:
            return 0
        state.feature_H = snapshot.state.to(self.spec.device, self.spec.dtype)
        state.position = snapshot.num_tokens - 1
        return snapshot.num_tokens

    @torch.inference_mode()
    def _read(self, states: Items[object]) -> None:
        """Makes last states into features, all in one go, where that was not done yet."""
        found = [
            (state, state.state_H)
            for state in states
            if isinstance(state, LastFeature) and state.state_H is not None
        ]
        if not found:
            return
        features_RH = self.runner.network.read(torch.stack([state_H for _, state_H in found]))
        for (state, _), feature_H in zip(found, features_RH.unbind(), strict=True):
            state.state_H, state.feature_H = None, feature_H

    def _start(self, seq: Sequence, plan: RowPlan) -> "KVCourse | None":
        """None where KV or feature of a committed token is missing: it is decoded plainly."""
        depth = min(plan.depth, plan.num_nodes)
        state = seq.drafter_state.get(self.name)
        if depth < 1 or not isinstance(state, LastFeature) or state.feature_H is None:
            return None
        num_keys = len(seq.tokens) - 1
        is_fresh = state.position == num_keys - 1 and seq.num_cached == num_keys
        if not is_fresh or num_keys + depth > self.spec.max_positions:
            return None
        growth, shaper = plant(seq, plan), seq.shaper
        if needs_ranker(seq, growth):
            shaper = state.ranker = state.ranker or self._ranker(seq)
        kind = KVLine if isinstance(growth, Line) else KVTree
        return kind(seq, growth, shaper, state.feature_H)

    def _ranker(self, seq: Sequence) -> Shaper:
        return make_ranker(seq, self.spec.vocab_size, self.spec.eos_token_ids)

    def _run(self, courses: "list[KVCourse]") -> None:
        """One pass; every course grows by the laws of its rows."""
        pieces = [course.piece() for course in courses]
        num_keys = [len(course.seq.tokens) - 1 for course in courses]
        output, feedback_NH = self.runner.run(pieces, num_keys)
        self.num_forwards += 1
        fed: list[Fed] = []
        for course, piece, first in zip(courses, pieces, output.first, strict=True):
            num_rows = 1 + len(piece.tree)
            course.ran(piece, feedback_NH[first : first + num_rows])
            fed.append(Fed(course, first, num_rows))
        feed(fed, output, self.spec.vocab_size)


class KVCourse(Grower):
    """One draft in the making; a kind of course says what each pass runs.

    Args:
        feature_H: of the position before the root.
    """

    def __init__(self, seq: Sequence, growth: Growth, shaper: Shaper, feature_H: Tensor) -> None:
        super().__init__(seq, growth, shaper)
        self._fed_1H = feature_H.unsqueeze(0)

    def piece(self) -> HeadPiece:
        """Its part of the next pass; the first one runs the root."""
        raise NotImplementedError

    def ran(self, piece: HeadPiece, feedback_PH: Tensor) -> None:
        """What its rows of a pass hand on; comes before the laws."""
        raise NotImplementedError


class KVLine(KVCourse):
    """A chain: each pass runs the newest token alone, fed with what the row before handed on."""

    def __init__(self, seq: Sequence, growth: Growth, shaper: Shaper, feature_H: Tensor) -> None:
        super().__init__(seq, growth, shaper, feature_H)
        self._argmax = argmax_line(seq, growth)
        self._place = len(seq.tokens) - 1

    def piece(self) -> HeadPiece:
        path = self.growth.path_tokens(*self.growth.wanted())
        chain = path[-1:] or self.seq.tokens[-1:]
        return HeadPiece(
            self.seq.table,
            self._place,
            chain,
            EMPTY_TREE,
            self._fed_1H,
            True,
            wants_argmax=self.is_argmax,
        )

    def ran(self, piece: HeadPiece, feedback_PH: Tensor) -> None:
        self._fed_1H = feedback_PH
        self._place += 1

    @property
    def is_argmax(self) -> bool:
        return self._argmax is not None

    @property
    def needs_peaks(self) -> bool:
        return self._argmax is not None and self._argmax.stop is not None

    def follow_argmax(
        self, argmax_N: Items[int], first: int, peaks: Mapping[int, float] = NO_PEAKS
    ) -> bool:
        if self._argmax is None or argmax_N[first] < 0:
            return False
        self._argmax.add(argmax_N[first], peaks.get(first, 1.0))
        return True

    def asks(self) -> list[tuple[int, Items[int]]]:
        return [(0, self.growth.path_tokens(node)) for node in self.growth.wanted()]


class KVTree(KVCourse):
    """Runs the root and all nodes again in every pass, and so gets the laws after the newest.

    A pass sees committed positions and its own rows, not those of passes before. Nodes are known by
    their paths, for a growth may drop some and number the others anew.
    """

    def __init__(self, seq: Sequence, growth: Growth, shaper: Shaper, feature_H: Tensor) -> None:
        super().__init__(seq, growth, shaper, feature_H)
        self._handed: dict[tuple[int, ...], Tensor] = {}  # by path, what its row hands on

    def piece(self) -> HeadPiece:
        tree = self.growth.tree("")
        fed = [self._fed_1H, *(self._handed[path[:-1]] for path in _paths(tree)[1:])]
        root, place = self.seq.tokens[-1:], len(self.seq.tokens) - 1
        fed_PH = torch.cat(fed)
        return HeadPiece(self.seq.table, place, root, tree, fed_PH, True, wants_argmax=False)

    def ran(self, piece: HeadPiece, feedback_PH: Tensor) -> None:
        rows = feedback_PH.split(1)
        self._handed = dict(zip(_paths(piece.tree), rows, strict=True))

    def asks(self) -> list[tuple[int, Items[int]]]:
        return [(node + 1, self.growth.path_tokens(node)) for node in self.growth.wanted()]


def _paths(tree: DraftTree) -> list[tuple[int, ...]]:
    """Tokens from the root's child down to each row of a pass; the root's own path is empty."""
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append((*paths[parent + 1], token))
    return paths


class LastRow(NamedTuple):
    """The last position of a sequence that a pass ran for good, and its row of the pass."""

    row: int
    position: int


def _last_row(states: States, index: int, commit: Commit) -> LastRow:
    kept = commit.accepted[: commit.num_kept]
    end = states.num_chain[index] - 1
    row = states.start[index] + end + (1 + kept[-1] if kept else 0)
    return LastRow(row, states.num_cached[index] + end + len(kept))
