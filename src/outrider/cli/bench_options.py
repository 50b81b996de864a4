"""Options that the commands of `outrider bench` share, and what their texts stand for."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence as Items
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from outrider.bench.by_arm import ByArm
from outrider.bench.datasets import OWN, Dataset, load_dataset
from outrider.bench.load import Server
from outrider.bench.report import make_report
from outrider.bench.result import Result
from outrider.bench.target import Arm, Target
from outrider.engine.config import EngineConfig
from outrider.engine.llm import LLM
from outrider.errors import ConfigError, RequestError
from outrider.request import OFF, SamplingParams, SpeculationParams

ARM_EXAMPLE = '{"method": "draft_model", "num_speculative_tokens": 4}'
PRICES_S = 2.0  # as `outrider serve` takes at start, where nothing is known yet
DEFAULT = "default"  # an arm that leaves speculation to the target

Model: TypeAlias = Annotated[
    str | None,
    typer.Argument(
        help='Hub id, folder, or "demo" (the shipped pair); with --url, what the server calls it.',
        metavar="[MODEL]",
    ),
]
Url: TypeAlias = Annotated[
    str | None,
    typer.Option(help="An OpenAI-compatible server to ask instead, as http://127.0.0.1:8000."),
]
DraftModel: TypeAlias = Annotated[
    str | None,
    typer.Option("--draft-model", help='Smaller model; "off" declines the demo\'s own.'),
]
Engine: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--engine",
        help="What else the engine is made with, as JSON: "
        '\'{"quantization": "int8", "max_num_seqs": 32}\'.',
    ),
]
Arms: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--arm",
        help='One way to answer: "off", a method, JSON such as \'' + ARM_EXAMPLE + "' (with "
        f'"name" and "extra" keys of the request body, if need be), or "{DEFAULT}", whatever the '
        "engine or server does by itself; may be repeated.",
    ),
]
Prompts: TypeAlias = Annotated[
    str,
    typer.Option(
        help=f'A file of prompts (JSONL, text, CSV, published data sets), or "{OWN}", our own set; '
        f'"{OWN}/code" is one domain of it.'
    ),
]
Limit: TypeAlias = Annotated[
    int | None, typer.Option(min=1, help="Most prompts, taken from all domains in turn.")
]
MaxTokens: TypeAlias = Annotated[int, typer.Option(min=2, help="Most tokens of an answer.")]
Temperature: TypeAlias = Annotated[float, typer.Option(help="0 is greedy.")]
Seed: TypeAlias = Annotated[int, typer.Option(help="Of answers, order and resampling.")]
IgnoreEos: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--ignore-eos", help="Go on to --max-tokens: equal lengths, but text that nobody wants."
    ),
]
Concurrency: TypeAlias = Annotated[
    int, typer.Option("--concurrency", "-c", min=1, help="Requests in flight.")
]
Budget: TypeAlias = Annotated[
    float, typer.Option(min=0.0, help="Seconds after which no new block is begun.")
]
Eps: TypeAlias = Annotated[
    float, typer.Option(help="Differences up to this share count as none: 0.02 is 2 %.")
]
AsJson: TypeAlias = Annotated[Path | None, typer.Option("--json", help="Write the result here.")]
Out: TypeAlias = Annotated[
    Path | None, typer.Option("--out", help="Folder for the result and its report.")
]
Resume: TypeAlias = Annotated[
    bool,
    typer.Option("--resume", help="Go on with the run that was interrupted on its way to --json."),
]


class Parsed(NamedTuple):
    """An arm as it was asked for; `url` is a server of its own."""

    arm: Arm
    url: str | None = None


def open_target(
    model: str | None,
    url: str | None,
    *,
    draft_model: str | None = None,
    engine: str | None = None,
    concurrency: int = 1,
    has_prices: bool = True,
) -> Server:
    """Our engine in this process, or whoever listens at `url`.

    Args:
        has_prices: the engine times passes and drafting first, if it never did here, as
            `outrider serve` does: its adaptive policy is then measured as users have it.

    Raises:
        ConfigError: neither or too much is named; ModelError: the model cannot be loaded.
    """
    if url is None:
        if model is None:
            raise ConfigError('nothing to measure: give MODEL (such as "demo") or --url URL')
        asked = read_object("--engine", engine)
        return _in_process(model, draft_model, asked, concurrency, has_prices=has_prices)
    for option, value in (("--draft-model", draft_model), ("--engine", engine)):
        if value is not None:
            raise ConfigError(f"{option} {value!r}: the server at --url is as it is; drop it")
    try:
        from outrider.bench.remote import Remote
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--url {url!r} needs {error.name}: pip install 'outrider[serve]'"
        ) from error
    return Remote(url, model=model)


def open_by_arm(
    parsed: Items["Parsed"],
    model: str | None,
    url: str | None,
    *,
    draft_model: str | None = None,
    engine: str | None = None,
    concurrency: int = 1,
    has_prices: bool = True,
) -> dict[str, Server]:
    """Who answers each arm, by its name; arms without a server of their own share one.

    Raises:
        ConfigError: see `open_target`; or what is set for a shared one that no arm would use.
    """
    opened = {one.url: open_target(model, one.url) for one in parsed if one.url is not None}
    if any(one.url is None for one in parsed):
        shared = open_target(
            model,
            url,
            draft_model=draft_model,
            engine=engine,
            concurrency=concurrency,
            has_prices=has_prices,
        )
        return {one.arm.name: opened[one.url] if one.url else shared for one in parsed}
    for option, value in (("--url", url), ("--draft-model", draft_model), ("--engine", engine)):
        if value is not None:
            raise ConfigError(f"{option} {value!r}: every arm has a server of its own; drop it")
    return {one.arm.name: opened[one.url] for one in parsed if one.url is not None}


def as_one(targets: Mapping[str, Target]) -> Target:
    """Targets by arm as a single one; the one there is, where all are the same."""
    first, *others = targets.values()
    return first if all(other is first for other in others) else ByArm(targets)


def read_arms(texts: Items[str]) -> list[Parsed]:
    """Arms of different names: equal ones are numbered."""
    parsed = [read_arm(text) for text in texts]
    names = _numbered([one.arm.name for one in parsed])
    return [
        Parsed(Arm(name=name, speculation=one.arm.speculation, extra=one.arm.extra), one.url)
        for name, one in zip(names, parsed, strict=True)
    ]


def read_arm(text: str) -> Parsed:
    """From "off", a method, "default", a URL, or a JSON object.

    Raises:
        RequestError: no JSON, or keys that are none of `SpeculationParams`.
    """
    told = text.strip()
    if told.startswith(("http://", "https://")):
        return Parsed(Arm(name=told), told)
    if told == DEFAULT:
        return Parsed(Arm(name=DEFAULT))
    if not told.startswith("{"):
        return Parsed(Arm(name=told, speculation=SpeculationParams(method=told)))
    keys = read_object("--arm", told, ARM_EXAMPLE)
    name, url, extra = (keys.pop(key, None) for key in ("name", "url", "extra"))
    if extra is not None and not isinstance(extra, Mapping):
        raise RequestError(f"--arm: extra={extra!r}: give an object with keys of the request body")
    speculation = SpeculationParams.from_dict(keys) if keys else None
    arm = Arm(
        name=str(name or url or label(speculation)), speculation=speculation, extra=extra or {}
    )
    return Parsed(arm, None if url is None else str(url))


def label(speculation: SpeculationParams | None) -> str:
    """The method, and what was set beside it: "draft_model K=4"."""
    if speculation is None:
        return DEFAULT
    if speculation.is_off:
        return OFF
    usual = SpeculationParams()
    given = {
        SHORT.get(name, name): value
        for name, value in vars(speculation).items()
        if name != "method" and value != getattr(usual, name)
    }
    settings = (f"{name}={_short(value)}" for name, value in given.items())
    return " ".join([speculation.method or DEFAULT, *settings])


SHORT = {"num_draft_tokens": "K"}


def read_object(option: str, text: str | None, example: str = "{...}") -> dict[str, Any]:
    """A JSON object; an empty one where there is no text."""
    if text is None:
        return {}
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(
            f"{option} {text!r} is no JSON ({error.msg} at {error.pos}): write it like {example}"
        ) from None
    if not isinstance(values, dict):
        raise RequestError(f"{option} {text!r} is no JSON object: write it like {example}")
    return values


def read_dataset(name: str, limit: int | None, target: Target) -> Dataset:
    """The prompts, told on stderr; as plain text where the model has no chat template."""
    data = load_dataset(name, limit=limit)
    if not getattr(target, "has_chat_template", True):
        data = data.as_text()
    typer.echo(data.told(), err=True)
    return data


def sampling_params(
    max_tokens: int, temperature: float, seed: int, *, ignore_eos: bool = False
) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens, temperature=temperature, seed=seed, ignore_eos=ignore_eos
    )


@contextmanager
def progress(description: str, total: float | None = None) -> Iterator[Callable[..., None]]:
    """A bar on stderr where somebody watches.

    Yields `tell(done, total=None, description=None)`, to be called with what is done so far.
    """
    err = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(description, total=total)

        def tell(done: float, total: float | None = None, description: str | None = None) -> None:
            bar.update(task, completed=done, total=total, description=description)

        yield tell


def identity(asked: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """What a journal's blocks depend on: what was asked, and the model that answered."""
    return {**asked, "model": about.get("model_hash") or about.get("model")}


def result_path(as_json: Path | None, out: Path | None, kind: str) -> Path | None:
    """Where the result goes; None keeps it on the screen."""
    return as_json or (None if out is None else out / f"{kind}.json")


def save(result: Result, as_json: Path | None, out: Path | None) -> None:
    """The result as a file, and its report in `out`; the paths are told on stderr."""
    path = result_path(as_json, out, result.kind)
    if path is None:
        return
    result.write(path)
    typer.echo(f"wrote {path}", err=True)
    if out is not None:
        page = make_report([(path.stem, result)]).write(out)[0]
        typer.echo(f"wrote {page}", err=True)


def _in_process(
    model: str,
    draft_model: str | None,
    engine: dict[str, Any],
    concurrency: int,
    *,
    has_prices: bool,
) -> Server:
    from outrider.bench.inprocess import InProcess

    engine.setdefault("max_num_seqs", max(EngineConfig.max_num_seqs, concurrency))
    try:
        llm = LLM(model, draft_model=draft_model, **engine)
    except TypeError as error:  # an argument of a kind that cannot be
        raise ConfigError(f"--engine {json.dumps(engine)}: {error}") from error
    if has_prices:
        llm.calibrate(PRICES_S)
    return InProcess(llm)


def _numbered(names: Items[str]) -> list[str]:
    """Later ones of the same name get a number: "off", "off (2)"."""
    found: list[str] = []
    for name in names:
        count, candidate = 1, name
        while candidate in found:
            count += 1
            candidate = f"{name} ({count})"
        found.append(candidate)
    return found


def _short(value: Any) -> str:
    return json.dumps(value, default=str) if isinstance(value, Mapping | tuple) else str(value)
