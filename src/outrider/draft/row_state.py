"""RowState: which rows of a head one sequence has, and the features of those that wait.

Shape legend: A boundaries between layers of the target, R positions, H its hidden width, D width
of what a row is fed with.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from outrider.cache.table import BlockTable
from outrider.sampling.shaper import Shaper

MAX_PIECES = 16  # tensors that they stand in, each of which keeps a whole step's alive


@dataclass(eq=False)
class RowState:
    """One sequence in a head's pool. The next row goes to slot `num_rows`.

    Attributes:
        num_skipped: rows whose features never came. Slots leave them out, so those behind a gap
            are nearer to those before it than they should be, and no other sequence may have them.
        num_rows: rows with KV; what stands behind them in the pool is void.
        num_waiting: rows whose features are here; the last of them may lack its token yet.
        waiting: what the first of those are fed with, in order.
        unread: features of the others, tapped_ARH as the target showed them. They are read when
            rows are run: a sequence that nobody drafts for costs next to nothing.
        ranker: ranks greedy drafts; made when first needed.
    """

    table: BlockTable
    num_skipped: int = 0
    num_rows: int = 0
    num_waiting: int = 0
    waiting: list[Tensor] = field(default_factory=list)
    unread: list[Tensor] = field(default_factory=list)
    ranker: Shaper | None = None

    @property
    def next_row(self) -> int:
        """Position of the first row without KV."""
        return self.num_skipped + self.num_rows

    @property
    def next_position(self) -> int:
        """Of the feature that comes next."""
        return self.next_row + self.num_waiting

    def add(self, tapped_ARH: Tensor) -> None:
        """Features of the positions that come next."""
        self.unread.append(tapped_ARH)
        self.num_waiting += tapped_ARH.shape[1]
        if len(self.unread) > MAX_PIECES:
            self.unread = [torch.cat(self.unread, dim=1)]

    def skip(self) -> None:
        """Rows that wait will not be run."""
        self.num_skipped += self.num_waiting
        self.num_waiting, self.waiting, self.unread = 0, [], []

    def ran(self, count: int) -> None:
        """The next `count` rows have KV now; what they are fed with stood in one tensor."""
        left_RD = self.waiting[0][count:]
        self.waiting = [left_RD.clone()] if len(left_RD) else []
        self.num_waiting -= count
        self.num_rows += count
