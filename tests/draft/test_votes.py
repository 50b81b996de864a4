"""Votes in C++ and their plain twin: trees by naive counts, equal drafts, files that lie."""

import gc
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, strategies as st

from outrider.draft import rest
from outrider.draft.datastore import END, LONGEST, Datastore
from outrider.draft.native.datastore import NativeVotes
from outrider.draft.native.library import DATASTORE_SOURCES, datastore_library
from outrider.draft.votes import Ask, Branches, PlainVotes, heaviest
from outrider.ops.cpu import build
from outrider.step import DraftTree

KINDS = ("native", "plain")
each_kind = pytest.mark.parametrize("kind", KINDS)
rows = st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=1, max_size=30)
corpora = st.lists(st.lists(st.integers(0, 2), max_size=40), min_size=1, max_size=6).filter(any)
contexts = st.lists(st.integers(0, 3), max_size=20)
asks = st.builds(
    Ask,
    depth=st.integers(0, 6),
    width=st.integers(1, 4),
    num_nodes=st.integers(0, 80),
    shortest=st.integers(1, 4),
    max_occurrences=st.sampled_from([1, 2, 7, 5000]),
)


def store_of(texts, vocab_size=1 << 20):
    return Datastore.build(texts, fingerprint="f", vocab_size=vocab_size)


def make(kind, store):
    if kind == "plain":
        return PlainVotes(store)
    if build.find_compiler() is None:
        pytest.skip("no C++ compiler on the PATH")
    compiled = datastore_library()
    assert compiled is not None, "a compiler is there: the search must build"
    return NativeVotes(compiled, store)


def agree(store, context, ask, native=None):
    native, plain = native or make("native", store), PlainVotes(store)
    assert native.search(context, ask.shortest) == plain.search(context, ask.shortest)
    assert native.draft(context, ask) == plain.draft(context, ask)


def scan(texts, ending):
    """What follows each occurrence of `ending`, document by document."""
    n = len(ending)
    return [
        text[stop:]
        for text in texts
        for stop in range(n, len(text) + 1)
        if text[stop - n : stop] == ending
    ]


def votes(texts, length=5):
    return np.array([[*text, *[END] * (length - len(text))] for text in texts], dtype=np.int32)


def naive(texts):
    """{path: how many texts begin with it}."""
    return Counter(tuple(text[:n]) for text in texts for n in range(1, len(text) + 1))


def tree_of(branches):
    tree = DraftTree(tokens=branches.tokens, parents=branches.parents)
    tree.check()
    return tree


def paths(branches):
    tree = tree_of(branches)
    return [tree.path_tokens(node) for node in range(len(tree))]


@given(rows, st.integers(1, 40))
def test_the_nodes_are_the_heaviest_by_a_naive_count(texts, num_nodes):
    counts = naive(texts)
    found = paths(heaviest(votes(texts), num_nodes, 99))
    assert len(set(found)) == len(found) == min(num_nodes, len(counts))
    weights = [counts[path] for path in found]
    assert weights == sorted(counts.values(), reverse=True)[:num_nodes], "heaviest first"


@given(rows, st.integers(1, 20), st.integers(1, 3))
def test_no_node_has_more_children_than_the_width_and_those_are_its_heaviest(
    texts, num_nodes, width
):
    counts, branches = naive(texts), heaviest(votes(texts), num_nodes, width)
    tree, found = tree_of(branches), paths(branches)
    for node in (-1, *range(len(tree))):
        path = tree.path_tokens(node)
        taken = [counts[found[child]] for child in tree.children(node)]
        below = sorted((n for p, n in counts.items() if p[:-1] == path), reverse=True)
        assert len(taken) <= width
        assert taken == below[: len(taken)]


@given(rows, st.integers(1, 6))
def test_a_width_of_one_is_the_heaviest_chain(texts, num_nodes):
    counts, tree = naive(texts), tree_of(heaviest(votes(texts), num_nodes, 1))
    assert tree.is_chain
    path = ()
    for token in tree.tokens:
        children = {p[-1]: n for p, n in counts.items() if p[:-1] == path}
        assert children[token] == max(children.values())
        path += (token,)
    assert len(tree) == num_nodes or not any(p[:-1] == path for p in counts)


def test_of_equal_nodes_the_shallower_comes_first():
    assert paths(heaviest(votes([[1, 2, 3], [4]]), 4, 9)) == [(1,), (4,), (1, 2), (1, 2, 3)]


@each_kind
@given(texts=corpora, context=contexts, shortest=st.integers(1, 4))
def test_the_longest_ending_is_the_one_a_scan_finds(kind, texts, context, shortest):
    length, low, high = make(kind, store_of(texts)).search(context, shortest)
    lengths = [n for n in range(1, min(len(context), LONGEST) + 1) if scan(texts, context[-n:])]
    longest = max(lengths, default=0)
    if not longest or longest < shortest:
        assert (length, low, high) == (0, 0, 0)
    else:
        assert (length, high - low) == (longest, len(scan(texts, context[-longest:])))


@each_kind
@given(texts=corpora, context=contexts.filter(any), ask=asks)
def test_a_draft_is_the_heaviest_of_what_a_scan_finds(kind, texts, context, ask):
    ask = ask._replace(max_occurrences=5000, width=99)
    lengths = [n for n in range(1, min(len(context), LONGEST) + 1) if scan(texts, context[-n:])]
    longest = max(lengths, default=0)
    found = paths(make(kind, store_of(texts)).draft(context, ask))
    if not longest or longest < ask.shortest:
        assert not found
        return
    counts = naive([text[: ask.depth] for text in scan(texts, context[-longest:])])
    assert len(set(found)) == len(found) == min(ask.num_nodes, len(counts))
    assert [counts[path] for path in found] == sorted(counts.values(), reverse=True)[: len(found)]


@given(texts=corpora, context=contexts, ask=asks)
def test_both_kinds_agree(texts, context, ask):
    agree(store_of(texts), context, ask)


@pytest.mark.parametrize("skew", [0.5, 1.2])
@pytest.mark.parametrize("position", [np.int32, np.int64], ids=["32 bits", "64 bits"])
def test_both_kinds_agree_on_larger_corpora(skew, position):
    """Endings with thousands of places, and hundreds of tokens behind one: the table widens."""
    rng = random.Random(0)
    texts = [[min(int(rng.paretovariate(skew)), 40_000) for _ in range(2000)] for _ in range(12)]
    store = store_of(texts)
    store = Datastore(store.header, store.tokens, store.positions.astype(position))
    native, widest = make("native", store), 0
    for _ in range(400):
        text = rng.choice(texts)
        stop = rng.randrange(1, len(text))
        ask = Ask(
            rng.randrange(1, 9), rng.choice([1, 4, 64]), rng.choice([1, 8, 200]),
            rng.choice([1, 2]), rng.choice([3, 1000, 5000]),
        )  # fmt: skip
        context = rng.choice([text[:stop], text[stop - 1 : stop]])
        agree(store, context, ask, native)
        _, low, high = native.search(context)
        widest = max(widest, len(set(store.tokens[store.positions[low:high]].tolist())))
    assert widest > 64


@each_kind
def test_a_mapped_file_is_read_where_it_lies(kind, tmp_path):
    texts = [[1, 2, 3, 4], [9, 2, 3, 5], [9, 2, 3, 5]]
    store_of(texts).save(tmp_path)
    votes = make(kind, Datastore.load(tmp_path))
    store_of([[7]]).save(tmp_path)
    gc.collect()  # nobody but the votes holds the map
    assert votes.draft([0, 2, 3], Ask(1, 9, 9)) == Branches((5, 4), (-1, -1))


@given(
    st.lists(st.integers(-(2**40), 2**40), min_size=4, max_size=4),
    st.lists(st.integers(-5, 9), min_size=6, max_size=6),
)
def test_a_damaged_index_is_never_read_outside_of_the_corpus(positions, tokens):
    store = store_of([[1, 2, 3, 1], [2]])
    damaged = Datastore(store.header, np.array(tokens, np.int32), np.array(positions, np.int64))
    votes = make("native", damaged)
    for token in (0, 1, 2, 3, 2**31 - 1):
        tree_of(votes.draft([token], Ask(4, 4, 16)))


def test_tokens_that_no_corpus_has_are_searched_like_others():
    for context in ([2**31 - 1], [1, 2**31 - 1], [], [0]):
        agree(store_of([[1, 2, 3]]), context, Ask(3, 3, 3))


def test_the_drafter_takes_c_plus_plus_where_it_can(monkeypatch, tmp_path, caplog):
    store = store_of([[1, 2, 3]])
    if build.find_compiler() is not None:
        assert isinstance(rest.new_votes(store), NativeVotes)
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    monkeypatch.setenv("OUTRIDER_CACHE", str(tmp_path / "cache"))
    assert build.load.__wrapped__(DATASTORE_SOURCES) is None
    assert "no C++ compiler" in caplog.messages[-1]
    assert "plain Python serves" in caplog.messages[-1]
    monkeypatch.setattr(rest, "datastore_library", lambda: None)
    assert isinstance(rest.new_votes(store), PlainVotes)
