"""`--quantization`: it reaches the engine of every command, and a slip is one line."""

import json

import pytest

from outrider import LLM, SamplingParams

ASKED = ("--max-tokens", 12, "--temperature", 0.9, "--seed", 3)
SAMPLING = SamplingParams(max_tokens=12, temperature=0.9, seed=3)


@pytest.fixture
def loaded(monkeypatch):
    """The quantisation of every `LLM` that is made."""
    seen = []
    make = LLM.__init__

    def noting(self, *args, **options):
        seen.append((options.get("quantization"), options.get("draft_quantization")))
        make(self, *args, **options)

    monkeypatch.setattr(LLM, "__init__", noting)
    return seen


@pytest.mark.parametrize("name", ["off", "int8", "int8-dynamic", "int8-weight-only", "int4"])
def test_generate_answers_with_the_quantised_model(call, model, name):
    args = ("--prompt", "def", "--json", "--quantization", name, *ASKED)
    answer = json.loads(call("generate", model, *args).stdout)
    expected = LLM(model, quantization=name).generate("def", SAMPLING)[0]
    assert answer["completions"][0]["token_ids"] == expected.token_ids


def test_it_reaches_both_models(call, model, draft, loaded):
    args = ("--quantization", "int8", "--draft-quantization", "int4", *ASKED)
    call("generate", model, "--draft-model", draft, "--prompt", "def", *args)
    call("chat", model, "--draft-model", draft, "--quantization", "int8", stdin="/exit\n")
    assert loaded == [("int8", "int4"), ("int8", None)]


def test_the_demo_takes_it(call, loaded, monkeypatch):
    monkeypatch.setattr("outrider.cli.demo.PROMPTS", ("def main(",))
    call("demo", "--max-tokens", 3, "--quantization", "int8", "--draft-quantization", "int4")
    assert loaded == [("int8", "int4")]


@pytest.mark.parametrize("option", ["--quantization", "--draft-quantization"])
def test_a_slip_is_one_line(refused, model, option):
    message = refused("generate", model, "--prompt", "def", option, "int9")
    assert message.startswith("unknown quantization 'int9'")
    assert "int8-weight-only" in message
    message = refused("generate", model, "--prompt", "x", "--quantization", "int8", "--dtype",
                      "float16", "--device", "cpu")  # fmt: skip
    assert "dtype='float16'" in message
