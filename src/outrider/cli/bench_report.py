"""`outrider bench report`: result files into pages to read and pass on."""

from pathlib import Path
from typing import Annotated

import typer

from outrider.bench.report import make_report
from outrider.bench.result import load


def report_command(
    results: Annotated[
        list[Path], typer.Argument(help="What `outrider bench ... --json FILE` wrote.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the pages; made if need be.")] = Path(
        "report"
    ),
) -> None:
    """One HTML page with plots, a Markdown summary, tables as CSV, and the JSON behind them.

    Two results of one kind are compared, and refused where prompts, model or the meaning of a
    number differ.
    """
    report = make_report([(_name(path, results), load(path)) for path in results])
    paths = report.write(out)
    for path in paths[:3]:
        typer.echo(path)
    typer.echo(f"{len(paths) - 3} figures and tables below {out}", err=True)


def _name(path: Path, among: list[Path]) -> str:
    """The file's name, with its folder where two are named alike."""
    is_alone = sum(other.stem == path.stem for other in among) == 1
    return path.stem if is_alone else str(path.with_suffix(""))
