"""Log-probabilities on the wire: bytes of tokens, halves of characters, offsets in the text."""

import math

import pytest

from outrider.serve.logprobs import (
    LEAST,
    LegacyLogprobs,
    chat_logprob,
    token_bytes,
    token_string,
)
from outrider.stream.events import TokenLogprob

TEXT = "return the fox é € 🦊\n"


def test_bytes_of_tokens_join_to_the_text(llm):
    ids = llm.tokenizer.encode(TEXT, add_special_tokens=False)
    assert b"".join(token_bytes(llm.tokenizer, i) for i in ids) == TEXT.encode()
    assert any("\ufffd" in llm.tokenizer.decode([i]) for i in ids), "no half character was tried"


def test_special_tokens_are_written_out(llm):
    special = min(llm.tokenizer.special_ids)
    assert token_bytes(llm.tokenizer, special) == llm.tokenizer.token_text(special).encode()


@pytest.mark.parametrize(
    ("text", "decoded", "expected"),
    [
        ("<0x0A>", "\n", b"\n"),
        ("<0xE2>", "\ufffd", b"\xe2"),
        ("▁the", "the", b" the"),
        ("▁", "", b" "),
    ],
)
def test_sentencepiece_tokens(text, decoded, expected):
    class Pieces:
        special_ids = frozenset()

        def token_text(self, token_id):
            return text

        def decode(self, ids, skip_special_tokens=True):
            return decoded

    assert token_bytes(Pieces(), 7) == expected


def test_half_characters_are_spelled_as_openai_does():
    assert token_string(b"\xe2\x82") == "bytes:\\xe2\\x82"
    assert token_string("é".encode()) == "é"


def test_never_is_a_number_that_json_has(llm):
    token = TokenLogprob(token_id=9, logprob=-math.inf, top={5: -0.5, 6: -math.inf, 7: -0.1})
    entry = chat_logprob(llm.tokenizer, token)
    assert entry["logprob"] == LEAST
    assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.1, -0.5, LEAST]


def test_offsets_point_at_tokens_however_they_are_cut(llm):
    ids = llm.tokenizer.encode(TEXT, add_special_tokens=False)
    tokens = tuple(TokenLogprob(token_id=i, logprob=-1.0, top={}) for i in ids)
    whole = LegacyLogprobs(llm.tokenizer, (), start=4).take(tokens)
    parts = LegacyLogprobs(llm.tokenizer, (), start=4)
    assert [at for token in tokens for at in parts.take((token,))["text_offset"]] == whole[
        "text_offset"
    ]
    for string, offset in zip(whole["tokens"], whole["text_offset"], strict=True):
        if not string.startswith("bytes:"):
            assert TEXT[offset - 4 :].startswith(string)
