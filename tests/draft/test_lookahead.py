"""Lookahead: the tree it draws, what enters its pool, and that the output stays the target's."""

from itertools import pairwise

import pytest
import torch

from outrider.draft.drafters import Drafters
from outrider.draft.lookahead import LookaheadDrafter, with_window
from outrider.engine.resolve import resolve
from outrider.errors import RequestError
from outrider.models.base import KVShape, ModelSpec
from outrider.ops.torch import TorchOps
from outrider.request import Request, SamplingParams, Speculation, SpeculationParams
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, Commit, DraftTree, Row, RowPlan, TargetOutput
from outrider.testing import check_drafter, events, run, tiny_decoder, tiny_engine

OFF = SpeculationParams(method="off")
LOOK = SpeculationParams(method="lookahead")
PROMPT = (11, 12, 13, 14, 15)
DEFAULTS = {name: about.default for name, about in LookaheadDrafter.options.items()}


class Noted(LookaheadDrafter):
    """Notes every (token, what the target said after it) that it was shown."""

    def __init__(self):
        self.said = set()
        self.pools = {}

    def observe(self, commits, output):
        for commit, first in zip(commits, output.first, strict=True):
            for node, token in enumerate(commit.tree.tokens):
                self.said.add((token, output.argmax_N[first + 1 + node]))
        super().observe(commits, output)

    def close(self, seq):
        self.pools[seq.id] = seq.drafter_state[self.name].pool
        super().close(seq)


class Successor:
    """A target that says, after each token, a token that depends on it alone."""

    def __init__(self, following):
        self.following = torch.tensor(following)
        self.ops = TorchOps()
        self.spec = ModelSpec(
            name="successor", family="toy", vocab_size=len(following), max_positions=256,
            eos_token_ids=(), kv_shapes=(KVShape(1, 1, 1),), dtype=torch.float32,
            device=torch.device("cpu"), num_parameters=0, fingerprint="",
        )  # fmt: skip

    def forward(self, tokens_N, layout, kv, wanted_R):
        said_R = self.following[tokens_N[wanted_R]]
        return torch.nn.functional.one_hot(said_R, len(self.following)).float()


def request(name="r", speculation=LOOK, prompt=PROMPT, seed=5, **sampling):
    return Request(
        id=name,
        prompt_token_ids=prompt,
        sampling=SamplingParams(**{"max_tokens": 40, "ignore_eos": True, **sampling}),
        speculation=speculation,
        seed=seed,
    )


def engine_with(drafter, **more):
    return tiny_engine(drafters=[drafter], draft_seed=None, **more)


def sequence(num_draft_tokens=10, num_nodes=56, seed=0, tokens=PROMPT, **options):
    seq = Sequence(
        id="s",
        request=Request(id="s", prompt_token_ids=tuple(PROMPT)),
        index=0,
        tokens=list(tokens),
        num_prompt=len(PROMPT),
        seed=seed,
        speculation=Speculation(
            drafter="lookahead",
            num_draft_tokens=num_draft_tokens,
            num_nodes=num_nodes,
            width=33,
            options={**DEFAULTS, **options},
        ),
    )
    LookaheadDrafter().open(seq)
    return seq


def draft(seq, depth=10, num_nodes=56, width=33):
    plan = RowPlan("lookahead", depth, width, num_nodes)
    (tree,) = LookaheadDrafter().draft([Row(seq, 1, num_nodes)], [plan])
    tree.check()
    assert len(tree) <= num_nodes
    assert all(tree.depth(node) <= depth for node in range(len(tree)))
    assert len(tree.children(-1)) <= width
    return tree


def answer(seq, tree, say, num_accepted=0):
    """A pass over the tree: after a path of tokens the target says `say(path)`."""
    said = [say(tree.path_tokens(node)) for node in range(-1, len(tree))]
    seq.tokens += [99] * (num_accepted + 1)
    output = TargetOutput(torch.empty(0), [0], said)
    LookaheadDrafter().observe([Commit(seq=seq, tree=tree)], output)


def say(path):
    return hash(path) % 1000 + 100


def state_of(seq):
    return seq.drafter_state["lookahead"]


def window_of(seq):
    return [list(column) for column in state_of(seq).columns]


def fill(seq, steps=4):
    for _ in range(steps):
        answer(seq, draft(seq), say)
    return seq


def test_the_window_fills_one_row_a_step_and_the_first_columns_leave():
    seq = sequence()
    shapes = []
    for _ in range(5):
        tree = draft(seq)
        shapes.append((len(window_of(seq)), {len(column) for column in window_of(seq)}))
        answer(seq, tree, say)
    assert shapes == [(10, {1}), (9, {2}), (8, {3}), (7, {4}), (7, {4})]


def test_row_0_begins_with_tokens_of_the_prompt_by_the_seed():
    first, again, other = sequence(), sequence(), sequence(seed=1)
    trees = [draft(seq) for seq in (first, again, other)]
    assert trees[0] == trees[1] != trees[2]
    assert trees[0].is_chain
    assert set(trees[0].tokens) <= set(PROMPT)


def test_the_tree_is_row_0_with_a_chain_below_each_column():
    tree, tips = with_window(DraftTree.chain([7, 8], "x"), [[1, 2, 3], [4, 5, 6]])
    assert tree.tokens == (7, 8, 1, 2, 3, 4, 5, 6)
    assert tree.parents == (-1, 0, -1, 2, 3, 2, 5, 6)
    assert [tree.path_tokens(tip) for tip in tips] == [(1, 2, 3), (1, 4, 5, 6)]


def test_a_pass_ends_one_ngram_per_column_and_the_oldest_row_leaves():
    seq = fill(sequence(), 3)
    before, tree = window_of(seq), draft(seq)
    assert state_of(seq).pool == {}
    answer(seq, tree, say)
    after = window_of(seq)
    row_0 = [column[0] for column in before]
    for j, (old, new) in enumerate(zip(before, after, strict=True)):
        told = say((*row_0[: j + 1], *old[1:]))
        assert new == [*old[1:], told]
        assert (*old[1:], told) in state_of(seq).pool[old[0]]


def test_the_pool_keeps_the_most_recent_ngrams_each_once():
    state = state_of(sequence(window=1, ngram=3, guesses=2))
    for b, c in ((1, 2), (3, 4), (1, 2), (5, 6)):
        state.columns = [[9, b]]
        state.learn([c])
    assert state.pool == {9: [(5, 6), (1, 2)]}


def test_ngrams_of_the_root_stand_first_as_a_trie():
    seq = fill(sequence())
    state_of(seq).pool = {PROMPT[0]: [(1, 2, 3, 4), (1, 2, 5, 6), (7, 8, 9, 1)]}
    seq.tokens += PROMPT[:1]
    tree = draft(seq)
    paths = [tree.path_tokens(node) for node in range(len(tree))]
    assert paths[:4] == [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]
    assert {(1, 2, 5, 6), (7, 8, 9, 1)} <= set(paths)
    assert len(tree) == 10 + 7 * 4
    roots = [tree.tokens[node] for node in tree.children(-1)]
    assert roots == [1, 7, window_of(seq)[0][0]]


def test_ngrams_give_way_first_then_columns():
    seq = fill(sequence())
    state_of(seq).pool = {PROMPT[0]: [(1, 2, 3, 4), (7, 8, 9, 1)]}
    seq.tokens += PROMPT[:1]
    assert draft(seq, num_nodes=31).tokens[:3] == (1, 2, 3)
    assert len(state_of(seq).tips) == 7
    assert len(draft(seq, num_nodes=28)) == 28
    assert len(draft(seq, num_nodes=13)) == 13, "three columns and one node of an n-gram"
    assert len(state_of(seq).tips) == 3
    assert draft(seq, num_nodes=3).tokens == (1, 2, 3)


def test_columns_go_where_the_path_would_be_too_long():
    seq = fill(sequence())
    state_of(seq).pool = {PROMPT[0]: [(1, 2, 3, 4)]}
    seq.tokens += PROMPT[:1]
    for depth, num_columns in ((10, 7), (9, 6), (4, 1), (3, 0)):
        draft(seq, depth=depth)
        assert len(state_of(seq).tips) == num_columns
    assert draft(seq, depth=2).tokens == (1, 2)


def test_columns_that_did_not_run_stay_as_they_were():
    seq = fill(sequence())
    before = window_of(seq)
    answer(seq, draft(seq, num_nodes=8), say)
    after = window_of(seq)
    assert after[2:] == before[2:]
    assert [column[:-1] for column in after[:2]] == [column[1:] for column in before[:2]]


def test_width_bounds_the_branches_with_the_window():
    seq = fill(sequence())
    state_of(seq).pool = {PROMPT[0]: [(1, 2, 3, 4), (7, 8, 9, 1), (1, 5, 5, 5)]}
    seq.tokens += PROMPT[:1]
    tree = draft(seq, width=2)
    assert [tree.tokens[node] for node in tree.children(-1)] == [1, window_of(seq)[0][0]]
    assert 5 in tree.tokens, "an n-gram that begins alike is no further branch"


def test_a_window_that_can_never_run_whole_begins_smaller():
    few = state_of(sequence(num_draft_tokens=3, num_nodes=56))
    assert (few.num_columns, few.num_rows) == (1, 3)
    small = state_of(sequence(num_nodes=9))
    assert (small.num_columns, small.num_rows) == (2, 4)
    least = state_of(sequence(num_draft_tokens=1, num_nodes=1))
    assert (least.num_columns, least.num_rows) == (1, 1)
    assert (state_of(sequence()).num_columns, state_of(sequence()).num_rows) == (7, 4)


def test_nothing_is_learned_without_logits_or_from_another_tree():
    seq = fill(sequence())
    tree, before = draft(seq), window_of(seq)
    other = DraftTree(tokens=tree.tokens, parents=tree.parents, source="another")
    for seen, first in ((other, 0), (EMPTY_TREE, 0), (tree, -1)):
        output = TargetOutput(torch.empty(0), [first], [5] * (len(tree) + 1))
        LookaheadDrafter().observe([Commit(seq=seq, tree=seen)], output)
    assert window_of(seq) == before
    closed = Sequence(id="c", request=seq.request, index=0, tokens=[1], seed=0)
    LookaheadDrafter().observe([Commit(seq=closed, tree=tree)], output)


def test_a_column_whose_logits_are_no_numbers_waits():
    seq = fill(sequence())
    tree, before = draft(seq), window_of(seq)
    answer(seq, tree, lambda path: -1)
    assert window_of(seq) == before


@pytest.mark.parametrize("seed", range(20))
def test_greedy_tokens_are_those_of_plain_decoding_and_the_pool_was_really_said(seed):
    drafter = Noted()
    prompt = tuple((13 * seed + j * j) % 90 + 30 for j in range(4 + seed % 5))
    engine = engine_with(drafter, target=tiny_decoder(seed))
    expected = run(engine, [request("plain", OFF, prompt)])["plain", 0]
    assert run(engine, [request("fast", LOOK, prompt)])["fast", 0] == expected
    chains = [
        (first, *ngram)
        for first, ngrams in drafter.pools["fast#0"].items()
        for ngram in ngrams
    ]  # fmt: skip
    assert chains
    for chain in chains:
        assert len(chain) == 5
        assert all(pair in drafter.said for pair in pairwise(chain))


def test_identity_by_the_suite():
    check_drafter(LookaheadDrafter)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "repetition_penalty": 1.2}])
def test_identity_with_preemption_chunks_and_options(sampling):
    def asked(speculation):
        return [
            request(f"r{i}", speculation, tuple(range(30 + i, 39 + 2 * i)), seed=i, **sampling)
            for i in range(6)
        ]

    small = SpeculationParams(
        method="lookahead", num_draft_tokens=6, num_nodes=20,
        drafter_options={"window": 4, "ngram": 3, "guesses": 2},
    )  # fmt: skip
    expected = run(tiny_engine(), asked(OFF))
    options = {"max_model_len": 70, "max_num_batched_tokens": 40, "max_num_seqs": 4}
    for speculation in (LOOK, small):
        pressed = engine_with(LookaheadDrafter(), num_blocks=30, options=options)
        assert run(pressed, asked(speculation)) == expected
        assert pressed.stats.num_preemptions > 0
        assert pressed.manager.num_used == 0


def test_on_a_periodic_target_whole_ngrams_are_accepted():
    following = [(3 * i + 1) % 10 for i in range(10)]
    engine = engine_with(LookaheadDrafter(), target=Successor(following), tokenizer=None)
    asked = request(prompt=(0, 1, 4, 3), max_tokens=120)
    (told,) = events(engine, [asked]).values()
    tokens = [t for event in told for t in event.token_ids]
    text = [*asked.prompt_token_ids, *tokens]
    assert all(b == following[a] for a, b in pairwise(text))
    late = [len(event.token_ids) for event in told][12:-3]
    assert min(late) >= 5, "ngram - 1 guesses and the bonus token"


def test_the_pool_outlives_the_sequence_in_a_snapshot():
    drafter, seq = LookaheadDrafter(), sequence()
    assert drafter.snapshot(seq) is None
    fill(seq, 6)
    kept = drafter.snapshot(seq)
    pool = {first: list(ngrams) for first, ngrams in state_of(seq).pool.items()}
    fill(seq, 3)
    drafter.close(seq)
    assert seq.drafter_state == {}
    assert drafter.snapshot(seq) is None
    assert drafter.restore(seq, kept) == len(seq.tokens)
    assert state_of(seq).pool == pool != {}
    assert state_of(seq).columns == []


def test_a_part_of_another_drafter_takes_the_defaults():
    seq = sequence()
    bare = Speculation(drafter="whole", num_draft_tokens=10, num_nodes=56)
    seq.speculation = bare
    LookaheadDrafter().open(seq)
    assert (state_of(seq).num_columns, state_of(seq).num_guesses) == (7, 7)


def test_bounds_of_the_options():
    for name, value in (("window", 33), ("ngram", 10), ("guesses", 0), ("guesses", 33)):
        with pytest.raises(ValueError, match=name):
            LookaheadDrafter.options[name].check(name, value)
    assert DEFAULTS == {"window": 0, "ngram": 0, "guesses": 7}


def test_a_window_that_does_not_fit_is_refused():
    def ask(**params):
        spec = SpeculationParams(method="lookahead", **params)
        return resolve(spec, SamplingParams(), Drafters([LookaheadDrafter()]), "", "")

    assert ask(num_draft_tokens=3).num_draft_tokens == 3  # the usual window, begun smaller
    with pytest.raises(RequestError, match="=11 or more"):
        ask(drafter_options={"window": 7, "ngram": 6}, num_draft_tokens=4)
    with pytest.raises(RequestError, match=r"ngram=1: .* use 2 to 9"):
        ask(drafter_options={"ngram": 1})
    wide = {"window": 15, "ngram": 4}
    with pytest.raises(RequestError, match=r"num_draft_tokens=10: a window of 15 .*=17 or more"):
        ask(drafter_options=wide)
    with pytest.raises(RequestError, match=r"num_nodes=30: .*num_nodes=45 or more"):
        ask(drafter_options=wide, num_draft_tokens=17, num_nodes=30)
    assert ask(drafter_options=wide, num_draft_tokens=17).options["window"] == 15
