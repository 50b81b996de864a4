"""`outrider bench calibrate`: what passes and drafting cost on this machine."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from outrider.bench import result
from outrider.bench.calibration.calibrate import (
    CONTEXTS,
    DRAFT_DEPTH,
    ROWS,
    Calibration,
    Calibrator,
    lines,
    with_depth,
)
from outrider.bench.datasets import OWN
from outrider.bench.inprocess import InProcess
from outrider.bench.provenance import Watch
from outrider.bench.result import Result
from outrider.bench.sweep.advise import usual_arms
from outrider.bench.target import Arm, Question
from outrider.cli import bench_options as options
from outrider.cli.bench_tables import Grid
from outrider.errors import ConfigError, RequestError

KIND = "calibrate"
BUDGET_S = 30.0


def calibrate_command(
    model: options.Model = None,
    url: Annotated[
        str | None,
        typer.Option(help="Refused: the passes of a server cannot be timed from outside."),
    ] = None,
    draft_model: options.DraftModel = None,
    engine: options.Engine = None,
    arm: options.Arms = None,
    rows: Annotated[str, typer.Option(help="Rows of the passes to time.")] = ",".join(
        map(str, ROWS)
    ),
    context: Annotated[
        str, typer.Option(help="Tokens in the KV cache of each sequence.")
    ] = ",".join(map(str, CONTEXTS)),
    temperature: Annotated[str, typer.Option(help="Of the answers drafted for.")] = "0",
    prompts: options.Prompts = OWN,
    limit: options.Limit = 16,
    seed: options.Seed = 0,
    budget: options.Budget = BUDGET_S,
    as_json: options.AsJson = None,
    out: options.Out = None,
) -> None:
    """Time passes by rows and context, and drafters on a few prompts: what K costs at any load.

    `outrider bench sweep --calibration FILE` takes the result, on the same machine and model, with
    as many threads. It needs the model in this process; of a server, `outrider bench sweep --url`
    measures K by load without predicting it.
    """
    if url is not None:
        raise ConfigError(
            f"--url {url!r}: the passes of a server cannot be timed from outside; calibrate on its "
            "machine with the model in this process, or measure it by `outrider bench sweep --url`"
        )
    watch = Watch()
    target = in_process(model, draft_model, engine, max(read_integers("--rows", rows)))
    data = options.read_dataset(prompts, limit, target)
    arms = drafting(arm, target)
    found = calibrated(
        target,
        arms,
        data.questions,
        temperatures=read_numbers("--temperature", temperature),
        rows=read_integers("--rows", rows),
        contexts=read_integers("--context", context),
        budget_s=budget,
        seed=seed,
    )
    written = Result(
        kind=KIND,
        findings=findings(found, target),
        blocks=[found.to_json()],
        settings={"draft_model": draft_model, "engine": engine, "budget_s": budget},
        data=data.describe(),
        target=target.describe(),
        seeds={"run": seed},
        provenance=watch.facts(),
    )
    options.save(written, as_json, out)
    console = Console()
    console.print(table(found))
    told = lines(found, target.llm.engine)
    console.print(", ".join(f"{k.replace('_', ' ')} {_number(v)}" for k, v in told.items()))


def calibrated(
    target: InProcess, arms: list[Arm], questions: tuple[Question, ...], **asked: Any
) -> Calibration:
    """With a bar on stderr."""
    seed = asked.pop("seed", 0)
    with options.progress("timing passes", 100) as tell:

        def tick(share: float, told: str) -> None:
            tell(round(100 * share), 100, f"timing {told}")

        return Calibrator(target, seed=seed, tick=tick).run(arms, questions, **asked)


def load_calibration(path: Path, target: InProcess) -> Calibration:
    """From a result of this command; ConfigError where it is of another machine or model."""
    held = result.load(path)
    if held.kind != KIND or not held.blocks:
        raise ConfigError(f"--calibration {str(path)!r} is a {held.kind!r}: give a {KIND!r}")
    found = Calibration.from_json(held.blocks[0])
    found.check(target.llm.engine)
    return found


def findings(found: Calibration, target: InProcess) -> dict[str, Any]:
    """What a report shows; all of it stands in the blocks."""
    told = found.to_json()
    return {
        "machine_fingerprint": found.machine,
        "points": [
            {key: point[key] for key in ("rows", "context", "seconds", "monotone", "fit", "spread")}
            for point in told["points"]
        ],
        "roofline": lines(found, target.llm.engine),
        "drafters": [
            {
                "name": key,
                "drafter": profile.drafter,
                "num_drafts": profile.num_drafts,
                "stands": [round(share, 4) for share in profile.forecast.stands],
            }
            for key, profile in found.profiles.items()
        ],
    }


def table(found: Calibration) -> Grid:
    """Milliseconds of a pass: rows down, contexts across; the fit in brackets."""
    contexts = sorted({point.context for point in found.points})
    shown = Grid("rows", *(f"context {context}\nms (fit)" for context in contexts))
    at = {(point.num_rows, point.context): point for point in found.points}
    for num_rows in sorted({point.num_rows for point in found.points}):
        cells = []
        for context in contexts:
            point = at.get((num_rows, context))
            fit = (
                f" ({1e3 * found.roofline.seconds(point):.2f})" if point and found.roofline else ""
            )
            cells.append("-" if point is None else f"{1e3 * point.seconds:.2f}{fit}")
        shown.add_row(str(num_rows), *cells)
    return shown


def in_process(
    model: str | None, draft_model: str | None, engine: str | None, concurrency: int
) -> InProcess:
    target = options.open_target(
        model,
        None,
        draft_model=draft_model,
        engine=engine,
        concurrency=concurrency,
        has_prices=False,
    )
    assert isinstance(target, InProcess), "without a URL it is our own engine"
    return target


def drafting(texts: list[str] | None, target: InProcess) -> list[Arm]:
    """Arms that draft, as asked for, or the usual ones of this engine."""
    if texts is None:
        return [_deep(arm) for arm in usual_arms(target)]
    arms = [parsed.arm for parsed in options.read_arms(texts)]
    for arm in arms:
        if arm.speculation is None or arm.speculation.is_off:
            raise RequestError(f"--arm {arm.name!r}: name a method that drafts, such as ngram")
    return [_deep(arm) for arm in arms]


def read_integers(option: str, text: str) -> tuple[int, ...]:
    """Rising whole numbers from "1,2,4"."""
    return tuple(int(number) for number in _read(option, text, int, 1))


def read_numbers(option: str, text: str) -> tuple[float, ...]:
    """Rising numbers from "0,0.7"."""
    return tuple(_read(option, text, float, 0))


def _read(option: str, text: str, kind: type[int] | type[float], least: int) -> list[float]:
    try:
        found = sorted({kind(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not least <= found[0] or found[-1] == float("inf"):
        raise RequestError(f"{option} {text!r}: give numbers from {least} on, such as 1,4,16")
    return [float(number) for number in found] if kind is float else list(found)


def _deep(arm: Arm) -> Arm:
    """With a K, so that the engine's own policy does not decide how far drafts are counted."""
    assert arm.speculation is not None
    depth = arm.speculation.num_draft_tokens or DRAFT_DEPTH
    return Arm(name=arm.name, speculation=with_depth(arm.speculation, depth), extra=arm.extra)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
