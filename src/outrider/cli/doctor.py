"""`outrider doctor`: whether a draft is run as it was trained, and what to expect of it."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from outrider.bench.datasets import OWN, Dataset, load_dataset
from outrider.bench.provenance import Watch
from outrider.bench.result import Result
from outrider.cli import bench_options, options as shared
from outrider.cli.bench_tables import Grid
from outrider.doctor.advice import advice
from outrider.doctor.diagnosis import (
    Diagnosis,
    diagnose_head,
    diagnose_model,
    to_json,
    with_prices,
)
from outrider.doctor.examine import Row
from outrider.doctor.fit import check_models
from outrider.doctor.guessers import Guesser, ModelGuesser
from outrider.doctor.outlook import read_prices
from outrider.doctor.pinning import write_pins
from outrider.doctor.scores import Score
from outrider.doctor.subject import Subject, read_subject, shown
from outrider.doctor.texts import Written, write_texts
from outrider.engine.build import MODEL_DRAFTER, TRANSLATOR
from outrider.engine.heads import is_head
from outrider.engine.llm import LLM
from outrider.errors import OutriderError, TokenizerError
from outrider.models.base import Network
from outrider.models.hub import resolve
from outrider.models.runner import Runner
from outrider.request import OFF
from outrider.tokenizer import Tokenizer, load_tokenizer

NUM_PROMPTS, NUM_POSITIONS = 24, 2000


def doctor(
    draft: Annotated[
        str,
        typer.Argument(
            help='Draft head or draft model: hub id or folder; "native" for MTP modules in the '
            "target's own files.",
            metavar="DRAFT",
        ),
    ],
    target: Annotated[
        str, typer.Option(help='The model it drafts for: hub id, folder, or "demo".')
    ],
    prompts: Annotated[
        str,
        typer.Option(help=f'A file of prompts, or "{OWN}", our own set; the target answers them.'),
    ] = OWN,
    limit: Annotated[
        int, typer.Option(min=1, help="Most prompts, taken from all domains in turn.")
    ] = NUM_PROMPTS,
    positions: Annotated[
        int, typer.Option(min=1, help="Tokens that the target writes, half greedy, half sampled.")
    ] = NUM_POSITIONS,
    pin: Annotated[
        bool,
        typer.Option(
            "--pin", help="Write what is clearly better to the head's outrider.json; exit status 0."
        ),
    ] = False,
    forecast: Annotated[
        bool, typer.Option(help="Time this machine, and say what speed to expect.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of the target's answers.")] = 0,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
) -> None:
    """Is a draft run with the conventions it was trained with, and does it pay?

    Wrong conventions of a draft head never crash, they only lower acceptance. The head is run along
    the target's own text as its files declare and in every other way that is known to be mistaken
    for it. Exit status 1 says that another way is clearly better. Of a draft model, what could
    make it a poor match is checked.
    """
    watch = Watch()
    about = {"dtype": dtype, "device": device}
    subject = read_subject(draft, target) if is_head(draft) else None
    llm, trouble = _engine(draft, target, subject, about)
    if subject is not None:
        shown(llm.engine.runner.network)
    data = _data(prompts, limit, llm)
    written = _written(llm, data, positions, seed)
    diagnosis = _diagnosed(draft, target, subject, llm, written)
    if forecast and not trouble and diagnosis.outlooks:
        with bench_options.progress("timing passes"):
            prices = read_prices(llm)
        diagnosis = with_prices(diagnosis, prices) if prices else diagnosis
    _show(diagnosis, data, trouble)
    result = Result(
        kind="doctor",
        findings={**to_json(diagnosis), "advice": advice(diagnosis)},
        settings={"draft": draft, "positions": positions, "limit": limit, "pin": pin, **about},
        data=data.describe(),
        target={"model": target, "model_hash": llm.engine.spec.fingerprint},
        seeds={"answers": seed},
        provenance=watch.facts(),
    )
    bench_options.save(result, as_json, None)
    if subject is None or diagnosis.winner is None:
        return
    if not pin:
        raise typer.Exit(1)
    path = write_pins(subject.folder, subject.pins_for(diagnosis.winner.conventions))
    typer.echo(f"wrote {path}", err=True)


def _engine(
    draft: str, target: str, subject: Subject | None, about: dict[str, Any]
) -> tuple[LLM, str]:
    """The target with its draft, and "" ; or alone, and why its head cannot be served as it is.

    What is to be found out is found out without the draft's own drafter, too.
    """
    if subject is None:
        return LLM(target, draft_model=draft, **about), ""
    try:
        return LLM(target, heads=(draft,), draft_model=OFF, **about), ""
    except OutriderError as error:
        trouble = str(error)
    return LLM(target, draft_model=OFF, **about), trouble


def _data(prompts: str, limit: int, llm: LLM) -> Dataset:
    """As plain text where the target has no chat template."""
    data = load_dataset(prompts, limit=limit)
    if not _has_template(llm):
        data = data.as_text()
    typer.echo(data.told(), err=True)
    return data


def _has_template(llm: LLM) -> bool:
    try:
        assert llm.tokenizer is not None
        llm.tokenizer.apply_chat_template([{"role": "user", "content": "?"}])
    except (OutriderError, AssertionError):
        return False
    return True


def _written(llm: LLM, data: Dataset, positions: int, seed: int) -> Written:
    draft = _draft_network(llm)
    with bench_options.progress("the target answers", 2.0 * len(data.questions)) as tell:
        return write_texts(
            llm,
            [question.prompt for question in data.questions],
            num_positions=positions,
            max_positions=draft.spec.max_positions if draft else None,
            seed=seed,
            tick=tell,
        )


def _diagnosed(
    draft: str, target: str, subject: Subject | None, llm: LLM, written: Written
) -> Diagnosis:
    network = llm.engine.runner.network
    with bench_options.progress("leading the draft along", 1.0) as tell:

        def tick(done: int, of: int, what: str) -> None:
            tell(done, of, what)

        if subject is not None:
            return diagnose_head(subject, network, written, tick=tick)
        its = _draft_network(llm)
        assert its is not None
        tokenizers = (llm.tokenizer, _draft_tokenizer(draft))
        checks = check_models(network.spec, its.spec, tokenizers, (target, draft))
        is_same = llm.engine.default_drafter == MODEL_DRAFTER
        guesser: Guesser | None = None
        if is_same:
            guesser = ModelGuesser(its, network.spec.vocab_size)
        return diagnose_model(guesser, network, written, checks, tick=tick)


def _draft_network(llm: LLM) -> Network | None:
    """Of a draft model; None of a head."""
    name = llm.engine.default_drafter
    if name not in (MODEL_DRAFTER, TRANSLATOR):
        return None
    runner: Runner = getattr(llm.engine.drafters[name], "runner")  # noqa: B009
    return runner.network


def _draft_tokenizer(draft: str) -> Tokenizer | None:
    try:
        return load_tokenizer(resolve(draft))
    except TokenizerError:
        return None


def _show(diagnosis: Diagnosis, data: Dataset, trouble: str) -> None:
    console = Console()
    num_prompts = len({text.prompt for text in diagnosis.written.texts})
    told = (
        f"{diagnosis.written.num_positions} tokens that the target wrote to {num_prompts} prompts"
    )
    console.print(f"{diagnosis.family}, on {told}", markup=False, highlight=False)
    if diagnosis.score is not None:
        console.print(_table(diagnosis))
    if diagnosis.checks:
        console.print(_checks(diagnosis))
    if any(one.speedups for one in diagnosis.outlooks):
        console.print(_outlook(diagnosis))
    notes = [*diagnosis.notes, f"not timed: {trouble}"] if trouble else diagnosis.notes
    for note in notes:
        console.print(f"note: {note}", style="dim", markup=False, highlight=False)
    for line in advice(diagnosis):
        console.print(line, markup=False, highlight=False)


def _table(diagnosis: Diagnosis) -> Grid:
    """Best rows first; those that nobody need believe in last."""
    assert diagnosis.score is not None
    depths = range(1, len(diagnosis.score.by_depth) + 1)
    heads = [*(f"depth\n{depth}" for depth in depths), "same\ntoken", "mean"]
    if diagnosis.findings is not None:
        heads += ["beside\ndeclared", "95 %\ninterval"]
    shown = Grid("settings", *heads, title="probability shared with the target")
    if diagnosis.findings is None:
        shown.add_row("draft model", *_cells(diagnosis.score))
    else:
        rows = sorted(diagnosis.findings.rows, key=_place)
        for row in rows:
            if not row.refusal:
                shown.add_row(_name(row, diagnosis), *_all_cells(row, len(depths)))
    for name, score in diagnosis.baselines.items():
        shown.add_row(f"({name})", *_cells(score))
    return shown


def _checks(diagnosis: Diagnosis) -> Grid:
    shown = Grid("check", "", "found", folds=("found",))
    for check in diagnosis.checks:
        shown.add_row(check.about, check.verdict, check.told)
    return shown


def _outlook(diagnosis: Diagnosis) -> Grid:
    depths = max(len(one.joint) for one in diagnosis.outlooks)
    shown = Grid("text", "", *(f"K={depth}" for depth in range(1, depths + 1)))
    for one in diagnosis.outlooks:
        shown.add_row(one.kind, "tokens/pass", *(f"{value:.2f}" for value in one.lengths))
        shown.add_row("", "times as fast", *(f"{value:.2f}" for value in one.speedups))
    return shown


def _all_cells(row: Row, num_depths: int) -> list[str]:
    """Of a row that was stopped early only the difference: its scores are of other texts."""
    if row.score is None or row.is_cut:
        return [*("-" for _ in range(num_depths + 2)), *_difference(row)]
    return [*_cells(row.score), *_difference(row)]


def _cells(score: Score) -> list[str]:
    overlaps = [f"{value:.3f}" for value in score.by_depth]
    return [*overlaps, f"{score.matches[0]:.3f}", f"{score.value:.3f}"]


def _difference(row: Row) -> list[str]:
    found = row.difference
    if found is None:
        return ["-", "-"]
    return [f"{found.value:+.3f}", f"{found.low:+.3f} to {found.high:+.3f}"]


def _name(row: Row, diagnosis: Diagnosis) -> str:
    if row is diagnosis.winner:
        return f"> {row.name}"
    return f"{row.name} (stopped early)" if row.is_cut else row.name


def _place(row: Row) -> tuple[bool, float]:
    return row.is_cut, -row.score.value if row.score else 0.0
