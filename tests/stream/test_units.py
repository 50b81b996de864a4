"""Units: commits held back to words, sentences and lines; nothing lost, nothing early."""

import pytest
from hypothesis import given, strategies as st

from outrider.request import COMMIT_UNITS
from outrider.stream.events import Committed, RequestMetrics, TokenLogprob
from outrider.stream.units import Units

TEXTS = st.lists(
    st.lists(
        st.sampled_from(["a", "Mr", " ", ". ", "! ", ".", "\n", "?\u201d", "é", "日本", "。", ""]),
        max_size=4,
    ).map("".join),
    min_size=1,
    max_size=12,
)


def commits(texts):
    """One event per text, one to three tokens each, the last with the end."""
    events, offset = [], 0
    for at, text in enumerate(texts):
        size = 1 + at % 3
        ids = tuple(range(offset, offset + size))
        is_last = at == len(texts) - 1
        events.append(
            Committed(
                "r", 0, offset, ids, text, num_drafted=4, num_accepted=size - 1,
                num_from_draft=size - 1, source="d",
                logprobs=tuple(TokenLogprob(token_id=i, logprob=-1.0, top={}) for i in ids),
                finish_reason="stop" if is_last else None,
                stop_reason="x" if is_last else None,
                metrics=RequestMetrics() if is_last else None,
            )
        )  # fmt: skip
        offset += size
    return events


def released(unit, texts):
    units = Units(unit)
    return [e for e in map(units.take, commits(texts)) if e is not None], units


@given(st.sampled_from(COMMIT_UNITS), TEXTS)
def test_texts_tokens_and_counts_join_to_what_came(unit, texts):
    told, units = released(unit, texts)
    came = commits(texts)
    assert "".join(e.text for e in told) == "".join(texts)
    assert [t for e in told for t in e.token_ids] == [t for e in came for t in e.token_ids]
    assert [p.token_id for e in told for p in e.logprobs] == [t for e in told for t in e.token_ids]
    for name in ("num_drafted", "num_accepted", "num_from_draft"):
        assert sum(getattr(e, name) for e in told) == sum(getattr(e, name) for e in came)
    assert [e.finish_reason for e in told] == [None] * (len(told) - 1) + ["stop"]
    last = told[-1]
    assert (last.stop_reason, last.metrics) == (came[-1].stop_reason, came[-1].metrics)
    assert (units.text, units.token_ids) == ("", ())


@given(st.sampled_from(COMMIT_UNITS), TEXTS)
def test_offsets_have_no_gaps_and_no_token_goes_out_before_its_text(unit, texts):
    told, _ = released(unit, texts)
    came = commits(texts)
    text_of = {e.offset + len(e.token_ids): len(e.text) for e in came}
    num_tokens = num_chars = 0
    for event in told:
        assert event.offset == num_tokens
        num_tokens += len(event.token_ids)
        num_chars += len(event.text)
        if unit != "token":
            assert sum(size for end, size in text_of.items() if end <= num_tokens) <= num_chars


@given(st.sampled_from(COMMIT_UNITS[1:]), TEXTS)
def test_all_but_the_last_event_end_with_a_unit(unit, texts):
    for event in released(unit, texts)[0][:-1]:
        assert event.text
        match unit:
            case "word":
                assert event.text[-1].isspace() or event.text[-1] in "日本。"
            case "sentence":
                assert event.text.rstrip("\u201d")[-1] in "。\n" or event.text[-1].isspace()
            case "line":
                assert event.text[-1] == "\n"


@given(st.sampled_from(["word", "line"]), TEXTS)
def test_what_is_held_back_holds_no_whole_unit(unit, texts):
    units = Units(unit)
    for event in commits(texts)[:-1]:
        units.take(event)
        assert not any(end in units.text for end in ("\n" if unit == "line" else " \n日。"))


def test_tokens_are_passed_on_as_they_are():
    events = commits(["a", "", "b c. d"])
    units = Units("token")
    assert [units.take(event) for event in events] == events


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("word", ["It ", "is ", "3.14, ", "he ", 'said. "Ok!" ', "Yes\n", "no"]),
        ("sentence", ["It is 3.14, he said. ", '"Ok!" ', "Yes\n", "no"]),
        ("line", ['It is 3.14, he said. "Ok!" Yes\n', "no"]),
    ],
)
def test_units_of_a_text(unit, expected):
    texts = ["It", " is", " 3.14", ", he", " said", '. "Ok', '!" ', "Yes\n", "no"]
    told = [event.text for event in released(unit, texts)[0]]
    assert "".join(told) == "".join(expected)
    assert told == expected if unit != "word" else len(told) >= len(expected)


def test_a_sentence_without_spaces_ends_with_its_mark():
    assert [e.text for e in released("sentence", ["日本", "です。「は", "い。」そ", "う"])[0]] == [
        "日本です。",
        "「はい。」",
        "そう",
    ]


def test_a_split_event_sends_its_tokens_with_its_last_piece():
    told, _ = released("word", ["on", "e t", "wo", " "])
    assert [(e.text, e.token_ids, e.offset) for e in told] == [
        ("one ", (0,), 0),
        ("two ", (1, 2, 3, 4, 5, 6), 1),
    ]
    head, _ = released("word", ["one two", " "])
    assert [(e.text, e.token_ids, e.num_drafted) for e in head] == [
        ("one ", (), 0),
        ("two ", (0, 1, 2), 8),
    ]
