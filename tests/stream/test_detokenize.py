"""Detokenizer against its definition: the text of all ids at once, cut at the first stop text."""

from hypothesis import assume, given, strategies as st

from outrider.stream.detokenize import Detokenizer
from outrider.testing import ByteTokenizer


class Pieces:
    """A tokenizer of text pieces and single bytes; id i is the i-th entry."""

    def __init__(self, *entries: str | bytes) -> None:
        self.entries = [e.encode() if isinstance(e, str) else e for e in entries]

    def decode(self, ids, skip_special_tokens=True):
        return b"".join(self.entries[i] for i in ids).decode(errors="replace")


class SentencePieces:
    """As SentencePiece reads: a word begins with its space, which the first of a text loses.

    Bytes that follow one another are a text together or, if they are none, all unreadable (as
    the byte fallback of `tokenizers` has it).
    """

    def __init__(self, *entries: str | bytes) -> None:
        self.entries = entries

    def decode(self, ids, skip_special_tokens=True):
        text, run = "", b""
        for i in [*ids, None]:
            entry = self.entries[i] if i is not None else ""
            if isinstance(entry, bytes):
                run += entry
                continue
            text += read(run) + entry.replace("▁", " ")
            run = b""
        return text.removeprefix(" ")


def read(run):
    try:
        return run.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(run)


BYTES = ByteTokenizer()
PIECES = Pieces("a", "b", "ab", "ba", "aab", "€", *(bytes([b]) for b in "€".encode()), "x")
SP = SentencePieces("▁a", "▁ab", "b", "▁", *(bytes([b]) for b in "é€".encode()), "a", "")


def split(data, items):
    """The items cut into consecutive commits."""
    commits, start = [], 0
    while start < len(items):
        end = data.draw(st.integers(start + 1, min(len(items), start + 6)))
        commits.append(tuple(items[start:end]))
        start = end
    return commits


def feed(detokenizer, commits, *, is_finished=True):
    """What the client reads, commit by commit, and the stop if there was one."""
    texts, count = [], 0
    for commit in commits:
        stop = detokenizer.add(commit)
        if stop is not None:
            texts.append(detokenizer.take(is_last=True))
            return texts, (stop.text, count + stop.num_tokens)
        count += len(commit)
        texts.append(detokenizer.take())
    if is_finished:
        texts.append(detokenizer.take(is_last=True))
    return texts, None


byte_ids = st.text(alphabet="ab é€😀\u0301", max_size=12).map(BYTES.encode)
noise = st.lists(st.sampled_from(list("aé€😀".encode())), max_size=24)


@given(byte_ids, st.data())
def test_any_split_gives_the_whole_text_and_whole_characters_only(ids, data):
    texts, _ = feed(Detokenizer(BYTES), split(data, ids))
    assert "".join(texts) == BYTES.decode(ids)
    assert "\ufffd" not in "".join(texts)


@given(noise, st.data())
def test_any_split_of_broken_bytes_gives_the_text_of_all(ids, data):
    texts, _ = feed(Detokenizer(BYTES), split(data, ids))
    assert "".join(texts) == BYTES.decode(ids)


@given(st.lists(st.integers(0, len(SP.entries) - 1), max_size=14), st.data())
def test_any_split_gives_the_text_of_one_by_one_with_sentence_pieces(ids, data):
    """Broken runs of bytes included, for which the text of all at once is another."""
    one_by_one, _ = feed(Detokenizer(SP, context=(0,)), [(i,) for i in ids])
    texts, _ = feed(Detokenizer(SP, context=(0,)), split(data, ids))
    assert "".join(texts) == "".join(one_by_one)


@given(st.lists(st.sampled_from([0, 1, 2, 3, 9, 10]), max_size=14), st.data())
def test_sentence_pieces_read_as_in_the_whole_text(ids, data):
    """The context keeps the space of the output's first word; without one it would be lost."""
    context = (0, 1)
    texts, _ = feed(Detokenizer(SP, context=context), split(data, ids))
    assert "".join(texts) == SP.decode([*context, *ids]).removeprefix(SP.decode(context))


def test_the_space_of_the_first_word_needs_the_context():
    assert feed(Detokenizer(SP, context=(2,)), [(0,), (1,)])[0] == [" a", " ab", ""]
    assert feed(Detokenizer(SP), [(0,), (1,)])[0] == ["a", " ab", ""]


def test_special_tokens_are_left_out_or_kept_as_asked():
    ids = (65, 3, 66, 2, 1)
    assert feed(Detokenizer(BYTES), [ids])[0] == ["AB", ""]
    kept = Detokenizer(BYTES, skip_special_tokens=False)
    assert feed(kept, [ids])[0] == ["A\x03B\x02\x01", ""]


def test_a_character_in_pieces_is_not_told_before_it_is_whole():
    euro = "€".encode()
    detokenizer = Detokenizer(BYTES)
    told = []
    for byte in euro:
        detokenizer.add((byte,))
        told.append(detokenizer.take())
    assert told == ["", "", "€"]


def test_an_incomplete_end_comes_with_the_last_text():
    detokenizer = Detokenizer(BYTES)
    detokenizer.add(tuple(b"a\xe2\x82"))
    assert detokenizer.take() == "a"
    assert detokenizer.take(is_last=True) == "\ufffd"
    assert detokenizer.take(is_last=True) == "", "told once"


stops = st.lists(st.text(alphabet="ab€", min_size=1, max_size=4), min_size=1, max_size=3)
piece_ids = st.lists(st.integers(0, len(PIECES.entries) - 1), max_size=16)


def definition(ids, stop_texts, keeps_stop):
    """(text, number of tokens, stop text): the stop that ends first in the text of all ids."""
    whole = PIECES.decode(ids)
    ends = {s: whole.find(s) + len(s) for s in stop_texts if s in whole}
    if not ends:
        return whole, len(ids), None
    end = min(ends.values())
    found = next(s for s in stop_texts if ends.get(s) == end)
    count = next(n for n in range(len(ids) + 1) if len(readable(ids[:n])) >= end)
    return whole[: end if keeps_stop else end - len(found)], count, found


def readable(ids):
    """The text that more ids cannot change."""
    return PIECES.decode(ids).rstrip("\ufffd")


@given(piece_ids, stops, st.booleans(), st.data())
def test_stop_texts_are_found_across_tokens_and_commits(ids, stop_texts, keeps_stop, data):
    assume("\ufffd" not in PIECES.decode(ids).rstrip("\ufffd"))
    detokenizer = Detokenizer(PIECES, stop=tuple(stop_texts), keeps_stop=keeps_stop)
    texts, stop = feed(detokenizer, split(data, ids))
    text, count, found = definition(ids, stop_texts, keeps_stop)
    assert "".join(texts) == text
    assert stop == ((found, count) if found else None)


@given(piece_ids, stops, st.data())
def test_exactly_what_may_begin_a_stop_text_is_held_back(ids, stop_texts, data):
    detokenizer = Detokenizer(PIECES, stop=tuple(stop_texts))
    told, seen = "", []
    for commit in split(data, ids):
        if detokenizer.add(commit) is not None:
            return
        told += detokenizer.take()
        seen += commit
        text = readable(seen)
        endings = [n for n in range(len(text) + 1) if any(
            s != text[n:] and s.startswith(text[n:]) for s in stop_texts
        )]  # fmt: skip
        assert told == text[: endings[0]]


def test_the_stop_text_is_cut_or_kept():
    ids = tuple(BYTES.encode("say no more"))
    for keeps, text in ((False, "say "), (True, "say no")):
        detokenizer = Detokenizer(BYTES, stop=("no",), keeps_stop=keeps)
        stop = detokenizer.add(ids)
        assert (stop.text, stop.num_tokens) == ("no", 6)
        assert detokenizer.take() == text
        assert detokenizer.take(is_last=True) == ""


def test_what_a_token_says_after_the_stop_text_is_dropped():
    tokenizer = Pieces("one. two", "!")
    detokenizer = Detokenizer(tokenizer, stop=(". ",))
    assert detokenizer.add((0, 1)) == (". ", 1)
    assert detokenizer.take(is_last=True) == "one"


def test_of_two_stop_texts_the_one_that_ends_first_wins():
    detokenizer = Detokenizer(BYTES, stop=("bcd", "c"))
    assert detokenizer.add(tuple(b"abcd")) == ("c", 3)
    assert detokenizer.take(is_last=True) == "ab"
    together = Detokenizer(Pieces("abcd"), stop=("bcd", "c"))
    assert together.add((0,)) == ("c", 1)
    assert together.take(is_last=True) == "ab"


def test_a_stop_text_that_did_not_count_is_not_held_back():
    detokenizer = Detokenizer(BYTES, stop=("ab",))
    assert detokenizer.add(tuple(b"ab"), may_stop=False) is None
    assert detokenizer.take() == "ab"


def test_tokens_that_may_not_stop_do_not_but_may_begin_a_stop_text():
    detokenizer = Detokenizer(BYTES, stop=("ab",))
    assert detokenizer.add(tuple(b"abxa"), may_stop=False) is None
    assert detokenizer.take() == "abx", "the a is held back"
    assert detokenizer.add(tuple(b"bc")) == ("ab", 1)
    assert detokenizer.take(is_last=True) == ""


def test_held_back_text_is_told_at_the_end():
    detokenizer = Detokenizer(BYTES, stop=("end",))
    detokenizer.add(tuple(b"the en"))
    assert detokenizer.take() == "the "
    assert detokenizer.take(is_last=True) == "en"


@given(piece_ids, piece_ids, stops, st.booleans())
def test_a_preview_is_what_would_be_told_and_changes_nothing(ids, ahead, stop_texts, has_stop):
    stop_texts = tuple(stop_texts) if has_stop else ()
    detokenizer = Detokenizer(PIECES, stop=stop_texts)
    if detokenizer.add(tuple(ids)) is not None:
        return
    detokenizer.take()
    count, text = detokenizer.preview(tuple(ahead))
    assert detokenizer.preview(tuple(ahead)) == (count, text)
    assert count == max((n for n in range(1, len(ahead) + 1) if told(ids, ahead[:n], stop_texts)),
                        default=0)  # fmt: skip
    if count:
        assert text == told(ids, ahead[:count], stop_texts)[0]
        assert detokenizer.add(tuple(ahead[:count])) is None
        assert detokenizer.take() == text


def told(ids, ahead, stop_texts):
    """(text,) of more tokens, if all of it is told at once and no stop text has begun or ended."""
    detokenizer = Detokenizer(PIECES, stop=stop_texts)
    detokenizer.add(tuple(ids))
    detokenizer.take()
    if detokenizer._text or any(detokenizer.add((token,)) is not None for token in ahead):
        return None
    text = detokenizer.take()
    return None if detokenizer.take(is_last=True) else (text,)


def test_a_preview_ends_before_a_character_in_pieces_and_before_a_stop_text():
    smile = "😀".encode()
    detokenizer = Detokenizer(BYTES, stop=("no!",))
    assert detokenizer.preview(tuple(b"ab" + smile[:3])) == (2, "ab")
    assert detokenizer.preview(tuple(b"ab" + smile)) == (6, "ab😀")
    assert detokenizer.preview(tuple(b"yes no")) == (4, "yes ")
    assert detokenizer.preview(tuple(b"yes no! more")) == (4, "yes ")
    assert detokenizer.preview(tuple(b"yes not")) == (7, "yes not")
    detokenizer.add(tuple(b"yes n"))
    assert detokenizer.take() == "yes "
    assert detokenizer.preview(tuple(b"ever")) == (0, ""), "a stop text may have begun"


def test_a_preview_completes_a_character_that_has_begun():
    euro = "€".encode()
    detokenizer = Detokenizer(BYTES)
    detokenizer.add(tuple(euro[:1]))
    assert detokenizer.take() == ""
    assert detokenizer.preview(tuple(euro[1:])) == (2, "€")
