"""The suffix tree in C++ and its plain twin: counts by definition, equal drafts, clean removals."""

import random
import subprocess
import sys

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from outrider.draft.native.library import DATASTORE_SOURCES, SOURCES, library
from outrider.draft.native.suffix_tree import NativeSuffixTree
from outrider.draft.suffix_tree import NO_GUESS, PlainSuffixTree, Search
from outrider.ops.cpu import build

TREES = ("native", "plain")
texts = st.lists(st.lists(st.integers(0, 2), max_size=30), min_size=1, max_size=4)
searches = st.builds(
    Search,
    depth=st.integers(1, 8),
    width=st.integers(1, 3),
    num_nodes=st.integers(1, 12),
    alpha=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    offset=st.sampled_from([-1.0, 0.0, 0.5, 3.0]),
    min_probability=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)


def make(kind, depth=8):
    if kind == "plain":
        return PlainSuffixTree(depth)
    if build.find_compiler() is None:
        pytest.skip("no C++ compiler on the PATH")
    compiled = library()
    assert compiled is not None, "a compiler is there: the tree must build"
    return NativeSuffixTree(compiled, depth)


each_kind = pytest.mark.parametrize("kind", TREES)


def filled(kind, texts, depth=8):
    tree = make(kind, depth)
    for text in texts:
        tree.extend(tree.open(), text)
    return tree


def substrings(texts, depth):
    """Every substring of up to `depth` tokens and how often it occurs."""
    counts = {}
    for text in texts:
        for start in range(len(text)):
            for stop in range(start + 1, min(start + depth, len(text)) + 1):
                key = tuple(text[start:stop])
                counts[key] = counts.get(key, 0) + 1
    return counts


def most_nodes(texts, depth):
    """Nodes of the compressed tree: strings that branch or that a window ends at, and the root."""
    counts = substrings(texts, depth)
    windows = {tuple(t[i : i + depth]) for t in texts for i in range(len(t))}
    branching = {
        s for s in counts if len({k for k in counts if len(k) == len(s) + 1 and k[:-1] == s}) > 1
    }
    return 1 + len(windows | branching)


def guess_by_definition(texts, context, search, depth):
    """A chain, from counts alone; None where two tokens are equally frequent."""
    counts = substrings(texts, depth)
    best = ((), 0.0, 0)
    for match in range(1, min(len(context), depth - 1) + 1):
        string = tuple(context[-match:])
        most = min(search.depth, search.num_nodes, int(match * search.alpha + search.offset))
        drafted, probability, score = (), 1.0, 0.0
        while string in counts and len(drafted) < most:
            following = {t: counts.get((*string, t), 0) for t in range(3)}
            top = max(following.values())
            if list(following.values()).count(top) > 1 and top:
                return None
            probability = probability * top / counts[string]
            if not top or probability < search.min_probability:
                break
            token = max(following, key=following.get)
            drafted, string, score = (*drafted, token), (*string, token), score + probability
        if drafted and score >= best[1]:
            best = (drafted, score, match)
    return best


@each_kind
@given(texts=texts, depth=st.integers(2, 9))
def test_counts_are_those_of_substrings(kind, texts, depth):
    tree = filled(kind, texts, depth)
    counts = substrings(texts, depth)
    assert all(tree.count(string) == count for string, count in counts.items())
    for string in list(counts)[:50]:
        for token in range(3):
            assert tree.count([*string, token]) == counts.get((*string, token), 0)
    assert tree.num_tokens == sum(map(len, texts))


@given(texts=texts, depth=st.integers(2, 9))
def test_the_compressed_tree_has_no_node_too_many(texts, depth):
    assert filled("native", texts, depth).num_nodes == most_nodes(texts, depth)


@each_kind
@given(texts=texts, context=st.lists(st.integers(0, 2), min_size=1, max_size=9), search=searches)
def test_a_chain_is_what_its_definition_says(kind, texts, context, search):
    search = search._replace(width=1, offset=abs(search.offset))
    expected = guess_by_definition(texts, context, search, 8)
    if expected is not None:
        found = filled(kind, texts).speculate(context, search)
        assert (found.tokens, found.score, found.match) == expected


# 6 and 7 are equally frequent: the text with 6 comes later.
ANCHORS = ([1, 2, 3, 4, 5, 7], [1, 2, 3, 4, 5, 6], [9, 2, 3, 4, 8])


@each_kind
@pytest.mark.parametrize("width", [1, 2])
def test_the_papers_example(kind, width):
    tree = filled(kind, ANCHORS, depth=64)
    search = Search(depth=8, width=width, num_nodes=3)
    first = tree.speculate([0, 1, 2, 3], search)
    assert (first.tokens, first.score, first.match) == ((4, 5, 6), 2.5, 3)
    second = tree.speculate([9, 9, 2, 3], search)
    assert (second.tokens, second.score, second.match) == ((4, 8), 2.0, 3)
    turned = filled(kind, ANCHORS[::-1], depth=64)
    assert turned.speculate([0, 1, 2, 3], search).tokens == (4, 5, 7), "the most recent of equals"


@each_kind
def test_a_tree_takes_the_likeliest_nodes_and_keeps_to_width_and_depth(kind):
    tree = filled(kind, [[1, 2, 3], [1, 2, 4], [1, 2, 3], [1, 5, 6], [1, 7, 8]])
    found = tree.speculate([1], Search(depth=2, width=2, num_nodes=9, offset=9.0))
    assert found.tokens == (2, 3, 7, 8), "at most width * depth; 5 was seen before 7"
    assert found.parents == (-1, 0, -1, 2)
    assert found.probabilities == (0.6, 0.6 * 2 / 3, 0.2, 0.2)
    assert found.score == 0.6 + 0.6 * 2 / 3 + 0.2 + 0.2
    wide = tree.speculate([1], Search(depth=2, width=3, num_nodes=9, offset=9.0))
    assert (wide.tokens, wide.parents) == ((2, 3, 7, 5, 8, 6), (-1, 0, -1, -1, 2, 3))
    flat = tree.speculate([1], Search(depth=1, width=3, num_nodes=9, offset=9.0))
    assert (flat.tokens, flat.parents) == ((2, 7, 5), (-1, -1, -1))
    few = tree.speculate([1], Search(depth=2, width=2, num_nodes=3, offset=9.0))
    assert few.tokens == found.tokens[:3]


def brute_force_longest(text, context):
    """Length of the longest ending that stands in the text before its last token; last such end."""
    for match in range(len(context), 0, -1):
        ends = [i for i in range(match, len(text)) if text[i - match : i] == context[-match:]]
        if ends:
            return match, ends[-1]
    return 0, None


@each_kind
def test_the_longest_match_and_its_last_end_against_brute_force(kind):
    rng = random.Random(1)
    for _ in range(300):
        text = [rng.randrange(rng.choice([2, 3, 9])) for _ in range(rng.randrange(1, 80))]
        context = [rng.randrange(3) for _ in range(5)] if rng.random() < 0.3 else text[-30:]
        match, end = brute_force_longest(text, context[-63:])
        found = filled(kind, [text], depth=64).longest(context, 20)
        assert found.match == match == found.score
        expected = text[end : end + min(20, 4 * match)] if match else []
        assert found.tokens == tuple(expected)


@each_kind
def test_of_several_texts_the_one_opened_last_is_the_most_recent(kind):
    tree = make(kind)
    old, new = tree.open(), tree.open()
    tree.extend(new, [1, 2])
    tree.extend(old, [1, 3])
    search = Search(1, 1, 1)
    assert tree.speculate([1], search).tokens == tree.longest([1], 1).tokens == (2,)
    tree.remove(new)
    assert tree.speculate([1], search).tokens == tree.longest([1], 1).tokens == (3,)


@each_kind
def test_nothing_is_drafted_from_nothing(kind):
    tree, search = make(kind), Search(8, 1, 8)
    assert tree.speculate([1, 2], search) == tree.longest([1, 2], 8) == NO_GUESS
    tree.extend(tree.open(), [])
    assert tree.speculate([], search) == tree.longest([], 8) == NO_GUESS
    tree.extend(tree.open(), [1, 2])
    assert tree.speculate([3], search) == tree.longest([2], 8) == NO_GUESS


def agree(native, plain, context, search):
    assert native.speculate(context, search) == plain.speculate(context, search)
    most = search.num_nodes
    assert native.longest(context, most) == plain.longest(context, most)


@pytest.mark.parametrize("alphabet", [1, 2, 3, 40])
def test_thousands_of_streams_draft_the_same(alphabet):
    """Texts grow in turns, are removed in any order, and are asked in between."""
    rng = random.Random(alphabet)
    for _ in range(700):
        depth = rng.choice([2, 3, 5, 9])
        native, plain, numbers = make("native", depth), make("plain", depth), []
        for _ in range(rng.randrange(2, 14)):
            deed = rng.random()
            if deed < 0.25 or not numbers:
                numbers.append((native.open(), plain.open()))
            elif deed < 0.4:
                one, other = numbers.pop(rng.randrange(len(numbers)))
                native.remove(one)
                plain.remove(other)
            else:
                tokens = [rng.randrange(alphabet) for _ in range(rng.randrange(1, 12))]
                one, other = rng.choice(numbers)
                native.extend(one, tokens)
                plain.extend(other, tokens)
            context = [rng.randrange(alphabet) for _ in range(rng.randrange(1, 10))]
            search = Search(
                rng.randrange(1, 7), rng.choice([1, 1, 2, 4]), rng.randrange(1, 12),
                rng.choice([0.5, 1.0, 2.5]), rng.choice([0.0, 2.0]), rng.choice([0.0, 0.1, 0.4]),
            )  # fmt: skip
            agree(native, plain, context, search)


class Trees(RuleBasedStateMachine):
    """Whatever was appended and removed, in any order: what is left is a tree built anew."""

    def __init__(self):
        super().__init__()
        self.depth = 4
        self.native = make("native", self.depth)
        self.texts = {}

    @rule()
    def open(self):
        text = self.native.open()
        assert text not in self.texts
        self.texts[text] = []

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 2), max_size=8))
    def extend(self, data, tokens):
        text = data.draw(st.sampled_from(sorted(self.texts)))
        self.native.extend(text, tokens)
        self.texts[text] += tokens

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def remove(self, data):
        text = data.draw(st.sampled_from(sorted(self.texts)))
        self.native.remove(text)
        del self.texts[text]

    @invariant()
    def is_a_tree_of_what_is_left(self):
        left = list(self.texts.values())
        anew = filled("native", left, self.depth)
        assert self.native.num_nodes == anew.num_nodes == most_nodes(left, self.depth)
        for string, count in substrings(left, self.depth).items():
            assert self.native.count(string) == anew.count(string) == count
        for token in range(3):
            search = Search(3, 1, 3, 1.0, 3.0, 0.0)
            # Which token is drafted may differ, as the texts were opened in another order.
            one, other = (tree.speculate([token], search) for tree in (self.native, anew))
            assert one.probabilities[:1] == other.probabilities[:1]


TestTrees = Trees.TestCase
TestTrees.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


def test_many_children_are_found_and_kept_in_order():
    """More than the few that are searched one by one, so through the hash table."""
    rng = random.Random(0)
    native, plain = make("native", 4), make("plain", 4)
    numbers = []
    for _ in range(30):
        tokens = [min(int(rng.paretovariate(0.6)), 300) for _ in range(60)]
        numbers.append((native.open(), plain.open()))
        native.extend(numbers[-1][0], tokens)
        plain.extend(numbers[-1][1], tokens)
    while numbers:
        for token in range(1, 12):
            for width in (1, 8):
                agree(native, plain, [token], Search(3, width, 24, 1.0, 3.0, 0.001))
            assert native.count([token]) == plain.count([token])
        one, other = numbers.pop(rng.randrange(len(numbers)))
        native.remove(one)
        plain.remove(other)
    assert (native.num_nodes, native.num_tokens) == (1, 0)


@pytest.mark.parametrize("alphabet", [20, 100_000], ids=["few tokens", "always new tokens"])
def test_what_was_removed_is_used_again(alphabet):
    """Memory of a tree that forgets as much as it takes in does not grow."""
    tree, numbers, held = make("native", 16), [], []
    rng = random.Random(0)
    for turn in range(300):
        numbers.append(tree.open())
        tree.extend(numbers[-1], [rng.randrange(alphabet) for _ in range(100)])
        if len(numbers) > 10:
            tree.remove(numbers.pop(0))
        if turn in (100, 299):
            held.append(tree.num_bytes)
    assert held[1] < 1.3 * held[0]


def test_importing_compiles_nothing_and_the_sources_are_there():
    for sources in (SOURCES, DATASTORE_SOURCES):
        assert (sources.folder / sources.main).is_file()
    code = (
        "import outrider.draft.suffix, outrider.draft.rest, outrider.draft.native.library as m; "
        "assert m.library.cache_info().currsize == m.datastore_library.cache_info().currsize == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_tree_is_compiled_for_any_processor_and_one_thread():
    (recipe,) = build.recipes("c++", SOURCES)
    assert (recipe.weakness, recipe.openmp) == ("", None)
    assert recipe.flags == build.BASE_FLAGS
    assert recipe.key != build.Recipe("c++", (), None).key, "the kernels are another library"


def test_where_it_cannot_be_compiled_python_is_said_to_serve(monkeypatch, tmp_path, caplog):
    refuses = tmp_path / "refuses"
    refuses.write_text("#!/bin/sh\nexit 1\n")
    refuses.chmod(0o755)
    monkeypatch.setenv("CXX", str(refuses))
    monkeypatch.setenv("OUTRIDER_CACHE", str(tmp_path / "cache"))
    assert build.load.__wrapped__(SOURCES) is None
    told = f"{refuses} cannot compile the suffix tree: plain Python serves, slower"
    assert caplog.messages[-1] == told
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    assert build.load.__wrapped__(SOURCES) is None
    assert "no C++ compiler" in caplog.messages[-1]
    assert "plain Python serves" in caplog.messages[-1]
