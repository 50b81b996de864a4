"""`outrider bench replay`: drafters that need no model, over recorded answers."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence as Items
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console

from outrider.bench import result as results
from outrider.bench.calibration.calibrate import Calibration
from outrider.bench.journal import Journal, open_journal
from outrider.bench.provenance import Watch
from outrider.bench.replay import Replayed, predicted, replay, wants_prediction, without_model
from outrider.bench.result import Result, content_hash
from outrider.bench.workloads import MAX_PROMPT_TOKENS, SOURCES, Encoded, Encoder, available, load
from outrider.cli import bench_options as options
from outrider.cli.bench_tables import Grid
from outrider.cli.options import read_speculation
from outrider.draft.drafters import Drafters
from outrider.errors import ConfigError, OutriderError
from outrider.models.hub import resolve
from outrider.registry import DRAFTERS
from outrider.request import SpeculationParams
from outrider.tokenizer import Tokenizer, load_tokenizer

KIND = "replay"


def replay_command(
    model: Annotated[
        str,
        typer.Argument(help='Whose tokens: hub id, folder, or "demo". No model is loaded.'),
    ] = "demo",
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
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Of `bench calibrate` on the model that is to be sped up: predicts how many times "
            "as fast one request at a time would be."
        ),
    ] = None,
    as_json: options.AsJson = None,
    out: options.Out = None,
    resume: options.Resume = False,
) -> None:
    """Draft over recorded answers of other models, without a model: what would be accepted?

    Each turn of a conversation is one record, and its prompt is the conversation before it. Records
    follow one another in their order, so that what a drafter keeps across requests warms up.
    """
    watch = Watch()
    make = Maker(load_tokenizer(resolve(model)), None if datastore is None else str(datastore))
    prices = None if calibration is None else _prices(calibration)
    logging.getLogger("transformers").setLevel(logging.ERROR)  # no model here to be too long for
    loaded = {name: load(name, data)[:limit] for name in _workloads(workload, data)}
    chosen = _asked(speculation, make) if speculation else _all_there_are(make)
    asked = {
        "speculation": [label(params) for params in chosen],
        "datastore": make.datastore,
        "max_prompt_tokens": max_prompt_tokens,
        "fresh": fresh,
        "limit": limit,
    }
    told_data = _described(loaded)
    identity = {**asked, "model": model, "data": told_data["hash"]}
    encoder = Encoder(make.tokenizer, max_prompt_tokens)
    with open_journal(options.result_path(as_json, out, KIND), identity, resume=resume) as journal:
        for name, records in loaded.items():
            encoded = [encoder(record) for record in records]
            _play(journal, name, encoded, make, chosen, is_fresh=fresh, all_are=not speculation)
        rows = [_with_prediction(row, prices) for _, row in journal.items()]
        found = Result(
            kind=KIND,
            findings={"results": rows},
            blocks=[{"key": key, "block": row} for key, row in journal.items()],
            settings={**asked, "calibration": None if calibration is None else str(calibration)},
            data=told_data,
            target={"kind": "recorded answers", "model": model, "name": model},
            provenance=watch.facts(),
        )
        options.save(found, as_json, out)
        journal.finish()
    console = Console()
    console.print(*tables(rows))
    console.print(LEGEND + (PREDICTED if prices else ""), style="dim")


class Maker(NamedTuple):
    """Makes the drafters that a request asks for, anew at each call."""

    tokenizer: Tokenizer
    datastore: str | None

    def __call__(self, params: SpeculationParams) -> Drafters:
        return without_model(str(params.method), self.tokenizer, self.datastore)


LEGEND = (
    "per call: tokens per call, all calls counted, with a draft or without. per draft: acceptance "
    "length, tokens per call that carried a draft, the target's own included. interval: 95 % "
    "bootstrap over sessions, unknown for a single one. rate: accepted / drafted tokens. share: of "
    "calls that carried a draft. us: microseconds of processor time per call, inside draft(), and "
    "inside open(), observe() and close()."
)
PREDICTED = (
    " times as fast: predicted by --calibration for one request at a time, as answers are recorded."
)


def tables(rows: Items[Mapping[str, Any]]) -> list[Grid]:
    """One per workload."""
    heads = ["per call", "interval", "per draft", "interval ", "rate", "share"]
    heads += ["draft\nus", "other\nus"]
    has_prediction = any("predicted" in row for row in rows)
    heads += ["times\nas fast"] if has_prediction else []
    shown: dict[str, Grid] = {}
    for row in rows:
        title = f"{Path(row['workload']).name}: {row['num_records']} answers replayed"
        grid = shown.setdefault(row["workload"], Grid("drafter", *heads, title=title))
        length, per_call = row["acceptance_length"], row["tokens_per_call"]
        grid.add_row(
            _named(row["speculation"]),
            f"{per_call['value']:.2f}",
            _ends(per_call),
            f"{length['value']:.2f}",
            _ends(length),
            f"{row['acceptance_rate']:.2f}",
            f"{row['draft_share']:.2f}",
            f"{row['draft_us_per_call']:.0f}",
            f"{row['other_us_per_call']:.0f}",
            *([f"~{row['predicted']:.2f}"] if "predicted" in row else []),
        )
    return list(shown.values())


def to_json(found: Replayed) -> dict[str, Any]:
    return {
        "workload": found.workload,
        "drafter": found.speculation.method,
        "name": label(found.speculation),
        "speculation": _given(found.speculation),
        "num_records": found.num_records,
        **found.counts._asdict(),
        "acceptance_length": found.acceptance_length._asdict(),
        "tokens_per_call": found.tokens_per_call._asdict(),
        "acceptance_rate": found.acceptance_rate,
        "draft_share": found.draft_share,
        "draft_us_per_call": found.draft_us,
        "other_us_per_call": found.other_us,
    }


def label(params: SpeculationParams) -> str:
    """The method, and what was set beside it."""
    return _named(_given(params))


def _named(given: Mapping[str, Any]) -> str:
    settings = (f"{key}={value}" for key, value in given.items() if key != "method")
    return " ".join([str(given["method"]), *settings])


def _given(params: SpeculationParams) -> dict[str, Any]:
    usual = SpeculationParams()
    values = dataclasses.asdict(params)
    return {key: value for key, value in values.items() if value != getattr(usual, key)}


def _ends(interval: Mapping[str, Any]) -> str:
    if interval["low"] is None:
        return "-"
    return f"{interval['low']:.2f}-{interval['high']:.2f}"


def _prices(path: Path) -> Calibration:
    """ConfigError where it is none, or of another machine."""
    held = results.load(path)
    if held.kind != "calibrate" or not held.blocks:
        raise ConfigError(f"--calibration {str(path)!r} is a {held.kind!r}: give a 'calibrate'")
    found = Calibration.from_json(held.blocks[0])
    found.check_machine()
    return found


def _with_prediction(row: Mapping[str, Any], prices: Calibration | None) -> dict[str, Any]:
    return dict(row) if prices is None else {**row, "predicted": predicted(row, prices.predictor)}


def _described(loaded: Mapping[str, Items[Any]]) -> dict[str, Any]:
    """For `Result.data`."""
    hashes = {name: content_hash(records) for name, records in loaded.items()}
    return {
        "name": ", ".join(Path(name).name for name in loaded),
        "hash": content_hash(hashes),
        "hashes": hashes,
        "num_records": {name: len(records) for name, records in loaded.items()},
    }


def _workloads(named: list[str] | None, data: Path | None) -> list[str]:
    if named:
        return list(dict.fromkeys(named))
    if data is None:
        raise ConfigError("no workload: give --workload FILE.jsonl, or --data FOLDER")
    found = available(data)
    if not found:
        files = ", ".join(source.file for source in SOURCES.values())
        raise ConfigError(f"--data {str(data)!r} holds none of {files}: name another folder")
    return found


def _asked(named: list[str], make: Maker) -> list[SpeculationParams]:
    asked: dict[str, SpeculationParams] = {}
    for text in named:
        params = read_speculation(text)
        if params.method is None or params.is_off:
            raise ConfigError("--speculation: name a method that drafts, such as ngram")
        make(params)
        asked[label(params)] = params
    return list(asked.values())


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


def _play(
    journal: Journal,
    workload: str,
    records: list[Encoded],
    make: Maker,
    chosen: Items[SpeculationParams],
    *,
    is_fresh: bool,
    all_are: bool,
) -> None:
    """Every drafter on one workload, those left out that an interrupted run finished."""
    for params in _usable(workload, records, make, chosen) if all_are else chosen:
        key = f"{workload}: {label(params)}"
        if key not in journal:
            journal.add(key, to_json(_replay(workload, records, make, params, is_fresh)))


def _usable(
    workload: str, records: list[Encoded], make: Maker, chosen: Items[SpeculationParams]
) -> Iterator[SpeculationParams]:
    """Those that find what they read; who does not is told."""
    has_prediction = any(record.prediction for record in records)
    for params in chosen:
        if has_prediction or not wants_prediction(make(params), params):
            yield params
        else:
            typer.echo(f"left out: {params.method} on {workload}, no prediction there", err=True)


def _replay(
    workload: str, records: list[Encoded], make: Maker, params: SpeculationParams, is_fresh: bool
) -> Replayed:
    """With a progress bar where somebody watches."""
    num_done = 0
    with options.progress(f"{workload}, {params.method}", len(records)) as tell:

        def tick() -> None:
            nonlocal num_done
            num_done += 1
            tell(num_done, len(records))

        return replay(
            records,
            lambda: make(params),
            params,
            workload=workload,
            is_fresh=is_fresh,
            tick=tick,
        )
