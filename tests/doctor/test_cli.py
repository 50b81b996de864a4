"""`outrider doctor` as a shell calls it: exit status, table, file, pins, mistakes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import Result
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from outrider.cli.main import app
from tests.doctor.conftest import WriteHead
from tests.doctor.training import TRUTH, V, prompts
from tests.engine.tiny_checkpoint import write_checkpoint
from tests.models.heads.layouts import write as write_files

Call = Callable[..., Result]


@pytest.fixture(scope="module")
def spoken(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target with a tokenizer of as many words as it has tokens."""
    folder = tmp_path_factory.mktemp("spoken")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (folder / name).write_bytes((target / name).read_bytes())
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = (" ".join(f"w{token}" for token in prompt) for prompt in prompts())
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def call(spoken: Path, asked: Path) -> Call:
    def run(draft: Path | str, *more: object, target: Path | None = None) -> Result:
        words = ["doctor", draft, "--target", target or spoken, "--prompts", asked]
        words += ["--positions", 1056, "--device", "cpu"]
        return CliRunner().invoke(app, [str(word) for word in (*words, *more)])

    return run


def test_a_head_that_is_declared_right(tmp_path: Path, write: WriteHead, call: Call) -> None:
    result = call(write(tmp_path, "medusa", TRUTH["medusa"]), "--no-forecast")
    assert result.exit_code == 0, result.output
    assert "as declared" in result.stdout
    assert "input_state=raw" in result.stdout
    assert "the last token again" in result.stdout
    assert "settings stand" in result.stdout


def test_a_head_that_is_declared_wrong_and_pinned(
    tmp_path: Path, write: WriteHead, call: Call
) -> None:
    wrong = replace(TRUTH["medusa"], input_state="raw")
    folder, out = write(tmp_path / "head", "medusa", wrong), tmp_path / "found.json"
    result = call(folder, "--no-forecast", "--json", out)
    assert result.exit_code == 1, result.output
    assert "> input_state" in " ".join(result.stdout.split())
    assert "repeat with --pin" in " ".join(result.stdout.split())
    held = json.loads(out.read_text())
    assert held["kind"] == "doctor"
    assert held["changes"] == {"input_state": "normed"}
    assert held["data"]["num_questions"] == 24
    assert held["advice"]
    pinned = call(folder, "--no-forecast", "--pin")
    assert pinned.exit_code == 0, pinned.output
    assert "wrote" in pinned.stderr
    assert json.loads((folder / "outrider.json").read_text())["conventions"] == {
        "input_state": "normed"
    }
    assert call(folder, "--no-forecast").exit_code == 0


@pytest.mark.slow
def test_a_forecast_of_a_head(
    tmp_path: Path, write: WriteHead, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTRIDER_CACHE", str(tmp_path / "cache"))
    result = call(write(tmp_path / "head", "medusa", TRUTH["medusa"]))
    assert result.exit_code == 0, result.output
    assert "tokens/pass" in result.stdout
    assert "tokens per pass of the target" in " ".join(result.stdout.split())


def test_a_draft_model(spoken: Path, call: Call, tmp_path: Path) -> None:
    result = call(spoken, "--no-forecast", "--json", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    assert "chat template" in result.stdout
    held = json.loads((tmp_path / "found.json").read_text())
    assert held["family"] == "draft model"
    assert held["score"]["overlap"] == pytest.approx([1.0] * 3, abs=1e-4)
    assert held["rows"] == []


def test_a_draft_model_of_another_vocabulary(call: Call, tmp_path: Path) -> None:
    mine = write_checkpoint(tmp_path / "mine")
    its = write_checkpoint(tmp_path / "its", "other words entirely, and more of them\n" * 3)
    result = call(its, "--no-forecast", target=mine)
    assert result.exit_code == 0, result.output
    assert "translated" in " ".join(result.stdout.split())
    assert "outrider bench advise" in " ".join(result.stdout.split())


def test_mistakes(tmp_path: Path, write: WriteHead, call: Call, spoken: Path) -> None:
    def told(result: Result) -> str:
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        return result.stderr.splitlines()[-1]

    strange = write_files(tmp_path / "strange", {}, {"a.weight": torch.ones(3)})
    assert told(call(strange)).startswith("error: ")
    head = write(tmp_path / "head", "eagle3", TRUTH["eagle3"])
    other = write_checkpoint(tmp_path / "other", hidden_size=64)
    assert "another model" in told(call(head, target=other))
    assert "no file" in told(call(head, "--prompts", tmp_path / "nowhere.txt"))
    (tmp_path / "empty.jsonl").write_text("")
    assert "no prompt" in told(call(head, "--prompts", tmp_path / "empty.jsonl"))
    assert "is no hub id" in told(call("no such/folder/at all"))
