"""How a draft grows out of a block whose laws depend on the token before (DSpark).

Shape legend: M width of what a finish remembers.
"""

from collections.abc import Mapping, Sequence as Items
from typing import NamedTuple, TypeAlias

from torch import Tensor

from outrider.draft.feeding import NO_PEAKS, Grower, argmax_line
from outrider.draft.growth import Growth, Line
from outrider.sampling.shaper import Shaper
from outrider.sequence import Sequence

Path: TypeAlias = tuple[int, ...]


class SureLine(Line):
    """A chain whose head says itself how likely a token is to stand.

    Attributes:
        sure: of the token that comes next, in the place of its law's largest probability.
    """

    def __init__(self, line: Line) -> None:
        super().__init__(
            line.depth,
            line.stream,
            is_recorded=line._is_recorded,
            num_paths=line._num_paths,
            stop=line.stop,
        )
        self.sure = 1.0

    def add(self, token: int, confidence: float) -> None:
        super().add(token, self.sure)


class Asked(NamedTuple):
    """A slot whose law is asked for: its depth below the root, and the token before it."""

    depth: int
    previous: int
    memory_M: Tensor


class Step(NamedTuple):
    """The next token of a chain, -1 where its logits are no numbers, and what is thought of it.

    Attributes:
        sure: by the head's own estimate. peak: largest probability of its law.
    """

    token: int
    sure: float
    peak: float


class PathGrower(Grower):
    """Asks for laws anew after each token: row i of a round is that of the i-th node it wants.

    Args:
        memory_M: what the finish is told at the root.
    """

    def __init__(self, seq: Sequence, growth: Growth, shaper: Shaper, memory_M: Tensor) -> None:
        super().__init__(seq, growth, shaper)
        self._argmax = argmax_line(seq, growth)
        self._paths: list[Path] = []
        self._root_M = memory_M
        self._memory: dict[Path, Tensor] = {}  # of the slots below a node

    def begin(self) -> list[Asked]:
        """The slots of the next round, one per node whose law is wanted."""
        wanted = self.growth.wanted()
        self._paths = [tuple(self.growth.path_tokens(node)) for node in wanted]
        return [
            Asked(
                len(path),
                path[-1] if path else self.seq.tokens[-1],
                self._memory[path[:-1]] if path else self._root_M,
            )
            for path in self._paths
        ]

    def remember(self, memories: Items[Tensor], sure: Items[float]) -> None:
        """What the finish says at the slots of this round beside laws; comes before those."""
        self._memory.update(zip(self._paths, memories, strict=True))
        if isinstance(self.growth, SureLine):
            (self.growth.sure,) = sure

    @property
    def is_argmax(self) -> bool:
        return self._argmax is not None

    def follow(self, steps: Items[Step]) -> None:
        """Takes as many of them as it wants."""
        line = self._argmax
        assert line is not None
        for token, sure, peak in steps:
            if self.is_done:
                return
            if token < 0:
                line.take([None])
                return
            if isinstance(line, SureLine):
                line.sure = sure
            line.add(token, peak)

    @property
    def needs_peaks(self) -> bool:
        line = self._argmax
        return line is not None and line.stop is not None and not isinstance(line, SureLine)

    def follow_argmax(
        self, argmax_N: Items[int], first: int, peaks: Mapping[int, float] = NO_PEAKS
    ) -> bool:
        if self._argmax is None or argmax_N[first] < 0:
            return False
        self._argmax.add(argmax_N[first], peaks.get(first, 1.0))
        return True

    def asks(self) -> list[tuple[int, Items[int]]]:
        return list(enumerate(self._paths))
