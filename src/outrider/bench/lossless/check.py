"""check_lossless: three levels of tests, arm by arm, and what they come to.

L1 compares tokens with plain decoding, L2 the laws of rule and engine with the target's, L3 sums up
what every draw of a sampled run tells. A server that is not ours shows its answers only: there L1
is all.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from outrider.bench.journal import Journal
from outrider.bench.lossless.draws import DrawLevel
from outrider.bench.lossless.identity import Rounding
from outrider.bench.lossless.laws import LawLevel
from outrider.bench.lossless.tokens import TokenLevel
from outrider.bench.lossless.trial import FAIL, LEVELS, PASS, UNDECIDED, Check, Plan, Trial
from outrider.bench.result import plain
from outrider.bench.target import Arm, Target
from outrider.verify.base import Exactness, Verifier

LOSSLESS, NOT_LOSSLESS, LOSSY = "lossless", "not lossless", "lossy by its own account"
ALIKE = "no difference found"  # where not all levels could be looked at, or were asked for


@dataclass(frozen=True, kw_only=True)
class ArmVerdict:
    """What all checks of an arm come to.

    Attributes:
        verdict: "lossless" where all levels passed, "no difference found" where those did that
            were looked at, "not lossless" where a check failed, else "undecided". An arm whose rule
            says that it is lossy is called nothing else.
        rule, exactness: "" where a server does not tell them.
        why: the checks that did not pass.
    """

    arm: str
    verdict: str
    rule: str = ""
    exactness: str = ""
    why: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All of it.

    Attributes:
        differences: answers that are not the base's, and where they part.
        rounding: None where the target is not ours, or L1 was not asked for.
    """

    arms: tuple[ArmVerdict, ...]
    checks: tuple[Check, ...]
    differences: tuple[Mapping[str, Any], ...] = ()
    rounding: Rounding | None = None
    summary: str = ""

    @property
    def passes(self) -> bool:
        """Whether every arm is what it says it is."""
        return all(arm.verdict in (LOSSLESS, ALIKE, LOSSY) for arm in self.arms)

    @property
    def fails(self) -> bool:
        """Whether an arm is surely not what it says it is; one that is not decided is neither."""
        return any(arm.verdict == NOT_LOSSLESS for arm in self.arms)

    def to_json(self) -> dict[str, Any]:
        """For `Result.findings`."""
        return {"passes": self.passes, "fails": self.fails, **plain(vars(self))}


def check_lossless(
    target: Target,
    plan: Plan,
    journal: Journal,
    *,
    tell: Callable[..., None] = lambda *told: None,
    clock: Callable[[], float] = time.monotonic,
) -> Findings:
    """Checks all arms of the plan.

    Args:
        journal: keeps finished blocks; those that it holds are not run again.
        tell: called with (blocks done, None, what is going on).

    Raises:
        RequestError, ConfigError: an arm asks for what the target does not have.
    """
    trial = Trial(target, plan, journal, tell=tell, clock=clock)
    for arm in trial.arms:
        trial.resolved(arm, 0.0)  # what is not here is told before anything runs
    checks: list[Check] = []
    tokens = TokenLevel(trial) if "L1" in plan.levels else None
    if tokens is not None:
        checks += tokens.checks()
    if "L2" in plan.levels:
        checks += LawLevel(trial).checks()
    if "L3" in plan.levels:
        checks += DrawLevel(trial).checks()
    names = [arm.name for arm in trial.arms]
    checks.sort(key=lambda check: names.index(check.arm))
    arms = tuple(_verdict(trial, arm, checks) for arm in trial.arms)
    return Findings(
        arms=arms,
        checks=tuple(checks),
        differences=tuple(
            {"arm": arm, "test": test, **vars(found)}
            for arm, test, found in (tokens.differences if tokens else ())
        ),
        rounding=tokens.rounding if tokens else None,
        summary=_summary(arms, is_ours=trial.ours is not None),
    )


def _verdict(trial: Trial, arm: Arm, checks: list[Check]) -> ArmVerdict:
    mine = [check for check in checks if check.arm == arm.name]
    rule = trial.rule(arm, 0.0)
    verdicts = {check.verdict for check in mine}
    if rule is not None and rule.exactness in (Exactness.LOSSY, Exactness.SYNTHETIC):
        verdict = LOSSY
    elif FAIL in verdicts:
        verdict = NOT_LOSSLESS
    else:
        verdict = _passed(trial, rule) if verdicts == {PASS} else UNDECIDED
    told = [f"{one.level}, {one.test}: {one.told}" for one in mine if one.verdict != PASS]
    return ArmVerdict(
        arm=arm.name,
        verdict=verdict,
        rule="" if rule is None else rule.name,
        exactness="" if rule is None else rule.exactness.value,
        why=tuple(told),
    )


def _passed(trial: Trial, rule: Verifier | None) -> str:
    """What may be said where no check failed; a rule for greedy requests has one level only."""
    if rule is None:
        return ALIKE
    wanted = {"L1"} if rule.exactness is Exactness.EXACT_GREEDY else set(LEVELS)
    return LOSSLESS if wanted <= set(trial.plan.levels) else ALIKE


def _summary(arms: tuple[ArmVerdict, ...], *, is_ours: bool) -> str:
    told = "; ".join(f"{one.arm}: {one.verdict}" for one in arms)
    return f"{told}." if is_ours else f"{told} (by its answers alone: a server shows no laws)."
