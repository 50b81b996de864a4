"""`outrider bench lossless`: whether speculation leaves the output alone."""

from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from outrider.bench.datasets import OWN
from outrider.bench.journal import open_journal
from outrider.bench.lossless.check import (
    ALIKE,
    LOSSLESS,
    LOSSY,
    NOT_LOSSLESS,
    Findings,
    check_lossless,
)
from outrider.bench.lossless.trial import FAIL, LEVELS, UNDECIDED, Plan
from outrider.bench.provenance import Watch
from outrider.bench.result import Result
from outrider.cli import bench_options as options
from outrider.cli.bench_tables import Grid
from outrider.request import OFF

KIND = "lossless"
FAILED, NOT_DECIDED = 1, 3  # exit status; 2 is a command that could not be run as it was asked for
STYLES = {
    FAIL: "bold red",
    NOT_LOSSLESS: "bold red",
    UNDECIDED: "yellow",
    LOSSY: "yellow",
    LOSSLESS: "green",
    ALIKE: "green",
}


def lossless_command(
    model: options.Model = None,
    url: options.Url = None,
    draft_model: options.DraftModel = None,
    engine: options.Engine = None,
    arm: options.Arms = None,
    base: Annotated[
        str,
        typer.Option(help='Who decodes plainly: "off", or the URL of a server that does.'),
    ] = OFF,
    level: Annotated[
        list[str] | None,
        typer.Option(
            help="L1: the same tokens. L2: the law of the rule, and counts of short answers. L3: "
            "every draw of a sampled run. May be repeated; all, if unset."
        ),
    ] = None,
    prompts: options.Prompts = OWN,
    limit: options.Limit = 16,
    max_tokens: options.MaxTokens = 64,
    temperature: Annotated[float, typer.Option(help="Of the sampled checks.")] = 1.0,
    draws: Annotated[
        int, typer.Option(min=1, help="Short answers per prompt that L2 counts.")
    ] = 1000,
    seed: options.Seed = 0,
    concurrency: options.Concurrency = 16,
    budget: options.Budget = 600.0,
    as_json: options.AsJson = None,
    out: options.Out = None,
    resume: options.Resume = False,
) -> None:
    """Are the answers with speculation those without, or at least drawn from the same law?

    Exit status 0: every arm is what it says it is. 1: one is not. 3: not decided, for want of
    budget, prompts or draws. 2: it could not be run as asked.

    A difference is examined: by how much the target itself preferred its token, beside what
    rounding alone changes. A server shows its answers only, so with --url greedy ones are compared,
    and that is all.
    """
    watch = Watch()
    against, *parsed = given = options.read_arms([base, *(arm or [options.DEFAULT])])
    target = options.as_one(
        options.open_by_arm(
            given,
            model,
            url,
            draft_model=draft_model,
            engine=engine,
            concurrency=concurrency,
            has_prices=False,
        )
    )
    data = options.read_dataset(prompts, limit, target)
    plan = Plan(
        base=against.arm,
        arms=tuple(one.arm for one in parsed),
        questions=data.questions,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        concurrency=concurrency,
        num_draws=draws,
        levels=tuple(level or LEVELS),
        budget_s=budget,
    )
    about = target.describe()
    path = options.result_path(as_json, out, KIND)
    with open_journal(path, options.identity(plan.identity(), about), resume=resume) as journal:
        with options.progress("looking") as tell:
            found = check_lossless(target, plan, journal, tell=tell)
        result = Result(
            kind=KIND,
            findings=found.to_json(),
            blocks=[{"key": key, "block": block} for key, block in journal.items()],
            settings={
                "base": options.label(against.arm.speculation),
                "arms": {one.name: options.label(one.speculation) for one in plan.arms},
                "levels": plan.levels,
                "max_tokens": max_tokens,
                "temperature": temperature,
                "num_draws": draws,
                "concurrency": concurrency,
                "draft_model": draft_model,
                "engine": engine,
                "url": url,
            },
            data=data.describe(),
            target=about,
            seeds={"answers": seed},
            provenance=watch.facts(),
        )
        options.save(result, as_json, out)
        journal.finish()
    console = Console()
    console.print(table(found))
    for line in told(found):
        console.print(line)
    if not found.passes:
        raise typer.Exit(FAILED if found.fails else NOT_DECIDED)


def table(found: Findings) -> Grid:
    """One row per check."""
    shown = Grid("arm", "", "check", "verdict", "what was seen", folds=("check", "what was seen"))
    for check in found.checks:
        verdict = Text(check.verdict, style=STYLES.get(check.verdict, ""))
        shown.add_row(Text(check.arm), check.level, check.test, verdict, Text(check.told))
    return shown


def told(found: Findings) -> list[Text]:
    """A line per arm, and what differences were measured against."""
    lines = []
    for arm in found.arms:
        rule = f" ({arm.rule}, {arm.exactness})" if arm.rule else ""
        verdict = Text(arm.verdict, style=STYLES.get(arm.verdict, ""))
        lines.append(Text(f"{arm.arm}{rule}: ").append_text(verdict))
    if not any(arm.rule for arm in found.arms):
        lines.append(Text("A server shows no laws: its greedy answers are all there is.", "dim"))
    if found.rounding is not None:
        one = found.rounding
        promise = "equal bits are promised" if one.is_bitwise else f"tie_eps {one.tie_eps:.2g} nats"
        lines.append(
            Text(
                f"Margins change by at most {one.largest:.2g} nats between passes of 1 and of "
                f"{one.width} rows ({one.num_positions} positions; {promise}).",
                style="dim",
            )
        )
    return lines
