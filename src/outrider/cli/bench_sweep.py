"""`outrider bench sweep`: how far to draft at which load."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from outrider.bench.calibration.calibrate import Calibration, with_depth
from outrider.bench.datasets import OWN
from outrider.bench.inprocess import InProcess
from outrider.bench.journal import Journal, open_journal
from outrider.bench.provenance import Watch
from outrider.bench.result import Result
from outrider.bench.statistics import EPS
from outrider.bench.sweep.advise import usual_arms
from outrider.bench.sweep.findings import findings
from outrider.bench.sweep.grid import BASE, CONCURRENCIES, DEPTHS, Cell, SweepPlan
from outrider.bench.sweep.run import Progressed, Sweep
from outrider.bench.target import Arm, Target
from outrider.cli import bench_options as options
from outrider.cli.bench_calibrate import (
    calibrated,
    load_calibration,
    read_integers,
    read_numbers,
)
from outrider.cli.bench_tables import Grid
from outrider.errors import ConfigError
from outrider.request import OFF

CALIBRATION_SHARE = 0.15  # of the budget
CALIBRATION_S = 45.0  # at most

Ks = Annotated[str, typer.Option("--draft-tokens", help="K: how far to draft, as 1,2,4,8.")]
Concurrencies = Annotated[
    str, typer.Option("--concurrency", "-c", help="Requests in flight, as 1,4,16.")
]
Temperatures = Annotated[str, typer.Option("--temperature", help="As 0,0.7; 0 is greedy.")]
Contexts = Annotated[
    str | None,
    typer.Option("--context", help="Tokens before the answer, as 256,4096; prompts as they are."),
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option("--calibration", help="Of `bench calibrate`; timed anew if unset."),
]


def sweep_command(
    model: options.Model = None,
    url: options.Url = None,
    draft_model: options.DraftModel = None,
    engine: options.Engine = None,
    arm: options.Arms = None,
    draft_tokens: Ks = ",".join(map(str, DEPTHS)),
    concurrency: Concurrencies = ",".join(map(str, CONCURRENCIES)),
    temperature: Temperatures = "0",
    context: Contexts = None,
    prompts: options.Prompts = OWN,
    limit: options.Limit = None,
    max_tokens: options.MaxTokens = 64,
    seed: options.Seed = 0,
    ignore_eos: options.IgnoreEos = False,
    adaptive: Annotated[
        bool, typer.Option(help="Also measure the adaptive policy at every load.")
    ] = True,
    calibration: CalibrationFile = None,
    budget: options.Budget = 300.0,
    eps: options.Eps = EPS,
    as_json: options.AsJson = None,
    out: options.Out = None,
    resume: options.Resume = False,
) -> None:
    """How far to draft at which load: K by concurrency, method and temperature.

    Each cell is predicted from timings of passes and drafters first; then those that matter most
    are measured against plain decoding, with intervals, for as long as --budget says. Arms are
    methods; one that says its K has that K alone. Without --arm: the draft model, or ngram. By URL
    nothing is predicted, and K can be varied on our own server only.
    """
    watch = Watch()
    loads = read_integers("--concurrency", concurrency)
    depths = read_integers("--draft-tokens", draft_tokens)
    temperatures = read_numbers("--temperature", temperature)
    contexts = (None,) if context is None else read_integers("--context", context)
    target = options.open_target(
        model, url, draft_model=draft_model, engine=engine, concurrency=max(loads)
    )
    data = options.read_dataset(prompts, limit, target)
    base, arms = _arms(arm, target)
    plan = SweepPlan(
        arms=arms,
        base=base,
        questions=data.questions,
        depths=depths,
        concurrencies=loads,
        temperatures=temperatures,
        contexts=contexts,
        max_tokens=max_tokens,
        ignore_eos=ignore_eos,
        with_controller=adaptive and is_ours(target),
        eps=eps,
        budget_s=budget,
        seed=seed,
    )
    Sweep(target, plan)  # refuses contexts without room before anything is timed
    about = target.describe()
    path = options.result_path(as_json, out, "sweep")
    with open_journal(path, options.identity(plan.identity(), about), resume=resume) as journal:
        prices = prices_for(target, plan, journal, calibration)
        cells, blocks = swept(target, plan, prices, journal)
        found = Result(
            kind="sweep",
            findings=findings(cells, plan),
            blocks=[*([] if prices is None else [{"calibration": prices.to_json()}]), *blocks],
            settings=settings(plan, draft_model=draft_model, engine=engine, url=url),
            data=data.describe(),
            target=about,
            seeds={"run": seed},
            provenance=watch.facts(),
        )
        options.save(found, as_json, out)
        journal.finish()
    console = Console()
    for one in tables(cells):
        console.print(one)
    console.print(found.findings["summary"])
    console.print(LEGEND, style="dim")


LEGEND = (
    "Times as fast as plain decoding: measured with its 95 % interval, or ~ predicted. * is surely "
    "faster, ! surely slower: beyond the noise of the run. need / got: tokens per pass at which K "
    "would gain nothing, and those there were."
)


def prices_for(
    target: Target, plan: SweepPlan, journal: Journal, path: Path | None = None
) -> Calibration | None:
    """From a file, from an interrupted run, or timed now; None for a server."""
    if not isinstance(target, InProcess):
        if path is not None:
            raise ConfigError(f"--calibration {str(path)!r}: nothing is predicted of a server")
        return None
    if path is not None:
        return load_calibration(path, target)
    if "calibration" not in journal:
        found = calibrated(
            target,
            [_deepest(arm, plan) for arm in plan.arms],
            plan.questions,
            temperatures=plan.temperatures,
            budget_s=min(CALIBRATION_SHARE * plan.budget_s, CALIBRATION_S),
            seed=plan.seed,
        )
        journal.add("calibration", found.to_json())
    return Calibration.from_json(journal["calibration"])


def swept(
    target: Target, plan: SweepPlan, prices: Calibration | None, journal: Journal
) -> tuple[list[Cell], list[dict[str, Any]]]:
    """Cells and blocks, with a bar on stderr; in what timing has left of the budget."""
    if prices is not None:
        left_s = plan.budget_s - min(CALIBRATION_SHARE * plan.budget_s, CALIBRATION_S)
        plan = replace(plan, budget_s=left_s)
    with options.progress("measuring", 100 * len(plan.loads)) as tell:

        def tick(at: Progressed) -> None:
            tell(round(100 * (at.num_done + at.share)), 100 * at.num_loads, at.told)

        sweep = Sweep(target, plan, calibration=prices, journal=journal, tick=tick)
        return sweep.run(), sweep.blocks


def settings(plan: SweepPlan, **given: Any) -> dict[str, Any]:
    return {
        "arms": [arm.name for arm in plan.arms],
        "depths": plan.depths,
        "concurrencies": plan.concurrencies,
        "temperatures": plan.temperatures,
        "contexts": plan.contexts,
        "max_tokens": plan.max_tokens,
        "ignore_eos": plan.ignore_eos,
        "eps": plan.eps,
        "budget_s": plan.budget_s,
        **given,
    }


def tables(cells: list[Cell]) -> list[Grid]:
    """One per method, temperature and context: K down, concurrency across."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        place = cell.place
        context = "" if place.context is None else f", context {place.context}"
        name = f"{cell.variant.method}, temperature {place.temperature:g}{context}"
        groups.setdefault(name, []).append(cell)
    return [_table(name, group) for name, group in groups.items()]


def is_ours(target: Target) -> bool:
    """Whether requests may say how far to draft."""
    return target.describe().get("engine") == "outrider"


def _table(name: str, cells: list[Cell]) -> Grid:
    loads = sorted({cell.place.concurrency for cell in cells})
    shown = Grid("K", *(f"{load} at once\nneed / got" for load in loads), title=name)
    rows: dict[str, dict[int, Cell]] = {}
    for cell in cells:
        k = "adaptive" if cell.variant.is_adaptive else str(cell.variant.k or "-")
        rows.setdefault(k, {})[cell.place.concurrency] = cell
    for k in sorted(rows, key=lambda k: (not k.isdigit(), k.rjust(4))):
        shown.add_row(k, *(_told(rows[k].get(load)) for load in loads))
    return shown


MARKS = {"faster": "*", "slower": "!"}


def _told(cell: Cell | None) -> str:
    if cell is None or cell.speedup is None:
        return "-"
    if cell.pair is None:
        return f"~{cell.speedup:.2f}"
    pair = cell.pair
    interval = pair.interval_told if pair.ratio.is_known else "unknown"
    told = f"{pair.ratio.ratio:.2f}{MARKS.get(pair.verdict, '')} ({interval})"
    if cell.needed is None or cell.tokens_per_pass is None:
        return told
    return f"{told}\n{cell.needed:.2f} / {cell.tokens_per_pass:.2f}"


def _arms(texts: list[str] | None, target: Target) -> tuple[Arm, tuple[Arm, ...]]:
    """Plain decoding, and who is held against it: an arm named "off" is the former."""
    given = [parsed.arm for parsed in options.read_arms(texts or [])]
    base = next((arm for arm in given if _is_off(arm)), BASE)
    arms = [arm for arm in given if not _is_off(arm)]
    if not arms and isinstance(target, InProcess):
        arms = usual_arms(target)[:1]
    if not arms:
        raise ConfigError("no arm drafts: give --arm, as --arm ngram")
    return base, tuple(arms)


def _is_off(arm: Arm) -> bool:
    return arm.name == OFF or (arm.speculation is not None and arm.speculation.is_off)


def _deepest(arm: Arm, plan: SweepPlan) -> Arm:
    """At the largest K that is asked for: drafts of all others are the first part of it."""
    if arm.speculation is None:
        raise ConfigError(f"--arm {arm.name!r}: in this process an arm names its method")
    depth = arm.speculation.num_draft_tokens or max(plan.depths)
    return replace(arm, speculation=with_depth(arm.speculation, depth))
