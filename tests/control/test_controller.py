"""The controller between policies and the engine, and the policies that measure nothing."""

import pytest

from outrider.control.base import PLAIN, Facts, Room
from outrider.control.controller import Controller
from outrider.control.fixed import FixedPolicy, OffPolicy, TablePolicy, read_table
from outrider.control.policies import make_controller
from outrider.errors import ConfigError, RequestError
from outrider.request import Candidate, Request, SamplingParams, Speculation
from outrider.sequence import Sequence
from outrider.step import Batch, Row, RowPlan


def row(policy="fixed", k=4, room=16, max_tokens=100, width=1, num_nodes=0, **options):
    spec = Speculation(
        drafter="m",
        num_draft_tokens=k,
        width=width,
        num_nodes=num_nodes,
        policy=policy,
        policy_options=options,
    )
    request = Request(
        id="r", prompt_token_ids=(1, 2), sampling=SamplingParams(max_tokens=max_tokens)
    )
    seq = Sequence(id="r#0", request=request, index=0, tokens=[1, 2], seed=0, speculation=spec)
    seq.num_cached = 1
    return Row(seq, 1, room)


def controller():
    return Controller(1000, [FixedPolicy(), OffPolicy(), TablePolicy()])


def plan(*rows):
    return controller().plan(Batch(list(rows), []))


def test_fixed_is_as_asked_for():
    assert plan(row(k=5)) == [RowPlan("m", 5, 1, 5)]
    assert plan(row(k=3, width=2)) == [RowPlan("m", 3, 2, 6)]
    assert plan(row(k=3, width=4, num_nodes=7)) == [RowPlan("m", 3, 4, 7)]


def test_what_cannot_be_used_is_not_drafted():
    assert plan(row(k=5, max_tokens=3)) == [RowPlan("m", 2, 1, 2)]
    assert plan(row(k=5, max_tokens=1)) == [PLAIN]
    assert plan(row(k=5, room=2)) == [RowPlan("m", 2, 1, 2)]
    assert plan(row(k=5, room=0)) == [PLAIN]
    assert Controller(4).plan(Batch([row(k=5)], [])) == [RowPlan("m", 1, 1, 1)]
    unread = row(k=5)
    unread.seq.num_cached = 0
    assert plan(unread) == [PLAIN]


def test_policies_of_one_step_may_differ():
    table = {"table": "1-2:3,3-:1"}
    found = plan(row(), row("off"), row("table", **table))
    assert [part.depth for part in found] == [4, 0, 1]


@pytest.mark.parametrize(("size", "depth"), [(1, 4), (4, 4), (5, 2), (16, 2), (17, 0), (64, 0)])
def test_a_table_goes_by_sequences_that_decode(size, depth):
    rows = [row("table", table="1-4:4,5-16:2,17-:0") for _ in range(size)]
    assert {part.depth for part in plan(*rows)} == {depth}


def test_prompts_are_not_counted_as_load():
    reading = row("off")
    reading.seq.tokens.extend([1] * 500)
    prompts = [Row(reading.seq, 100, 0)] * 6
    found = plan(row("table", table="1-4:4,5-:0"), *prompts)
    assert found[0].depth == 4


@pytest.mark.parametrize(
    ("text", "table"),
    [("1:3", ((1, 3),)), (" 1-4 : 4, 5-: 0", ((1, 4), (5, 0))), ("2-3:1,8-9:0", ((2, 1), (8, 0)))],
)
def test_tables_are_read(text, table):
    assert read_table(text) == table


@pytest.mark.parametrize("text", ["", "x", "4-1:2", "1-4:4,3-5:2", "1-4:99", "1-4", "0-4:1"])
def test_what_is_no_table_is_refused(text):
    with pytest.raises(RequestError, match="table="):
        read_table(text)


def test_a_policy_that_plans_too_much_is_caught():
    class Greedy(FixedPolicy):
        name = "greedy"

        def plan(self, rooms, load):
            return [RowPlan("m", 99, 1, 99) for _ in rooms]

    with pytest.raises(AssertionError, match="greedy"):
        Controller(1000, [Greedy()]).plan(Batch([row("greedy")], []))


def test_two_policies_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="fixed"):
        Controller(10, [FixedPolicy(), FixedPolicy()])


def test_the_engines_own_controller_knows_all_policies():
    made = make_controller(100, Facts(clock=lambda: 0.0))
    assert list(made.policies) == ["fixed", "off", "table", "adaptive"]
    assert made.default == "adaptive"
    assert made.resting(8) == {"off"}
    assert set(made.explain()) == set(made.policies)
    with pytest.raises(ConfigError, match="adaptve"):
        make_controller(100, Facts(), "adaptve")


def test_a_candidate_is_drafted_for_as_far_as_it_goes():
    room = Room(row(k=8).seq, 8, 5)
    assert room.plan(8, Candidate("n", 6, 1, 6)) == RowPlan("n", 5, 1, 5)
    assert room.plan(2, Candidate("n", 6, 1, 6)) == RowPlan("n", 2, 1, 2)
