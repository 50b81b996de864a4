"""Histogram: counts of drafted steps by how many tokens they accepted, and every rate from them.

`accepted` below is the path's length before the output was cut by a stop or by its length; the
bonus token is in no count. See the words of the acceptance rates in docs/concepts/words.md.
"""

from collections.abc import Iterable, Mapping, Sequence as Items
from itertools import zip_longest
from typing import NamedTuple, TypeAlias

from outrider.bench.statistics import Share, wilson
from outrider.bench.target import Acceptance

Steps: TypeAlias = Mapping[tuple[int, int], int]  # (drafted depth, accepted) -> number of steps


class Rates(NamedTuple):
    """Acceptance by position 1, 2, ...; entry i - 1 is that of position i.

    Attributes:
        joint: of all drafted steps, those that accepted at least i tokens.
        conditional: of steps that drafted position i and accepted all before it, those that
            accepted it too.
        eligible: of steps that drafted position i, those that accepted it: the one to read where
            the depth varies.
    """

    joint: tuple[Share, ...]
    conditional: tuple[Share, ...]
    eligible: tuple[Share, ...]


def total(parts: Iterable[Acceptance | None]) -> Acceptance | None:
    """The sum; None if any part is unknown, or there is none."""
    summed: Acceptance | None = None
    for part in parts:
        if part is None:
            return None
        summed = part if summed is None else _added(summed, part, 1)
    return summed


def since(before: Acceptance | None, after: Acceptance | None) -> Acceptance | None:
    """What counters counted between two readings."""
    return None if before is None or after is None else _added(after, before, -1)


def fixed_depth(histogram: Items[int], depth: int) -> Steps:
    """Steps that all drafted `depth` tokens."""
    assert len(histogram) <= depth + 1, "more tokens were accepted than drafted"
    return {(depth, accepted): count for accepted, count in enumerate(histogram)}


def rates(steps: Steps) -> Rates:
    """Every rate with Wilson's interval; steps of one answer depend on each other, so that these
    are for reading, not for claims.
    """
    drafted = {step: count for step, count in steps.items() if step[0] > 0}
    deepest = max((depth for depth, _ in drafted), default=0)
    joint, conditional, eligible = [], [], []
    for i in range(1, deepest + 1):
        num_reached = _count(drafted, depth=i, accepted=i)
        joint.append(wilson(num_reached, _count(drafted)))
        conditional.append(wilson(num_reached, _count(drafted, depth=i, accepted=i - 1)))
        eligible.append(wilson(num_reached, _count(drafted, depth=i)))
    return Rates(tuple(joint), tuple(conditional), tuple(eligible))


def joint(histogram: Items[int]) -> tuple[Share, ...]:
    """The one rate that needs no depth: of drafted steps, those that accepted at least i."""
    return tuple(
        wilson(sum(histogram[i:]), sum(histogram)) for i in range(1, max(1, len(histogram)))
    )


def acceptance_length(histogram: Items[int]) -> float:
    """1 + mean accepted tokens per drafted step; 1.0 for none."""
    count = sum(histogram)
    return 1.0 + sum(i * n for i, n in enumerate(histogram)) / count if count else 1.0


def _count(steps: Steps, depth: int = 0, accepted: int = 0) -> int:
    """Steps that drafted and accepted at least so many."""
    return sum(n for (d, a), n in steps.items() if d >= depth and a >= accepted)


def _added(one: Acceptance, other: Acceptance, sign: int) -> Acceptance:
    counts = zip_longest(one.histogram, other.histogram, fillvalue=0)
    return Acceptance(
        num_steps=one.num_steps + sign * other.num_steps,
        num_drafts=one.num_drafts + sign * other.num_drafts,
        num_draft_tokens=one.num_draft_tokens + sign * other.num_draft_tokens,
        num_accepted_tokens=one.num_accepted_tokens + sign * other.num_accepted_tokens,
        histogram=tuple(mine + sign * its for mine, its in counts),
    )
