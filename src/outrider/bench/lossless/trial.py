"""Trial: what all levels share: the plan, the target, blocks that are run once, and verdicts."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from outrider.bench.inprocess import InProcess
from outrider.bench.journal import Journal
from outrider.bench.result import content_hash
from outrider.bench.target import Arm, Ask, Question, Reply, Target
from outrider.engine.engine import Engine
from outrider.engine.prompts import encode, with_prediction
from outrider.errors import ConfigError, PairError, unknown
from outrider.request import OFF, SamplingParams, Speculation, SpeculationParams
from outrider.verify.base import Exactness, Verifier
from outrider.verify.verifiers import verifier

LEVELS = ("L1", "L2", "L3")
PASS, FAIL, UNDECIDED = "pass", "fail", "undecided"
BASE = Arm(name=OFF, speculation=SpeculationParams(method=OFF))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is checked, on what.

    Attributes:
        base: who decodes plainly; the arms are compared with it.
        temperature: of the sampled checks. max_tokens: of an answer.
        num_draws: short answers per prompt whose tokens are counted.
        budget_s: no block is begun after it.
    """

    arms: tuple[Arm, ...]
    questions: tuple[Question, ...]
    base: Arm = BASE
    max_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0
    concurrency: int = 8
    num_draws: int = 1000
    levels: tuple[str, ...] = LEVELS
    budget_s: float = 600.0

    def __post_init__(self) -> None:
        if not self.arms:
            raise ConfigError('no arm to check: give --arm, such as "draft_model"')
        if not self.questions:
            raise ConfigError("no prompt: the data set is empty")
        for level in self.levels:
            if level not in LEVELS:
                raise ConfigError(unknown("level", level, LEVELS))
        if self.temperature <= 0.0 and set(self.levels) & {"L2", "L3"}:
            raise ConfigError(
                f"temperature={self.temperature}: L2 and L3 test laws and need one above 0 (greedy "
                "answers are compared in any case); raise it, or ask for --level L1 alone"
            )

    def identity(self) -> dict[str, Any]:
        """What a block depends on: equal plans may share a journal."""
        return {
            "base": self.base,
            "arms": self.arms,
            "questions": content_hash(self.questions),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "concurrency": self.concurrency,
            "num_draws": self.num_draws,
        }


@dataclass(frozen=True, kw_only=True)
class Check:
    """One test of one arm.

    Attributes:
        verdict: "pass", "fail" or "undecided". told: what was seen.
        statistic: what was compared with `limit`, where that is one number.
        count: how many answers, cases, draws or terms it rests on.
    """

    arm: str
    level: str
    test: str
    verdict: str
    told: str
    statistic: float | None = None
    limit: float | None = None
    count: int = 0

    @classmethod
    def not_run(cls, arm: Arm, level: str, test: str) -> "Check":
        told = "not run: the budget was over"
        return cls(arm=arm.name, level=level, test=test, verdict=UNDECIDED, told=told)


class Trial:
    """One run of the checks; blocks that the journal holds are not run again.

    Attributes:
        ours: the target, if it is our own engine: only then laws can be seen.
    """

    def __init__(
        self,
        target: Target,
        plan: Plan,
        journal: Journal,
        *,
        tell: Callable[..., None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.target = target
        self.plan = plan
        self.ours = target if isinstance(target, InProcess) else None
        self.arms = [_fixed(arm, self.ours) if self.ours else arm for arm in plan.arms]
        self._journal = journal
        self._tell = tell
        self._clock = clock
        self._deadline = clock() + plan.budget_s

    @property
    def engine(self) -> Engine:
        assert self.ours is not None, "a server's engine cannot be seen"
        return self.ours.llm.engine

    def once(self, key: str, make: Callable[[], Any]) -> Any | None:
        """A block, as the journal reads it back; None where there is no time left to make it."""
        self._tell(len(self._journal), None, key)
        if key in self._journal:
            return self._journal[key]
        if self._clock() > self._deadline:
            return None
        return self._journal.add(key, make())

    def resolved(self, arm: Arm, temperature: float) -> Speculation | None:
        """What is in force; None of a server, and of a rule that does not serve the temperature.

        Raises:
            RequestError, PairError: at temperature 0, what the engine does not have.
        """
        if self.ours is None:
            return None
        llm = self.ours.llm
        asked = llm.speculation if arm.speculation is None else arm.speculation
        sampling = SamplingParams(temperature=temperature, seed=self.plan.seed)
        try:
            return llm.engine.resolve(with_prediction(asked, llm.tokenizer), sampling)
        except PairError:
            if temperature == 0.0:
                raise
            return None

    def rule(self, arm: Arm, temperature: float) -> Verifier | None:
        spec = self.resolved(arm, temperature)
        return None if spec is None else verifier(spec.verifier, spec.verifier_options)

    def exact_arms(self) -> Iterator[tuple[Arm, Verifier]]:
        """Those whose rule promises the target's law at the plan's temperature."""
        for arm in self.arms:
            rule = self.rule(arm, self.plan.temperature)
            if rule is not None and rule.exactness is Exactness.EXACT:
                yield arm, rule

    def run(self, asks: list[Ask]) -> list[Reply]:
        return self.target.run(asks, concurrency=self.plan.concurrency)

    def asks(self, arm: Arm, temperature: float, tenant: str) -> list[Ask]:
        """Each question with a seed of its own, the same for all arms."""
        return [
            Ask(
                question=question,
                sampling=SamplingParams(
                    max_tokens=self.plan.max_tokens, temperature=temperature, seed=self.seed(index)
                ),
                arm=arm,
                tenant=tenant,
            )
            for index, question in enumerate(self.plan.questions)
        ]

    def seed(self, index: int) -> int:
        return self.plan.seed * 1_000_003 + index

    def prompt(self, question: Question) -> tuple[int, ...]:
        """Its token ids."""
        assert self.ours is not None, "a server's token ids are its own affair"
        return encode(question.prompt, self.ours.llm.tokenizer)


def _fixed(arm: Arm, ours: InProcess) -> Arm:
    """Drafts in every step where nobody says otherwise: what is not drafted cannot be checked.

    Raises:
        ConfigError: the arm never drafts.
    """
    asked = ours.llm.speculation if arm.speculation is None else arm.speculation
    if asked.is_off or not (asked.method or ours.llm.engine.default_drafter):
        raise ConfigError(
            f"arm {arm.name!r} drafts nothing, so there is nothing to check: name a method, or "
            "load a draft model"
        )
    if asked.policy is not None or asked.slo:
        return arm
    return replace(arm, speculation=replace(asked, policy="fixed"))
