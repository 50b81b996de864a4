"""`outrider chat`: turns from standard input, /reset and /exit, and what ends a conversation."""

import re
from functools import partial

import pytest
from typer.testing import CliRunner

from outrider import LLM, SamplingParams
from outrider.cli import chat, main

SEEDED = ("--max-tokens", 6, "--temperature", 0.9, "--top-p", 1.0, "--seed", 3)
SAMPLING = SamplingParams(max_tokens=6, temperature=0.9, seed=3)


@pytest.fixture(scope="module")
def answers(model):
    """What the model says in turn to a conversation."""
    llm = LLM(model)

    def answers(*lines, system=""):
        messages = [{"role": "system", "content": system}] if system else []
        for line in lines:
            messages.append({"role": "user", "content": line})
            text = llm.chat(messages, SAMPLING).text
            messages.append({"role": "assistant", "content": text})
        return [message["content"] for message in messages if message["role"] == "assistant"]

    return answers


def test_turns_build_on_one_another(call, model, answers):
    result = call("chat", model, *SEEDED, stdin="Hi\n\n  How are you?  \n")
    first, second = answers("Hi", "How are you?")
    assert result.stdout == f"{first}\n{second}\n"
    assert second != answers("How are you?")[0]
    assert "/reset" in result.stderr
    assert result.stderr.count("[6 tokens, acceptance length 1.00") == 2
    assert "> " not in result.stderr, "the prompt sign is for terminals"


def test_earlier_turns_come_from_the_prefix_cache(call, model):
    result = call("chat", model, *SEEDED, stdin="The first turn of several\nAgain\n")
    cached = [int(found) for found in re.findall(r"(\d+) of \d+ prompt tokens", result.stderr)]
    assert cached[0] == 0
    assert cached[1] > 0


def test_reset_forgets_and_exit_leaves(call, model, answers):
    stdin = "Hi\n/reset\nHow are you?\n/exit\nnever read\n"
    result = call("chat", model, *SEEDED, stdin=stdin)
    assert result.stdout == f"{answers('Hi')[0]}\n{answers('How are you?')[0]}\n"


def test_the_system_message_survives_a_reset(call, model, answers):
    result = call("chat", model, *SEEDED, "--system", "Be brief.", stdin="Hi\n/reset\nHi\n")
    (expected,) = answers("Hi", system="Be brief.")
    assert result.stdout == f"{expected}\n" * 2
    assert expected != answers("Hi")[0]


def test_a_draft_model_changes_no_word(call, model, draft, answers):
    result = call("chat", model, "--draft-model", draft, *SEEDED, stdin="Hi\n")
    assert result.stdout == f"{answers('Hi')[0]}\n"


@pytest.mark.parametrize("stdin", ["", "\n\n", "/exit\n", "/reset\n"])
def test_nothing_said_nothing_answered(call, model, stdin):
    assert call("chat", model, stdin=stdin).stdout == ""


def test_settings_are_checked_before_anything_is_loaded(refused):
    assert refused("chat", "no/such", "--temperature", -1).startswith("temperature=-1.0")


TOO_LONG = "word " * 200


def test_a_turn_beyond_the_context_fails_a_pipe(model):
    result = CliRunner().invoke(main.app, ["chat", model], input=TOO_LONG + "\nHi\n")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("error: the prompt has")


def test_a_turn_beyond_the_context_is_dropped_at_a_terminal(call, model, answers, monkeypatch):
    monkeypatch.setattr(chat, "_is_terminal", lambda: True)
    result = call("chat", model, *SEEDED, stdin=f"{TOO_LONG}\nHi\n")
    assert result.stdout == f"{answers('Hi')[0]}\n"
    assert re.search(r"error: the prompt has \d+ tokens.*/reset starts over", result.stderr)
    assert "> " in result.stderr


def test_an_answer_that_breaks_off_fails_a_pipe(model, monkeypatch):
    stuck = partial(SamplingParams, regex="[a-z]{3}", min_tokens=20)
    monkeypatch.setattr(chat, "SamplingParams", stuck)
    result = CliRunner().invoke(main.app, ["chat", model], input="Hi\nHi\n")
    assert result.exit_code == 2
    assert len(result.stdout.strip()) == 3
    assert result.stderr.splitlines()[-1].startswith("error: no token is allowed: min_tokens=20")
