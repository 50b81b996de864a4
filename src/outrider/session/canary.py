"""The canary: whether drafts are accepted less often after a restore than chance explains.

Stale or foreign draft KV changes no output, for the target decides; it only makes drafts worse, and
nothing else reports it. Acceptance is the one witness.
"""

from collections.abc import Iterable, Mapping, Sequence as Items
from dataclasses import dataclass
from math import exp, lgamma
from typing import Any, NamedTuple, Self

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
    def of_positions(cls, tried: Items[int], stood: Items[int]) -> Self:
        """From counts by position: drafts that came so far and stood until there; of those, how
        many stood there too."""
        return cls(sum(stood), sum(tried) - sum(stood))

    @property
    def total(self) -> int:
        return self.accepted + self.rejected

    @property
    def rate(self) -> float:
        """Accepted share; 0.0 without tries."""
        return self.accepted / self.total if self.total else 0.0


@dataclass(frozen=True, kw_only=True)
class History:
    """How the turns of a session fared, in sums: two histories add up number by number.

    Attributes:
        num_turns: those with tries.
        squares: sum over the turns of accepted**2 / total, which tells how much they differ.
    """

    num_turns: int = 0
    accepted: int = 0
    rejected: int = 0
    squares: float = 0.0

    @classmethod
    def of(cls, turns: Iterable[Tries]) -> Self:
        """One entry per turn."""
        known = [turn for turn in turns if turn.total]
        return cls(
            num_turns=len(known),
            accepted=sum(turn.accepted for turn in known),
            rejected=sum(turn.rejected for turn in known),
            squares=sum(turn.accepted**2 / turn.total for turn in known),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `as_dict` gave, or a sum of such; of other members nothing is read."""
        return cls(**{name: values.get(name, 0) for name in cls.__dataclass_fields__})

    def as_dict(self) -> dict[str, Any]:
        """Numbers for JSON."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @property
    def total(self) -> int:
        return self.accepted + self.rejected


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


def judge(history: History, recent: Tries, *, level: float = LEVEL) -> Judgement:
    """Compares tries after a restore with a session's own history.

    The rate of a stretch of text is Beta distributed around the session's mean, so the accepted
    tokens of the next one are beta-binomial (two-sided test). The spread has two sources: turns
    differ, which the turns themselves tell (moments, as for a binomial with a common intraclass
    correlation), and the mean is known from finitely many tries, reckoned as if turns were of
    one length. No history, or no recent tries, is no reason for alarm.
    """
    if not history.total or not recent.total:
        return Judgement(False, False, 1.0, 0.0, recent.rate, DISPERSION)
    # Half a try of each kind: a session that was never rejected may be rejected now.
    mean = (history.accepted + 0.5) / (history.total + 1.0)
    dispersion = _dispersion(history, mean)
    length = history.total / history.num_turns
    effective = history.total / (1 + (length - 1) * dispersion)
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


def _dispersion(history: History, mean: float) -> float:
    """Intraclass correlation by moments, drawn towards the usual one where turns are few."""
    squares = history.squares - 2 * mean * history.accepted + mean**2 * history.total
    excess = squares / (mean * (1 - mean)) - history.num_turns
    spare = history.total - history.num_turns
    seen = max(0.0, (excess + 1) / spare) if spare else 0.0  # + 1: the mean is theirs too
    weight = history.num_turns - 1
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
