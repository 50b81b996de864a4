"""A/B: drift cancels, equal arms are equal, what is injected is found, stopping says nothing."""

import itertools
import math
import random
from dataclasses import replace

import pytest

from outrider.bench.ab import Plan, measure
from outrider.bench.blocks import NULL, Block, Run
from outrider.bench.journal import Journal, open_journal
from outrider.bench.pairs import findings, null, pairs, result
from outrider.bench.result import from_json
from outrider.errors import ConfigError
from outrider.request import SamplingParams
from tests.bench.simulated import OFF, ON, OTHER, Simulated, questions

SAMPLING = SamplingParams(max_tokens=16)


def plan(**fields):
    given = {"arms": (OFF, ON), "questions": questions(), "sampling": SAMPLING, "budget_s": 1e9}
    return Plan(**{**given, **fields})


def run(target, **fields):
    return measure(target, plan(**fields), clock=target.clock)


def noisy(speedup, *, noise=0.03, seed=0, spread=0.3):
    """Questions of all lengths of context; `speedup` by arm; noise of each answer."""
    rng = random.Random(seed)
    size = {f"q{i}": math.exp(rng.gauss(0, spread)) for i in range(100)}

    def seconds(arm, question, number):
        return 0.01 * size[question] * math.exp(rng.gauss(0, noise)) / speedup.get(arm, 1.0)

    return Simulated(seconds)


def test_a_linear_drift_cancels_exactly():
    """Each run takes longer than the one before by the same factor; the arms are equal."""
    found = run(Simulated(lambda arm, question, number: 1.002**number), num_rounds=2)
    (pair,) = pairs(found)
    for ratio in (pair.ratio, pair.null):
        assert ratio.interval == (pytest.approx(1.0), pytest.approx(1.0))
    assert pair.verdict == "equal"


def test_a_drift_that_bends_is_shared_out_by_turning_the_order():
    """Twice as steep at the end of a block as at its start: whoever stands outside seems slower."""
    target = Simulated(lambda arm, question, number: math.exp(0.01 * (number % 6) ** 2))
    (pair,) = pairs(run(target, num_rounds=2))
    assert pair.ratio.ratio == pytest.approx(1.0, abs=1e-9)
    assert pair.null.ratio == pytest.approx(1.0, abs=1e-9)


def test_a_true_difference_is_found_under_drift_and_prompts_of_all_sizes():
    def seconds(arm, question, number):
        return 1.002**number * (1 + int(question[1:])) / (2.5 if arm == "on" else 1.0)

    (pair,) = pairs(run(Simulated(seconds), num_rounds=1))
    assert pair.ratio.ratio == pytest.approx(2.5)
    assert pair.verdict == "faster"
    assert pair.sign_test == pytest.approx(2 / 2**12)


@pytest.mark.parametrize("seed", range(12))
def test_equal_arms_are_equal(seed):
    (pair,) = pairs(run(noisy({}, seed=seed), seed=seed))
    assert pair.verdict == "equal"
    assert pair.null.low > 0.98
    assert pair.null.high < 1.02


@pytest.mark.parametrize("seed", range(12))
def test_a_slow_down_of_5_percent_is_found(seed):
    (pair,) = pairs(run(noisy({"on": 1 / 1.05}, seed=seed), seed=seed))
    assert pair.verdict == "slower"
    assert pair.ratio.ratio == pytest.approx(1 / 1.05, abs=0.015)


def test_it_stops_on_precision_never_on_what_it_finds():
    """Twice as fast is plain after ten blocks; the interval asked for is not there yet."""
    obvious, equal = (run(noisy({"on": speedup}, seed=3)) for speedup in (2.0, 1.0))
    assert obvious.stopped == equal.stopped == "precision"
    assert len(obvious.blocks) == len(equal.blocks) > 30


def test_the_first_round_is_finished_however_precise_it_is_before():
    found = run(noisy({}, noise=0.0), questions=questions(40))
    assert len(found.blocks) == 40


def test_the_interval_covers_the_truth_though_the_run_stops_when_it_is_narrow():
    hits = 0
    for seed in range(60):
        target = noisy({"on": 1.03}, noise=0.02, seed=seed)
        (pair,) = pairs(run(target, eps=0.04, questions=questions(30), seed=seed))
        hits += pair.ratio.low <= 1.03 <= pair.ratio.high
    assert hits >= 53


def test_prompts_that_differ_do_not_keep_it_running_for_ever():
    """The gain varies by prompt: asking the same prompts again narrows only the noise."""
    gain = {f"q{i}": 1.2 + 0.05 * i for i in range(12)}
    rng = random.Random(4)

    def seconds(arm, question, number):
        return math.exp(rng.gauss(0, 0.01)) / (gain[question] if arm == "on" else 1.0)

    found = run(Simulated(seconds))
    (pair,) = pairs(found)
    assert found.stopped == "precision"
    assert pair.ratio.noise < 0.4 * 0.02
    assert pair.ratio.half_width > 0.05
    assert pair.verdict == "faster"


def test_the_budget_ends_a_run_that_is_not_precise():
    found = run(noisy({}, noise=0.5), budget_s=60.0)
    assert found.stopped == "budget"
    assert pairs(found)[0].verdict == "undecided"
    assert len(run(noisy({}), budget_s=0.0).blocks) == 1


def test_rounds_end_a_run():
    found = run(noisy({}, noise=0.5), num_rounds=2)
    assert found.stopped == "rounds"
    assert len(found.blocks) == 24


def test_the_order_is_there_and_back_with_the_null_arm_inside_and_turns():
    target = noisy({})
    found = run(target, num_rounds=1)
    a, n, b = 0, NULL, 1
    orders = [tuple(run.arm for run in block.runs) for block in found.blocks]
    assert orders[:4] == [
        (a, n, b, b, n, a), (n, b, a, a, b, n), (b, a, n, n, a, b), (a, n, b, b, n, a),
    ]  # fmt: skip
    measured = target.runs[-6 * len(orders) :]
    assert [name for name, *_ in measured[:6]] == ["off", "off", "on", "on", "off", "off"]


def test_a_round_asks_every_question_once_in_an_order_of_its_own():
    found = run(noisy({}), num_rounds=2)
    rounds = [[b.questions[0] for b in found.blocks if b.round == number] for number in (0, 1)]
    assert sorted(rounds[0]) == sorted(rounds[1]) == sorted(f"q{i}" for i in range(12))
    assert rounds[0] != rounds[1]


def test_no_tenant_sees_a_question_twice_and_arms_share_the_seed():
    target = noisy({})
    run(target, num_rounds=3)
    measured = [one for one in target.runs if "warm-up" not in str(one[2])]
    seen = [(tenant, q) for _, asked, (tenant,), _ in measured for q in asked]
    assert len(seen) == len(set(seen))
    by_block = [measured[i : i + 6] for i in range(1 + 2, len(measured), 6)]
    seeds = [{one[3] for one in block} for block in by_block]
    assert all(len(of_block) == 1 for of_block in seeds)
    assert len(set.union(*seeds)) == 36, "every question and round has its own"


def test_three_arms_give_three_pairs_and_one_null():
    found = run(noisy({"on": 1.5, "other": 2.0}), arms=(OFF, ON, OTHER))
    told = {(pair.base.name, pair.arm.name): pair for pair in pairs(found)}
    assert list(told) == [("off", "on"), ("off", "other"), ("on", "other")]
    assert told["off", "on"].ratio.ratio == pytest.approx(1.5, abs=0.03)
    assert told["on", "other"].ratio.ratio == pytest.approx(2.0 / 1.5, abs=0.03)
    assert {pair.null for pair in told.values()} == {null(found)}


def test_the_warm_up_is_not_measured_and_lasts_until_it_is_steady():
    """A machine that gets faster over its first 30 runs."""
    target = Simulated(lambda arm, question, number: 0.01 * math.exp(max(0.0, 3 - 0.1 * number)))
    found = run(target, num_rounds=1)
    assert found.num_warm_ups > 8
    assert found.is_steady
    assert pairs(found)[0].ratio.ratio == pytest.approx(1.0)
    calm = run(noisy({}), num_rounds=1)
    assert calm.num_warm_ups <= 8


@pytest.mark.parametrize("disturbed", [{61}, {62, 63}, {60, 150, 151}])
def test_a_disturbed_block_is_kept_and_left_out_of_the_verdict(disturbed):
    """Something else ran during a few runs, whosever turn it was."""
    target = noisy({}, noise=0.01)
    calm = target._seconds
    target._seconds = lambda arm, question, number: (
        calm(arm, question, number) * (4.0 if number in disturbed else 1.0)
    )
    found = run(target, num_rounds=4, eps=0.01)
    assert len(found.usable) == len(found.blocks)
    assert 1 <= len(found.usable) - len(found.kept) <= 6
    (pair,) = pairs(found)
    assert pair.ratio.half_width < 0.01
    assert pair.verdict == "equal"


def test_a_batch_is_timed_as_a_whole_per_token():
    """Two seats, four questions: 2 x 11 x 0.1 s for 44 tokens."""
    target = Simulated(lambda arm, question, number: 0.1 if arm == "off" else 0.05)
    found = run(target, concurrency=2, num_rounds=2)
    block = found.blocks[0]
    assert len(block.questions) == 4
    assert next(block.of(0)).seconds_per_token == pytest.approx(2.2 / 44)
    (pair,) = pairs(found)
    assert pair.ratio.ratio == pytest.approx(2.0)
    assert (pair.ratio.num_blocks, pair.ratio.num_clusters, pair.num_prompts) == (6, 6, 12)
    batches = {frozenset(block.questions) for block in found.blocks}
    assert len(batches) == 6, "batches of another round are others"


def test_batches_are_as_large_as_asked_and_never_ask_twice():
    assert run(noisy({}), concurrency=3, batch=3, num_rounds=1).plan.batch_size == 3
    assert plan(concurrency=8).batch_size == 12


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arms": (OFF,)}, "at least two"),
        ({"arms": (OFF, OFF)}, "a name of its own"),
        ({"questions": ()}, "questions=0"),
        ({"eps": 0.0}, "eps=0.0: must lie between 0 and 1"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"concurrency": 13}, "concurrency 13 needs as many prompts, there are 12: raise --limit"),
        (
            {"concurrency": 4, "batch": 3},
            "batch=3: at concurrency 4 prompts of a block may be 4 to 12",
        ),
        ({"batch": 2}, "prompts of a block may be 1, each is timed alone"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        plan(**fields)


def test_an_arm_that_fails_is_named():
    target = Simulated(
        lambda *_: 0.1, error=lambda ask: "no such drafter" if ask.arm.name == "on" else ""
    )
    with pytest.raises(ConfigError, match="arm 'on' fails: no such drafter"):
        run(target)


def test_one_question_that_fails_is_left_out_and_counted():
    target = noisy({}, noise=0.5)
    target._error = lambda ask: "too long" if ask.question.id == "q0" else ""
    found = run(target, num_rounds=2)
    assert found.left_out == {"an answer failed": 1}
    assert len(found.usable) == 22
    assert pairs(found)[0].num_prompts == 11


def test_a_server_that_goes_away_ends_the_run():
    target = noisy({})
    target._error = lambda ask: "connection refused" if len(target.runs) > 60 else ""
    with pytest.raises(ConfigError, match="connection refused"):
        run(target)


def test_an_answer_of_one_token_has_no_time_per_token():
    target = Simulated(
        lambda *_: 0.1, num_tokens=lambda ask: 1 if ask.question.id in ("q3", "q4") else 5
    )
    found = run(target, num_rounds=2)
    assert found.left_out == {"fewer than 2 tokens came": 2}
    nothing = Simulated(lambda *_: 0.1, num_tokens=lambda ask: 1)
    with pytest.raises(ConfigError, match="no question can be used"):
        run(nothing)


def test_a_question_says_how_long_its_answer_may_be():
    seen = set()
    target = noisy({})
    target._num_tokens = lambda ask: seen.add(ask.sampling.max_tokens) or 5
    run(target, questions=questions(max_tokens=7), num_rounds=1)
    assert seen == {7}
    run(target, questions=questions(max_tokens=70), num_rounds=1)
    assert seen == {7, 16}


@pytest.mark.parametrize("tells", [True, False])
def test_acceptance_comes_with_the_replies_or_from_the_counters(tells):
    target = Simulated(lambda *_: 0.1, tells=tells)
    found = findings(run(target, num_rounds=1))
    off, on = found["arms"]
    assert "acceptance" not in off
    assert on["acceptance"]["acceptance_length"] == pytest.approx(3.0)
    assert on["acceptance"]["acceptance_rate"] == pytest.approx(2 / 3)
    assert on["acceptance"]["num_drafts"] == 4 * on["num_answers"] == 4 * 24
    if tells:
        assert on["acceptance"]["joint_rates"] == [1.0, 1.0]
        assert on["acceptance"]["tokens_per_step"] == pytest.approx(1.1)


def test_answers_that_differ_between_arms_are_counted():
    target = noisy({})
    answer = target._answer

    def other(ask, free):
        reply = answer(ask, free)
        is_other = ask.arm.name == "on" and ask.question.id == "q2"
        return replace(reply, text="something else") if is_other else reply

    target._answer = other
    (pair,) = pairs(run(target, num_rounds=2))
    assert (pair.num_identical, pair.num_prompts) == (11, 12)


def test_domains_have_ratios_of_their_own():
    asked = tuple(replace(q, domain="code" if i % 2 else "chat") for i, q in enumerate(questions()))

    def seconds(arm, question, number):
        return 0.1 / (2.0 if arm == "on" and int(question[1:]) % 2 else 1.0)

    (pair,) = pairs(run(Simulated(seconds), questions=asked, num_rounds=1))
    told = {domain: ratio.ratio for domain, ratio in pair.domains}
    assert told == {"chat": pytest.approx(1.0), "code": pytest.approx(2.0)}


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    path = tmp_path / "ab.json"
    asked = plan(num_rounds=3)
    identity = asked.identity()

    def stop(at):
        if at.num_blocks == 20:
            raise KeyboardInterrupt

    target = noisy({"on": 1.5})
    with pytest.raises(KeyboardInterrupt), open_journal(path, identity) as journal:
        measure(target, asked, journal=journal, clock=target.clock, tick=stop)
    before = [block for _, block in journal.items()]
    assert len(before) == 20
    target = noisy({"on": 1.5}, seed=1)
    with open_journal(path, identity, resume=True) as journal:
        found = measure(target, asked, journal=journal, clock=target.clock)
        assert len(journal) == 36
    assert list(found.blocks[:20]) == [Block.from_json(block) for block in before]
    assert found.stopped == "rounds"
    whole = measure(noisy({"on": 1.5}), asked, clock=target.clock)
    assert [b.questions for b in found.blocks] == [b.questions for b in whole.blocks]
    assert [[r.arm for r in b.runs] for b in found.blocks] == [
        [r.arm for r in b.runs] for b in whole.blocks
    ]


def test_questions_that_were_useless_before_the_interruption_stay_out(tmp_path):
    asked, path = plan(num_rounds=2), tmp_path / "ab.json"

    def target():
        made = noisy({}, noise=0.5)
        made._num_tokens = lambda ask: 1 if ask.question.id == "q3" else 5
        return made

    with open_journal(path, asked.identity()) as journal:
        whole = measure(target(), asked, journal=journal)
    with open_journal(path, asked.identity(), resume=True) as journal:
        again = measure(target(), asked, journal=journal)
    assert again.blocks == whole.blocks
    assert len(again.blocks) == 23


def test_earlier_blocks_count_towards_the_budget():
    asked = plan(budget_s=60.0)
    first = noisy({}, noise=0.5)
    journal = Journal(None, {})
    measure(first, asked, journal=journal, clock=first.clock)
    held = Journal(None, {}, dict(journal.items()))
    second = noisy({}, noise=0.5)
    found = measure(second, asked, journal=held, clock=second.clock)
    assert len(found.blocks) - len(journal) <= 1


def test_ticks_tell_how_precise_it_is():
    told = []
    target = noisy({})
    measure(target, plan(), clock=target.clock, tick=told.append)
    assert told[0].half_width == math.inf
    assert told[-1].half_width <= told[-1].goal == pytest.approx(0.4 * math.log(1.02))
    assert all(a.seconds < b.seconds for a, b in itertools.pairwise(told))


def test_the_result_holds_what_was_promised_and_is_computed_again_from_its_blocks():
    measured = run(noisy({"on": 1.5}))
    found = result(measured, data={"hash": "d"}, target={"model": "m"}, provenance={})
    held = found.to_json()
    (pair,) = held["pairs"]
    assert (pair["base"], pair["arm"], pair["verdict"]) == ("off", "on", "faster")
    assert pair["interval"][0] < pair["ratio"] < pair["interval"][1]
    assert pair["null_interval"] == held["null"]["interval"]
    assert held["null"]["verdict"] == "equal"
    assert held["run"]["stopped_by"] == "precision"
    assert from_json(held).to_json() == held
    again = replace(measured, blocks=tuple(map(Block.from_json, held["blocks"])))
    assert again == measured
    assert findings(again) == findings(measured)


def test_a_run_survives_json():
    block = Block(
        round=0,
        questions=("q",),
        runs=(Run(arm=0, seconds_per_token=None, seconds=0.0, num_tokens=0, left_out="x"),),
    )
    assert Block.from_json(Journal(None, {}).add("k", block)) == block
    assert block.left_out == "x"
