"""Token Recycling: the table against a naive loop, trees against all trees, a bigram target."""

from itertools import combinations, product
from math import prod

import pytest
import torch

from outrider.draft.recycle import HIT_RATES, PUBLISHED_LEVELS, RecycleDrafter, template
from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.sequence import Sequence
from outrider.step import Commit, DraftTree, Row, RowPlan, TargetOutput
from outrider.testing import check_drafter, events, run, tiny_decoder, tiny_engine

OFF = SpeculationParams(method="off")


class BigramNetwork:
    """A target whose logits depend on the last token alone; it says `successor[token]`."""

    def __init__(self, successor):
        stand_in = tiny_decoder()
        self.spec, self.ops = stand_in.spec, stand_in.ops
        size = self.spec.vocab_size
        self.logits_VV = torch.randn((size, size), generator=torch.Generator().manual_seed(1))
        self.logits_VV[torch.arange(size), torch.tensor(successor)] = 50.0

    def forward(self, tokens_N, layout, kv, wanted_R):
        return self.logits_VV[tokens_N[wanted_R]]


def requests(speculations, max_tokens=24, temperature=0.0):
    return [
        Request(
            id=f"r{i}",
            prompt_token_ids=tuple((11 * i + j * j) % 90 + 30 for j in range(5 + 3 * i)),
            sampling=SamplingParams(
                max_tokens=max_tokens, temperature=temperature, ignore_eos=True
            ),
            speculation=speculation,
            seed=1000 + i,
        )
        for i, speculation in enumerate(speculations)
    ]


def sequence(tokens):
    prompt = tuple(tokens)
    return Sequence(
        id="s",
        request=Request(id="s", prompt_token_ids=prompt),
        index=0,
        tokens=list(prompt),
        seed=0,
    )


def teach(drafter, *rows):
    """The drafter sees sequences (root, draft tokens, logits rows) that accepted nothing."""
    commits, first, logits = [], [], []
    for tokens, nodes, rows_V in rows:
        seq = sequence([*tokens, 0])
        drafter.open(seq)
        tree = DraftTree(tokens=tuple(nodes), parents=(-1,) * len(nodes))
        commits.append(Commit(seq=seq, tree=tree, tokens=(0,)))
        first.append(len(logits))
        logits += rows_V
    drafter.observe(commits, TargetOutput(torch.tensor(logits), first, []))


def draft(drafter, tokens, depth=6, width=8, num_nodes=16):
    seq = sequence(tokens)
    plan = RowPlan("recycle", depth, width, num_nodes)
    (tree,) = drafter.draft([Row(seq, 1, num_nodes)], [plan])
    tree.check()
    return tree


def falling(*best, size=16):
    """Logits whose order is `best`, then the other tokens by id."""
    order = [*best, *(token for token in range(size) if token not in best)]
    return [float(size - order.index(token)) for token in range(size)]


@pytest.mark.parametrize("speculation", [
    SpeculationParams(method="recycle"),
    SpeculationParams(method="recycle", num_nodes=80),
    SpeculationParams(method="recycle", num_draft_tokens=9, width=1, num_nodes=9),
    SpeculationParams(method="recycle", num_draft_tokens=3, width=2, num_nodes=5),
])  # fmt: skip
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_bigram_target_is_accepted_to_the_depth_of_the_template(speculation, temperature):
    cycle = [10, 40, 20, 90, 33, 71, 64, 50, 12, 99, 41]
    successor = list(range(256))
    for token, following in zip(cycle, cycle[1:] + cycle[:1], strict=True):
        successor[token] = following
    engine = tiny_engine(
        target=BigramNetwork(successor), drafters=[RecycleDrafter(256)], draft_seed=None
    )
    asked = engine.drafters["recycle"]
    shape = template(
        speculation.num_nodes or asked.default_num_nodes,
        speculation.num_draft_tokens or asked.default_draft_tokens,
        speculation.width or asked.default_width,
    )
    depth = len(shape.levels)
    sampling = SamplingParams(
        max_tokens=1 + 3 * (depth + 1), temperature=temperature, ignore_eos=True
    )
    first, second = (
        Request(id=name, prompt_token_ids=(40,), sampling=sampling, speculation=speculation, seed=1)
        for name in ("first", "second")
    )
    cold = events(engine, [first])["first", 0][-1].metrics
    warm = events(engine, [second])["second", 0][-1].metrics
    assert warm.acceptance_length == depth + 1, "every token of the cycle is on record"
    assert warm.num_steps == 4 < cold.num_steps


def test_the_table_is_what_a_naive_loop_over_all_rows_leaves(monkeypatch):
    drafter, naive = RecycleDrafter(256), {}
    observe = drafter.observe

    def noting(commits, output):
        for commit, first in zip(commits, output.first, strict=True):
            if first < 0 or commit.seq.speculation.drafter != "recycle":
                continue
            root = commit.seq.tokens[: len(commit.seq.tokens) - len(commit.tokens)][-1]
            for row, token in enumerate([root, *commit.tree.tokens]):
                logits_V = output.logits_NV[first + row]
                naive[token] = logits_V.argsort(descending=True)[:8].tolist()
        observe(commits, output)

    monkeypatch.setattr(drafter, "observe", noting)
    engine = tiny_engine(drafters=[drafter], draft_seed=None)
    on = SpeculationParams(method="recycle")
    run(engine, requests([on, OFF, on, SpeculationParams(method="ngram"), on]))
    assert engine.stats.num_draft_tokens > 100
    seen = {token: row for token, row in enumerate(drafter.successors().tolist()) if row[0] >= 0}
    assert seen == naive
    assert (drafter.successors()[-1] == -1).all(), "the row of the missing token stays empty"


def test_of_rows_for_one_token_the_last_one_wins():
    drafter = RecycleDrafter(16)
    teach(
        drafter,
        ([5], [7, 7], [falling(1), falling(2), falling(3)]),
        ([7], [5], [falling(4), falling(6)]),
    )
    assert drafter.successors()[7, 0] == 4
    assert drafter.successors()[5, 0] == 6
    teach(drafter, ([5], [7], [falling(8), falling(9)]))
    assert (drafter.successors()[5, 0], drafter.successors()[7, 0]) == (8, 9)


def test_rows_of_failed_closed_and_unfinished_sequences_are_not_learnt():
    drafter = RecycleDrafter(16)
    failed, closed, chunk = sequence([1]), sequence([2]), sequence([3])
    for seq in (failed, closed, chunk):
        drafter.open(seq)
    drafter.close(closed)
    commits = [
        Commit(seq=failed, finish_reason="error", error="no numbers"),
        Commit(seq=closed, tokens=(2,)),
        Commit(seq=chunk),
    ]
    output = TargetOutput(torch.tensor([falling(4), falling(4)]), [0, 1, -1], [])
    drafter.observe(commits, output)
    assert (drafter.successors() == -1).all()


def test_a_tree_follows_the_table_and_ends_where_it_does():
    drafter = RecycleDrafter(16)
    assert len(draft(drafter, [3])) == 0
    teach(drafter, ([3], [4], [falling(4, 5), falling(6)]))
    tree = draft(drafter, [9, 3], width=2)
    paths = [tree.path_tokens(node) for node in range(len(tree))]
    assert paths == [(4,), (5,), (4, 6), (4, 0)], "4 was met, 5 and 6 were not"
    chain = draft(drafter, [3], width=1)
    assert chain.is_chain
    assert chain.tokens == (4, 6)


def test_rows_drafted_together_get_what_they_would_get_alone():
    drafter = RecycleDrafter(16)
    for token in range(16):
        teach(drafter, ([token], [], [falling((5 * token + 3) % 16, (3 * token) % 16)]))
    plans = [RowPlan("recycle", d, w, n) for d, w, n in [(6, 8, 16), (2, 3, 4), (6, 8, 16)]]
    seqs = [sequence([token]) for token in (1, 9, 14)]
    together = drafter.draft([Row(seq, 1, 99) for seq in seqs], plans)
    for seq, plan, tree in zip(seqs, plans, together, strict=True):
        assert drafter.draft([Row(seq, 1, 99)], [plan]) == [tree]
        assert len(tree) == plan.num_nodes
        assert max(tree.depth(node) for node in range(len(tree))) <= plan.depth
    assert together[0] != together[2]


@pytest.mark.parametrize(("width", "depth"), [(2, 3), (3, 2)])
@pytest.mark.parametrize("num_nodes", [1, 2, 3, 4, 5])
def test_a_template_is_the_best_of_all_trees(num_nodes, width, depth):
    every = [path for d in range(1, depth + 1) for path in product(range(width), repeat=d)]
    weight = {path: prod(HIT_RATES[rank] for rank in path) for path in every}
    best = max(
        sum(weight[path] for path in chosen)
        for chosen in combinations(every, num_nodes)
        if all(len(path) == 1 or path[:-1] in chosen for path in chosen)
    )
    shape = template(num_nodes, depth, width)
    ranks = [int(rank) for level in shape.levels for rank in level.ranks]
    tree = DraftTree(tokens=tuple(ranks), parents=shape.parents)
    tree.check()
    mine = sum(weight[tree.path_tokens(node)] for node in range(num_nodes))
    assert mine == pytest.approx(best, rel=1e-12)


def test_the_tree_of_80_nodes_has_the_published_levels():
    assert [len(level.ranks) for level in template(80, 6, 8).levels] == list(PUBLISHED_LEVELS)


@pytest.mark.parametrize("num_nodes", [1, 7, 16, 64, 80])
@pytest.mark.parametrize(("depth", "width"), [(6, 8), (4, 3), (5, 1), (6, 2)])
def test_a_template_keeps_to_depth_width_and_size(num_nodes, depth, width):
    shape = template(num_nodes, depth, width)
    full = sum(width**d for d in range(1, depth + 1))
    assert len(shape.parents) == min(num_nodes, full)
    assert len(shape.levels) <= depth
    assert max(shape.parents.count(parent) for parent in shape.parents) <= width
    ranks = [int(rank) for level in shape.levels for rank in level.ranks]
    for parent in set(shape.parents):
        siblings = [ranks[n] for n, above in enumerate(shape.parents) if above == parent]
        assert siblings == list(range(len(siblings))), "likeliest first"


def test_a_vocabulary_of_fewer_tokens_than_successors_will_do():
    drafter = RecycleDrafter(3)
    for token in range(3):
        teach(drafter, ([token], [], [falling(2, 0, size=3)]))
    tree = draft(drafter, [1])
    assert [tree.tokens[node] for node in tree.children(-1)] == [2, 0, 1]


def test_the_conformance_check():
    check_drafter(lambda: RecycleDrafter(256))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_pressed_for_blocks_and_mixed_with_others_the_tokens_stay_the_same(temperature):
    speculations = [
        SpeculationParams(method="recycle"),
        SpeculationParams(method="recycle", width=1, num_draft_tokens=3),
        OFF,
        SpeculationParams(method="recycle", num_nodes=30, num_draft_tokens=4),
    ] * 2
    sharp = tiny_decoder(scale=0.4)
    plain = run(
        tiny_engine(target=sharp, draft_seed=None), requests([OFF] * 8, temperature=temperature)
    )
    engine = tiny_engine(
        target=sharp, drafters=[RecycleDrafter(256)], draft_seed=None, num_blocks=30,
        options={"max_num_seqs": 6, "max_model_len": 100, "max_num_batched_tokens": 64},
    )  # fmt: skip
    assert run(engine, requests(speculations, temperature=temperature)) == plain
    assert engine.stats.num_preemptions > 0
    assert engine.stats.num_accepted_tokens > 0


def test_the_table_outlives_the_sequences_and_there_is_no_snapshot():
    drafter, seq = RecycleDrafter(16), sequence([1, 2])
    drafter.open(seq)
    assert drafter.snapshot(seq) is None
    drafter.close(seq)
    assert seq.drafter_state == {}
    teach(drafter, ([3], [], [falling(4)]))
    assert draft(drafter, [3]).tokens[0] == 4


def test_tenants_see_nothing_of_one_another():
    drafter = RecycleDrafter(9, max_tenants=2)
    drafter.successors("a")[3, 0] = 4
    assert (drafter.successors("b") == -1).all()
    assert drafter.successors("a")[3, 0] == 4
    drafter.successors("c")  # b was not used for longest
    assert set(drafter.tables) == {"a", "c"}


def test_fewer_successors_are_a_narrower_table_and_tree():
    drafter = RecycleDrafter(16, num_successors=2)
    teach(drafter, ([3], [], [falling(4, 5, 6)]))
    assert drafter.tables[""].shape == (17, 2)
    assert (drafter.default_width, drafter.max_width) == (2, 2)
    assert set(draft(drafter, [3]).tokens) == {4, 5}
