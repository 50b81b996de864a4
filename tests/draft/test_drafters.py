"""Drafters: each row goes to the drafter its plan names, and nobody does what is not theirs."""

from dataclasses import replace

import pytest
import torch

from outrider.draft.drafters import Drafters
from outrider.errors import ConfigError
from outrider.request import Request, Speculation, SpeculationParams
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, Batch, Commit, DraftTree, Row, RowPlan, TargetOutput
from outrider.testing import ScriptedDrafter, events, junk, tiny_engine

NOTHING = TargetOutput(torch.zeros(0, 1), [], [])


def sequence(name, drafter=""):
    request = Request(id=name, prompt_token_ids=(1, 2))
    return Sequence(
        id=name,
        request=request,
        index=0,
        tokens=[1, 2],
        seed=0,
        speculation=Speculation(drafter=drafter),
    )


def naming(drafter):
    """Drafts one token that says which sequence it was made for."""
    return ScriptedDrafter(
        lambda seq, plan: DraftTree.chain([ord(seq.id)] * plan.depth, drafter), name=drafter
    )


def test_every_row_gets_the_tree_of_its_own_drafter():
    names = {"a": "one", "b": "two", "c": "", "d": "one", "e": "two"}
    batch = Batch([Row(sequence(name, who), 1, 2) for name, who in names.items()], [])
    depths = (1, 2, 0, 2, 1)
    plan = [
        RowPlan(who, depth, 1, depth) for who, depth in zip(names.values(), depths, strict=True)
    ]
    trees = Drafters([naming("one"), naming("two")]).draft(batch, plan)
    assert [tree.source for tree in trees] == ["one", "two", "", "one", "two"]
    assert [tree.tokens for tree in trees] == [
        (ord(name),) * depth for name, depth in zip(names, depths, strict=True)
    ]


def test_a_drafter_is_asked_once_for_all_its_rows_and_not_at_all_for_none():
    asked = []

    class Noting(ScriptedDrafter):
        def draft(self, rows, plan):
            asked.append((self.name, [row.seq.id for row in rows]))
            return super().draft(rows, plan)

    drafters = Drafters([Noting(junk(9), name="one"), Noting(junk(9), name="two")])
    batch = Batch([Row(sequence(name, "one"), 1, 2) for name in "abc"], [])
    plan = [RowPlan("one", 1, 1, 1), RowPlan("two", 0, 1, 0), RowPlan("one", 1, 1, 1)]
    trees = drafters.draft(batch, plan)
    assert asked == [("one", ["a", "c"])]
    assert trees[1] is EMPTY_TREE


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (DraftTree.chain([1, 2, 3], "one"), "more than was planned"),
        (DraftTree(tokens=(1, 2), parents=(1, -1)), "parents before children"),
        (DraftTree(tokens=(1, 2), parents=(-1,)), "one parent per token"),
        (DraftTree(tokens=(1, 2), parents=(-1, 0), laws=(None,)), "one law per token"),
    ],
)
def test_a_tree_that_breaks_the_rules_is_caught_where_it_was_made(tree, message):
    drafters = Drafters([ScriptedDrafter(lambda seq, plan: tree, name="one")])
    with pytest.raises(AssertionError, match=message):
        drafters.draft(Batch([Row(sequence("a"), 1, 2)], []), [RowPlan("one", 2, 1, 2)])


def test_a_drafter_sees_every_commit_while_a_sequence_is_open_with_it():
    one, two = ScriptedDrafter(junk(9), name="one"), ScriptedDrafter(junk(9), name="two")
    mine = sequence("a", "one")
    commits = [Commit(seq=mine, tokens=(4, 5)), Commit(seq=sequence("b"))]
    drafters = Drafters([one, two])
    drafters.observe(commits, NOTHING)
    assert one.num_observed == {}
    drafters.open(mine)
    drafters.observe(commits, NOTHING)
    drafters.close(mine)
    drafters.observe(commits, NOTHING)
    assert one.num_observed == {"a": 2, "b": 0}
    assert two.num_observed == {}


def test_only_the_chosen_drafter_opens_and_closes_a_sequence():
    one, two = ScriptedDrafter(junk(9), name="one"), ScriptedDrafter(junk(9), name="two")
    drafters = Drafters([one, two])
    for seq in (sequence("a", "one"), sequence("b", "")):
        drafters.open(seq)
        drafters.close(seq)
    assert (one.opened, one.closed) == (["a"], ["a"])
    assert (two.opened, two.closed) == ([], [])


def test_who_reads_states_is_left_alone_where_nothing_can_be_drafted():
    """A drafter that learns from tokens learns on; states would be handed out for nothing."""
    reads, learns = naming("reads"), naming("learns")
    reads.boundaries = (0, 2)
    drafters = Drafters([reads, learns])
    off, on = sequence("a", "learns"), sequence("b", "reads")
    off.speculation = replace(off.speculation, parts=("reads",), policy="off")
    drafters.open(off)
    assert (reads.opened, learns.opened, drafters.taps()) == ([], ["a"], ())
    drafters.open(on)
    assert drafters.taps() == (0, 2)
    drafters.observe([Commit(seq=off, tokens=(4,)), Commit(seq=on, tokens=(5,))], NOTHING)
    drafters.close(on)
    drafters.close(off)
    assert (reads.opened, reads.closed, learns.closed) == (["b"], ["b"], ["a"])
    assert drafters.taps() == ()


def test_names():
    drafters = Drafters([naming("one"), naming("two")])
    assert drafters.names() == ["one", "two"]
    assert "one" in drafters
    assert "three" not in drafters
    assert drafters["two"].name == "two"


def test_in_an_engine_what_is_opened_is_closed_once():
    drafter = ScriptedDrafter(junk(256))
    engine = tiny_engine(
        drafters=[drafter],
        num_blocks=24,
        options={"max_model_len": 60, "max_num_seqs": 4},
    )
    spec = SpeculationParams(method="scripted", num_draft_tokens=3)
    asked = [
        Request(id=f"r{i}", prompt_token_ids=tuple(range(20 + i, 36 + i)), speculation=spec)
        for i in range(4)
    ]
    told = events(engine, asked)
    assert engine.stats.num_preemptions > 0
    assert sorted(drafter.opened) == sorted(drafter.closed)
    assert len(drafter.opened) == 4 + engine.stats.num_preemptions
    num_tokens = {key[0]: sum(len(e.token_ids) for e in es) for key, es in told.items()}
    assert {name.split("#")[0]: n for name, n in drafter.num_observed.items()} == num_tokens


def test_a_drafter_that_needs_what_nobody_hands_out_is_refused():
    drafter = ScriptedDrafter(junk(256))
    drafter.needs = ("hidden states",)
    with pytest.raises(ConfigError, match="'scripted' needs 'hidden states', which this version"):
        Drafters([drafter])


def test_a_head_that_waits_for_states_has_not_been_tried():
    """Its price would be that of doing nothing; one that looks and finds nothing has worked."""
    head = ScriptedDrafter(lambda seq, plan: EMPTY_TREE, name="head")
    head.boundaries = (2,)
    drafters = Drafters([head, ScriptedDrafter(lambda seq, plan: EMPTY_TREE, name="search")])
    plan = [RowPlan("head", 3, 1, 3), RowPlan("search", 3, 1, 3), RowPlan("head", 3, 1, 3)]
    trees = [EMPTY_TREE, EMPTY_TREE, DraftTree.chain([1], "head")]
    assert drafters.followed(plan, trees) == [RowPlan(), plan[1], plan[2]]
