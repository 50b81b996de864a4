"""`outrider bench load`: waits and throughput of many at once, in closed or open loop."""

from collections.abc import Callable, Mapping, Sequence as Items
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from outrider.bench.datasets import OWN, Dataset
from outrider.bench.journal import open_journal
from outrider.bench.load_run import Runner, best, described
from outrider.bench.load_summary import read_slo
from outrider.bench.provenance import Watch
from outrider.bench.result import Result, content_hash
from outrider.bench.talks import Habits
from outrider.cli import bench_load_options as load_options, bench_options as options
from outrider.cli.bench_load_levels import (
    CONCURRENCIES,
    Asked,
    encoder,
    levels,
    read_ramp,
    read_trace,
)
from outrider.cli.bench_tables import Grid

KIND = "load"
BUDGET_S = 600.0
LATE_MS = 20.0  # a client that sends so late measures itself
LEGEND = (
    "Median and 99th percentile: to the first token, per token after it, to the whole answer. "
    "AL: tokens per drafted step, the target's own included."
)
SATURATED = "Saturated: more came than was served, so waits only tell how long it went on."
SHORT = "Short: over before one could tell whether the queue grows; ask for more by --num-requests."
LATE = "The client could not send in time and measures itself"


def load_command(
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
    concurrency: load_options.Concurrencies = None,
    rate: load_options.Rates = None,
    burstiness: load_options.Burstiness = 1.0,
    ramp_of: load_options.Ramp = None,
    trace: load_options.TracePath = None,
    speed: load_options.Speed = 1.0,
    scale_lengths: load_options.ScaleLengths = 1.0,
    turns: load_options.Turns = 1,
    think: load_options.Think = 0.0,
    num_requests: load_options.NumRequests = None,
    duration: load_options.Duration = None,
    slo: load_options.Limits = None,
    tokenizer: load_options.TokenizerName = None,
    budget: options.Budget = BUDGET_S,
    as_json: options.AsJson = None,
    out: options.Out = None,
    resume: options.Resume = False,
) -> None:
    """How long do users wait, and what does the machine give, when many ask at once?

    Closed loop: so many users, each asking again once answered. Open loop: requests come at their
    own pace; a rate that cannot be served is noticed, told, and ends the search upwards.
    """
    watch = Watch()
    limits = read_slo(slo or ())
    parsed = options.read_arms(arm or [options.DEFAULT])
    in_flight = max(concurrency or CONCURRENCIES)
    targets = options.open_by_arm(
        parsed, model, url, draft_model=draft_model, engine=engine, concurrency=in_flight
    )
    first = targets[parsed[0].arm.name]
    data = options.read_dataset(prompts, limit, first)
    asked = Asked(
        data=data,
        trace=read_trace(trace, speed, scale_lengths, num_requests, first),
        concurrencies=tuple(concurrency or ()),
        rates=tuple(sorted(rate or ())),
        burstiness=None if burstiness == float("inf") else burstiness,
        ramp=None if ramp_of is None else read_ramp(ramp_of),
        habits=Habits(num_turns=turns, think_s=think, seed=seed) if turns > 1 else None,
        num_requests=num_requests,
        duration=duration,
        seed=seed,
    )
    plain = options.sampling_params(max_tokens, temperature, seed, ignore_eos=ignore_eos)
    run = Runner(
        targets,
        list(levels(asked, encoder(first, tokenizer))),
        [one.arm for one in parsed],
        plain if trace is None else replace(plain, max_tokens=None, ignore_eos=True),
        limits,
        budget,
    )
    settings = _settings(run, asked, draft_model=draft_model, engine=engine, url=url)
    path = options.result_path(as_json, out, KIND)
    found = _measured(run, data, settings, path, watch, resume=resume)
    options.save(found, as_json, out)
    if not run.finish():
        typer.echo("the budget was over before the last load: go on by --resume", err=True)
    console = Console()
    console.print(table(run.levels))
    console.print(told(found), style="dim")


def _measured(
    run: Runner,
    data: Dataset,
    settings: dict[str, Any],
    path: Path | None,
    watch: Watch,
    *,
    resume: bool,
) -> Result:
    """All loads, those that an interrupted run finished taken from its journal."""
    about, seed = described(run.targets), run.sampling.seed or 0
    requests = content_hash([(level.questions, level.at_s) for level in run.loads])
    identity = options.identity({**settings, "requests": requests, "seed": seed}, about)
    with (
        open_journal(path, identity, resume=resume) as journal,
        options.progress("warming up") as tell,
    ):
        run.to_the_end(journal, tell)
    return Result(
        kind=KIND,
        findings={
            "levels": run.levels,
            "left_out": run.left_out,
            "best": best(run.levels),
            "rounds": run.num_rounds(len(data.questions)),
        },
        blocks=run.blocks,
        settings=settings,
        data=data.describe(),
        target=about,
        seeds={"seed": seed},
        provenance=watch.facts(),
    )


def _settings(run: Runner, asked: Asked, **given: Any) -> dict[str, Any]:
    """What was asked for, defaults filled in."""
    habits = asked.habits or Habits(num_turns=1, think_s=0.0)
    return {
        "arms": run.arms,
        "levels": [level.name for level in run.loads],
        "sampling": run.sampling,
        "burstiness": "inf" if asked.burstiness is None else asked.burstiness,
        "turns": habits.num_turns,
        "think_s": habits.think_s,
        "duration": asked.duration,
        "slo": run.slo,
        "trace": asked.trace.describe() if asked.trace else None,
        **given,
    }


def table(levels: Items[Mapping[str, Any]]) -> Grid:
    """A line per load and arm; columns that would be empty are left out."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "req\n/s": lambda level: f"{level['request_throughput']:.2f}",
        "tok\n/s": lambda level: f"{level['output_throughput']:.0f}",
        "first\nms": lambda level: _pair(level, "ttft"),
        "token\nms": lambda level: _pair(level, "tpot"),
        "whole\ns": lambda level: _pair(level, "e2el", 1e-3),
    }
    if any("spec_decode_acceptance_length" in level for level in levels):
        columns["AL"] = _length
    if any("request_goodput" in level for level in levels):
        columns["good\n/s"] = lambda level: f"{level['request_goodput']:.2f}"
    if any(level["failed"] for level in levels):
        columns["failed"] = lambda level: str(level["failed"])
    shown = Grid("load", *columns)
    title = ""
    for level in levels:
        if level["name"] != title:
            title = level["name"]
            shown.add_row(title)
        cells = [cell(level) for cell in columns.values()]
        shown.add_row(f"  {level['arm']}{_mark(level)}", *cells)
    return shown


def told(found: Result) -> str:
    """How to read the table, and what was left out."""
    levels = found.findings["levels"]
    errors = [f"{count} x {why}" for level in levels for why, count in level["errors"].items()]
    is_remote = found.target.get("kind") == "remote"  # else the engine is busy, not the client
    late = [level["name"] for level in levels if is_remote and (level["p99_lag_ms"] or 0) > LATE_MS]
    slo = ", ".join(f"{name} {limit:g} ms" for name, limit in found.settings["slo"].items())
    left_out = "; ".join(found.findings["left_out"])
    is_saturated = any(level["saturated"] for level in levels)
    is_short = any(level["too_short"] for level in levels)
    rounds = found.findings["rounds"] or 1
    again = f"Each prompt was asked up to {rounds} times, the later ones from the prefix cache."
    parts = [
        LEGEND,
        again if rounds > 1 else "",
        SATURATED if is_saturated else "",
        SHORT if is_short else "",
        f"Good: within {slo}." if slo else "",
        f"Left out: {left_out}." if left_out else "",
        f"Failed: {'; '.join(errors)}." if errors else "",
        f"{LATE}: {', '.join(dict.fromkeys(late))}." if late else "",
    ]
    return " ".join(filter(None, parts))


def _mark(level: Mapping[str, Any]) -> str:
    return " (saturated)" if level["saturated"] else " (short)" if level["too_short"] else ""


def _pair(level: Mapping[str, Any], name: str, factor: float = 1.0) -> str:
    median, high = (level[f"{which}_{name}_ms"] for which in ("median", "p99"))
    if median is None:
        return "-"
    return f"{_short(median * factor)}/{_short(high * factor)}"


def _short(value: float) -> str:
    """Two or three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _length(level: Mapping[str, Any]) -> str:
    length = level.get("spec_decode_acceptance_length")
    return "-" if length is None else f"{length:.2f}"
