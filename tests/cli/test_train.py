"""`outrider train`: a pair that `generate` can run, a grown checkpoint with the same answers."""

import json
import logging

import pytest

from outrider.train import demo
from outrider.train.corpus import Corpus, Domain, read_corpus
from outrider.train.evaluate import EvaluationConfig
from outrider.train.network import DecoderShape

SMALL = DecoderShape(
    vocab_size=4096,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
FEW = EvaluationConfig(
    window=32, max_windows=1, num_prompts=1, prompt_length=8, num_generated=4, num_draft_tokens=2
)


@pytest.fixture
def few_words(monkeypatch):
    """The recipe with tiny models, few texts and a short evaluation."""

    def few_documents(folder):
        (code,) = read_corpus(folder).domains
        few = Domain(name="code", training=code.training[:20], held_out=code.held_out[:2])
        return Corpus(domains=(few,), sources=())

    monkeypatch.setattr(demo, "TARGET", SMALL)
    monkeypatch.setattr(demo, "DRAFT", SMALL)
    monkeypatch.setattr(demo, "WINDOW", 33)
    monkeypatch.setattr(demo, "read_corpus", few_documents)
    monkeypatch.setattr(demo, "EvaluationConfig", lambda: FEW)


def test_demo_trains_a_pair_that_generates(call, few_words, tmp_path):
    out = tmp_path / "pair"
    call("train", "demo", "--out", out, "--target-steps", 2, "--draft-steps", 1)
    for role in ("target", "draft"):
        assert (out / role / "model.safetensors").is_file()
        assert (out / role / "README.md").is_file()
    result = call(
        "generate", out / "target", "--draft-model", out / "draft",
        "--prompt", "def main(", "--max-tokens", 8, "--json",
    )  # fmt: skip
    (completion,) = json.loads(result.stdout)["completions"]
    assert completion["metrics"]["drafter"] == "draft_model"
    assert len(completion["token_ids"]) > 0


def test_demo_resumes_unless_told_not_to(call, few_words, tmp_path, caplog):
    out = tmp_path / "pair"
    args = ("train", "demo", "--out", out, "--target-steps", 1, "--draft-steps", 1)
    call(*args)
    caplog.set_level(logging.INFO, logger="outrider")
    call(*args)
    assert "target resumes" in caplog.text
    caplog.clear()
    call(*args, "--no-resume")
    assert "resumes" not in caplog.text


def test_every_option_of_demo_arrives(call, monkeypatch, tmp_path):
    asked = {}

    def train_demo(out, **options):
        asked.update(options, out=out)

    monkeypatch.setattr("outrider.cli.train.train_demo", train_demo)
    call(
        "train", "demo", "--out", tmp_path, "--corpus", tmp_path, "--target-steps", 7,
        "--draft-steps", 3, "--seed", 5, "--device", "cuda", "--compiled", "--no-resume",
    )  # fmt: skip
    assert asked == {
        "out": tmp_path,
        "corpus": tmp_path,
        "num_target_steps": 7,
        "num_draft_steps": 3,
        "seed": 5,
        "device": "cuda",
        "compiled": True,
        "resume": False,
    }


def test_grow_keeps_the_answers(call, model, tmp_path):
    out = tmp_path / "grown"
    result = call("train", "grow", model, out, "--num-layers", 3, "--hidden-size", 48)
    assert result.stdout == ""
    assert str(out) in result.stderr
    config = json.loads((out / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"]) == (3, 48)
    asked = ("--prompt", "def main(", "--max-tokens", 16, "--json")
    before, after = (
        json.loads(call("generate", folder, *asked).stdout)["completions"][0]["token_ids"]
        for folder in (model, out)
    )
    assert before == after


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("demo", "--target-steps", 0), "0"),
        (("demo", "--corpus", "nowhere"), "nowhere"),
        (("grow", "no/such", "out"), "cannot get 'no/such'"),
        (("grow", "{model}", "out", "--size", "7b"), "7b"),
        (("grow", "{model}", "out", "--num-layers", 1), "num_layers 1"),
        (("grow", "{model}", "out", "--dtype", "int8"), "int8"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line(refused, few_words, model, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    args = [model if arg == "{model}" else arg for arg in args]
    assert message in refused("train", *args)
