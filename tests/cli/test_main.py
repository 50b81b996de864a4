"""`outrider` itself: version, help, unknown commands, and how mistakes and interrupts end."""

import pytest
from typer.testing import CliRunner

import outrider
from outrider.cli import main
from outrider.errors import EngineError, ModelError


def invoke(*args):
    return CliRunner().invoke(main.app, list(args))


def test_version(call):
    assert call("--version").stdout == f"outrider {outrider.__version__}\n"


@pytest.mark.parametrize(
    "command", ["demo", "generate", "chat", "plugins", "train", "bench", "index"]
)
def test_every_command_has_help(call, command):
    assert command in call("--help").stdout
    assert "Usage: " in call(command, "--help").stdout


@pytest.mark.parametrize("args", [("nonsense",), ("generate",), ("generate", "m", "--oops")])
def test_wrong_usage_ends_with_status_2(args):
    result = invoke(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: " in result.stderr


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (ModelError("no such\nmodel"), 2, "error: no such model"),
        (EngineError("it stopped"), 2, "error: it stopped"),
        (ValueError("seed=-1: must be >= 0"), 2, "error: seed=-1: must be >= 0"),
        (FileNotFoundError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_command_raises_becomes_one_line(monkeypatch, error, status, told):
    def fail():
        raise error

    monkeypatch.setattr("outrider.cli.plugins._drafters", fail)
    result = invoke("plugins")
    assert result.exit_code == status
    assert result.stderr == told + "\n"
    assert result.stdout == ""


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    def fail():
        raise AssertionError("a bug")

    monkeypatch.setattr("outrider.cli.plugins._drafters", fail)
    assert isinstance(invoke("plugins").exception, AssertionError)
