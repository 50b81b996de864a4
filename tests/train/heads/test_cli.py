"""`outrider train draft`: every option arrives, and the command does what it says."""

import re

import pytest
import typer
from typer.testing import CliRunner

from outrider.cli import train_draft
from outrider.cli.main import OneLineErrors
from outrider.train.heads.settings import DraftTraining
from tests.train.heads.checkpoint import write_target, write_texts

app = typer.Typer(cls=OneLineErrors, pretty_exceptions_enable=False)
app.command("draft")(train_draft.draft)
app.callback()(lambda: None)


def call(*args):
    return CliRunner().invoke(app, ["draft", *map(str, args)])


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("target"))


def test_it_trains_and_keeps_stdout_for_data(target, tmp_path):
    data = write_texts(tmp_path / "texts.jsonl")
    result = call(
        "--kind", "medusa", "--target", target, "--data", data, "--out", tmp_path / "out",
        "--steps", 3, "--depths", 2, "--window", 64, "--tokens-per-step", 128, "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert re.search(r"step 1: acceptance length \d", result.stderr)
    assert f"wrote {tmp_path / 'out'}" in result.stderr
    assert (tmp_path / "out" / "medusa_lm_head.safetensors").is_file()


def test_every_option_arrives(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(train_draft, "train_draft", lambda s, report: asked.append(s))
    result = call(
        "--kind", "eagle3", "--target", "t", "--data", "a.txt", "--data", "b.jsonl",
        "--out", "o", "--held-out", "c.txt", "--on-policy", "--temperature", 0.5,
        "--answers", 9, "--answer-tokens", 10, "--steps", 11, "--depths", 12, "--layers", 2,
        "--draft-vocab", 13, "--feature-layers", "1,2", "--loss", "tv", "--layout", "eagle",
        "--window", 14, "--tokens-per-step", 15, "--rate", 0.1, "--promote", "p",
        "--concurrency", 16, "--patience", 0, "--resume", "--seed", 17, "--device", "cpu",
        "--dtype", "float32", "--served-prompts", 18,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (given,) = asked
    usual = DraftTraining(kind="", target="", data=("x",), out="")
    names = DraftTraining.__dataclass_fields__
    assert [name for name in names if getattr(given, name) == getattr(usual, name)] == []
    assert (given.num_answers, given.depths, given.num_layers) == (9, 12, 2)
    assert [path.name for path in given.data] == ["a.txt", "b.jsonl"]
    assert given.feature_layers == (1, 2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--kind", "eagle4"), "did you mean 'eagle3'"),
        (("--kind", "eagle3", "--feature-layers", "1,x"), "give numbers of layers"),
        (("--kind", "eagle3", "--steps", 0), "steps=0"),
        (("--kind", "eagle3"), "no file"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line(target, tmp_path, args, message):
    result = call("--target", target, "--data", "absent.txt", "--out", tmp_path, *args)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert message in line
