"""`outrider bench cost`: what a million tokens of each class costs on this machine."""

import time
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console

from outrider.bench.cost import Bill, Plan, Slo, measure, num_ticks
from outrider.bench.datasets import OWN
from outrider.bench.energy import EnergyMeter, find_counters
from outrider.bench.inprocess import InProcess
from outrider.bench.journal import open_journal
from outrider.bench.meter import Fit
from outrider.bench.prices import findings
from outrider.bench.provenance import Watch
from outrider.bench.result import Result
from outrider.bench.target import Arm, Target
from outrider.cli import bench_options as options
from outrider.cli.bench_tables import Grid
from outrider.errors import ConfigError

KIND = "cost"
ELSEWHERE = "the server runs elsewhere: its counters cannot be read from here"


def cost_command(
    model: options.Model = None,
    dollars_per_hour: Annotated[
        float | None,
        typer.Option(help="What the machine costs; without it seconds are told, and no price."),
    ] = None,
    url: options.Url = None,
    draft_model: options.DraftModel = None,
    engine: options.Engine = None,
    arm: options.Arms = None,
    prompts: options.Prompts = OWN,
    limit: options.Limit = 16,
    max_tokens: options.MaxTokens = 64,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    ignore_eos: options.IgnoreEos = False,
    concurrency: options.Concurrency = 8,
    repeat: Annotated[
        int,
        typer.Option(min=1, help="Rounds over the prompts; all but the first meet a warm cache."),
    ] = 2,
    request_rate: Annotated[
        float | None,
        typer.Option(help="Requests per second, Poisson; as soon as there is room, if unset."),
    ] = None,
    ttft_ms: Annotated[
        float | None, typer.Option(help="Answers whose first token takes longer earn nothing.")
    ] = None,
    tpot_ms: Annotated[
        float | None, typer.Option(help="Answers with more time per further token earn nothing.")
    ] = None,
    budget: options.Budget = 600.0,
    as_json: options.AsJson = None,
    out: options.Out = None,
    resume: options.Resume = False,
) -> None:
    """What do a million prompt, cached and output tokens cost, and what does speculation save?

    In dollars by --dollars-per-hour, else in seconds of the machine. From measured seconds: every
    step's time is shared among the tokens it held, and with the idle time the shares add up to the
    wall clock. Of a server by --url, prices come from the difference between runs with and without
    answers. Energy is told where the machine counts it.
    """
    watch = Watch()
    parsed = options.read_arms(arm or [options.DEFAULT])
    if own := next((one.url for one in parsed if one.url), None):
        raise ConfigError(f"--arm {own!r}: one machine has one price; measure it by --url {own}")
    target = options.open_target(
        model, url, draft_model=draft_model, engine=engine, concurrency=concurrency
    )
    data = options.read_dataset(prompts, limit, target)
    plan = Plan(
        arms=tuple(one.arm for one in parsed),
        questions=data.questions,
        sampling=options.sampling_params(max_tokens, temperature, seed, ignore_eos=ignore_eos),
        dollars_per_hour=dollars_per_hour,
        concurrency=concurrency,
        repeat=repeat,
        request_rate=request_rate,
        slo=Slo(ttft_s=_seconds(ttft_ms), tpot_s=_seconds(tpot_ms)),
        seed=seed,
    )
    about = target.describe()
    path = options.result_path(as_json, out, KIND)
    with open_journal(path, options.identity(plan.identity(), about), resume=resume) as journal:
        late = time.monotonic() + budget
        for one in plan.arms:
            if one.name not in journal and (time.monotonic() < late or not len(journal)):
                journal.add(one.name, _measured(target, plan, one))
        bills = [_read(journal[one.name]) for one in plan.arms if one.name in journal]
        result = Result(
            kind=KIND,
            findings=findings(bills, plan),
            blocks=bills,
            settings={
                "dollars_per_hour": dollars_per_hour,
                "arms": {one.name: options.label(one.speculation) for one in plan.arms},
                "max_tokens": max_tokens,
                "temperature": temperature,
                "ignore_eos": ignore_eos,
                "concurrency": concurrency,
                "repeat": repeat,
                "request_rate": request_rate,
                "ttft_ms": ttft_ms,
                "tpot_ms": tpot_ms,
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
        if len(bills) == len(plan.arms):
            journal.finish()
        else:
            typer.echo("the budget was over before the last arm: go on by --resume", err=True)
    console = Console()
    console.print(table(result))
    for line in told(result):
        console.print(line, style="dim", markup=False)


def table(result: Result) -> Grid:
    """One row per class of each arm, and the idle time."""
    has_price = result.findings["dollars_per_hour"] is not None
    keys = {
        "s per\nmillion": "seconds_per_million",
        **({"$ per\nmillion": "dollars_per_million"} if has_price else {}),
        "with idle\ntime": "with_idle" if has_price else "seconds_with_idle",
    }
    if any(row["within_slo"] is not None for row in result.findings["classes"]):
        keys["within\nlimits"] = "within_slo"
    shown = Grid("arm", "of class", "tokens", "seconds", *keys, folds=("of class",))
    for row in result.findings["classes"]:
        cells = [f"{row['tokens']}", f"{row['seconds']:.2f}"]
        cells += [_price(row[key]) for key in keys.values()]
        shown.add_row(row["arm"], row["class"].removesuffix(f" ({row['arm']})"), *cells)
    for arm in result.findings["arms"]:
        idle = arm["idle_s"]
        shown.add_row(arm["name"], "idle", "", "-" if idle is None else f"{idle:.2f}")
    return shown


def told(result: Result) -> list[str]:
    """Per arm what a single price hides: the mix, how busy the machine was, energy."""
    return [result.findings["summary"], *map(_told_of, result.findings["arms"])]


def _told_of(arm: Mapping[str, Any]) -> str:
    busy = arm["utilisation"]
    price = arm["blended_dollars_per_million"]
    seconds = arm["blended_seconds_per_million"]
    blended = f"{_price(seconds)} s" if price is None else f"{_price(price)} $"
    parts = [
        f"{arm['name']}: {blended} per million of any kind",
        f"{arm['input_to_output']:.2f} input tokens per output token"
        if arm["input_to_output"] is not None
        else "no output",
        f"seconds {arm['method']}",
        "" if busy is None else f"utilisation {100 * busy:.1f} %",
        f"{arm['num_failed']} answers failed ({arm['first_error']})" if arm["num_failed"] else "",
        f"{arm['joules_per_output_token']:.3g} J per output token"
        if arm["joules_per_output_token"] is not None
        else f"no energy ({arm['power_why_not']})",
    ]
    return "; ".join(filter(None, parts)) + "."


def _measured(target: Target, plan: Plan, arm: Arm) -> Bill:
    with options.progress(arm.name, float(num_ticks(target, plan))) as tell:
        num_done = 0

        def tick() -> None:
            nonlocal num_done
            num_done += 1
            tell(float(num_done))

        return measure(target, plan, arm, _energy(target), tick=tick)


def _energy(target: Target) -> EnergyMeter:
    if not isinstance(target, InProcess):
        return EnergyMeter(why_not=ELSEWHERE)
    return find_counters(gpus=target.llm.engine.spec.device.type == "cuda")


def _read(held: Mapping[str, Any]) -> Bill:
    """A bill as the journal gives it back."""
    fit = held["fit"]
    return Bill(**{**held, "fit": None if fit is None else Fit(**fit)})


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _price(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
