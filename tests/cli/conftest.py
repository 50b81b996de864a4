"""A tiny checkpoint, and the command line as a shell would call it."""

from collections.abc import Callable

import pytest
from click.testing import Result
from typer.testing import CliRunner

from outrider.cli.main import app
from tests.engine.tiny_checkpoint import write_checkpoint

Call = Callable[..., Result]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("target")))


@pytest.fixture(scope="session")
def draft(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("draft"), num_hidden_layers=1))


@pytest.fixture
def call() -> Call:
    """Runs a command that must succeed."""

    def call(*args: object, stdin: str | bytes = "") -> Result:
        result = CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)
        assert result.exit_code == 0, result.output
        return result

    return call


@pytest.fixture
def refused() -> Callable[..., str]:
    """Runs a command that must fail for a user's mistake; its message, one line on stderr."""

    def refused(*args: object, stdin: str | bytes = "") -> str:
        result = CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)
        assert result.exit_code == 2, result.output
        assert isinstance(result.exception, SystemExit)
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        prefix, _, message = line.partition("error: ")
        assert prefix == ""
        return message

    return refused
