"""`outrider bench load`: waits and throughput of many at once, in closed or open loop."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence as Items
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from outrider.bench.datasets import OWN
from outrider.bench.journal import Journal, open_journal
from outrider.bench.load import Level, Server, closed_loop, measure
from outrider.bench.load_summary import blocks, read_slo, summary
from outrider.bench.provenance import Watch
from outrider.bench.result import Result, content_hash
from outrider.bench.talks import Habits
from outrider.bench.target import Arm
from outrider.cli import bench_options as options
from outrider.cli.bench_load_levels import (
    CONCURRENCIES,
    OPEN_S,
    ROUNDS,
    Asked,
    encoder,
    levels,
    read_ramp,
    read_trace,
)
from outrider.errors import ConfigError
from outrider.request import SamplingParams

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
    concurrency: Annotated[
        list[int] | None,
        typer.Option(
            "--concurrency", "-c", min=1, help="Closed loop: requests in flight; may be repeated."
        ),
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(help="Open loop: requests per second; may be repeated."),
    ] = None,
    burstiness: Annotated[
        float,
        typer.Option(help="Of arrivals: 1 is Poisson, less comes in bursts, inf evenly."),
    ] = 1.0,
    ramp_of: Annotated[
        str | None,
        typer.Option("--ramp", help="Open loop: a rate that changes, as FIRST:LAST:SECONDS."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Open loop: recorded arrivals and lengths (Azure, Mooncake, BurstGPT, Vidur). "
            "With --rate only the lengths."
        ),
    ] = None,
    speed: Annotated[float, typer.Option(help="Of the trace: 2 is twice as fast.")] = 1.0,
    scale_lengths: Annotated[
        float, typer.Option(help="Of the trace: 0.1 makes prompts and answers a tenth as long.")
    ] = 1.0,
    turns: Annotated[
        int, typer.Option(min=1, help="Closed loop: turns of a talk, each behind the last one.")
    ] = 1,
    think: Annotated[
        float, typer.Option(min=0.0, help="Mean seconds between an answer and the next turn.")
    ] = 0.0,
    num_requests: Annotated[
        int | None,
        typer.Option(
            "--num-requests",
            "-n",
            min=1,
            help=f"Of each load; if unset {ROUNDS} per user, or {OPEN_S:g} seconds of a rate.",
        ),
    ] = None,
    duration: Annotated[
        float | None, typer.Option(min=0.0, help="Seconds of a load after which none is sent.")
    ] = None,
    slo: Annotated[
        list[str] | None,
        typer.Option(
            help="What makes an answer good: ttft:MS, tpot:MS, e2el:MS, or a name of MLPerf's such "
            "as llama3.1-8b; may be repeated."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Of the server's model, so that a trace's prompts have exact lengths."),
    ] = None,
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
    targets = _targets(parsed, model, url, draft_model, engine, in_flight)
    target = targets[parsed[0].arm.name]
    data = options.read_dataset(prompts, limit, target)
    plain = options.sampling_params(max_tokens, temperature, seed, ignore_eos=ignore_eos)
    asked = Asked(
        data=data,
        trace=read_trace(trace, speed, scale_lengths, num_requests, target),
        concurrencies=tuple(concurrency or ()),
        rates=tuple(sorted(rate or ())),
        burstiness=None if burstiness == float("inf") else burstiness,
        ramp=None if ramp_of is None else read_ramp(ramp_of),
        habits=Habits(num_turns=turns, think_s=think, seed=seed) if turns > 1 else None,
        num_requests=num_requests,
        duration=duration,
        seed=seed,
    )
    loads = list(levels(asked, encoder(target, tokenizer)))
    sampling = plain if trace is None else replace(plain, max_tokens=None, ignore_eos=True)
    about = _described(targets)
    settings = {
        "arms": [one.arm for one in parsed],
        "levels": [level.name for level in loads],
        "sampling": sampling,
        "burstiness": burstiness,
        "turns": turns,
        "think_s": think,
        "duration": duration,
        "slo": limits,
        "trace": asked.trace.describe() if asked.trace else None,
        "draft_model": draft_model,
        "engine": engine,
        "url": url,
    }
    path = options.result_path(as_json, out, "load")
    with open_journal(path, _identity(settings, loads, about, seed), resume=resume) as journal:
        arms = [one.arm for one in parsed]
        run = _Runner(targets, loads, arms, sampling, limits, budget, journal)
        with options.progress("warming up") as tell:
            run.to_the_end(tell)
        found = Result(
            kind="load",
            findings={"levels": run.levels, "left_out": run.left_out, "best": best(run.levels)},
            blocks=run.blocks,
            settings=settings,
            data=data.describe(),
            target=about,
            seeds={"seed": seed},
            provenance=watch.facts(),
        )
        options.save(found, as_json, out)
        journal.finish()
    console = Console()
    console.print(table(run.levels))
    console.print(told(found), style="dim")


def _described(targets: Mapping[str, Server]) -> dict[str, Any]:
    """The first arm's target, and by arm where there are several."""
    first, *_ = targets.values()
    told = {arm: target.describe() for arm, target in targets.items()}
    alone = len({id(target) for target in targets.values()}) == 1
    return first.describe() if alone else {**first.describe(), "by_arm": told}


def _identity(
    settings: Mapping[str, Any], levels: Items[Level], about: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """What a load's figures depend on."""
    return {
        **settings,
        "requests": content_hash([(level.questions, level.at_s) for level in levels]),
        "model": about.get("model_hash") or about.get("model"),
        "seed": seed,
    }


class _Runner:
    """All loads under all arms, those of an interrupted run left as they are."""

    def __init__(
        self,
        targets: Mapping[str, Server],
        levels: Items[Level],
        arms: Items[Arm],
        sampling: SamplingParams,
        slo: Mapping[str, float],
        budget_s: float,
        journal: Journal,
    ) -> None:
        self._targets, self._loads, self._arms = targets, levels, arms
        self._sampling, self._slo, self._journal = sampling, slo, journal
        self._end_s = time.perf_counter() + budget_s
        self._is_warm: set[str] = set()
        self._saturated: dict[str, str] = {}  # arm -> load
        self.left_out: list[str] = []

    @property
    def levels(self) -> list[dict[str, Any]]:
        """Figures, in the order of the loads."""
        return [self._journal[key]["figures"] for key in self._keys() if key in self._journal]

    @property
    def blocks(self) -> list[dict[str, Any]]:
        return [
            {"level": key, "requests": self._journal[key]["requests"]}
            for key in self._keys()
            if key in self._journal
        ]

    def to_the_end(self, tell: Callable[..., None]) -> None:
        for place, level in enumerate(self._loads):
            # There and back, so that a drift of the machine is nobody's.
            for arm in self._arms if place % 2 == 0 else reversed(self._arms):
                self._run(level, arm, tell)

    def _run(self, level: Level, arm: Arm, tell: Callable[..., None]) -> None:
        key = _key(level, arm)
        if key not in self._journal:
            reason = self._why_not(level, arm)
            if reason:
                self.left_out.append(f"{key}: {reason}")
                return
            self._warm_up(level, arm)
            self._measure(level, arm, tell)
        if self._journal[key]["figures"]["saturated"]:
            self._saturated[arm.name] = level.name

    def _why_not(self, level: Level, arm: Arm) -> str:
        if time.perf_counter() > self._end_s:
            return "the budget was over"
        if level.rate is not None and arm.name in self._saturated:
            return f"already saturated at {self._saturated[arm.name]}"
        return ""

    def _warm_up(self, level: Level, arm: Arm) -> None:
        """A few requests that nobody counts, once per arm; ConfigError where none is answered."""
        if arm.name in self._is_warm:
            return
        self._is_warm.add(arm.name)
        first = replace(
            closed_loop(level.questions[:2], 2, 4), name="warm-up", is_filler=level.is_filler
        )
        replies = measure(self._targets[arm.name], first, arm, self._sampling).replies
        if all(reply.error for reply in replies):
            raise ConfigError(f"arm {arm.name!r}: no request is answered ({replies[0].error})")

    def _measure(self, level: Level, arm: Arm, tell: Callable[..., None]) -> None:
        num, key = len(level.questions), _key(level, arm)
        done = 0

        def tick(_: object) -> None:
            nonlocal done
            done += 1
            tell(done, num, key)

        tell(0, num, key)
        measured = measure(self._targets[arm.name], level, arm, self._sampling, tick=tick)
        figures = summary(measured, self._slo)
        self._journal.add(key, {"figures": figures, "requests": blocks(measured)})

    def _keys(self) -> Iterator[str]:
        return (_key(level, arm) for level in self._loads for arm in self._arms)


def best(levels: Items[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By arm, the load with the most good answers per second; () without limits."""
    found: dict[str, Mapping[str, Any]] = {}
    for level in levels:
        known = found.get(level["arm"])
        if "request_goodput" in level and (
            known is None or level["request_goodput"] > known["request_goodput"]
        ):
            found[level["arm"]] = level
    keys = ("arm", "name", "request_goodput", "output_goodput", "slo_attainment", "slo_met")
    return [{key: level[key] for key in keys} for level in found.values()]


def table(levels: Items[Mapping[str, Any]]) -> Table:
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
    shown = Table(box=SIMPLE, padding=(0, 1, 0, 0), expand=False)
    shown.add_column("load", overflow="fold", min_width=20)
    for name in columns:
        shown.add_column(name, justify="right", no_wrap=True)
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
    parts = [
        LEGEND,
        SATURATED if is_saturated else "",
        SHORT if is_short else "",
        f"Good: within {slo}." if slo else "",
        f"Left out: {left_out}." if left_out else "",
        f"Failed: {'; '.join(errors)}." if errors else "",
        f"{LATE}: {', '.join(dict.fromkeys(late))}." if late else "",
    ]
    return " ".join(filter(None, parts))


def _targets(
    parsed: Items[options.Parsed],
    model: str | None,
    url: str | None,
    draft_model: str | None,
    engine: str | None,
    in_flight: int,
) -> dict[str, Server]:
    """By arm; arms without a server of their own share one."""
    opened: dict[str | None, Any] = {}
    for one in parsed:
        if one.url in opened:
            continue
        if one.url is not None:
            opened[one.url] = options.open_target(model, one.url)
        else:
            opened[None] = options.open_target(
                model, url, draft_model=draft_model, engine=engine, concurrency=in_flight
            )
    return {one.arm.name: opened[one.url] for one in parsed}


def _key(level: Level, arm: Arm) -> str:
    return f"{level.name}, {arm.name}"


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
