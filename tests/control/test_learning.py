"""Lessons: what steps beside prompts, with targets, with trees and with other policies teach."""

import pytest

from outrider.control.adaptive import AdaptivePolicy
from outrider.control.base import Facts, Load, Room, Step, StepTimes
from outrider.control.cost import CostModel, PassCounts
from outrider.control.learning import Lessons
from outrider.control.minds import Minds
from outrider.request import Request, SamplingParams, Speculation
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, Batch, Commit, DraftTree, Row, RowPlan

CHAIN = DraftTree.chain((1, 1, 1, 1), "m")


def sequence(num_tokens=1, **speculation):
    spec = Speculation(
        **{"drafter": "m", "num_draft_tokens": 4, "policy": "adaptive", **speculation}
    )
    request = Request(id="r", prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=None))
    seq = Sequence(
        id="r#0", request=request, index=0, tokens=[1] * num_tokens, seed=0, speculation=spec
    )
    seq.num_prompt, seq.num_cached = 1, num_tokens - 1
    return seq


def drafted(seq, num_tokens=1, part=RowPlan("m", 4, 1, 4), tree=CHAIN, seconds=1.0, prompt=()):
    """One step in which `seq` is given so many tokens, beside `prompt` (sequence, rows)."""
    seq.tokens.extend([1] * num_tokens)
    seq.num_cached = len(seq.tokens) - 1
    accepted = tuple(range(num_tokens - 1))
    commits = [Commit(seq, tree, (1,) * num_tokens, len(tree.tokens), num_tokens - 1, 0, accepted)]
    rows, plan = [Row(seq, 1, 4)], [part]
    for other, num_rows in prompt:
        rows.append(Row(other, num_rows, 0))
        plan.append(RowPlan())
        commits.append(Commit(other))
    return Step(Batch(rows, []), plan, commits, StepTimes(0.0, seconds, 0.0))


def known(pass_s):
    cost = CostModel()
    for _ in range(30):
        for num_rows in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
            cost.observe_pass(PassCounts(num_rows, 0, 0, 1, 0), pass_s(num_rows), 0.0)
    return cost


def test_beside_prompts_a_token_is_worth_a_step_of_decoding_alone():
    """A pass of a prompt takes 20 times as long as decoding; drafts double the rest of it."""
    lessons = Lessons(Facts(lambda: 0.0))
    lessons.cost = known(lambda num_rows: 0.005 if num_rows < 100 else 0.1)
    seq, reading = sequence(), sequence(1000, drafter="")
    for number in range(400):
        reading.num_cached = 0
        step = drafted(seq, 1 + number % 2, seconds=0.108, prompt=[(reading, 256)])
        lessons._weigh(step, step.times, lessons._learn_acceptance(step))
    assert lessons.guard.num_shut > 0


def test_a_wide_tree_that_was_not_drafted_was_not_refused():
    lessons, seq = Lessons(Facts()), sequence()
    for _ in range(40):
        lessons.observe(drafted(seq, part=RowPlan("m", 2, 2, 4), tree=EMPTY_TREE))
    found = lessons.minds.of(seq).experience["m"].forecast(1, 40)
    assert found.reached[0] < 0.2


def test_two_that_learn_from_one_engine_do_not_disturb_each_other():
    """As `outrider bench calibrate` beside the engine's own policy."""
    one, other, seq = Lessons(Facts()), Lessons(Facts()), sequence(500)
    for number in range(4):
        step = drafted(seq)
        lags = [each._learn_acceptance(step).drafted["m"].lag for each in (one, other)]
        assert lags == [496, 496] if number == 0 else [0, 0]


def test_a_preempted_sequence_is_new_to_its_drafters():
    minds, seq = Minds(), sequence(400)
    minds.of(seq).drafted_at["m"] = 400
    assert minds.of(seq).lag(seq, "m") == 0
    seq.num_preemptions += 1
    assert minds.of(seq).lag(seq, "m") == 396


def test_a_past_is_no_sequence_that_drafted():
    lessons, seq = Lessons(Facts()), sequence()
    minds = lessons.minds
    mind = minds.of(seq)
    mind.experience["m"].expect([10, 5], [5, 3], 12.0)
    assert minds.common(seq, "m")._num_sequences == 0.0


def policy_with_prices(now):
    policy = AdaptivePolicy(Facts(now))
    policy.lessons.cost = known(lambda num_rows: 0.005 + 2e-4 * num_rows)
    return policy


def feed(policy, rooms, accepted):
    for room in rooms:
        for _ in range(60):
            policy.lessons.minds.of(room.seq).experience["m"].observe(4, 4, accepted, 0)


def test_a_first_token_that_came_is_waited_for_no_more():
    now = [100.0]
    policy = policy_with_prices(lambda: now[0])
    rooms = [Room(sequence(50), 4, 4) for _ in range(4)]
    feed(policy, rooms, 4)
    waiting = sequence(ttft_s=1.0)
    waiting.num_prompt, waiting.arrived_s = len(waiting.tokens), 99.0
    load = Load(68, 64, 4, 0, 200, 0, (), [(waiting, 0)])
    assert {part.depth for part in policy.plan(rooms, lambda: load)} == {0}
    waiting.tokens.append(1)
    policy.lessons.step += 1
    after = Load(4, 0, 4, 0, 200, 0)
    assert min(part.depth for part in policy.plan(rooms, lambda: after)) > 0


def test_the_time_of_prompts_counts_against_a_target():
    """30 ms are left, and the prompt takes all of them."""
    policy = policy_with_prices(lambda: 100.0)
    room = Room(sequence(50), 4, 4)
    feed(policy, [room], 4)
    waiting = sequence(ttft_s=1.0)
    waiting.num_prompt, waiting.arrived_s = len(waiting.tokens), 99.03
    load = Load(129, 128, 1, 0, 50, 0, (), [(waiting, 0)])
    (part,) = policy.plan([room], lambda: load)
    assert part.depth == 0


@pytest.mark.parametrize("hot_first", [True, False])
def test_a_kind_that_is_hopeless_says_nothing_of_another(hot_first):
    policy = policy_with_prices(lambda: 0.0)
    hot, known_to_be_good, new = sequence(50), sequence(50), sequence(50)
    hot.request = Request(
        id="h", prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=None, temperature=1.0)
    )
    feed(policy, [Room(hot, 4, 4)], 0)
    feed(policy, [Room(known_to_be_good, 4, 4)], 4)
    policy.lessons.step = 100
    seqs = [hot, new] if hot_first else [new, hot]
    rooms = [Room(seq, 4, 4) for seq in seqs]
    plans = policy.plan(rooms, lambda: Load(2, 0, 2, 0, 100, 0))
    assert plans[seqs.index(new)].depth > 0


def test_no_more_is_expected_than_there_is_room_for():
    policy = policy_with_prices(lambda: 0.0)
    room = Room(sequence(50), 4, 1)
    feed(policy, [room], 4)
    policy.plan([room], lambda: Load(1, 0, 1, 0, 50, 0))
    assert policy.explain()["depths"] == {"1": 1}
