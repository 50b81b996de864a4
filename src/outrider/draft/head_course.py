"""One row while a head drafts it: which passes of the head feed the growth of its draft.

Shape legend: P rows of one sequence in a pass, M nodes, D width of what a row is fed with.
"""

from collections.abc import Mapping, Sequence as Items

import torch
from torch import Tensor

from outrider.draft.feeding import NO_PEAKS, Grower, MarginalGrower, argmax_line, by_depth
from outrider.draft.growth import Growth
from outrider.draft.row_state import RowState
from outrider.models.heads.network import HeadPiece
from outrider.models.runner import upload
from outrider.sampling.shaper import Shaper
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, DraftTree


class HeadCourse(Grower):
    """The draft of one row in the making; a kind of course says what each pass runs."""

    def __init__(self, seq: Sequence, state: RowState, growth: Growth, shaper: Shaper) -> None:
        super().__init__(seq, growth, shaper)
        self.state = state

    def first_piece(self, piece: HeadPiece) -> HeadPiece:
        """Its part of the pass that reaches the end of the log, from the committed rows there."""
        return piece

    def ran(self, piece: HeadPiece, feedback_PD: Tensor) -> None:
        """What its rows of a pass with logits hand on; comes before the laws."""

    def next_piece(self) -> HeadPiece:
        """Its part of a pass after that one."""
        raise AssertionError("one pass was enough")


class HeadLineCourse(HeadCourse):
    """A chain: each pass runs the newest token alone, fed with what the row before handed on."""

    def __init__(self, seq: Sequence, state: RowState, growth: Growth, shaper: Shaper) -> None:
        super().__init__(seq, state, growth, shaper)
        self._argmax = argmax_line(seq, growth)
        self._num_ran = 0  # drafted tokens

    def ran(self, piece: HeadPiece, feedback_PD: Tensor) -> None:
        self._feedback_1D = feedback_PD[-1:]

    def next_piece(self) -> HeadPiece:
        path = self.growth.path_tokens(*self.growth.wanted())
        place = self.state.num_rows + self._num_ran
        self._num_ran += 1
        fed_1D = self._feedback_1D
        return HeadPiece(
            self.state.table,
            place,
            path[-1:],
            EMPTY_TREE,
            fed_1D,
            True,
            self._num_ran,
            wants_argmax=self.is_argmax,
        )

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


class HeadTreeCourse(HeadCourse):
    """Runs the root and all nodes again in every pass, and so gets the laws after the newest.

    A node is fed with what its parent's row handed on in the pass that first ran the parent. Nodes
    are known by their paths, for a growth may drop some and number the others anew.
    """

    def ran(self, piece: HeadPiece, feedback_PD: Tensor) -> None:
        num_rows = 1 + len(piece.tree)
        self._inputs_PD = piece.inputs_PD[-num_rows:]
        self._feedback_PD = feedback_PD[-num_rows:]
        self._places = {path: row for row, path in enumerate(_paths(piece.tree))}

    def next_piece(self) -> HeadPiece:
        tree = self.growth.tree("")
        picked = [self._source(path) for path in _paths(tree)]
        known = torch.cat((self._inputs_PD, self._feedback_PD))
        index = upload(picked, known.device)
        root = self.seq.tokens[-1:]
        state, fed_PD = self.state, known.index_select(0, index)
        return HeadPiece(
            state.table,
            state.num_rows - 1,
            root,
            tree,
            fed_PD,
            True,
            is_behind_gap=state.num_skipped > 0,
            wants_argmax=self.is_argmax,
        )

    def _source(self, path: tuple[int, ...]) -> int:
        """Where a row's input is found: among those of the last pass, or handed on by a row."""
        row = self._places.get(path)
        return len(self._places) + self._places[path[:-1]] if row is None else row

    def asks(self) -> list[tuple[int, Items[int]]]:
        return [(node + 1, self.growth.path_tokens(node)) for node in self.growth.wanted()]


class HeadMaskCourse(MarginalGrower, HeadCourse):
    """All depths in one pass: rows of a mask stand where no feature and no token is known yet.

    Args:
        mask: token of those rows; mask_1D: what they are fed with.
    """

    def __init__(
        self,
        seq: Sequence,
        state: RowState,
        growth: Growth,
        shaper: Shaper,
        *,
        mask: int,
        mask_1D: Tensor,
        depth: int,
        vocab_size: int,
    ) -> None:
        super().__init__(seq, state, by_depth(seq, growth), shaper)
        self.vocab_size = vocab_size
        self._masks = DraftTree.chain([mask] * (depth - 1), "")
        self._mask_1D = mask_1D

    def first_piece(self, piece: HeadPiece) -> HeadPiece:
        fed_MD = self._mask_1D.expand(len(self._masks), -1)
        inputs_PD = torch.cat((piece.inputs_PD, fed_MD))
        return piece._replace(tree=self._masks, inputs_PD=inputs_PD)


def _paths(tree: DraftTree) -> list[tuple[int, ...]]:
    """Tokens from the root to each row: the root's own first."""
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append((*paths[parent + 1], token))
    return paths
