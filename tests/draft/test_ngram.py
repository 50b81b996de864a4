"""Prompt lookup: the index against its definition, and what a draft makes of it."""

from hypothesis import given, strategies as st

from outrider.draft.ngram import NgramDrafter, NgramIndex, continuation, merge
from outrider.request import Request, Speculation
from outrider.sequence import Sequence
from outrider.step import Row, RowPlan

texts = st.lists(st.integers(0, 2), min_size=1, max_size=40)
bounds = st.tuples(st.integers(1, 4), st.integers(0, 3)).map(lambda b: (b[0], b[0] + b[1]))


def brute_force(tokens, shortest, longest):
    """Where the text goes on after the last earlier occurrence of its ending, longest first."""
    starts = []
    for n in range(longest, shortest - 1, -1):
        earlier = [at for at in range(n, len(tokens)) if tokens[at - n : at] == tokens[-n:]]
        if earlier and earlier[-1] not in starts:
            starts.append(earlier[-1])
    return starts


def sequence(tokens, shortest=1, longest=4, **speculation):
    seq = Sequence(
        id="s",
        request=Request(id="s", prompt_token_ids=tuple(tokens)),
        index=0,
        tokens=list(tokens),
        seed=0,
        speculation=Speculation(
            drafter="ngram", prompt_lookup_min=shortest, prompt_lookup_max=longest, **speculation
        ),
    )
    NgramDrafter().open(seq)
    return seq


def draft(seq, depth, width=1, num_nodes=None):
    plan = RowPlan("ngram", depth, width, depth * width if num_nodes is None else num_nodes)
    (tree,) = NgramDrafter().draft([Row(seq, 1, plan.num_nodes)], [plan])
    tree.check()
    return tree


@given(texts, bounds, st.data())
def test_the_index_finds_what_its_definition_says_however_it_grows(tokens, limits, data):
    index, end = NgramIndex(*limits), 0
    while end < len(tokens):
        end = data.draw(st.integers(end + 1, len(tokens)))
        index.extend(tokens[:end])
        assert index.matches == brute_force(tokens[:end], *limits)


def test_the_most_recent_match_wins_over_the_first():
    tokens = [7, 8, 1, 5, 7, 8, 2, 5, 7, 8]
    assert draft(sequence(tokens), depth=3).tokens == (2, 5, 7)


def test_a_longer_match_wins_over_a_more_recent_one():
    tokens = [1, 2, 3, 9, 9, 3, 4, 4, 1, 2, 3]
    assert draft(sequence(tokens), depth=1).tokens == (9,)
    assert draft(sequence(tokens, longest=1), depth=1).tokens == (4,)


def test_an_ending_does_not_match_itself():
    assert len(draft(sequence([1, 2, 3, 4]), depth=4)) == 0
    assert len(draft(sequence([5]), depth=4)) == 0


def test_a_match_shorter_than_the_minimum_does_not_count():
    tokens = [1, 9, 2, 9]
    assert len(draft(sequence(tokens, shortest=2), depth=2)) == 0
    assert draft(sequence(tokens, shortest=1), depth=2).tokens == (2, 9)


def test_a_draft_is_a_chain_named_after_its_drafter_without_laws():
    tree = draft(sequence([1, 2, 3, 1, 2]), depth=3)
    assert tree.is_chain
    assert (tree.source, tree.laws, tree.tokens) == ("ngram", (), (3, 1, 2))


def test_branches_are_the_matches_of_other_lengths():
    tokens = [1, 2, 3, 9, 2, 3, 8, 3, 7, 1, 2, 3]
    tree = draft(sequence(tokens), depth=2, width=3)
    roots = [tree.tokens[node] for node in tree.children(-1)]
    assert roots == [9, 8, 7], "what followed 1 2 3, then 2 3, then 3"
    narrow = draft(sequence(tokens), depth=2, width=1)
    assert [narrow.tokens[node] for node in narrow.children(-1)] == [9]


@given(texts, st.integers(1, 12), st.data())
def test_past_the_end_a_draft_reads_what_it_has_written(tokens, length, data):
    start = data.draw(st.integers(0, len(tokens) - 1))
    drafted = continuation(tokens, start, length)
    text = tokens + drafted
    assert drafted == [text[start + i] for i in range(length)]


def test_a_loop_is_drafted_to_any_depth():
    assert draft(sequence([4, 5, 4, 5, 4]), depth=6).tokens == (5, 4, 5, 4, 5, 4)


chains = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=4)


@given(chains)
def test_a_merged_tree_holds_the_chains_and_nothing_else(found):
    tree = merge(found, 99, "ngram")
    tree.check()
    paths = [tree.path_tokens(node) for node in range(len(tree))]
    wanted = {tuple(chain[: i + 1]) for chain in found for i in range(len(chain))}
    assert len(paths) == len(set(paths)) == len(wanted)
    assert set(paths) == wanted
    first = [tree.tokens[node] for node in tree.children(-1)]
    assert first == list(dict.fromkeys(chain[0] for chain in found)), "earlier chains lead"


@given(chains, st.integers(1, 6))
def test_a_merged_tree_keeps_to_its_size_and_fills_it_in_order(found, num_nodes):
    whole, cut = merge(found, 99, "ngram"), merge(found, num_nodes, "ngram")
    cut.check()
    assert cut.tokens == whole.tokens[:num_nodes]
    assert cut.parents == whole.parents[:num_nodes]


def test_a_plan_of_few_nodes_is_kept():
    tokens = [1, 2, 3, 9, 2, 3, 8, 3, 7, 1, 2, 3]
    assert len(draft(sequence(tokens), depth=4, width=3, num_nodes=5)) == 5
    assert len(draft(sequence(tokens), depth=4, width=1, num_nodes=2)) == 2


def test_the_index_follows_the_log_and_is_given_up_with_the_sequence():
    seq, drafter = sequence([1, 2, 3]), NgramDrafter()
    assert len(draft(seq, depth=2)) == 0
    seq.tokens += [1, 2]
    assert draft(seq, depth=2).tokens == (3, 1)
    drafter.close(seq)
    assert seq.drafter_state == {}
    assert drafter.snapshot(seq) is None, "it is rebuilt from the tokens"
    drafter.open(seq)
    assert draft(seq, depth=2).tokens == (3, 1)
