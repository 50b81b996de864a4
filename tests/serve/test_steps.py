"""Steps: texts of the tokens of each commit join to the stream's text, whatever was drafted."""

from importlib.resources import as_file, files

import pytest

from outrider import SamplingParams
from outrider.serve.steps import Steps
from outrider.stream.events import Committed, StepTree
from outrider.testing import ByteTokenizer
from outrider.tokenizer import load_tokenizer

PROMPT = [40, 41, 42, 43]


class Bytes(ByteTokenizer):
    """One that can also say how a token stands in its vocabulary."""

    def token_text(self, token_id):
        return f"<special {token_id}>" if token_id in self.special_ids else f"<0x{token_id:02X}>"


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
    assert [step["tokens"] for step in details(events, Bytes())] == [
        ["A", ""],
        ["", "€", "B"],
    ]


def test_what_never_became_a_character_comes_with_the_last_token():
    event = Committed("r", token_ids=(65, "€".encode()[0]), finish_reason="length")
    (step,) = details([event], Bytes())
    assert step["tokens"] == ["A", "\ufffd"]


def test_counts_are_told_without_a_tokenizer():
    event = Committed("r", token_ids=(5, 6), num_drafted=3, num_from_draft=1, source="ngram")
    assert details([event], None) == [
        {"tokens": ["", ""], "accepted": 1, "num_drafted": 3, "source": "ngram"}
    ]


def test_an_end_without_tokens_is_an_empty_step():
    assert details([Committed("r", finish_reason="abort")], Bytes())[0]["tokens"] == []


EURO = "€".encode()


def test_tokens_without_text_say_what_they_are():
    """Bytes of a character that is not whole as escapes; special tokens by name."""
    events = [
        Committed("r", token_ids=(65, EURO[0], EURO[1])),
        Committed("r", token_ids=(EURO[2], 66)),
        Committed("r", token_ids=(3,), finish_reason="stop"),
    ]
    first, second, third = details(events, Bytes())
    assert first["without_text"] == {"1": r"\xe2", "2": r"\x82"}
    assert second["tokens"] == ["€", "B"]
    assert "without_text" not in second
    assert third["without_text"] == {"0": "<special 3>"}


def test_nodes_of_a_tree_never_read_as_unknown_characters():
    tree = StepTree((66, EURO[0], EURO[1], 2), (-1, 0, 1, 0), (0,))
    event = Committed("r", token_ids=(66,), num_drafted=4, num_from_draft=1, tree=tree)
    (step,) = details([event], Bytes())
    assert step["tree"]["tokens"] == ["B", r"\xe2", r"\x82", "<special 2>"]
    assert details([event], None)[0]["tree"]["tokens"] == [""] * 4


def test_every_token_of_a_byte_level_vocabulary_reads_alone():
    """As the shipped pair has it: what is whole is text, blanks too; the rest is escaped."""
    with as_file(files("outrider") / "assets" / "demo" / "target") as folder:
        tokenizer = load_tokenizer(folder)
    steps = Steps(tokenizer, PROMPT)
    ids = tokenizer.encode("the 日本 café 😀", add_special_tokens=False)
    tree = StepTree(tuple(ids), tuple(range(-1, len(ids) - 1)), ())
    alone = steps.detail(Committed("r", tree=tree))["tree"]["tokens"]
    assert "".join(alone).startswith("the ")
    assert not any("\ufffd" in text for text in alone)
    assert any(r"\x" in text for text in alone)
    read = "".join(alone).encode("latin-1", "backslashreplace").decode("unicode_escape")
    assert read.encode("latin-1").decode() == "the 日本 café 😀"
