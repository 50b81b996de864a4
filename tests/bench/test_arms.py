"""Arms: the interval covers what it promises, drift cancels, verdicts say no more than they may."""

import itertools
import math
import random
from types import SimpleNamespace

import pytest

from outrider.bench import arms
from outrider.bench.arms import Arm, Ratio, compare, num_calls, paired_ratio
from outrider.engine.outputs import Completion, RequestOutput
from outrider.request import SamplingParams, SpeculationParams
from outrider.stream.events import RequestMetrics

BASE = Arm("plain", SpeculationParams(method="off"))
FAST = Arm("fast", SpeculationParams(method="ngram"))
NUM_TOKENS = 10


class FakeMachine:
    """A clock and a model in one: `seconds(arm, prompt, call)` is what an answer takes.

    Attributes:
        calls: (tenant, prompt) of each, in order.
    """

    def __init__(self, monkeypatch, seconds, tokens=None):
        self.now, self.calls = 0.0, []
        self._seconds = seconds
        self._tokens = tokens or (lambda arm, prompt, call: list(range(NUM_TOKENS)))
        monkeypatch.setattr(arms, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def generate(self, prompts, sampling, speculation, *, tenant):
        (prompt,) = prompts
        arm = "plain" if speculation.is_off else "fast"
        call = len(self.calls)
        self.now += self._seconds(arm, prompt, call)
        self.calls.append((tenant, prompt))
        metrics = RequestMetrics(num_drafts=4, num_accepted_tokens=2 * (arm == "fast"))
        done = Completion(token_ids=self._tokens(arm, prompt, call), metrics=metrics)
        return [RequestOutput(request_id="r", prompt_token_ids=[1], completions=[done])]


def measured(machine, prompts=tuple("abcdefghijkl")):
    return compare(machine, prompts, BASE, FAST, SamplingParams())


@pytest.mark.parametrize("num_prompts", [25, 60])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(num_prompts, monkeypatch):
    """400 experiments with a true speed-up of 1.2 and 30 % of noise per prompt.

    With fewer prompts percentiles cover less than they say: 90 % at 15.
    """
    monkeypatch.setattr(arms, "NUM_RESAMPLES", 300)
    rng, truth, hits = random.Random(1), math.log(1.2), 0
    for seed in range(400):
        found = paired_ratio([rng.gauss(truth, 0.3) for _ in range(num_prompts)], seed=seed)
        assert found.low <= found.ratio <= found.high
        hits += found.low <= 1.2 <= found.high
    assert 0.90 <= hits / 400 <= 0.98


def test_the_ratio_is_the_geometric_mean_and_the_interval_shrinks_with_prompts():
    found = paired_ratio([math.log(2), math.log(8)])
    assert found.ratio == pytest.approx(4.0)
    assert found.num_prompts == 2
    rng = random.Random(2)
    noise = [rng.gauss(0, 0.2) for _ in range(400)]
    few, many = paired_ratio(noise[:25]), paired_ratio(noise)
    shrunk = math.log(many.high / many.low) / math.log(few.high / few.low)
    assert 0.15 < shrunk < 0.4, "about 1/4 for 16 times as many"


def test_the_same_data_and_seed_give_the_same_interval():
    values = [0.1 * i for i in range(12)]
    assert paired_ratio(values) == paired_ratio(values)
    assert paired_ratio(values) != paired_ratio(values, seed=1)


def test_nothing_measured_is_an_error():
    with pytest.raises(ValueError, match="no prompt was measured"):
        paired_ratio([])


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.01, 1.2, "faster"), (0.8, 0.99, "slower"), (0.99, 1.3, "undecided"),
     (0.7, 1.01, "undecided"), (1.0, 1.2, "undecided"), (0.8, 1.0, "undecided")],
)  # fmt: skip
def test_verdicts(low, high, verdict):
    assert Ratio(ratio=(low + high) / 2, low=low, high=high, num_prompts=30).verdict == verdict


@pytest.mark.parametrize(
    ("num_prompts", "verdict"), [(1, "undecided"), (9, "undecided"), (10, "faster")]
)
def test_few_prompts_decide_nothing_however_clear_they_look(num_prompts, verdict):
    assert paired_ratio([math.log(2)] * num_prompts).verdict == verdict


def test_equal_arms_are_undecided_about_as_often_as_the_interval_says():
    rng, decided = random.Random(3), 0
    for seed in range(100):
        decided += (
            paired_ratio([rng.gauss(0, 0.1) for _ in range(20)], seed=seed).verdict != "undecided"
        )
    assert decided <= 15


def test_a_drift_of_the_machine_cancels(monkeypatch):
    """Each call is 3 % slower than the one before; the arms are equal."""
    machine = FakeMachine(monkeypatch, lambda arm, prompt, call: 1.03**call)
    found = measured(machine).speedup
    assert found.ratio == pytest.approx(1.0, abs=1e-12)
    assert (found.low, found.high) == (pytest.approx(1.0), pytest.approx(1.0))


def test_a_true_difference_is_found_under_drift_and_prompts_of_all_sizes(monkeypatch):
    machine = FakeMachine(
        monkeypatch,
        lambda arm, prompt, call: 1.03**call * ord(prompt) * (1.0 if arm == "plain" else 0.4),
    )
    found = measured(machine)
    assert found.speedup.ratio == pytest.approx(2.5)
    assert found.speedup.verdict == "faster"


def test_time_is_per_token(monkeypatch):
    """An arm that says twice as much in twice the time is as fast."""
    machine = FakeMachine(
        monkeypatch,
        lambda arm, prompt, call: 1.0 if arm == "plain" else 2.0,
        lambda arm, prompt, call: [1] * (10 if arm == "plain" else 20),
    )
    found = measured(machine)
    assert found.speedup.ratio == pytest.approx(1.0)
    assert found.tokens_per_second == (pytest.approx(10.0), pytest.approx(10.0))
    assert found.num_identical == 0


def test_the_order_is_a_warm_up_of_each_and_then_a_b_b_a(monkeypatch):
    machine = FakeMachine(monkeypatch, lambda arm, prompt, call: 1.0)
    ticks = itertools.count()
    compare(machine, ["x", "y"], BASE, FAST, SamplingParams(), tick=lambda: next(ticks))
    a, b = "arm plain", "arm fast"
    assert machine.calls == [(arm, p) for p in "xy" for arm in (a, b, a, b, b, a)]
    assert next(ticks) == num_calls(2) == 12


def test_the_warm_up_does_not_count(monkeypatch):
    machine = FakeMachine(monkeypatch, lambda arm, prompt, call: 1000.0 if call % 6 < 2 else 1.0)
    found = measured(machine)
    assert found.speedup.ratio == pytest.approx(1.0)
    assert found.tokens_per_second == (pytest.approx(10.0), pytest.approx(10.0))


def test_acceptance_is_that_of_the_second_arm_and_identity_is_over_all_runs(monkeypatch):
    def tokens(arm, prompt, call):
        return [1, 2, 3] if prompt == "a" and call % 6 == 5 else [1, 2]

    found = measured(FakeMachine(monkeypatch, lambda arm, prompt, call: 1.0, tokens))
    assert found.acceptance_length == pytest.approx(1.5)
    assert found.num_identical == 11
