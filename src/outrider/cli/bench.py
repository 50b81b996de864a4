"""`outrider bench`: measurements that answer whether and how to speculate."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from outrider.bench.replay import Interval, Replayed, replay, wants_prediction, without_model
from outrider.bench.workloads import MAX_PROMPT_TOKENS, SOURCES, Encoded, Encoder, available, load
from outrider.cli import options
from outrider.cli.bench_ab import ab_command
from outrider.cli.bench_advise import advise_command
from outrider.cli.bench_calibrate import calibrate_command
from outrider.cli.bench_cost import cost_command
from outrider.cli.bench_load import load_command
from outrider.cli.bench_lossless import lossless_command
from outrider.cli.bench_report import report_command
from outrider.cli.bench_sweep import sweep_command
from outrider.draft.drafters import Drafters
from outrider.errors import ConfigError, OutriderError
from outrider.models.hub import resolve
from outrider.registry import DRAFTERS
from outrider.request import SpeculationParams
from outrider.tokenizer import Tokenizer, load_tokenizer

app = typer.Typer(no_args_is_help=True, help="Measure what speculation is worth.")


@app.callback()
def bench() -> None:
    """Measure what speculation is worth."""


app.command("ab")(ab_command)
app.command("cost")(cost_command)
app.command("lossless")(lossless_command)
app.command("load")(load_command)
app.command("report")(report_command)
app.command("calibrate")(calibrate_command)
app.command("sweep")(sweep_command)
app.command("advise")(advise_command)


@app.command("replay")
def replay_command(
    speculation: Annotated[
        list[str] | None,
        typer.Option(
            help="A method's name, or JSON with its settings; may be repeated. Without it, every "
            "drafter that needs no model.",
        ),
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help=f'{", ".join(SOURCES)}, or a .jsonl file of {{"prompt": ..., "output": ...}}; may '
            "be repeated. Without it, all whose files are in --data.",
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder that holds the logs, at any depth.")
    ] = None,
    tokenizer: Annotated[
        str, typer.Option(help='Whose tokens: hub id, folder, or "demo".')
    ] = "demo",
    datastore: Annotated[
        Path | None, typer.Option(help="Folder with a corpus index, for method rest.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First records of a workload.")] = None,
    max_prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Of a longer prompt the end is kept.")
    ] = MAX_PROMPT_TOKENS,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Forget what drafters learnt before each record.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Draft over recorded answers of other models, without a model: what would be accepted?

    Each turn of a conversation is one record, and its prompt is the conversation before it. Records
    follow one another in their order, so that what a drafter keeps across requests warms up.
    """
    make = Maker(load_tokenizer(resolve(tokenizer)), None if datastore is None else str(datastore))
    logging.getLogger("transformers").setLevel(logging.ERROR)  # no model here to be too long for
    loaded = {name: load(name, data)[:limit] for name in _workloads(workload, data)}
    chosen = _asked(speculation, make) if speculation else _all_there_are(make)
    encoder = Encoder(make.tokenizer, max_prompt_tokens)
    found = []
    for name, records in loaded.items():
        encoded = [encoder(record) for record in records]
        has_prediction = any(record.prediction for record in encoded)
        for params in chosen:
            if not speculation and not has_prediction and wants_prediction(make(params), params):
                typer.echo(f"left out: {params.method} on {name}, no prediction there", err=True)
                continue
            found.append(_replay(name, encoded, make, params, fresh))
    if as_json:
        typer.echo(json.dumps({"tokenizer": tokenizer, "results": [to_json(r) for r in found]}))
    console = Console(stderr=as_json)
    console.print(*tables(found))
    console.print(LEGEND, style="dim")


class Maker(NamedTuple):
    """Makes the drafters that a request asks for, anew at each call."""

    tokenizer: Tokenizer
    datastore: str | None

    def __call__(self, params: SpeculationParams) -> Drafters:
        return without_model(str(params.method), self.tokenizer, self.datastore)


LEGEND = (
    "per call: tokens per call, all calls counted, with a draft or without. per draft: acceptance "
    "length, tokens per call that carried a draft, the target's own included. interval: 95 % "
    "bootstrap over sessions. rate: accepted / drafted tokens. share: of calls that carried a "
    "draft. us: microseconds of processor time per call, inside draft(), and inside open(), "
    "observe() and close()."
)
COLUMNS = (
    "per call",
    "interval",
    "per draft",
    "interval",
    "rate",
    "share",
    "draft\nus",
    "other\nus",
)


def tables(found: list[Replayed]) -> list[Table]:
    """One per workload."""
    shown = {
        result.workload: Table(title=_title(result), box=SIMPLE, padding=0) for result in found
    }
    for one in shown.values():
        one.add_column("drafter", overflow="fold", min_width=12)
        for name in COLUMNS:
            one.add_column(name, justify="right", no_wrap=name == "interval")
    for result in found:
        length, per_call = result.acceptance_length, result.tokens_per_call
        shown[result.workload].add_row(
            label(result.speculation),
            f"{per_call.value:.2f}",
            _ends(per_call),
            f"{length.value:.2f}",
            _ends(length),
            f"{result.acceptance_rate:.2f}",
            f"{result.draft_share:.2f}",
            f"{result.draft_us:.0f}",
            f"{result.other_us:.0f}",
        )
    return list(shown.values())


def _title(result: Replayed) -> str:
    return f"{Path(result.workload).name}: {result.num_records} answers replayed"


def to_json(result: Replayed) -> dict[str, Any]:
    return {
        "workload": result.workload,
        "drafter": result.speculation.method,
        "speculation": _given(result.speculation),
        "num_records": result.num_records,
        **result.counts._asdict(),
        "acceptance_length": result.acceptance_length._asdict(),
        "tokens_per_call": result.tokens_per_call._asdict(),
        "acceptance_rate": result.acceptance_rate,
        "draft_share": result.draft_share,
        "draft_us_per_call": result.draft_us,
        "other_us_per_call": result.other_us,
    }


def label(params: SpeculationParams) -> str:
    """The method, and what was set beside it."""
    given = {key: value for key, value in _given(params).items() if key != "method"}
    settings = (f"{key}={value}" for key, value in given.items())
    return " ".join([str(params.method), *settings])


def _given(params: SpeculationParams) -> dict[str, Any]:
    usual = SpeculationParams()
    values = dataclasses.asdict(params)
    return {key: value for key, value in values.items() if value != getattr(usual, key)}


def _ends(interval: Interval) -> str:
    if interval.low is None:
        return "-"
    return f"{interval.low:.2f}-{interval.high:.2f}"


def _workloads(named: list[str] | None, data: Path | None) -> list[str]:
    if named:
        return named
    if data is None:
        raise ConfigError("no workload: give --workload FILE.jsonl, or --data FOLDER")
    found = available(data)
    if not found:
        files = ", ".join(source.file for source in SOURCES.values())
        raise ConfigError(f"--data {str(data)!r} holds none of {files}: name another folder")
    return found


def _asked(named: list[str], make: Maker) -> list[SpeculationParams]:
    asked = [options.read_speculation(text) for text in named]
    for params in asked:
        if params.method is None or params.is_off:
            raise ConfigError("--speculation: name a method that drafts, such as ngram")
        make(params)
    return asked


def _all_there_are(make: Maker) -> list[SpeculationParams]:
    """Every drafter that can be built here with its usual settings; why others cannot is told."""
    found = []
    for name in DRAFTERS.names():
        params = SpeculationParams(method=name)
        try:
            wants_prediction(make(params), params)
        except OutriderError as error:
            typer.echo(f"left out: {error}", err=True)
            continue
        found.append(params)
    return found


def _replay(
    workload: str, records: list[Encoded], make: Maker, params: SpeculationParams, is_fresh: bool
) -> Replayed:
    """With a progress bar where somebody watches."""
    err = Console(stderr=True)
    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(f"{workload}, {params.method}", total=len(records))
        return replay(
            records,
            lambda: make(params),
            params,
            workload=workload,
            is_fresh=is_fresh,
            tick=lambda: progress.advance(task),
        )
