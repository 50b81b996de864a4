"""`outrider bench ab`: arms against each other on one target, with intervals, beside a null arm."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from outrider.bench.ab import BUDGET_S, Measured, Plan, Progressed, measure
from outrider.bench.by_arm import ByArm
from outrider.bench.datasets import OWN
from outrider.bench.journal import open_journal
from outrider.bench.pairs import result
from outrider.bench.provenance import Watch
from outrider.bench.result import Result
from outrider.bench.statistics import EPS
from outrider.bench.target import Target
from outrider.cli import bench_options as options
from outrider.cli.bench_options import Parsed
from outrider.errors import ConfigError
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
    target = _target(parsed, model, url, draft_model, engine, concurrency)
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
    identity = {**plan.identity(), "model": about.get("model_hash") or about.get("model")}
    with open_journal(path, identity, resume=resume) as journal:
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


def table(found: Result) -> Table:
    """Arms, each beside the first."""
    shown = Table(box=SIMPLE, padding=0, expand=False)
    shown.add_column("arm", overflow="fold", min_width=16)
    for name in ("tokens/s", "times as fast (95 %)", "verdict", "acceptance", "same"):
        shown.add_column(name, justify="right", no_wrap=True)
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
    return (
        f"{run['num_blocks']} blocks, {run['num_marked']} marked as disturbed{left_out}; "
        f"stopped by {run['stopped_by']}. Equal: the whole interval within {eps:g} % of 1. Faster "
        "or slower: the interval leaves out 1, and the ratio is farther from 1 than the null arm's "
        "interval reaches. acceptance: tokens per drafted step, the target's own included. same: "
        f"prompts whose answers were the same in every run.{steady}{servers}"
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


def _target(
    parsed: list[Parsed],
    model: str | None,
    url: str | None,
    draft_model: str | None,
    engine: str | None,
    concurrency: int,
) -> Target:
    """One for all arms, or by arm where some have a server of their own."""
    of_server: dict[str | None, Target] = {
        one.url: options.open_target(model, one.url) for one in parsed if one.url is not None
    }
    if len([one for one in parsed if one.url]) == len(parsed):
        if url is not None:
            raise ConfigError(f"--url {url!r}: every arm has a server of its own; drop it")
        return ByArm(_by_name(parsed, of_server))
    shared = options.open_target(
        model, url, draft_model=draft_model, engine=engine, concurrency=concurrency
    )
    return ByArm(_by_name(parsed, {None: shared, **of_server})) if of_server else shared


def _by_name(parsed: list[Parsed], targets: Mapping[str | None, Target]) -> dict[str, Target]:
    return {one.arm.name: targets[one.url] for one in parsed}


def _speed(arm: Mapping[str, Any]) -> str:
    return f"{arm['tokens_per_second']:.1f}"


def _ratio(pair: Mapping[str, Any]) -> str:
    low, high = pair["interval"]
    return f"{pair['ratio']:.3f} ({low:.3f} to {high:.3f})"
