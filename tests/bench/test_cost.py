"""Seconds by class add up to the wall clock, and prices are what follows from them."""

import itertools

import pytest

from outrider.bench.cost import (
    DIFFERENCE,
    STEPS,
    Plan,
    Slo,
    measure,
    num_ticks,
    split_rounds,
)
from outrider.bench.energy import EnergyMeter
from outrider.bench.inprocess import InProcess
from outrider.bench.meter import CACHED, OUTPUT, PROMPT, Fit, Held, Meter, fit_steps, share_out
from outrider.bench.prices import findings, prices, totals
from outrider.bench.result import Result, from_json
from outrider.bench.target import Arm, Ask, Question, Reply
from outrider.errors import ConfigError
from outrider.request import SamplingParams, SpeculationParams
from outrider.testing import tiny_engine
from tests.bench.lossless.conftest import Tiny

OFF = Arm(name="off", speculation=SpeculationParams(method="off"))
DRAFT = Arm(name="draft", speculation=SpeculationParams(method="draft_model", num_draft_tokens=3))
SAMPLING = SamplingParams(max_tokens=12, ignore_eos=True)
QUESTIONS = tuple(
    Question(id=f"q{i}", prompt=tuple((11 * i + j * j) % 90 + 30 for j in range(20 + 3 * i)))
    for i in range(4)
)


def plan(*arms, **keys):
    given = {
        "questions": QUESTIONS,
        "sampling": SAMPLING,
        "dollars_per_hour": 3.6,
        "concurrency": 2,
        **keys,
    }
    return Plan(arms=arms or (OFF,), **given)


@pytest.fixture
def target():
    engine = tiny_engine(draft_noise=0.05, num_blocks=512)
    return InProcess(Tiny(engine))


@pytest.fixture
def clock():
    """A second per look: every step and every gap between steps takes a known time."""
    return itertools.count().__next__


class Joules:
    """A counter that shows a list of readings, one by one."""

    def __init__(self, readings, name="cpu", range_j=None):
        self.name, self.range_j = name, range_j
        self._readings = iter(readings)

    def joules(self):
        reading = next(self._readings)
        if reading is None:
            raise PermissionError("not for you")
        return reading


@pytest.mark.parametrize("arm", [OFF, DRAFT], ids=lambda arm: arm.name)
def test_classes_and_idle_add_up_to_the_wall_clock(target, arm):
    bill = measure(target, plan(arm), arm, EnergyMeter())
    assert bill.method == STEPS
    assert sum(bill.seconds.values()) + bill.idle_s == pytest.approx(bill.wall_s, rel=1e-9)
    assert min(bill.seconds.values()) >= 0.0
    assert bill.idle_s > 0.0
    assert 0.0 < bill.utilisation < 1.0
    assert (bill.acceptance_length or 0.0) > 1.0 or arm is OFF


def test_whole_steps_are_timed_and_nothing_else(target, clock):
    """Two looks at the clock per step, two around all: a step takes 1 s, a gap 1 s."""
    engine, num_steps = target.llm.engine, target.llm.engine.stats.num_steps
    bill = measure(target, plan(repeat=1), OFF, EnergyMeter(), clock=clock)
    warm_up = measure(target, plan(repeat=1), OFF, EnergyMeter())  # of the same two questions
    assert warm_up.num_answers == 4
    num_metered = sum(bill.seconds.values())
    assert num_metered == pytest.approx(round(num_metered))
    assert bill.idle_s == pytest.approx(num_metered + 1)
    assert engine.stats.num_steps > num_steps + num_metered


def test_tokens_by_class(target):
    """The second round finds whole blocks of its prompts in the cache, the first finds none."""
    bill = measure(target, plan(), OFF, EnergyMeter())
    num_prompt = sum(len(question.prompt) for question in QUESTIONS)
    num_cached = sum((len(question.prompt) - 1) // 4 * 4 for question in QUESTIONS)
    assert bill.tokens == {PROMPT: 2 * num_prompt - num_cached, CACHED: num_cached, OUTPUT: 96}
    assert bill.num_answers == 8


def test_rejected_drafts_are_no_tokens(target):
    bills = [measure(target, plan(arm), arm, EnergyMeter()) for arm in (OFF, DRAFT)]
    assert bills[0].tokens == bills[1].tokens


def test_the_engine_is_left_as_it_was(target):
    engine = target.llm.engine
    step, policies = engine.step, dict(engine.controller.policies)
    measure(target, plan(), OFF, EnergyMeter())
    assert engine.step == step
    assert engine.controller.policies == policies


def test_the_meter_counts_what_the_engine_counts(target):
    stats = target.llm.engine.stats
    before = stats.num_rows, stats.num_prompt_tokens
    meter = Meter()
    with meter.metering(target.llm.engine):
        target.run(
            [
                *(_ask(question, DRAFT) for question in QUESTIONS),
                *(_ask(question, OFF) for question in QUESTIONS),
            ],
            concurrency=3,
        )
    held = [held for held, _ in meter._steps]
    assert sum(one.rows for one in held) == stats.num_rows - before[0]
    assert sum(one.prompt_rows for one in held) == stats.num_prompt_tokens - before[1]
    assert sum(one.cached_read for one in held) > 0


def _ask(question, arm):
    return Ask(question=question, sampling=SAMPLING, arm=arm)


def test_a_step_is_shared_by_rows_and_by_what_is_read():
    held = Held(6, 2, prompt_read=30, cached_read=50, output_read=20, draft_s=0.5)
    shared = share_out(held, 4.5, read_share=0.25)
    assert shared == pytest.approx({PROMPT: 2.25 + 0.3, CACHED: 0.5, OUTPUT: 0.75 + 0.2 + 0.5})
    assert sum(shared.values()) == pytest.approx(4.5)


def test_drafting_longer_than_the_step_takes_no_more_than_all():
    """Clocks differ a little."""
    shared = share_out(Held(2, 2, 5, 0, 5, draft_s=3.0), 2.0, 0.5)
    assert shared == pytest.approx({PROMPT: 0.0, CACHED: 0.0, OUTPUT: 2.0})


def test_the_fit_finds_the_prices_of_a_machine():
    steps = [
        (
            held := Held(rows, 2, 40 * k, 10, 100 * k, 0.1),
            0.1 + 1.0 + 0.2 * held.rows + 0.003 * held.read,
        )
        for rows in (0, 5, 30)
        for k in (1, 4, 9)
    ]
    fit = fit_steps(steps)
    assert fit == pytest.approx(Fit(1.0, 0.2, 0.003, 1.0))


def test_no_price_is_below_zero():
    """Steps that are faster the more is read: reading then costs nothing."""
    steps = [(Held(0, 1, output_read=read), 2.0 - read / 1000) for read in range(0, 500, 50)]
    fit = fit_steps(steps)
    assert min(fit[:3]) >= 0.0
    assert fit.read_s == 0.0


def test_prices_follow_from_seconds(target):
    asked = plan(dollars_per_hour=3.6)  # a tenth of a cent per second
    bill = measure(target, asked, OFF, EnergyMeter())
    by_class = {one["class"]: one for one in prices(bill, asked)}
    output = by_class[OUTPUT]
    assert output["dollars_per_million"] == pytest.approx(bill.seconds[OUTPUT] / 96 * 1000)
    laid_on = output["with_idle"] / output["dollars_per_million"]
    assert laid_on == pytest.approx(1 / bill.utilisation)
    all_of_it = sum(one["with_idle"] * one["tokens"] / 1e6 for one in by_class.values())
    assert all_of_it == pytest.approx(bill.wall_s * 0.001), "together they pay for the machine"
    total = totals(bill, asked)
    assert total["dollars"] == pytest.approx(all_of_it)
    assert total["input_to_output"] == pytest.approx(
        (bill.tokens[PROMPT] + bill.tokens[CACHED]) / 96
    )


def test_late_answers_earn_nothing(target):
    strict = plan(slo=Slo(ttft_s=1e-9))
    bill = measure(target, strict, OFF, EnergyMeter())
    assert bill.num_in_slo == 0
    assert {one["within_slo"] for one in prices(bill, strict)} == {None}
    lax = plan(slo=Slo(ttft_s=1e9, tpot_s=1e9))
    bill = measure(target, lax, OFF, EnergyMeter())
    for one in prices(bill, lax):
        assert one["within_slo"] == one["with_idle"]


class Server:
    """Takes 2 s per uncached token, 0.5 s per cached one, and 3 s per output token."""

    name = "server"

    def __init__(self, *, caches=True, fails=()):
        self.now_s = 0.0
        self._caches, self._fails, self._seen = caches, fails, set()

    def describe(self):
        return {"name": self.name}

    def counters(self):
        return None

    def clock(self):
        return self.now_s

    def run(self, asks, *, concurrency, tick=lambda reply: None):
        return [self._reply(ask, tick) for ask in asks]

    def _reply(self, ask, tick):
        key = ask.tenant, ask.question.id
        num_cached = len(ask.question.prompt) - 1 if key in self._seen and self._caches else 0
        self._seen.add(key)
        num_prompt, num_tokens = len(ask.question.prompt), ask.sampling.max_tokens
        self.now_s += 2 * (num_prompt - num_cached) + 0.5 * num_cached + 3 * (num_tokens - 1)
        reply = Reply(
            ask=ask,
            due_s=0.0,
            sent_s=0.0,
            num_prompt_tokens=num_prompt,
            num_cached_tokens=num_cached,
            num_tokens=num_tokens,
            error="lost" if ask.question.id in self._fails and ask.tenant[:4] == "cost" else "",
        )
        tick(reply)
        return reply


def test_a_server_is_priced_by_difference():
    server, ticks = Server(), []
    bill = measure(
        server, plan(), OFF, EnergyMeter(), clock=server.clock, tick=lambda: ticks.append(1)
    )
    assert bill.method == DIFFERENCE
    assert bill.idle_s is None
    assert bill.utilisation is None
    assert len(ticks) == num_ticks(server, plan())
    assert sum(bill.seconds.values()) == pytest.approx(bill.wall_s)
    assert bill.seconds[PROMPT] == pytest.approx(2 * bill.tokens[PROMPT])
    assert bill.seconds[CACHED] == pytest.approx(0.5 * bill.tokens[CACHED])
    assert bill.seconds[OUTPUT] == pytest.approx(3 * bill.tokens[OUTPUT])
    assert bill.tokens[OUTPUT] == 4 * 11, "first tokens come with the prompt"


def test_a_server_without_a_cache_has_no_price_for_one():
    server = Server(caches=False)
    bill = measure(server, plan(), OFF, EnergyMeter(), clock=server.clock)
    assert bill.seconds[CACHED] == 0.0
    by_class = {one["class"]: one for one in prices(bill, plan())}
    assert by_class[CACHED]["dollars_per_million"] is None
    assert sum(bill.seconds.values()) == pytest.approx(bill.wall_s)


def test_rounds_that_are_faster_than_they_should_be_still_add_up():
    tokens = [{PROMPT: 10, CACHED: 0}, {PROMPT: 9, CACHED: 1}, {PROMPT: 9, CACHED: 1}]
    for times in ([5.0, 1.0, 0.5], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0]):
        assert sum(split_rounds(times, tokens).values()) == pytest.approx(sum(times))


def test_failed_answers_earn_nothing():
    server = Server(fails=("q1",))
    bill = measure(server, plan(), OFF, EnergyMeter(), clock=server.clock)
    assert (bill.num_failed, bill.num_answers, bill.first_error) == (3, 9, "lost")
    whole = Server()
    good = measure(whole, plan(), OFF, EnergyMeter(), clock=whole.clock)
    assert bill.tokens[OUTPUT] == good.tokens[OUTPUT] * 3 / 4
    assert bill.wall_s == good.wall_s


def test_an_arm_that_cannot_be_served_is_told_before_anything_is_measured(target):
    wrong = Arm(name="wrong", speculation=SpeculationParams(method="nobody"))
    with pytest.raises(ConfigError, match="arm 'wrong' cannot be served"):
        measure(target, plan(wrong), wrong, EnergyMeter())


def test_energy_per_query_and_token(target):
    meter = EnergyMeter([Joules(itertools.count(100.0, 10.0))])
    bill = measure(target, plan(), OFF, meter)
    assert bill.power_valid
    assert bill.joules == 90.0, "one reading before, one per answer, one after"
    told = totals(bill, plan())
    assert told["joules_per_query"] == pytest.approx(90 / 8)
    assert told["joules_per_output_token"] == pytest.approx(90 / 96)


def test_without_a_counter_no_energy_is_told(target):
    bill = measure(target, plan(), OFF, EnergyMeter())
    assert not bill.power_valid
    assert totals(bill, plan())["joules_per_token"] is None
    assert "no energy counter" in bill.power_why_not


def test_findings_name_arms_and_go_through_a_file(target):
    asked = plan(OFF, DRAFT)
    bills = [measure(target, asked, arm, EnergyMeter()) for arm in asked.arms]
    found = findings(bills, asked)
    held = from_json(Result(kind="cost", findings=found, blocks=bills).to_json())
    assert [one["class"] for one in held.findings["classes"]][-1] == f"{OUTPUT} (draft)"
    spent = sum(one["seconds"] for one in held.findings["classes"])
    wall = sum(one["wall_s"] for one in held.findings["arms"])
    assert spent + held.findings["idle_seconds"] == pytest.approx(wall)
    assert "draft: " in found["summary"]
    assert held.blocks[0]["seconds"].keys() == bills[0].seconds.keys()


@pytest.mark.parametrize("dollars", [0.0, -1.0, float("nan")])
def test_a_price_of_the_machine_must_be_given(dollars):
    with pytest.raises(ConfigError, match="dollars_per_hour"):
        plan(dollars_per_hour=dollars)
