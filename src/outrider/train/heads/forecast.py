"""The speed-up to expect: what drafts bring, over what passes cost on this machine.

    S(K) = tokens(K) * t(B) / (t(B + B K) + draft(K))

Passes of the target and of the draft are timed alone; what the engine does between them, which is
the same for every drafter, is left out. So is a choice of K by the step, which only helps.
"""

from typing import NamedTuple

from outrider.train.heads.acceptance import Rates
from outrider.train.heads.student import Student
from outrider.train.heads.teacher import Teacher
from outrider.train.heads.timing import seconds_of, target_pass


class Prices(NamedTuple):
    """Seconds on this machine.

    Attributes:
        concurrency: sequences that decode together.
        plain_s: of a pass of the target with a row for each.
        verify_s: likewise, by K from 1, with K draft tokens for each.
        draft_s: of drafting so deep for all of them.
    """

    concurrency: int
    plain_s: float
    verify_s: tuple[float, ...]
    draft_s: tuple[float, ...]


class Forecast(NamedTuple):
    """The best draft length and what it should bring.

    Attributes:
        speedup: at K = `num_draft_tokens`, with acceptance length `length`.
        needed: acceptance length at which that K would bring nothing.
        most: speed-up of the best K if all that is drafted stood.
    """

    num_draft_tokens: int
    speedup: float
    length: float
    needed: float
    most: float


def measure(teacher: Teacher, student: Student, num_depths: int, *, concurrency: int = 1) -> Prices:
    """Times passes; some tenths of a second for small models."""
    sizes = range(num_depths + 1)
    runs = [target_pass(teacher.network, concurrency, num_nodes) for num_nodes in sizes]
    runs.append(student.serving_pass(concurrency))
    *verify, once = seconds_of(runs, teacher.spec.device)
    for num_nodes in range(1, len(verify)):  # more rows never take less; noise says so at times
        verify[num_nodes] = max(verify[num_nodes], verify[num_nodes - 1])
    draft = [student.num_passes(depth) * once for depth in range(1, num_depths + 1)]
    return Prices(concurrency, verify[0], tuple(verify[1:]), tuple(draft))


def forecast(prices: Prices, rates: Rates) -> Forecast:
    """For a drafter of these rates."""
    found = []
    for depth, (verify_s, draft_s) in enumerate(
        zip(prices.verify_s, prices.draft_s, strict=True), 1
    ):
        needed = (verify_s + draft_s) / prices.plain_s
        length = 1.0 + sum(rates.joint[:depth])
        found.append((length / needed, depth, length, needed, (depth + 1) / needed))
    speedup, depth, length, needed, _ = max(found)
    return Forecast(depth, speedup, length, needed, max(row[-1] for row in found))


def told(guess: Forecast, concurrency: int) -> str:
    """In one sentence."""
    return (
        f"projected {guess.speedup:.2f}x at K={guess.num_draft_tokens} and concurrency "
        f"{concurrency} (needs an acceptance length of {guess.needed:.2f}, has {guess.length:.2f}; "
        f"{guess.most:.2f}x if every draft stood)"
    )
