"""L1: greedy answers are those of the base, and so are those of a seed where the rule says so."""

from collections.abc import Iterator

from outrider.bench.lossless.identity import (
    Answer,
    Difference,
    Rounding,
    differences,
    examine,
    measure_rounding,
)
from outrider.bench.lossless.trial import FAIL, PASS, UNDECIDED, Check, Trial
from outrider.bench.target import Arm
from outrider.verify.base import Exactness

LEVEL = "L1"
AGAIN = "once more"
NUM_TEXTS = 4  # answers that rounding is measured on


class TokenLevel:
    """Compares answers, and looks at why they part where it can.

    Attributes:
        rounding: what the width of a pass changes; None on a server, or without time.
        differences: of all arms: (arm, test, difference).
    """

    def __init__(self, trial: Trial) -> None:
        self.differences: list[tuple[str, str, Difference]] = []
        self._trial = trial
        self.rounding = self._rounding()

    def checks(self) -> Iterator[Check]:
        for arm in self._trial.arms:
            if self.rounding is not None and self.rounding.breaks_promise:
                yield _bitwise(arm, self.rounding)
            yield self._compared(arm, 0.0, "greedy tokens")
            temperature = self._trial.plan.temperature
            if temperature > 0.0 and self._is_keyed_by_position(arm):
                yield self._compared(arm, temperature, "tokens of a seed")

    def _is_keyed_by_position(self, arm: Arm) -> bool:
        rule = self._trial.rule(arm, self._trial.plan.temperature)
        return (
            rule is not None and rule.keyed_by == "position" and rule.exactness is Exactness.EXACT
        )

    def _compared(self, arm: Arm, temperature: float, test: str) -> Check:
        base = self._answers(self._trial.plan.base, temperature)
        null = self._answers(self._trial.plan.base, temperature, AGAIN)
        mine = self._answers(arm, temperature)
        if base is None or null is None or mine is None:
            return Check.not_run(arm, LEVEL, test)
        found = list(differences(base, mine))
        if self.rounding is not None:
            found = [self._examined(one, base, temperature) for one in found]
        self.differences += [(arm.name, test, difference) for difference in found]
        verdict, told = _judge(
            base, mine, found, list(differences(base, null)), is_ours=self._trial.ours is not None
        )
        return Check(
            arm=arm.name,
            level=LEVEL,
            test=test,
            verdict=verdict,
            told=told,
            statistic=float(len(found)),
            limit=0.0,
            count=len(base),
        )

    def _answers(self, arm: Arm, temperature: float, again: str = "") -> list[Answer] | None:
        """Of all questions; arms share no prefix cache, so that none gains by another's work."""
        told = f"{LEVEL}: {arm.name}, temperature {temperature:g} {again}".strip()
        asks = self._trial.asks(arm, temperature, told)
        held = self._trial.once(told, lambda: [Answer.of(one) for one in self._trial.run(asks)])
        return None if held is None else [Answer.from_json(one) for one in held]

    def _rounding(self) -> Rounding | None:
        trial = self._trial
        base = self._answers(trial.plan.base, 0.0)
        if trial.ours is None or base is None:
            return None
        good = [
            (trial.prompt(question), answer.token_ids or ())
            for question, answer in zip(trial.plan.questions, base, strict=True)
            if not answer.error
        ]
        depths = [spec.num_draft_tokens for arm in trial.arms if (spec := trial.resolved(arm, 0.0))]
        width = 1 + max(1, *depths)
        held = trial.once(
            f"{LEVEL}: rounding",
            lambda: measure_rounding(trial.engine, good[:NUM_TEXTS], width),
        )
        return None if held is None else Rounding(**held)

    def _examined(self, found: Difference, base: list[Answer], temperature: float) -> Difference:
        trial = self._trial
        assert self.rounding is not None, "looked at in our own engine only"
        index = next(i for i, answer in enumerate(base) if answer.id == found.id)
        return examine(
            trial.engine,
            found,
            trial.prompt(trial.plan.questions[index]),
            base[index].token_ids or (),
            self.rounding,
            temperature=temperature,
            seed=trial.seed(index),
        )


def _bitwise(arm: Arm, rounding: Rounding) -> Check:
    largest, width = rounding.largest, rounding.width
    return Check(
        arm=arm.name,
        level=LEVEL,
        test="bitwise rows",
        verdict=FAIL,
        told=f"passes of 1 and of {width} rows give margins up to {largest:.3g} nats apart; these "
        "kernels promise equal bits",
        statistic=largest,
        limit=0.0,
        count=rounding.num_positions,
    )


def _judge(
    base: list[Answer],
    mine: list[Answer],
    found: list[Difference],
    null: list[Difference],
    *,
    is_ours: bool,
) -> tuple[str, str]:
    """Verdict and words. Where a server does not repeat itself, a difference tells nothing."""
    errors = [answer.error for answer in (*base, *mine) if answer.error]
    num_both = sum(not a.error and not b.error for a, b in zip(base, mine, strict=True))
    wrong = [one for one in found if not one.is_near_tie]
    told = [f"{num_both - len(found)} of {num_both} answers equal"]
    if wrong:
        told.append(f"{wrong[0].id!r} parts after {wrong[0].position}: {_parting(wrong[0])}")
    if len(found) > len(wrong):
        told.append(f"{len(found) - len(wrong)} part at near-ties")
    if null:
        told.append(f"the base against itself: {len(null)} differ")
    if errors:
        told.append(f"{len(errors)} answers failed: {errors[0]}")
    if wrong and (is_ours or not null):
        return FAIL, "; ".join(told)
    return (UNDECIDED if wrong or errors else PASS), "; ".join(told)


def _parting(found: Difference) -> str:
    told = f"{found.base!r} without speculation, {found.arm!r} with it"
    if found.margin_nats is None or found.margin_ulp is None:
        return told
    return f"{told}, {found.margin_nats:.3g} nats ({found.margin_ulp:.3g} ulp) apart"
