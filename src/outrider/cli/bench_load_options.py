"""Options that `outrider bench load` alone has."""

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from outrider.cli.bench_load_levels import OPEN_S, ROUNDS

Concurrencies: TypeAlias = Annotated[
    list[int] | None,
    typer.Option(
        "--concurrency", "-c", min=1, help="Closed loop: requests in flight; may be repeated."
    ),
]
Rates: TypeAlias = Annotated[
    list[float] | None,
    typer.Option(help="Open loop: requests per second; may be repeated."),
]
Burstiness: TypeAlias = Annotated[
    float,
    typer.Option(help="Of arrivals: 1 is Poisson, less comes in bursts, inf evenly."),
]
Ramp: TypeAlias = Annotated[
    str | None,
    typer.Option("--ramp", help="Open loop: a rate that changes, as FIRST:LAST:SECONDS."),
]
TracePath: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        help="Open loop: recorded arrivals and lengths (Azure, Mooncake, BurstGPT, Vidur). "
        "With --rate only the lengths."
    ),
]
Speed: TypeAlias = Annotated[float, typer.Option(help="Of the trace: 2 is twice as fast.")]
ScaleLengths: TypeAlias = Annotated[
    float, typer.Option(help="Of the trace: 0.1 makes prompts and answers a tenth as long.")
]
Turns: TypeAlias = Annotated[
    int, typer.Option(min=1, help="Closed loop: turns of a talk, each behind the last one.")
]
Think: TypeAlias = Annotated[
    float, typer.Option(min=0.0, help="Mean seconds between an answer and the next turn.")
]
NumRequests: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--num-requests",
        "-n",
        min=1,
        help=f"Of each load; if unset {ROUNDS} per user, or {OPEN_S:g} seconds of a rate.",
    ),
]
Duration: TypeAlias = Annotated[
    float | None, typer.Option(min=0.0, help="Seconds of a load after which none is sent.")
]
Limits: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        help="What makes an answer good: ttft:MS, tpot:MS, e2el:MS, or a name of MLPerf's such "
        "as llama3.1-8b; may be repeated."
    ),
]
TokenizerName: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Of the server's model, so that a trace's prompts have exact lengths."),
]
