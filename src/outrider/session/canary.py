"""The canary: whether drafts are accepted less often after a restore than chance explains.

Stale or foreign draft KV changes no output, for the target decides; it only makes drafts worse, and
nothing else reports it. Acceptance is the one witness.
"""

from collections.abc import Sequence as Items
from math import exp, lgamma
from typing import NamedTuple, Self

LEVEL = 1e-3  # one false alarm in a thousand restores
# Of one stretch of text against the next, where too few were seen to tell: the demo pair, K = 4,
# turns of 64 tokens, 14 texts at temperature 0 and 0.8.
DISPERSION = 0.05


class Tries(NamedTuple):
    """How drafted tokens fared over some steps: a token is tried when all before it stood.

    Trials under this condition are comparable whatever K was.
    """

    accepted: int
    rejected: int

    @classmethod
    def of_steps(cls, steps: Items[tuple[int, int]]) -> Self:
        """From chains, one (num_drafted, num_accepted) per verify step."""
        accepted = sum(accepted for _, accepted in steps)
        return cls(accepted, sum(accepted < drafted for drafted, accepted in steps))

    @classmethod
    def of_histogram(cls, histogram: Items[int], depth: int) -> Self:
        """From `RequestMetrics.accepted_histogram` (entry a: steps that accepted a) at K=depth."""
        accepted = sum(a * steps for a, steps in enumerate(histogram))
        return cls(accepted, sum(histogram[:depth]))

    @property
    def total(self) -> int:
        return self.accepted + self.rejected

    @property
    def rate(self) -> float:
        """Accepted share; 0.0 without tries."""
        return self.accepted / self.total if self.total else 0.0


class Judgement(NamedTuple):
    """What `judge` found.

    Attributes:
        is_worse, is_better: than chance allows at the level asked for.
        p_value: two-sided: how likely tries at least as far off as these are.
        expected, seen: acceptance rates of the history and of what is judged.
        dispersion: variance between stretches of text that was reckoned with, as a share of
            rate * (1 - rate).
    """

    is_worse: bool
    is_better: bool
    p_value: float
    expected: float
    seen: float
    dispersion: float


def judge(history: Items[Tries], recent: Tries, *, level: float = LEVEL) -> Judgement:
    """Compares tries after a restore with a session's own history, one entry per turn.

    The rate of a stretch of text is Beta distributed around the session's mean, so the accepted
    tokens of the next one are beta-binomial (two-sided test). The spread has two sources: turns
    differ, which the turns themselves tell (moments, as for a binomial with a common intraclass
    correlation), and the mean is known from finitely many tries. No history, or no recent tries,
    is no reason for alarm.
    """
    known = [turn for turn in history if turn.total]
    if not known or not recent.total:
        return Judgement(False, False, 1.0, 0.0, recent.rate, DISPERSION)
    # Half a try of each kind: a session that was never rejected may be rejected now.
    num_tries = sum(turn.total for turn in known) + 1.0
    mean = (sum(turn.accepted for turn in known) + 0.5) / num_tries
    dispersion = _dispersion(known, mean)
    effective = sum(turn.total / (1 + (turn.total - 1) * dispersion) for turn in known)
    spread = min(dispersion + 1 / (effective + 1), 0.99)
    concentration = 1 / spread - 1
    a, b = mean * concentration, (1 - mean) * concentration
    low = _at_most(recent.accepted, recent.total, a, b)
    high = _at_most(recent.rejected, recent.total, b, a)
    p_value = min(1.0, 2 * min(low, high))
    is_off = p_value < level
    return Judgement(
        is_off and low < high, is_off and high < low, p_value, mean, recent.rate, dispersion
    )


def _dispersion(turns: Items[Tries], mean: float) -> float:
    """Intraclass correlation by moments, drawn towards the usual one where turns are few."""
    excess = spare = 0.0
    for turn in turns:
        variance = turn.total * mean * (1 - mean)
        excess += (turn.accepted - turn.total * mean) ** 2 / variance - 1
        spare += turn.total - 1
    seen = max(0.0, (excess + 1) / spare) if spare else 0.0  # + 1: the mean is theirs too
    weight = len(turns) - 1
    return min((weight * seen + 4 * DISPERSION) / (weight + 4), 0.5)


def _at_most(count: int, total: int, a: float, b: float) -> float:
    """P[X <= count] of a beta-binomial law over 0 ... total."""
    whole = lgamma(a) + lgamma(b) - lgamma(a + b) + lgamma(total + a + b) - lgamma(total + 1)
    return min(
        1.0,
        sum(
            exp(
                lgamma(x + a) + lgamma(total - x + b) - lgamma(x + 1) - lgamma(total - x + 1)
                - whole
            )
            for x in range(count + 1)
        ),
    )  # fmt: skip
