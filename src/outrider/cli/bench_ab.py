"""`outrider bench ab`: arms against each other on one target, with intervals, beside a null arm."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console

from outrider.bench.ab import BUDGET_S, Measured, Plan, Progressed, measure
from outrider.bench.datasets import OWN
from outrider.bench.journal import open_journal
from outrider.bench.pairs import result
from outrider.bench.provenance import Watch
from outrider.bench.result import Result
from outrider.bench.statistics import EPS
from outrider.cli import bench_options as options
from outrider.cli.bench_options import Parsed
from outrider.cli.bench_tables import Grid
from outrider.request import OFF

MANY_MARKED = 0.2  # of all blocks


def ab_command(
    model: options.Model = None,
    url: options.Url = None,
    draft_model: options.DraftModel = None,
    engine: options.Engine = None,
    arm: options.Arms = None,
    prompts: options.Prompts = OWN,
    limit: options.Limit = None,
    max_tokens: options.MaxTokens = 64,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    ignore_eos: options.IgnoreEos = False,
    concurrency: options.Concurrency = 1,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts of a block; twice the concurrency if unset."),
    ] = None,
    budget: options.Budget = BUDGET_S,
    eps: options.Eps = EPS,
    as_json: options.AsJson = None,
    out: options.Out = None,
    resume: options.Resume = False,
) -> None:
    """Is one way to answer faster than another? With an interval, a verdict, and the noise.

    Every prompt is put to all arms, there and back (A B B A), on the same engine. The first arm
    also runs against itself: what that gives is noise. Give two arms or more; a single one is
    compared with "off". A URL as an arm is a server of its own.
    """
    watch = Watch()
    parsed = _arms(arm)
    target = options.as_one(
        options.open_by_arm(
            parsed, model, url, draft_model=draft_model, engine=engine, concurrency=concurrency
        )
    )
    data = options.read_dataset(prompts, limit, target)
    plan = Plan(
        arms=tuple(one.arm for one in parsed),
        questions=data.questions,
        sampling=options.sampling_params(max_tokens, temperature, seed, ignore_eos=ignore_eos),
        concurrency=concurrency,
        batch=batch,
        eps=eps,
        budget_s=budget,
        seed=seed,
    )
    about = target.describe()
    path = options.result_path(as_json, out, "ab")
    with open_journal(path, options.identity(plan.identity(), about), resume=resume) as journal:
        with options.progress("warming up", 1.0) as tell:
            measured = measure(target, plan, journal=journal, tick=_Teller(tell, budget))
        found = result(
            measured,
            data=data.describe(),
            target=about,
            provenance=watch.facts(),
            settings={"draft_model": draft_model, "engine": engine, "url": url},
        )
        options.save(found, as_json, out)
        journal.finish()
    console = Console()
    console.print(table(found))
    console.print(told(found, measured), style="dim")


def table(found: Result) -> Grid:
    """Arms, each beside the first."""
    shown = Grid("arm", "tokens/s", "times as fast (95 %)", "verdict", "accept-\nance", "same")
    first, *others = found.findings["arms"]
    base_pairs = [pair for pair in found.findings["pairs"] if pair["base"] == first["name"]]
    shown.add_row(first["name"], _speed(first))
    for arm, pair in zip(others, base_pairs, strict=True):
        acceptance = arm.get("acceptance")
        shown.add_row(
            arm["name"],
            _speed(arm),
            _ratio(pair),
            pair["verdict"],
            f"{acceptance['acceptance_length']:.2f}" if acceptance else "-",
            f"{pair['num_identical']}/{pair['num_prompts']}",
        )
    null = found.findings["null"]
    shown.add_row(f"null: {first['name']}", "", _ratio(null), null["verdict"])
    return shown


def told(found: Result, measured: Measured) -> str:
    """How to read the table, and how the run ended."""
    run = found.findings["run"]
    left_out = "".join(f"; {count} left out: {why}" for why, count in run["left_out"].items())
    steady = "" if run["is_steady"] else " The machine had not settled after the warm-up."
    if run["num_marked"] > MANY_MARKED * run["num_blocks"]:
        steady += " Other work disturbed many blocks: an idle machine tells more, and sooner."
    eps = 100 * measured.plan.eps
    servers = (
        "" if found.target.get("one_process", True) else " The arms did not run in one process."
    )
    unknown = _unknown(found.findings["null"])
    return (
        f"{run['num_blocks']} blocks, {run['num_marked']} marked as disturbed{left_out}; "
        f"stopped by {run['stopped_by']}. times as fast: by {run['compared_by']}. tokens/s: all "
        f"tokens over all seconds, waiting for the first one included.{unknown} Equal: the whole "
        f"interval within {eps:g} % of 1. Faster or slower: the interval leaves out 1, and the "
        "ratio is farther from 1 than the null arm's interval reaches. acceptance: tokens per "
        "drafted step, the target's own included. same: prompts whose answers were the same in "
        f"every run.{steady}{servers}"
    )


class _Teller:
    """Turns where the run stands into the bar's words."""

    def __init__(self, tell: Any, budget_s: float) -> None:
        self._tell, self._budget_s = tell, budget_s

    def __call__(self, at: Progressed) -> None:
        width = "" if at.half_width > 1 else f", within {100 * at.half_width:.1f} %"
        goal = f" of {100 * at.goal:.1f} %" if width else ""
        self._tell(
            min(at.seconds, self._budget_s), self._budget_s, f"block {at.num_blocks}{width}{goal}"
        )


def _arms(texts: list[str] | None) -> list[Parsed]:
    """At least two: one alone is compared with "off"; none is what the target does by itself."""
    given = list(texts or [options.DEFAULT])
    return options.read_arms(given if len(given) > 1 else [OFF, *given])


def _speed(arm: Mapping[str, Any]) -> str:
    return f"{arm['tokens_per_second']:.1f}"


def _ratio(pair: Mapping[str, Any]) -> str:
    if pair["interval"] is None:
        return f"{pair['ratio']:.3f} (unknown)"
    low, high = pair["interval"]
    return f"{pair['ratio']:.3f} ({low:.3f} to {high:.3f})"


def _unknown(null: Mapping[str, Any]) -> str:
    """Why there are no intervals, where there are none."""
    note = null["interval_note"]
    return f" Intervals are {note}; give more prompts." if note else ""
