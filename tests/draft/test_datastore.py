"""The datastore: suffixes against sorted(), searches against scanning, files against damage."""

import json

import numpy as np
import pytest
from hypothesis import given, strategies as st

from outrider.draft.datastore import END, LONGEST, Datastore, suffix_array
from outrider.errors import ConfigError

VOCAB = 4
documents = st.lists(
    st.lists(st.integers(0, VOCAB - 1), max_size=30), min_size=1, max_size=5
).filter(any)


def built(texts, vocab_size=VOCAB):
    return Datastore.build(texts, fingerprint="f", vocab_size=vocab_size)


def scan(texts, ending):
    """What follows each occurrence of `ending`, document by document."""
    n = len(ending)
    return [
        text[stop:]
        for text in texts
        for stop in range(n, len(text) + 1)
        if text[stop - n : stop] == ending
    ]


@given(st.lists(st.integers(-1, 3), max_size=60))
def test_the_suffix_array_is_the_sorted_suffixes(tokens):
    found = suffix_array(np.array(tokens, dtype=np.int32))
    assert found.tolist() == sorted(range(len(tokens)), key=lambda start: tokens[start:])


@given(st.lists(st.integers(-1, 1), max_size=80), st.sampled_from([2, 4, 8, 16]))
def test_to_a_depth_only_that_many_tokens_count(tokens, depth):
    found = suffix_array(np.array(tokens, dtype=np.int32), depth)
    starts = range(len(tokens))
    assert found.tolist() == sorted(starts, key=lambda start: tokens[start : start + depth])


@given(documents, st.lists(st.integers(0, VOCAB), max_size=20), st.integers(1, 4))
def test_a_search_finds_the_longest_ending_and_all_its_places(texts, tokens, shortest):
    store = built(texts)
    length, low, high = store.search(tokens, shortest)
    lengths = [n for n in range(1, min(len(tokens), LONGEST) + 1) if scan(texts, tokens[-n:])]
    longest = max(lengths, default=0)
    if longest < shortest:
        assert (length, low, high) == (0, 0, 0)
        return
    assert length == longest
    rows = store.continuations(low, high, most=10**6, length=40).tolist()
    cut = [row[: row.index(END)] for row in rows]
    assert sorted(cut) == sorted(scan(texts, tokens[-length:]))
    assert all(set(row[row.index(END) :]) == {END} for row in rows)


def test_an_ending_of_16_tokens_is_compared_and_no_more():
    ending = list(range(20))
    texts = [[*ending, 60], [50, *ending[-16:], 61], [50, *ending[-15:], 62]]
    store = built(texts, vocab_size=64)
    length, low, high = store.search(ending)
    found = store.continuations(low, high, 9, 1)[:, 0].tolist()
    assert (length, sorted(found)) == (16, [60, 61])


def test_occurrences_are_sampled_evenly_over_the_range():
    store = built([[0, 1]] * 100)
    _, low, high = store.search([0])
    assert high - low == 100
    assert len(store.continuations(low, high, 7, 1)) == 7
    store.positions, store.tokens = np.arange(100), np.arange(101)
    seen = store.continuations(0, 100, 10, 1)[:, 0].tolist()
    assert seen == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]


def test_a_document_does_not_run_into_the_next():
    store = built([[1, 2], [3, 1, 0]])
    assert store.search([2, 3])[0] == 1, "2 | 3 stand in two documents"
    length, low, high = store.search([1])
    rows = sorted(store.continuations(low, high, 9, 3).tolist())
    assert (length, rows) == (1, [[0, END, END], [2, END, END]])


@given(documents)
def test_a_folder_holds_what_was_built(tmp_path_factory, texts):
    folder, store = tmp_path_factory.mktemp("store"), built(texts)
    store.save(folder)
    again = Datastore.load(folder)
    assert again.header == store.header
    assert np.array_equal(again.tokens, store.tokens)
    assert np.array_equal(again.positions, store.positions)
    for ending in ([0], [1, 2], [3, 3, 0]):
        assert again.search(ending) == store.search(ending)
    assert sorted(path.name for path in folder.iterdir()) == [
        "datastore.json", "positions.npy", "tokens.npy"
    ]  # fmt: skip


def test_the_header_tells_the_figures(tmp_path):
    built([[1, 2, 3], [0]]).save(tmp_path / "new" / "folder")
    header = json.loads((tmp_path / "new" / "folder" / "datastore.json").read_text())
    assert header == {
        "fingerprint": "f",
        "vocab_size": VOCAB,
        "num_tokens": 4,
        "num_documents": 2,
        "format": "outrider-datastore-1",
    }


def test_a_mapped_datastore_survives_that_its_folder_is_written_anew(tmp_path):
    built([[1, 2, 3]] * 500).save(tmp_path)
    mapped = Datastore.load(tmp_path)
    before = mapped.tokens.tolist()
    built([[0]]).save(tmp_path)
    assert mapped.tokens.tolist() == before
    assert Datastore.load(tmp_path).header.num_tokens == 1


@pytest.mark.parametrize("texts", [[], [[]], [[], []]])
def test_a_corpus_without_tokens_is_refused(texts):
    with pytest.raises(ConfigError, match="no tokens"):
        built(texts)


@pytest.mark.parametrize("token", [VOCAB, -1])
def test_ids_outside_the_vocabulary_are_refused(token):
    with pytest.raises(ConfigError, match=r"outside \[0, 4\)"):
        built([[1, token, 2]])


def cut_short(folder):
    (folder / "tokens.npy").write_bytes((folder / "tokens.npy").read_bytes()[:-8])


def other_length(folder):
    np.save(folder / "positions.npy", np.zeros(2, dtype=np.int32))


def other_numbers(folder):
    np.save(folder / "tokens.npy", np.zeros(6))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "datastore.json").unlink(), "no datastore in .* build one with"),
        (lambda folder: (folder / "datastore.json").write_text("{"), "build it again with"),
        (lambda folder: (folder / "datastore.json").write_text("[]"), "another format"),
        (lambda folder: (folder / "datastore.json").write_text('{"format": "x"}'), "other format"),
        (lambda folder: (folder / "tokens.npy").unlink(), r"tokens\.npy.* build it again"),
        (cut_short, "build it again"),
        (other_numbers, "another format: build it again"),
        (other_length, "incomplete: build it again"),
    ],
)
def test_a_damaged_folder_is_refused_with_the_remedy(tmp_path, damage, message):
    built([[1, 2, 3], [0]]).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ConfigError, match=message):
        Datastore.load(tmp_path)
