"""Pairs: what the blocks of an A/B run say of its arms, of each pair of them, and of the noise."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

from outrider.bench.ab import Measured
from outrider.bench.blocks import NULL
from outrider.bench.histogram import joint, total
from outrider.bench.result import Result
from outrider.bench.statistics import Ratio, paired_ratio, sign_test, verdict
from outrider.bench.target import Arm
from outrider.request import SpeculationParams

# Of what is timed: at concurrency 1 each prompt by itself, else a block of prompts as a whole.
PER_TOKEN = "time per output token after the first (TPOT), prompt by prompt"
PER_BLOCK = "time of a whole block of prompts per output token"
ONE_PROMPT, ONE_BLOCK = "unknown: one prompt only", "unknown: one block only"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """How many times as fast `arm` is as `base`, and whether that may be said.

    Attributes:
        null: the first arm against itself, in the same run.
        sign_test: p of as many gains among prompts, were gains and losses equally likely.
        num_identical: prompts whose answers were the same in every run of both arms, out of
            `num_prompts` asked.
        domains: the ratio by domain, where there are several.
    """

    base: Arm
    arm: Arm
    ratio: Ratio
    null: Ratio
    verdict: str
    sign_test: float
    num_prompts: int
    num_identical: int
    domains: tuple[tuple[str, Ratio], ...] = ()

    @property
    def interval_note(self) -> str | None:
        """Why there is no interval; None where there is one."""
        return interval_note(self.ratio, self.num_prompts)

    @property
    def interval_told(self) -> str:
        """Its ends, or why there are none."""
        return self.interval_note or f"{self.ratio.low:.2f} to {self.ratio.high:.2f}"

    def to_json(self) -> dict[str, Any]:
        return {
            "base": self.base.name,
            "arm": self.arm.name,
            "ratio": self.ratio.ratio,
            "interval": self.ratio.interval,
            "interval_note": self.interval_note,
            "verdict": self.verdict,
            "null_interval": self.null.interval,
            "min_detectable": self.ratio.detectable,
            "sign_test": self.sign_test,
            "num_prompts": self.num_prompts,
            "num_blocks": self.ratio.num_blocks,
            "num_identical": self.num_identical,
            "domains": [
                {
                    "domain": domain,
                    "ratio": ratio.ratio,
                    "interval": ratio.interval,
                    "interval_note": interval_note(ratio, ratio.num_clusters),
                    "num_prompts": ratio.num_clusters,
                }
                for domain, ratio in self.domains
            ],
        }


def interval_note(ratio: Ratio, num_prompts: int) -> str | None:
    """Why there is no interval; None where there is one."""
    if ratio.is_known:
        return None
    return ONE_PROMPT if num_prompts == 1 else ONE_BLOCK


def pairs(measured: Measured) -> list[Pair]:
    """Every pair of arms, those with the first arm first.

    Raises:
        ValueError: not one block could be used.
    """
    noise = null(measured)
    return [
        pair(measured, base, arm, noise)
        for base, arm in combinations(range(len(measured.plan.arms)), 2)
    ]


def pair(measured: Measured, base: int, arm: int, noise: Ratio) -> Pair:
    plan = measured.plan
    logs = measured.clusters(base, arm)
    ratio = paired_ratio(logs, seed=plan.seed)
    return Pair(
        base=plan.arms[base],
        arm=plan.arms[arm],
        ratio=ratio,
        null=noise,
        verdict=verdict(ratio, noise, eps=plan.eps),
        sign_test=sign_test([sum(blocks) / len(blocks) for blocks in logs]),
        num_prompts=_num_prompts(measured),
        num_identical=_num_identical(measured, base, arm),
        domains=tuple(_by_domain(measured, base, arm)),
    )


def null(measured: Measured) -> Ratio:
    """The first arm against itself: what noise alone gives."""
    return paired_ratio(measured.clusters(0, NULL), seed=measured.plan.seed)


def arms(measured: Measured) -> list[dict[str, Any]]:
    """Of each arm: how fast, and how well its drafts were guessed."""
    return [_arm(measured, number) for number in range(len(measured.plan.arms))]


def findings(measured: Measured) -> dict[str, Any]:
    """For a result's file: pairs, arms, the null arm, and how the run went."""
    noise = null(measured)
    num_usable, num_kept = len(measured.usable), len(measured.kept)
    return {
        "pairs": [one.to_json() for one in pairs(measured)],
        "arms": arms(measured),
        "null": {
            "ratio": noise.ratio,
            "interval": noise.interval,
            "interval_note": interval_note(noise, _num_prompts(measured)),
            "verdict": verdict(noise, eps=measured.plan.eps),
            "min_detectable": noise.detectable,
        },
        "run": {
            "compared_by": PER_BLOCK if measured.plan.concurrency > 1 else PER_TOKEN,
            "stopped_by": measured.stopped,
            "num_blocks": len(measured.blocks),
            "num_marked": num_usable - num_kept,
            "left_out": measured.left_out,
            "num_warm_ups": measured.num_warm_ups,
            "is_steady": measured.is_steady,
        },
    }


def result(
    measured: Measured,
    *,
    data: dict[str, Any],
    target: dict[str, Any],
    provenance: dict[str, Any],
    settings: dict[str, Any] | None = None,
) -> Result:
    """The file that an A/B run leaves."""
    plan = measured.plan
    return Result(
        kind="ab",
        findings=findings(measured),
        blocks=measured.blocks,
        settings={
            "arms": [{"name": arm.name, **_asked(arm)} for arm in plan.arms],
            "max_tokens": plan.sampling.max_tokens,
            "temperature": plan.sampling.temperature,
            "ignore_eos": plan.sampling.ignore_eos,
            "concurrency": plan.concurrency,
            "batch": plan.batch_size,
            "eps": plan.eps,
            "budget_s": plan.budget_s,
            "num_rounds": plan.num_rounds,
            **(settings or {}),
        },
        data=data,
        target=target,
        seeds={"run": plan.seed},
        provenance=provenance,
    )


def _arm(measured: Measured, number: int) -> dict[str, Any]:
    runs = [run for block in measured.kept for run in block.of(number)]
    acceptance = total(run.acceptance for run in runs)
    seconds, num_tokens = sum(run.seconds for run in runs), sum(run.num_tokens for run in runs)
    told: dict[str, Any] = {
        "name": measured.plan.arms[number].name,
        "tokens_per_second": num_tokens / seconds if seconds else None,
        "ms_per_token": _mean_ms(run.seconds_per_token for run in runs),
        "ttft_ms": _mean_ms(run.ttft_s for run in runs),
        "num_answers": sum(len(run.answers) for run in runs),
    }
    if acceptance is not None and acceptance.num_drafts:
        rates = joint(acceptance.histogram)
        told["acceptance"] = {
            "acceptance_length": acceptance.acceptance_length,
            "acceptance_rate": acceptance.num_accepted_tokens / max(1, acceptance.num_draft_tokens),
            "tokens_per_step": num_tokens / acceptance.num_steps if acceptance.num_steps else None,
            **acceptance._asdict(),
            "joint_rates": [share.value for share in rates],
            "joint_intervals": [[share.low, share.high] for share in rates],
        }
    return told


def _num_prompts(measured: Measured) -> int:
    return len({question for block in measured.kept for question in block.questions})


def _num_identical(measured: Measured, base: int, arm: int) -> int:
    """Questions that every run of both arms answered alike, round by round.

    A round has its own seed, so that answers of two rounds differ unless they are greedy.
    """
    is_alike: dict[str, bool] = {}
    for block in measured.kept:
        runs = [run.answers for which in (base, arm) for run in block.of(which)]
        for question, *answers in zip(block.questions, *runs, strict=True):
            is_alike[question] = is_alike.get(question, True) and len(set(answers)) == 1
    return sum(is_alike.values())


def _by_domain(measured: Measured, base: int, arm: int) -> Iterator[tuple[str, Ratio]]:
    """Where a block is one prompt, and there is more than one domain."""
    by_domain: dict[str, list[str]] = {}
    for question in measured.plan.questions:
        by_domain.setdefault(question.domain, []).append(question.id)
    if len(by_domain) < 2 or measured.plan.batch_size > 1:
        return
    for domain, ids in by_domain.items():
        if logs := measured.clusters(base, arm, ids):
            yield domain, paired_ratio(logs, seed=measured.plan.seed)


def _asked(arm: Arm) -> dict[str, Any]:
    """Speculation as it was asked for, without what is usual."""
    usual, asked = SpeculationParams(), arm.speculation
    given = {
        field.name: getattr(asked, field.name)
        for field in (fields(asked) if asked is not None else ())
        if getattr(asked, field.name) != getattr(usual, field.name)
    }
    return {"speculation": None if asked is None else given, "extra": arm.extra}


def _mean_ms(seconds: Iterable[float | None]) -> float | None:
    known = [1e3 * each for each in seconds if each is not None]
    return sum(known) / len(known) if known else None
