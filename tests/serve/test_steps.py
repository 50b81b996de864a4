"""Steps: texts of the tokens of each commit join to the stream's text, whatever was drafted."""

import pytest

from outrider import SamplingParams
from outrider.serve.steps import Steps
from outrider.stream.events import Committed
from outrider.testing import ByteTokenizer

PROMPT = [40, 41, 42, 43]


def details(events, tokenizer, prompt=PROMPT):
    steps = Steps(tokenizer, prompt)
    return [steps.detail(event) for event in events]


@pytest.mark.parametrize("method", ["off", "ngram", "draft_model"])
def test_pieces_join_to_the_text_of_a_real_stream(llm, method):
    sampling = SamplingParams(max_tokens=40, temperature=0.8, seed=3, ignore_eos=True)
    events = [e for e in llm.stream([PROMPT], sampling, method) if isinstance(e, Committed)]
    found = details(events, llm.tokenizer)
    for event, step in zip(events, found, strict=True):
        assert len(step["tokens"]) == len(event.token_ids)
        assert "".join(step["tokens"]) == event.text  # no stop text: nothing is held back
        assert step["accepted"] <= min(step["num_drafted"], len(step["tokens"]))
    assert sum(len(step["tokens"]) for step in found) == 40
    assert {step["source"] for step in found} <= {"", method}
    if method == "off":
        assert not any(step["num_drafted"] for step in found)


def test_half_a_character_waits_for_its_other_half():
    euro = "€".encode()
    events = [
        Committed("r", token_ids=(65, euro[0])),
        Committed("r", token_ids=(euro[1], euro[2], 66), num_drafted=2, num_from_draft=2),
    ]
    assert [step["tokens"] for step in details(events, ByteTokenizer())] == [
        ["A", ""],
        ["", "€", "B"],
    ]


def test_what_never_became_a_character_comes_with_the_last_token():
    event = Committed("r", token_ids=(65, "€".encode()[0]), finish_reason="length")
    (step,) = details([event], ByteTokenizer())
    assert step["tokens"] == ["A", "\ufffd"]


def test_counts_are_told_without_a_tokenizer():
    event = Committed("r", token_ids=(5, 6), num_drafted=3, num_from_draft=1, source="ngram")
    assert details([event], None) == [
        {"tokens": ["", ""], "accepted": 1, "num_drafted": 3, "source": "ngram"}
    ]


def test_an_end_without_tokens_is_an_empty_step():
    assert details([Committed("r", finish_reason="abort")], ByteTokenizer())[0]["tokens"] == []
