"""The adaptive policy on machines on paper, against plain decoding and against every fixed K."""

import json
import random

import pytest

from outrider.control.adaptive import AdaptivePolicy
from outrider.control.base import PLAIN, Facts, Load, Room, Step, StepTimes
from outrider.control.cost import CostModel, DraftCounts, PassCounts
from outrider.control.deciding import weights_of
from outrider.control.fixed import FixedPolicy
from outrider.request import Candidate, Request, SamplingParams, Speculation
from outrider.sequence import Sequence
from outrider.step import Batch, Commit, DraftTree, Row, RowPlan
from outrider.testing.simulate import Machine, Terms, simulate

WINDOW = 300
CPU = Machine(
    pass_s=lambda rows, context: 0.004 * (1 + 0.06 * (rows - 1)) + 1e-7 * context,
    draft_s={"m": lambda rows, depth: depth * (8e-4 + 5e-5 * rows), "s": lambda rows, depth: 1e-5},
    rest_s=2e-5,
)
GPU = Machine(
    pass_s=lambda rows, context: 0.005 * max(1.0, rows / 300) + 2e-8 * context,
    draft_s={"m": lambda rows, depth: depth * (4e-4 + 1e-5 * rows), "s": lambda rows, depth: 1e-5},
    rest_s=1e-5,
)
MACHINES = {"cpu": CPU, "gpu": GPU}


class Always(FixedPolicy):
    """One K for all."""

    name = "always"

    def __init__(self, depth):
        self.depth = depth

    def plan(self, rooms, load):
        return [room.plan(self.depth) if self.depth else PLAIN for room in rooms]


def known_prices(machine):
    """What a calibration would find."""
    cost, rng = CostModel(), random.Random(0)
    for _ in range(40):
        for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
            context = 300 * min(rows, 64)
            taken = machine.pass_s(rows, context) * rng.gauss(1, 0.03)
            counts = PassCounts(rows, context, 0, min(rows, 64), 0)
            cost.observe_pass(counts, taken, machine.rest_s * min(rows, 64))
        depth, rows = rng.randint(1, 8), rng.choice([1, 4, 16, 64])
        for name in ("m", "s"):
            drafted = DraftCounts(depth, rows, rows * depth, 0)
            cost.observe_draft(name, drafted, machine.draft_s[name](rows, depth))
    return cost.to_json()


PRICES = {name: known_prices(machine) for name, machine in MACHINES.items()}


def adaptive(name, terms, num_steps, prices=None):
    made = []

    def make(clock):
        policy = AdaptivePolicy(Facts(clock))
        if prices is not None:
            policy.take_prices(prices)
        made.append(policy)
        return policy

    return simulate(make, MACHINES[name], terms, num_steps), made[0]


def best_fixed(name, terms, num_steps=300):
    """(K, time of plain decoding over its own) of the best K."""
    found = {
        k: simulate(lambda clock, k=k: Always(k), MACHINES[name], terms, num_steps).over_plain()
        for k in (0, 1, 2, 3, 4, 6, 8)
    }
    best = max(found, key=found.get)
    return best, found[best]


def phases(values, length):
    return lambda step: values[(step // length) % len(values)]


def share_of_best(name, acceptance, batch_size, num_steps):
    """Of the best fixed K's goodput."""

    def terms(step):
        return Terms(batch_size, {"m": acceptance})

    run, _ = adaptive(name, terms, num_steps, PRICES[name])
    assert run.worst_window(WINDOW) >= 0.97
    return run.over_plain() / best_fixed(name, terms, 120)[1]


@pytest.mark.parametrize("name", MACHINES)
def test_nearly_as_good_as_the_best_fixed_k(name):
    shares = [share_of_best(name, a, size, 400) for a, size in [(0.85, 1), (0.6, 8), (0.3, 16)]]
    assert min(shares) >= 0.88
    assert sum(shares) / len(shares) >= 0.94


@pytest.mark.slow
@pytest.mark.parametrize("name", MACHINES)
def test_nearly_as_good_as_the_best_fixed_k_everywhere(name):
    shares = [
        share_of_best(name, acceptance, batch_size, 1500)
        for acceptance in (0.9, 0.75, 0.5, 0.2)
        for batch_size in (1, 4, 16, 64)
    ]
    assert min(shares) >= 0.88
    assert sum(shares) / len(shares) >= 0.96


@pytest.mark.parametrize("has_prices", [True, False], ids=["calibrated", "cold"])
@pytest.mark.parametrize(("name", "batch_size"), [("cpu", 1), ("gpu", 16)])
def test_useless_drafts_cost_next_to_nothing(name, batch_size, has_prices):
    prices = PRICES[name] if has_prices else None
    run, _ = adaptive(name, lambda step: Terms(batch_size, {"m": 0.0}), 900, prices)
    assert run.worst_window(WINDOW) >= 0.97
    assert run.over_plain(300) >= 0.985
    assert sum(run.depths[-300:]) > 0, "a gate that never tries again never opens again"


@pytest.mark.parametrize("name", MACHINES)
def test_the_load_changes(name):
    size = phases([1, 16, 4, 24, 2], 60)

    def terms(step):
        return Terms(size(step), {"m": 0.75})

    run, _ = adaptive(name, terms, 900, PRICES[name])
    assert run.worst_window(WINDOW) >= 0.97
    assert run.over_plain() >= 0.95 * best_fixed(name, terms, 300)[1]


@pytest.mark.parametrize(("name", "batch_size"), [("cpu", 1), ("gpu", 8)])
def test_acceptance_falls_and_rises(name, batch_size):
    """From one step to the next; what is lost until that is noticed is bounded."""
    acceptance = phases([0.85, 0.2, 0.7, 0.0], 300)

    def terms(step):
        return Terms(batch_size, {"m": acceptance(step)})

    run, _ = adaptive(name, terms, 1500, PRICES[name])
    assert run.worst_window(WINDOW) >= 0.93
    assert run.over_plain() >= best_fixed(name, terms, 600)[1]
    assert run.over_plain(1350, 1500) > 1.3, "it opens again"


@pytest.mark.parametrize("name", MACHINES)
def test_prompts_beside_decoding_are_not_taken_for_load(name):
    """A long pass full of prompt tokens neither makes drafts look free nor switches them off."""

    def terms(step):
        return Terms(4, {"m": 0.75}, num_prompt=256 if step % 10 < 3 else 0)

    run, _ = adaptive(name, terms, 800, PRICES[name])
    assert run.over_plain() >= 0.93 * best_fixed(name, terms, 300)[1]
    assert run.worst_window(WINDOW) >= 0.97


@pytest.mark.parametrize(("name", "batch_size"), [("cpu", 4), ("gpu", 8)])
@pytest.mark.parametrize("factors", [(2.0, 0.5), (0.5, 2.0)], ids=["small dear", "small cheap"])
def test_a_cost_table_that_is_wrong_by_two(name, batch_size, factors):
    few, many = factors
    prices = known_prices(MACHINES[name])
    table = prices["passes"]
    table["seconds"] = [
        seconds * (few if rows < 2 * batch_size else many)
        for rows, seconds in zip(table["rows"], table["seconds"], strict=True)
    ]
    run, policy = adaptive(name, lambda step: Terms(batch_size, {"m": 0.75}), 900, prices)
    assert run.worst_window(WINDOW) >= 0.97
    found = policy.lessons.cost.passes.predict(batch_size)
    assert found == pytest.approx(MACHINES[name].pass_s(batch_size, 0), rel=0.3)


def test_of_two_drafters_the_better_one_drafts():
    lookup = phases([0.95, 0.05], 400)

    def terms(step):
        return Terms(1, {"m": 0.8, "s": lookup(step)}, {"s": 0.9})

    run, _ = adaptive("cpu", terms, 1600, PRICES["cpu"])
    only_m = simulate(
        lambda clock: Always(3), CPU, lambda step: Terms(1, {"m": 0.8}), 400
    ).over_plain()
    assert run.over_plain(100, 400) > 1.3 * only_m, "the lookup, while it is right"
    assert run.over_plain(950, 1200) > 1.05, "the model, when the lookup is wrong"


def rooms_of(policy, *speculations, num_generated=0):
    rooms = []
    for number, settings in enumerate(speculations):
        spec = Speculation(
            drafter="m",
            num_draft_tokens=8,
            policy="adaptive",
            candidates=(Candidate("m", 8, 1, 8),),
            **settings.get("speculation", {}),
        )
        request = Request(
            id=str(number),
            prompt_token_ids=(1,),
            sampling=SamplingParams(max_tokens=None),
            priority=settings.get("priority", 0),
        )
        tokens = [1] * (1 + num_generated)
        seq = Sequence(
            id=str(number), request=request, index=0, tokens=tokens, seed=0, speculation=spec
        )
        rooms.append(Room(seq, 8, 8))
    return rooms


def load_of(rooms, **changes):
    size = len(rooms)
    return lambda: Load(size, 0, size, 0, 100 * size, 0)._replace(**changes)


def warm_policy(now=lambda: 0.0, machine="gpu"):
    policy = AdaptivePolicy(Facts(now))
    policy.take_prices(PRICES[machine])
    return policy


def feed(policy, rooms, drafted, accepted, count=30):
    for room in rooms:
        experience = policy.lessons.minds.of(room.seq).experience["m"]
        for _ in range(count):
            experience.observe(drafted, drafted, accepted, policy.lessons.step)


def test_each_request_gets_a_draft_of_its_own_length():
    policy = warm_policy(machine="cpu")
    good, bad = rooms_of(policy, {}, {})
    feed(policy, [good], 8, 8)
    feed(policy, [bad], 8, 0)
    deep, shallow = policy.plan([good, bad], load_of([good, bad]))
    assert deep.depth > 2 > shallow.depth


def test_a_target_of_time_per_token_is_kept_where_goodput_would_not_keep_it():
    plain_ms = 1e3 * GPU.pass_s(2, 200)
    free, bound = ({"speculation": {"tpot_s": s}} for s in (None, 0.8 * plain_ms / 1e3))
    depths = []
    for setting in (free, bound):
        policy = warm_policy()
        rooms = rooms_of(policy, setting, {})
        feed(policy, rooms[:1], 8, 0, 300)  # it would wait for the other's long drafts
        feed(policy, rooms[1:], 8, 7)
        depths.append(policy.plan(rooms, load_of(rooms))[1].depth)
    assert depths[1] < depths[0]


def test_a_target_of_time_per_token_may_ask_for_drafts_that_goodput_does_not():
    plain_s = CPU.pass_s(6, 100)
    depths = []
    for target in (None, 0.75 * plain_s):
        policy = warm_policy(machine="cpu")
        rooms = rooms_of(policy, {"speculation": {"tpot_s": target}}, *[{}] * 5)
        feed(policy, rooms[1:], 8, 0, 100)  # they would wait for the first one's drafts
        feed(policy, rooms[:1], 8, 5, 100)
        plans = policy.plan(rooms, load_of(rooms))
        depths.append([part.depth for part in plans])
    assert depths[0] == [0] * 6
    assert depths[1][0] > 0
    assert depths[1][1:] == [0] * 5
    assert policy.explain()["why"] == "the latency targets"


def test_a_late_first_token_comes_before_drafts():
    plans = []
    for arrived_s in (100.0, 99.0):
        policy = warm_policy(lambda: 100.0)
        (room,) = rooms_of(policy, {})
        feed(policy, [room], 8, 7)
        (waiting,) = rooms_of(policy, {"speculation": {"ttft_s": 1.0}})
        waiting.seq.arrived_s = arrived_s
        load = load_of([room], prefilling=[(waiting.seq, 0)], num_prompt=64, num_rows=65)
        plans.append(policy.plan([room], load)[0])
    assert plans[0].depth > 0
    assert plans[1] == PLAIN


def test_urgent_requests_weigh_more():
    policy = warm_policy()
    rooms = rooms_of(policy, {"priority": 0}, {"priority": 3})
    assert weights_of(rooms) == [1.0, 0.125]


def test_it_tells_why():
    run, policy = adaptive("gpu", lambda step: Terms(4, {"m": 0.8}), 200, PRICES["gpu"])
    told = policy.explain()
    assert told["expected_tokens_per_s"] > told["plain_tokens_per_s"] > 0
    assert sum(told["depths"].values()) == 4
    assert told["acceptance"][0]["drafter"] == "m"
    assert told["acceptance"][0]["stands"][0] == pytest.approx(0.8, abs=0.12)
    assert told["guard"]["advantage"] == pytest.approx(run.over_plain(100), rel=0.2)


def test_prices_of_another_form_change_nothing():
    policy = warm_policy()
    before = policy.prices()
    seen = {"drafter": "m", "temperature_up_to": "0", "reach": [[1, 0]], "stand": [[-1, 2]]}
    wrongs = [{}, {"format": 99}, {**before, "passes": {}}, {**before, "drafts": {"m": 3}}]
    wrongs += [{**before, "acceptance": wrong} for wrong in (3, [3], [{}], [seen])]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=r"format|no cost model|rows|prices|no experience"):
            policy.take_prices(wrong)
        assert policy.prices() == before


def test_texts_are_forgotten_and_prices_kept():
    _, policy = adaptive("gpu", lambda step: Terms(4, {"m": 0.8}), 100)
    before = policy.prices()
    policy.forget_texts()
    assert policy.prices() == {**before, "acceptance": []}
    assert policy.explain()["acceptance"] == []


def test_what_another_run_saw_of_drafts_is_a_start():
    """Where drafts never stand, somebody who was told so loses less on them at first."""

    def terms(step):
        return Terms(4, {"m": 0.05})

    first, told = adaptive("cpu", terms, 400, PRICES["cpu"])
    second, _ = adaptive("cpu", terms, 60, json.loads(json.dumps(told.prices())))
    untold, _ = adaptive("cpu", terms, 60, PRICES["cpu"])
    assert second.over_plain() > untold.over_plain()
    assert first.over_plain() > 0.97


def test_it_opens_again_beside_prompts_in_every_step():
    """What a trial is charged leaves the prompt's time out."""
    acceptance = phases([0.0, 0.85], 300)

    def terms(step):
        return Terms(8, {"m": acceptance(step)}, num_prompt=256)

    run, _ = adaptive("gpu", terms, 600, PRICES["gpu"])
    assert sum(run.depths[450:]) > 100
    assert run.over_plain(500) > 1.5


def test_drafts_of_other_policies_do_not_shut_ours():
    policy = warm_policy()
    rooms = rooms_of(policy, {})
    other = FixedPolicy()
    seq = rooms[0].seq
    seq.speculation = Speculation(drafter="m", num_draft_tokens=4, policy=other.name)
    tree = DraftTree.chain((1, 1, 1, 1), "m")
    for _ in range(200):
        seq.tokens.append(1)
        commit = Commit(seq, tree, (1,), 4, 0)
        plan = [RowPlan("m", 4, 1, 4)]
        policy.observe(Step(Batch([Row(seq, 1, 4)], []), plan, [commit], StepTimes(1.0, 1.0, 0.0)))
    assert policy.lessons.guard.num_shut == 0


def test_confidence_is_asked_for_and_used_only_where_a_request_wants_it():
    policy = warm_policy()
    wants = {"speculation": {"policy_options": {"confidence": True}}}
    rooms = rooms_of(policy, {}, wants)
    feed(policy, rooms, 8, 7)
    usual, asked = policy.plan(rooms, load_of(rooms))
    assert usual.stop is None
    assert asked.stop is not None
    assert asked.stop.floor == 0.0, "nothing is known of it yet"
    known = policy.lessons.confidence_of("m", policy.lessons.minds.of(rooms[1].seq))
    for _ in range(150):
        known.observe_draft((0.9, 0.2), 1)
    policy.lessons.step += 1
    again = policy.plan(rooms, load_of(rooms))[1]
    assert 0.0 < again.stop.floor < 1.0
    assert again.stop.acceptance(0.9) > 0.5 > again.stop.acceptance(0.2, 2)
