"""`outrider demo`: the pair seen live, then measured against plain decoding."""

import json

import pytest


@pytest.fixture
def few_prompts(monkeypatch):
    monkeypatch.setattr(
        "outrider.cli.demo.PROMPTS", ("def main(", [{"role": "user", "content": "Hi"}])
    )


def test_demo_shows_measures_and_writes(call, few_prompts, tmp_path):
    path = tmp_path / "figures.json"
    args = ("--max-tokens", 6, "--num-draft-tokens", 2, "--temperature", 0.8, "--seed", 4)
    result = call("demo", *args, "--json", path)
    assert "def read_lines(path" in result.stdout
    assert "drafted tokens accepted, acceptance length" in result.stdout
    assert "2/2" in result.stdout, "same tokens with and without speculation"
    model, ngram = json.loads(path.read_text())
    for figures in (model, ngram):
        assert figures["base"] == "plain"
        assert figures["num_prompts"] == figures["num_identical"] == 2
        assert 0 < figures["low"] <= figures["ratio"] <= figures["high"]
        assert figures["verdict"] in ("faster", "slower", "undecided")
        assert all(speed > 0 for speed in figures["tokens_per_second"])
        assert figures["acceptance_length"] >= 1.0
    assert model["speculation"]["method"] == "draft_model"
    assert model["speculation"]["num_draft_tokens"] == 2
    assert ngram["speculation"]["method"] == "ngram"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--max-tokens", 0), "max_tokens=0"),
        (("--num-draft-tokens", 65), "num_draft_tokens=65"),
        (("--temperature", -1), "temperature=-1"),
    ],
)
def test_a_mistake_is_one_line(refused, args, message):
    assert message in refused("demo", *args)
