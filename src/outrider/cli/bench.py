"""`outrider bench`: measurements that answer whether and how to speculate."""

import typer

from outrider.cli.bench_ab import ab_command
from outrider.cli.bench_advise import advise_command
from outrider.cli.bench_calibrate import calibrate_command
from outrider.cli.bench_cost import cost_command
from outrider.cli.bench_load import load_command
from outrider.cli.bench_lossless import lossless_command
from outrider.cli.bench_replay import replay_command
from outrider.cli.bench_report import report_command
from outrider.cli.bench_sweep import sweep_command

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
app.command("replay")(replay_command)
