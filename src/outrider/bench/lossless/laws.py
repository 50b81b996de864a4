"""L2: the rule in every choice it can make, and counts of what the engine emits, have p's law."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from outrider.bench.lossless.forced import rows
from outrider.bench.lossless.law_tests import GTest, enumerate_rule, g_test
from outrider.bench.lossless.trial import FAIL, PASS, UNDECIDED, Check, Trial
from outrider.bench.target import Arm, Ask, Question
from outrider.engine.engine import Engine
from outrider.request import SamplingParams
from outrider.testing.outputs import target_law
from outrider.verify.base import Verifier

LEVEL = "L2"
SIGNIFICANCE = 0.001  # of all counts together
NUM_PROMPTS = 2
PROMPT_TOKENS = 32  # the end of a longer one
LENGTH = 3  # tokens that are counted; more are asked for, so that drafts reach that far
NUM_TOKENS = 3  # that can come at all
# Each pair of them stands in here: drafters that look things up find them.
PAIRS = (0, 0, 1, 0, 2, 1, 1, 2, 2, 0)
BIAS = 200.0  # on their logits: the mass of all others is exp(-200 / temperature)
FIRST_DRAW = 500_000  # seeds of other checks are smaller


class LawLevel:
    """Tests what each arm's rule does, alone and inside the engine."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial

    def checks(self) -> Iterator[Check]:
        arms = list(self._trial.exact_arms())
        for arm, rule in arms:
            yield self._enumerated(arm, rule)
        counted = [(arm, list(self._counted(arm))) for arm, _ in arms]
        num_tests = sum(len(blocks) for _, blocks in counted)
        for arm, blocks in counted:
            yield _judge(arm, blocks, SIGNIFICANCE / num_tests)

    def _enumerated(self, arm: Arm, rule: Verifier) -> Check:
        spec = self._trial.resolved(arm, self._trial.plan.temperature)
        assert spec is not None, "asked of arms that sample"
        test, options = "rule, every choice", dict(spec.verifier_options)
        held = self._trial.once(
            f"{LEVEL}: rule {spec.verifier} {options or ''}".strip(),
            lambda: {**(one := enumerate_rule(rule))._asdict(), "passes": one.passes},
        )
        if held is None:
            return Check.not_run(arm, LEVEL, test)
        told = held["broken"] or f"total variation {held['bias']:.1e} from the target's law"
        if not held["passes"]:
            told += f" ({held['where']})"
        return Check(
            arm=arm.name,
            level=LEVEL,
            test=test,
            verdict=PASS if held["passes"] else FAIL,
            told=f"{spec.verifier}: {told}",
            statistic=held["bias"],
            limit=0.0,
            count=held["num_cases"],
        )

    def _counted(self, arm: Arm) -> Iterator[Mapping[str, Any] | None]:
        for index, question in enumerate(self._trial.plan.questions[:NUM_PROMPTS]):
            key = f"{LEVEL}: {arm.name}, prompt {index + 1}"
            yield self._trial.once(key, lambda q=question: self._count(arm, q))  # type: ignore[misc]

    def _count(self, arm: Arm, question: Question) -> Mapping[str, Any]:
        """Many short answers of few tokens, against their law from one pass over all of them."""
        trial = self._trial
        prompt = trial.prompt(question)[-PROMPT_TOKENS:]
        allowed = _likeliest(trial.engine, prompt)
        prompt = (*prompt, *(allowed[i] for i in PAIRS))
        law = target_law(trial.engine, prompt, allowed, LENGTH, trial.plan.temperature)
        replies = trial.run(list(self._draws(arm, question, prompt, allowed)))
        seen = Counter((r.token_ids or ())[:LENGTH] for r in replies if not r.error)
        accepted = [reply.acceptance for reply in replies if reply.acceptance is not None]
        return {
            **g_test(seen, law)._asdict(),
            "num_draft_tokens": sum(one.num_draft_tokens for one in accepted),
            "error": next((reply.error for reply in replies if reply.error), ""),
            "seen": {" ".join(map(str, path)): count for path, count in seen.items()},
            "law": {" ".join(map(str, path)): weight for path, weight in law.items()},
        }

    def _draws(
        self, arm: Arm, question: Question, prompt: tuple[int, ...], allowed: tuple[int, ...]
    ) -> Iterator[Ask]:
        short = Question(id=f"{question.id}, few tokens", prompt=prompt)
        plan = self._trial.plan
        for draw in range(plan.num_draws):
            sampling = SamplingParams(
                max_tokens=LENGTH + 2,
                temperature=plan.temperature,
                logit_bias=dict.fromkeys(allowed, BIAS),
                ignore_eos=True,
                seed=self._trial.seed(FIRST_DRAW + draw),
            )
            yield Ask(question=short, sampling=sampling, arm=arm, tenant=LEVEL)


def _likeliest(engine: Engine, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens that may come after a prompt, best first, without those that end it."""
    logits_V = next(iter(rows(engine, prompt, len(prompt), 1))).clone()
    logits_V[list(engine.spec.eos_token_ids)] = float("-inf")
    return tuple(logits_V.topk(NUM_TOKENS).indices.tolist())


def _judge(arm: Arm, blocks: list[Mapping[str, Any] | None], limit: float) -> Check:
    """The prompt with the smallest p speaks for all."""
    test = "counts per context"
    done = [held for held in blocks if held is not None]
    if len(done) < len(blocks):
        return Check.not_run(arm, LEVEL, test)
    found = [GTest(**{key: held[key] for key in GTest._fields}) for held in done]
    worst = min(found, key=lambda one: one.p)
    verdict, told = _verdict(worst, done)
    return Check(
        arm=arm.name,
        level=LEVEL,
        test=test,
        verdict=FAIL if worst.p < limit else verdict,
        told=told,
        statistic=worst.p,
        limit=limit,
        count=sum(one.num_draws for one in found),
    )


def _verdict(worst: GTest, blocks: list[Mapping[str, Any]]) -> tuple[str, str]:
    """Of counts that have the right law, if they tell anything; and words for any."""
    errors = [held["error"] for held in blocks if held["error"]]
    told = "tokens came that never can"
    if worst.statistic is not None:
        told = f"G = {worst.statistic:.1f} on {worst.degrees} degrees, p = {worst.p:.2g}"
    if errors:
        return UNDECIDED, f"{told}; an answer failed: {errors[0]}"
    if not any(held["num_draft_tokens"] for held in blocks):
        return UNDECIDED, f"{told}; but nothing was drafted"
    if not worst.degrees:
        return UNDECIDED, "one token alone can come: choose a higher temperature"
    return PASS, told
