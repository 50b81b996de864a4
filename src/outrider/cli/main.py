"""`outrider`: the command line; mistakes end in one line on stderr and exit status 2."""

from typing import Any

import typer
from typer.core import TyperGroup

from outrider import __version__
from outrider.cli import bench, chat, demo, doctor, generate, index, plugins, serve, train
from outrider.errors import OutriderError


class OneLineErrors(TyperGroup):
    """Says what went wrong and what to do, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (OutriderError, ValueError, OSError) as error:
            typer.echo(f"error: {' '.join(str(error).splitlines())}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Speculative decoding: guess ahead, verify exactly, keep what stands.",
)
app.command("demo")(demo.demo)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("plugins")(plugins.plugins)
app.command("doctor")(doctor.doctor)
app.add_typer(train.app, name="train")
app.add_typer(index.app, name="index")
app.add_typer(bench.app, name="bench")


def _version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"outrider {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and stop."
    ),
) -> None:
    """Options of all commands."""
