"""One row while it is drafted: which passes of the draft model feed the growth of its draft."""

from collections.abc import Mapping, Sequence as Items

from torch import Tensor

from outrider.draft.draft_kv import DraftState
from outrider.draft.feeding import NO_PEAKS, Grower, MarginalGrower, by_depth
from outrider.draft.growth import Growth, Line
from outrider.draft.recall import Recall
from outrider.models.runner import Piece
from outrider.sampling.shaper import Shaper
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, DraftTree


class Course(Grower):
    """The draft of one row in the making; a kind of course says what each pass runs."""

    def __init__(self, seq: Sequence, state: DraftState, growth: Growth, shaper: Shaper) -> None:
        super().__init__(seq, growth, shaper)
        self.state = state

    def first_nodes(self) -> DraftTree:
        """Nodes to run in the pass that reaches the end of the log."""
        return EMPTY_TREE

    def next_piece(self) -> Piece:
        """Its part of a pass after that one."""
        raise AssertionError("one pass was enough")

    def ran(self) -> DraftTree:
        """The drafted nodes that the pool now holds behind the log."""
        return EMPTY_TREE


class LineCourse(Course):
    """A chain: each pass runs the newest token alone; its KV counts as cached until commit.

    Args:
        vocab_size: of the target. num_ids: of the draft model.
        recall: guesses the tokens that come next; a pass that runs guesses too gives as many
            tokens as it has right ones, and one more (vertical cascade, Chen et al. 2023,
            "Cascade speculative drafting"). The draft is the same token for
            token, drawn ones included, for each is still made from its own law.
    """

    def __init__(
        self,
        seq: Sequence,
        state: DraftState,
        line: Line,
        shaper: Shaper,
        *,
        vocab_size: int,
        num_ids: int,
        recall: Recall | None = None,
    ) -> None:
        super().__init__(seq, state, line, shaper)
        self._line = line
        self._vocab_size = vocab_size
        self._num_ids = num_ids
        self._recall = recall
        self._guesses: Items[int] = ()
        self._num_right = 0
        self._is_argmax = line.stream is None and seq.shaper.is_plain_greedy

    @property
    def is_done(self) -> bool:
        return len(self._line.tokens) >= self._line.depth

    def first_nodes(self) -> DraftTree:
        if self._recall is None:
            return EMPTY_TREE
        self._recall.follow(self.seq.tokens)
        return self._guess(self._recall)

    def next_piece(self) -> Piece:
        tree = EMPTY_TREE if self._recall is None else self._guess(self._recall)
        return Piece(self.state.table, self.state.num_cached, self._line.tokens[-1:], tree, True)

    def _guess(self, recall: Recall) -> DraftTree:
        """Guesses for all that is missing but the last token, which a right guess gives anyway."""
        count = self._line.depth - len(self._line.tokens) - 1
        guesses = recall.guess(self.seq.tokens, self._line.tokens, count)
        is_known = [token < self._num_ids for token in guesses]
        self._guesses = guesses if all(is_known) else guesses[: is_known.index(False)]
        self._num_right = 0
        return DraftTree.chain(self._guesses, "")

    @property
    def needs_peaks(self) -> bool:
        return self._is_argmax and self._line.stop is not None

    def follow_argmax(
        self, argmax_N: Items[int], first: int, peaks: Mapping[int, float] = NO_PEAKS
    ) -> bool:
        if not self._is_argmax:
            return False
        while True:
            row = first + self._num_right
            token = argmax_N[row]
            if not 0 <= token < self._vocab_size:
                return False
            self._line.add(token, peaks.get(row, 1.0))
            if not self._guesses or self.is_done or not self._was_guessed():
                return True

    def asks(self) -> list[tuple[int, Items[int]]]:
        return [(self._num_right, self._line.tokens)]

    def take(self, laws: Items[Tensor | None]) -> bool:
        self._line.take(laws)
        return not self.is_done and self._was_guessed()

    def _was_guessed(self) -> bool:
        """Whether the newest token was run in this pass: then the row after it is known too."""
        at = self._num_right
        if at >= len(self._guesses) or self._guesses[at] != self._line.tokens[-1]:
            self._guesses, self._num_right = (), 0
            return False
        self._num_right += 1
        self.state.num_cached += 1
        return True

    def ran(self) -> DraftTree:
        num_ran = self.state.num_cached - len(self.seq.tokens)
        return DraftTree.chain(self._line.tokens[:num_ran], "") if num_ran > 0 else EMPTY_TREE


class TreeCourse(Course):
    """Runs all nodes again in every pass, and so gets the laws after the newest.

    A pass sees earlier passes whole, not single nodes of them; and the rows of a small tree cost
    next to nothing.

    Args:
        root: the last committed token, as the draft model reads it.
    """

    def __init__(
        self, seq: Sequence, state: DraftState, growth: Growth, shaper: Shaper, root: int
    ) -> None:
        super().__init__(seq, state, growth, shaper)
        self._root = root
        self._ran = EMPTY_TREE

    def next_piece(self) -> Piece:
        self._ran = self.growth.tree("")
        return Piece(self.state.table, len(self.seq.tokens) - 1, [self._root], self._ran, True)

    def asks(self) -> list[tuple[int, Items[int]]]:
        return [(node + 1, self.growth.path_tokens(node)) for node in self.growth.wanted()]

    def ran(self) -> DraftTree:
        return self._ran


class MaskCourse(MarginalGrower, Course):
    """All depths in one pass: mask tokens stand for what is not known yet (PARD, An et al. 2025).

    The KV of masks is dropped.
    """

    def __init__(
        self,
        seq: Sequence,
        state: DraftState,
        growth: Growth,
        shaper: Shaper,
        *,
        mask: int,
        depth: int,
        vocab_size: int,
    ) -> None:
        super().__init__(seq, state, by_depth(seq, growth), shaper)
        self.vocab_size = vocab_size
        self._masks = DraftTree.chain([mask] * (depth - 1), "")

    def first_nodes(self) -> DraftTree:
        return self._masks
