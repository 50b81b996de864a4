"""`outrider bench advise`: whether speculation pays here, and how."""

from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.console import Console

from outrider.bench.datasets import OWN, Dataset, load_dataset
from outrider.bench.inprocess import InProcess
from outrider.bench.journal import Journal
from outrider.bench.provenance import Watch
from outrider.bench.result import Result
from outrider.bench.statistics import EPS
from outrider.bench.sweep.advise import (
    Advice,
    Candidate,
    advise,
    candidates,
    measured_pairs,
    only_predicted,
    promising,
    table,
    usual_arms,
)
from outrider.bench.sweep.grid import DEPTHS, Cell, SweepPlan
from outrider.bench.target import Arm, Target
from outrider.cli import bench_options as options
from outrider.cli.bench_calibrate import read_integers
from outrider.cli.bench_sweep import Concurrencies, Ks, is_ours, prices_for, settings, swept
from outrider.cli.bench_tables import Grid
from outrider.errors import ConfigError

BUDGET_S = 180.0
CONCURRENCIES = (1, 8)


def advise_command(
    model: options.Model = None,
    url: options.Url = None,
    draft_model: Annotated[
        list[str] | None,
        typer.Option(help="A smaller model to draft with; may be repeated, one engine for each."),
    ] = None,
    engine: options.Engine = None,
    arm: options.Arms = None,
    draft_tokens: Ks = ",".join(map(str, DEPTHS)),
    concurrency: Concurrencies = ",".join(map(str, CONCURRENCIES)),
    temperature: options.Temperature = 0.0,
    prompts: options.Prompts = OWN,
    limit: options.Limit = None,
    max_tokens: options.MaxTokens = 64,
    seed: options.Seed = 0,
    budget: options.Budget = BUDGET_S,
    eps: options.Eps = EPS,
    as_json: options.AsJson = None,
    out: options.Out = None,
) -> None:
    """Does speculation pay for this model, text and load? With which drafter, and how far?

    Tries the draft models that are named, and drafters that need none. All are predicted from
    timings; the most promising are measured against plain decoding.
    """
    watch = Watch()
    loads = read_integers("--concurrency", concurrency)
    names: list[str | None] = list(draft_model) if draft_model else [None]
    found: list[Candidate] = []
    blocks: list[dict[str, Any]] = []
    for number, name in enumerate(names):
        target = options.open_target(
            model, url, draft_model=name, engine=engine, concurrency=max(loads)
        )
        data = _read(prompts, limit, target, is_first=number == 0)
        plan = SweepPlan(
            arms=_arms(arm, target, with_tokens=number == 0),
            questions=data.questions,
            depths=read_integers("--draft-tokens", draft_tokens),
            concurrencies=loads,
            temperatures=(temperature,),
            max_tokens=max_tokens,
            with_controller=is_ours(target),
            eps=eps,
            budget_s=budget / len(names),
            seed=seed,
        )
        cells, own = _examined(target, plan)
        found += candidates(name or "", cells)
        blocks += [{"draft_model": name, **block} for block in own]
    told = advise(found)
    result = Result(
        kind="advise",
        findings={**told.to_json(), "table": table(found), "pairs": measured_pairs(found)},
        blocks=blocks,
        settings=settings(plan, draft_models=names, engine=engine, url=url),
        data=data.describe(),
        target=target.describe(),
        seeds={"run": seed},
        provenance=watch.facts(),
    )
    options.save(result, as_json, out)
    _show(told, found)


def _examined(target: Target, plan: SweepPlan) -> tuple[list[Cell], list[dict[str, Any]]]:
    """Cells of one engine: all predicted, the most promising measured."""
    journal = Journal(None, {})
    prices = prices_for(target, plan, journal)
    if prices is None or not isinstance(target, InProcess):
        return swept(target, plan, None, journal)
    kept = replace(plan, arms=promising(plan, target, prices))
    cells, blocks = swept(target, kept, prices, journal)
    return [*cells, *only_predicted(plan, kept, target, prices)], blocks


def _arms(texts: list[str] | None, target: Target, *, with_tokens: bool) -> tuple[Arm, ...]:
    """As named, or this engine's draft model, and once the drafters that need none."""
    if texts:
        arms = [parsed.arm for parsed in options.read_arms(texts)]
        return tuple(one for one in arms if one.speculation is None or not one.speculation.is_off)
    if not isinstance(target, InProcess):
        raise ConfigError("--url: name what to try, as --arm ngram")
    found = usual_arms(target, with_tokens=with_tokens)
    if not found:
        raise ConfigError("nothing to try: give --draft-model, or --arm")
    return tuple(found)


def _read(prompts: str, limit: int | None, target: Target, *, is_first: bool) -> Dataset:
    """The prompts; what is said of them is said once."""
    if is_first:
        return options.read_dataset(prompts, limit, target)
    data = load_dataset(prompts, limit=limit)
    return data if getattr(target, "has_chat_template", True) else data.as_text()


COLUMNS = (
    *("at\nonce", "best\nK", "times\nas fast", "95 %\ninterval", "\nverdict"),
    *("pre-\ndicted", "adap-\ntive"),
)


def _show(told: Advice, found: list[Candidate]) -> None:
    console = Console()
    shown = Grid("drafter", *COLUMNS)
    for row in table(found):
        interval = row["interval"]
        drafter = row["drafter"]
        shown.add_row(
            f"{drafter} ({row['draft_model']})" if row["draft_model"] else drafter,
            str(row["concurrency"]),
            str(row["num_draft_tokens"] or "-"),
            _number(row["ratio"]),
            _ends(interval, row["interval_note"]),
            row["verdict"] or "-",
            _number(row["predicted"]),
            _number(row["adaptive_ratio"]),
        )
    console.print(shown)
    console.print(told.answer)


def _ends(interval: tuple[float, float] | None, note: str | None) -> str:
    if interval is None:
        return "unknown" if note else "-"
    return f"{interval[0]:.2f} to {interval[1]:.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
