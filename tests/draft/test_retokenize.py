"""The draft model reads the text it would have been given; only the end of it is encoded anew."""

import random

import pytest
from hypothesis import given, settings, strategies as st

from outrider.draft.retokenize import (
    LOOK_BEHIND,
    MAX_LOOK_BEHIND,
    TextLog,
    TokenLog,
    common_length,
    whole_characters,
)
from outrider.draft.vocabulary_map import Dialect
from outrider.tokenizer import load_tokenizer
from tests.draft.vocabularies import CODE, TEXT, letters, merged
from tests.test_tokenizer import write_sentencepiece

WORDS = [
    "the",
    "cat",
    "cats",
    "there",
    "return",
    "x1",
    "42",
    "naïve",
    "café",
    "日本語",
    "🐈",
    "🐈‍⬛",
]
TIGHT = ["", "", "", ","]
JOINTS = [" ", " ", " ", "  ", "\n", "\n    ", ", ", ".", "", "\t", "...\n\n"]


@pytest.fixture(scope="module")
def dialects(tmp_path_factory):
    pieces = load_tokenizer(write_sentencepiece(tmp_path_factory.mktemp("pieces")))
    made = {"words": merged(TEXT), "code": merged(CODE, 400), "letters": letters()}
    made["pieces"] = pieces
    return {name: Dialect(each, each.vocab_size) for name, each in made.items()}


def whole(dialect, text):
    """The full encoding, special tokens included."""
    return dialect.tokenizer.encode(text)


def random_text(rng):
    joints = rng.choice([JOINTS, TIGHT])
    parts = [rng.choice(WORDS) + rng.choice(joints) for _ in range(rng.randrange(1, 160))]
    return "".join(parts)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32))
@pytest.mark.parametrize(
    ("target", "draft"),
    [("words", "code"), ("letters", "words"), ("code", "letters"), ("pieces", "code"),
     ("letters", "pieces")],
)  # fmt: skip
def test_the_end_encoded_anew_gives_what_the_whole_would(dialects, target, draft, seed):
    rng = random.Random(seed)
    target, draft = dialects[target], dialects[draft]
    ids = target.tokenizer.encode(random_text(rng))
    text = target.tokenizer.decode(ids)
    log = TextLog(target, draft)
    at = 0
    while at < len(ids):
        at += rng.randrange(1, 40)
        before = list(log.tokens)
        num_kept = log.follow(ids[:at])
        assert log.tokens[:num_kept] == before[:num_kept]
        assert log.num_settled <= len(log.tokens)
        if not log.partial:
            assert log.tokens == whole(draft, target.tokenizer.decode(ids[:at]))
    assert log.num_covered == at or at > len(ids)
    assert log.tokens == whole(draft, text)


def test_what_is_settled_never_changes_and_a_step_costs_the_same_in_a_long_text(dialects):
    target, draft = dialects["letters"], dialects["words"]
    ids = target.encode(TEXT * 60)
    log = TextLog(target, draft)
    log.follow(ids[:4000])
    lengths = []
    encode = draft.tokenizer.encode

    class Noting:
        def encode(self, text, add_special_tokens=True):
            lengths.append(len(text))
            return encode(text, add_special_tokens=add_special_tokens)

    draft = Dialect(draft.tokenizer, draft.num_ids)
    draft.tokenizer = Noting()
    log._draft, log._encode = draft, draft.go_on
    for end in range(4001, len(ids) + 1):
        settled = log.tokens[: log.num_settled]
        num_kept = log.follow(ids[:end])
        assert num_kept == len(settled)
        assert log.tokens[:num_kept] == settled
    assert max(lengths) < 3 * LOOK_BEHIND
    assert log.tokens == encode(TEXT * 60)


def test_a_text_without_places_to_cut_is_appended_to_at_last(dialects, monkeypatch):
    monkeypatch.setattr("outrider.draft.retokenize._cuts", lambda text: [])
    target, draft = dialects["letters"], dialects["words"]
    ids = target.encode("the cat sat there. " * 80)
    log = TextLog(target, draft)
    for end in range(1, len(ids) + 1):
        log.follow(ids[:end])
        assert len(log.text) < MAX_LOOK_BEHIND
    assert b"".join(map(draft.bytes_of, log.tokens)) == b"the cat sat there. " * 80


def test_characters_that_have_only_begun_wait(dialects):
    target, draft = dialects["letters"], dialects["words"]
    ids = target.encode("a🐈b")
    log = TextLog(target, draft)
    seen = [(log.follow(ids[:end]), log.text, log.partial)[1:] for end in range(1, len(ids) + 1)]
    cat = "🐈".encode()
    assert seen == [("a", b""), ("a", cat[:1]), ("a", cat[:2]), ("a", cat[:3]), ("a🐈", b""),
                    ("a🐈b", b"")]  # fmt: skip


def test_bytes_that_are_no_character_are_replaced(dialects):
    target, draft = dialects["letters"], dialects["words"]
    (byte,) = (i for i, data in enumerate(target.spellings) if data == b"\x9f")
    log = TextLog(target, draft)
    log.follow([*target.encode("a"), byte, *target.encode("b")])
    assert log.text == "a\ufffdb"


def test_special_tokens_are_no_text_and_change_nothing(dialects):
    target, draft = dialects["words"], dialects["letters"]
    role = target.tokenizer.vocabulary()["<|user|>"]
    assert role not in target.tokenizer.special_ids
    log = TextLog(target, draft)
    ids = [role, *target.encode("the cat")]
    log.follow(ids)
    assert log.tokens == draft.encode("the cat")
    assert log.follow([*ids, target.tokenizer.eos_token_id]) == len(log.tokens)
    assert log.num_covered == len(ids) + 1


def test_a_log_of_tokens_only_appends():
    log = TokenLog([7], lambda token: (token, token) if token > 2 else ())
    assert log.follow([1, 3]) == 1
    assert log.tokens == [7, 3, 3]
    assert log.follow([1, 3, 2, 4]) == 3
    assert log.tokens == [7, 3, 3, 4, 4]
    assert (log.num_settled, log.num_covered) == (5, 4)


def test_common_length():
    assert common_length([1, 2, 3, 4], [1, 2, 9, 4], 1) == 2
    assert common_length([1, 2], [1, 2, 3], 0) == 2
    assert common_length([1], [1, 2, 3], 3) == 1


@pytest.mark.parametrize(
    ("data", "text"), [(b"ab", "ab"), ("aé".encode()[:-1], "a"), (b"a\xffb", "a"), (b"", "")]
)
def test_whole_characters(data, text):
    assert whole_characters(data) == text
