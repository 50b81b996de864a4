"""LogitSpec: candidates against a table, the pool against its definition, junk in the pool."""

import random

import pytest
import torch
from hypothesis import given, strategies as st

from outrider.draft.retrieval import NgramPool, RetrievalDrafter, chain_length
from outrider.request import Request, SamplingParams, Speculation, SpeculationParams
from outrider.sequence import Sequence
from outrider.step import Commit, DraftTree, Row, RowPlan, TargetOutput
from outrider.testing import check_drafter, events, run, tiny_engine

OFF = SpeculationParams(method="off")
ON = SpeculationParams(method="retrieval")
texts = st.lists(st.integers(0, 3), min_size=1, max_size=30)


def sequence(tokens, width=64, num_nodes=256):
    return Sequence(
        id="s",
        request=Request(id="s", prompt_token_ids=tuple(tokens)),
        index=0,
        tokens=list(tokens),
        seed=0,
        speculation=Speculation(
            drafter="retrieval", num_draft_tokens=5, width=width, num_nodes=num_nodes
        ),
    )


def logits(ranked, size):
    """A row whose order is `ranked`, then the other tokens by id."""
    row = torch.zeros(size)
    order = [*ranked, *(token for token in range(size) if token not in ranked)]
    row[order] = torch.arange(size, 0, -1).float()
    return row


def draft(tokens, ranked=(), depth=5, width=64, num_nodes=256, size=256):
    """The tree below `tokens` when the row that the last one came from ranks as told."""
    drafter, seq = RetrievalDrafter(), sequence(tokens, width, num_nodes)
    drafter.open(seq)
    if ranked:
        output = TargetOutput(logits(ranked, size)[None], [0], [])
        drafter.observe([Commit(seq=seq, tokens=(tokens[-1],))], output)
    plan = RowPlan("retrieval", depth, width, num_nodes)
    (tree,) = drafter.draft([Row(seq, 1, num_nodes)], [plan])
    tree.check()
    return tree


def below(tree, node):
    """Depth of the subtree of a node, itself included."""
    return 1 + max((below(tree, child) for child in tree.children(node)), default=0)


def test_order_and_lengths_of_candidates():
    root, candidates = 255, list(range(64))
    text = [t for c in candidates for t in (c, 100 + c, 101 + c, 102 + c, 103 + c, 104 + c)]
    ranked = [9, root, 40, *(c for c in reversed(candidates) if c not in (9, 40))]
    tree = draft([*text, root], ranked)
    branches = tree.children(-1)
    wanted = [token for token in ranked if token != root]
    assert [tree.tokens[node] for node in branches] == wanted[:64], "by rank, without the root"
    assert branches[0] == 0
    assert ranked.index(58) == 8
    assert ranked.index(33) == 32
    table = {9: 4, 40: 4, 58: 4, 57: 3, 33: 3, 32: 1, 31: 1, 0: 1}  # token: length of its chain
    lengths = {tree.tokens[node]: below(tree, node) for node in branches}
    assert {token: lengths[token] for token in table} == table
    assert tree.path_tokens(3) == (9, 109, 110, 111)


@pytest.mark.parametrize(
    ("rank", "length"), [(0, 4), (1, 4), (8, 4), (9, 3), (32, 3), (33, 1), (64, 1)]
)
def test_length_of_a_chain_by_rank(rank, length):
    assert chain_length(rank) == length


def test_the_chain_of_the_root_comes_first_and_may_be_as_deep_as_planned():
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2]
    tree = draft(tokens, [2, 7, 5], depth=6)
    paths = [tree.path_tokens(node) for node in range(len(tree))]
    assert paths[5] == (3, 4, 5, 6, 7, 8)
    assert paths[6:10] == [(7,), (7, 8), (7, 8, 1), (7, 8, 1, 2)]
    assert paths[10] == (5,)


def test_a_longer_ending_decides_where_a_candidate_goes_on():
    tokens = [8, 1, 2, 3, 9, 2, 3, 4, 9, 3, 5, 9, 8, 1]
    assert draft(tokens, [2], width=2).path_tokens(3)[:3] == (2, 3, 9)
    tokens[1] = 7  # now only "2" itself is known, and last stood before 3 4
    assert draft(tokens, [2], width=1).tokens[:3] == (2, 3, 4)


def test_a_candidate_that_begins_like_the_roots_chain_branches_below_it():
    """5 1 9 was followed by 2 3; 1 9 2 last by 4: the same child, two ways on."""
    tokens = [5, 1, 9, 2, 3, 7, 1, 9, 2, 4, 8, 5, 1, 9]
    tree = draft(tokens, [2], depth=2, width=2, num_nodes=3)
    assert [tree.path_tokens(node) for node in range(3)] == [(2,), (2, 3), (2, 4)]
    chain = draft(tokens, [2], depth=2, width=1)
    assert (chain.is_chain, chain.tokens) == (True, (2, 3))


def test_without_logits_there_is_the_roots_chain_alone():
    tree = draft([1, 2, 3, 4, 1, 2], depth=3)
    assert tree.is_chain
    assert tree.tokens == (3, 4, 1)
    assert len(draft([1, 2, 3, 4])) == 0


def test_candidates_are_forgotten_when_the_log_has_gone_on_without_logits():
    drafter, seq = RetrievalDrafter(), sequence([1, 2, 3])
    drafter.open(seq)
    drafter.observe([Commit(seq=seq, tokens=(3,))], TargetOutput(logits([7], 9)[None], [0], []))
    plan = [RowPlan("retrieval", 5, 64, 99)]
    assert len(drafter.draft([Row(seq, 1, 99)], plan)[0]) > 0
    seq.tokens.append(8)
    assert len(drafter.draft([Row(seq, 1, 99)], plan)[0]) == 0


@given(texts, st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True), st.data())
def test_a_tree_keeps_to_its_plan(tokens, ranked, data):
    depth, width, nodes = (data.draw(st.integers(1, most)) for most in (7, 5, 20))
    tree = draft(tokens, ranked, depth, width, nodes, size=8)
    assert 1 <= len(tree) <= nodes
    assert len(tree.children(-1)) <= width
    assert all(tree.depth(node) <= depth for node in range(len(tree)))
    assert width > 1 or tree.is_chain
    candidates = [tree.tokens[node] for node in tree.children(-1)]
    assert len(set(candidates)) == len(candidates)


def brute_force(tokens, candidate):
    """The place after the last earlier occurrence of the longest ending of up to 3 tokens."""
    text = [*tokens, candidate]
    for length in range(3, 0, -1):
        for stop in range(len(tokens), length - 1, -1):
            if len(text) > length - 1 and tokens[stop - length : stop] == text[-length:]:
                return stop
    return None


@given(texts, st.integers(0, 4), st.data())
def test_the_pool_finds_what_its_definition_says(tokens, candidate, data):
    pool, end = NgramPool(1, 3), 0
    while end < len(tokens):
        end = data.draw(st.integers(end + 1, len(tokens)))
        pool.extend(tokens[:end])
    assert pool.after(tokens, candidate) == brute_force(tokens, candidate)


@given(texts, st.integers(0, 3))
def test_past_the_end_a_candidate_reads_itself_and_what_it_proposed(tokens, candidate):
    if candidate == tokens[-1]:
        return
    tree = draft(tokens, [candidate], width=64, num_nodes=256, size=8)
    start = brute_force(tokens, candidate)
    text = [*tokens, candidate]
    while start is not None and len(text) < len(tokens) + 4:
        text.append(text[start + len(text) - len(tokens) - 1])
    paths = [tree.path_tokens(node) for node in range(len(tree))]
    assert tuple(text[len(tokens) :]) in paths


def requests(speculation, temperature=0.0, count=8, max_tokens=30):
    return [
        Request(
            id=f"r{i}",
            prompt_token_ids=tuple((11 * i + j * j) % 9 + 30 for j in range(8 + 3 * i)),
            sampling=SamplingParams(
                max_tokens=max_tokens, temperature=temperature, ignore_eos=True
            ),
            speculation=speculation,
            seed=1000 + i,
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def plain():
    return {t: run(tiny_engine(draft_seed=None), requests(OFF, t)) for t in (0.0, 0.9)}


def pressed(drafter):
    """An engine with too few blocks for all."""
    return tiny_engine(
        drafters=[drafter], draft_seed=None, num_blocks=36,
        options={"max_num_seqs": 6, "max_model_len": 100, "max_num_batched_tokens": 64},
    )  # fmt: skip


def test_the_ranking_is_that_of_the_row_which_the_root_came_from(plain, monkeypatch):
    """At temperature 0 the root is the best of its row, whichever node the row belongs to."""
    drafter, best, nodes = RetrievalDrafter(), [], []
    observe = drafter.observe

    def checking(commits, output):
        observe(commits, output)
        for commit in commits:
            if commit.tokens and commit.finish_reason is None:
                state = commit.seq.drafter_state["retrieval"]
                best.append((state.ranked[0], state.num_tokens))
                assert best[-1] == (commit.tokens[-1], len(commit.seq.tokens))
                nodes.extend(commit.accepted[-1:])

    monkeypatch.setattr(drafter, "observe", checking)
    assert run(pressed(drafter), requests(ON)) == plain[0.0]
    assert len(best) > 50
    assert max(nodes) > 1, "some roots came from a row further down"


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_pressed_for_blocks_the_tokens_stay_the_same(plain, temperature):
    engine = pressed(RetrievalDrafter())
    assert run(engine, requests(ON, temperature)) == plain[temperature]
    assert engine.stats.num_preemptions > 0
    assert engine.stats.num_accepted_tokens > 0


def test_a_cut_commit_reads_the_row_of_the_last_tokens_parent():
    """A commit that keeps two of three accepted tokens: the second came from the first's row."""
    drafter, seq = RetrievalDrafter(), sequence([1, 2, 5, 6])
    drafter.open(seq)
    tree = DraftTree(tokens=(9, 5, 6, 7), parents=(-1, -1, 1, 2))
    commit = Commit(seq=seq, tree=tree, tokens=(5, 6), num_kept=2, accepted=(1, 2, 3))
    rows = torch.stack([logits([best], 16) for best in (10, 11, 12, 13, 14)])
    drafter.observe([commit], TargetOutput(rows, [0], []))
    assert seq.drafter_state["retrieval"].ranked[0] == 12


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_junk_in_the_pool_changes_no_token(plain, monkeypatch, temperature):
    rng, seen = random.Random(0), []

    def junk(pool, tokens, candidate):
        seen.append(candidate)
        return rng.randrange(len(tokens))

    monkeypatch.setattr(NgramPool, "after", junk)
    monkeypatch.setattr(
        NgramPool, "matches", property(lambda pool: [rng.randrange(8)], lambda pool, found: None),
        raising=False,
    )  # fmt: skip
    engine = pressed(RetrievalDrafter())
    assert run(engine, requests(ON, temperature)) == plain[temperature]
    assert len(seen) > 100


def test_the_conformance_check():
    check_drafter(RetrievalDrafter)


def test_it_drafts_more_than_the_ngrams_do():
    """Random weights repeat little: the second-best token is what there is to win."""
    ngram = SpeculationParams(method="ngram", prompt_lookup_min=1, prompt_lookup_max=3)
    lengths = {}
    for speculation in (ON, ngram):
        engine = tiny_engine(drafters=[RetrievalDrafter()], draft_seed=None)
        events(engine, requests(speculation))
        stats = engine.stats
        lengths[speculation.method] = stats.num_generated_tokens / stats.num_steps
    assert lengths["retrieval"] > lengths["ngram"]
