"""L3: what every draw of a sampled run tells, summed up."""

from collections.abc import Iterator, Mapping
from typing import Any

from outrider.bench.lossless.audit import Audit, Score
from outrider.bench.lossless.trial import FAIL, PASS, UNDECIDED, Check, Trial
from outrider.bench.target import Arm

LEVEL = "L3"
MOST_DEVIATIONS = 4.0
FEWEST_TERMS = 100  # of which a sum is about normal, and sees anything
EMITTED = "emitted"
# Name in `Scores` -> what the test is called.
TESTS = {
    "accepted": "drafts accepted",
    EMITTED: "tokens emitted",
    "towards": "tokens emitted, towards the draft",
    "drawn": "drafts drawn as recorded",
}


class DrawLevel:
    """Audits one run of each arm that samples."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial

    def checks(self) -> Iterator[Check]:
        for arm, _ in self._trial.exact_arms():
            held = self._trial.once(f"{LEVEL}: {arm.name}", lambda arm=arm: self._audited(arm))  # type: ignore[misc]
            if held is None:
                yield Check.not_run(arm, LEVEL, "audit")
                continue
            scores = {name: Score(**held["scores"][name]) for name in TESTS}
            for name, score in scores.items():
                if score.num_terms or name == EMITTED:  # the others do not fit every rule and draft
                    yield _judge(arm, TESTS[name], score, held["error"])

    def _audited(self, arm: Arm) -> Mapping[str, Any]:
        trial = self._trial
        asks = trial.asks(arm, trial.plan.temperature, f"{LEVEL}: {arm.name}")
        with Audit().attached(trial.engine) as audit:
            replies = trial.run(asks)
        error = next((reply.error for reply in replies if reply.error), "")
        return {"scores": audit.scores, "error": error}


def _judge(arm: Arm, test: str, score: Score, error: str) -> Check:
    z = score.deviations
    told = f"z = {z:+.1f} over {score.num_terms} terms"
    verdict = PASS if score.num_terms >= FEWEST_TERMS and not error else UNDECIDED
    if score.num_terms < FEWEST_TERMS:
        told += f", fewer than {FEWEST_TERMS}: ask for more prompts or tokens"
    if error:
        told += f"; an answer failed: {error}"
    return Check(
        arm=arm.name,
        level=LEVEL,
        test=test,
        verdict=FAIL if abs(z) >= MOST_DEVIATIONS else verdict,
        told=told,
        statistic=z,
        limit=MOST_DEVIATIONS,
        count=score.num_terms,
    )
