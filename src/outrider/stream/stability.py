"""Stability: the probability that drafted tokens stand, learned from which ones did."""

from collections.abc import Sequence as Items
from typing import TypeAlias

from outrider.request import MAX_DRAFT_TOKENS, StreamParams

Cell: TypeAlias = list[float]  # [tokens that stood, tokens that did not], old ones weigh less

PRIOR_MEAN = 0.8
PRIOR_WEIGHT = 2.0  # of the mean that is expected, in observations
OWN_WEIGHT = 10.0  # likewise, where one completion's experience meets that of all
MEMORY = 200.0  # observations after which one counts 1/e
MAX_SOURCES = 64

MAX_ERASURE = 0.2  # tokens taken back per final token
CALM_GATE = 0.5  # gates from here on keep to it


class Stability:
    """Acceptance given that all before it stood, per (drafter, position), multiplied up a path.

    Each is the mean of a beta posterior with exponential forgetting. What is expected beforehand
    is the drafter's acceptance one position earlier or, for one completion's own experience, what
    all completions have seen.

    Args:
        shared: the experience of all, which this one adds to.
    """

    def __init__(self, shared: "Stability | None" = None) -> None:
        self._shared = shared
        self._cells: dict[str, list[Cell]] = {}

    def survival(self, source: str, length: int) -> list[float]:
        """Of the first `length` tokens of a path: probability that it and all before it stand."""
        joint, found = 1.0, []
        for acceptance in self._acceptance(source, length):
            joint *= acceptance
            found.append(joint)
        return found

    def observe(self, source: str, num_stood: int, num_tried: int) -> None:
        """The first `num_stood` tokens stood; if `num_tried` is one more, the next did not.

        Whatever came after a refused token, or after the end of the output, was not tried.
        """
        if self._shared is not None:
            self._shared.observe(source, num_stood, num_tried)
        cells = self._cells_of(source)
        cells += [[0.0, 0.0] for _ in range(min(num_tried, MAX_DRAFT_TOKENS) - len(cells))]
        for position, cell in enumerate(cells[:num_tried]):
            _add(cell, stood=position < num_stood)

    def _acceptance(self, source: str, length: int) -> list[float]:
        """Acceptance of each position given those before."""
        cells = self._cells.get(source, [])
        shared = self._shared._acceptance(source, length) if self._shared is not None else None
        found: list[float] = []
        for position in range(length):
            if shared is not None:
                expected, weight = shared[position], OWN_WEIGHT
            else:
                expected, weight = (found[-1] if found else PRIOR_MEAN), PRIOR_WEIGHT
            stood, fell = cells[position] if position < len(cells) else (0.0, 0.0)
            found.append((stood + weight * expected) / (stood + fell + weight))
        return found

    def _cells_of(self, source: str) -> list[Cell]:
        """The drafter's cells; the one that was silent longest makes room for a new one."""
        cells = self._cells.pop(source, [])
        if len(self._cells) >= MAX_SOURCES:
            del self._cells[next(iter(self._cells))]
        self._cells[source] = cells
        return cells


def num_shown(survival: Items[float], params: StreamParams) -> int:
    """How many leading tokens of a path a client shall see.

    Those whose survival reaches the gate. From `CALM_GATE` on fewer, if tokens shown and taken
    back would otherwise exceed `MAX_ERASURE` of the tokens that the step is expected to commit:
    knowing only the position, many tokens may pass a gate that few would pass if each were known.
    """
    count = 0
    for joint in survival[: params.max_tail_tokens]:
        if joint < params.min_stability:
            break
        count += 1
    if params.min_stability >= CALM_GATE:
        allowed = MAX_ERASURE * (1.0 + sum(survival))
        while count and sum(1.0 - joint for joint in survival[:count]) > allowed:
            count -= 1
    return count


def _add(cell: Cell, *, stood: bool) -> None:
    keep = 1.0 - 1.0 / MEMORY
    cell[0] = keep * cell[0] + stood
    cell[1] = keep * cell[1] + (not stood)
