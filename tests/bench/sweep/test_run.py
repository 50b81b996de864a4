"""A sweep over a target whose speed is known: it must find it, go on after a break, and refuse."""

import json
import math

import pytest

from outrider.bench.journal import Journal, open_journal
from outrider.bench.statistics import FASTER, SLOWER
from outrider.bench.sweep.contexts import lengthened
from outrider.bench.sweep.findings import break_even, controller, findings, sweet_spots
from outrider.bench.sweep.grid import BASE, SweepPlan
from outrider.bench.sweep.run import Sweep
from outrider.bench.target import Arm
from outrider.errors import ConfigError
from outrider.request import SpeculationParams
from tests.bench.simulated import Simulated, questions

ARM = Arm(name="ngram", speculation=SpeculationParams(method="ngram"))
LOADS = (1, 4, 16)
# By K, the concurrency from which on it loses.
CROSSINGS = {1: 64.0, 2: 16.0, 4: 8.0}


def speedup(k: int, concurrency: int) -> float:
    """K=4 is best alone and loses first."""
    return 1.0 + 0.25 * k * math.log(CROSSINGS[k] / concurrency) / math.log(64.0)


class Known(Simulated):
    """The simulated target, with speeds by K and concurrency."""

    def __init__(self, **fields) -> None:
        super().__init__(self._step_s, **fields)
        self.concurrency = 1

    def run(self, asks, *, concurrency, tick=lambda reply: None):
        self.concurrency = concurrency
        return super().run(asks, concurrency=concurrency, tick=tick)

    def _step_s(self, arm: str, question: str, number: int) -> float:
        drift = 0.01 * (1.0 + 1e-4 * number) * (1 + 0.001 * (number % 3))
        if arm == "off":
            return drift
        k = 2 if arm.endswith("adaptive") else int(arm.rpartition("=")[2])
        return drift / speedup(k, self.concurrency)


def plan(**fields) -> SweepPlan:
    asked = {"depths": (1, 2, 4), "concurrencies": LOADS, "budget_s": 6000.0, **fields}
    return SweepPlan(arms=(ARM,), questions=questions(40), **asked)


def swept(target=None, journal=None, **fields):
    target = target or Known()
    asked = plan(**fields)
    sweep = Sweep(target, asked, journal=journal, clock=target.clock)
    return sweep.run(), sweep


@pytest.fixture(scope="module")
def cells():
    return swept()[0]


def test_every_cell_is_measured_and_right(cells) -> None:
    fixed = [cell for cell in cells if not cell.variant.is_adaptive]
    assert len(fixed) == 9
    for cell in fixed:
        expected = speedup(cell.variant.k, cell.place.concurrency)
        assert cell.ratio == pytest.approx(expected, rel=0.01)
        assert cell.predicted is None
        if abs(expected - 1) > 0.05:
            assert cell.pair.verdict == (FASTER if expected > 1 else SLOWER)


def test_the_best_k_falls_with_the_load(cells) -> None:
    found = sweet_spots([cell for cell in cells if not cell.variant.is_adaptive])
    assert {spot["concurrency"]: spot["num_draft_tokens"] for spot in found} == {1: 4, 4: 2, 16: 1}
    assert all(spot["is_measured"] for spot in found)


def test_break_even_is_found_between_loads(cells) -> None:
    found = {row["num_draft_tokens"]: row for row in break_even(cells) if row["num_draft_tokens"]}
    assert found[4]["measured"] == pytest.approx(CROSSINGS[4], rel=0.15)
    assert found[1]["measured"] is None  # beyond what was measured
    assert found[4]["predicted"] is None


def test_the_adaptive_policy_is_held_against_the_best_k(cells) -> None:
    path = {point["concurrency"]: point for point in controller(cells)}
    assert path[1]["best_fixed"] == "ngram K=4"
    assert path[1]["regret"] == pytest.approx(1 - speedup(2, 1) / speedup(4, 1), abs=0.01)
    assert path[4]["regret"] == pytest.approx(0.0, abs=0.01)


def test_where_no_k_gains_the_best_is_plain_decoding() -> None:
    cells, _ = swept(depths=(2, 4), concurrencies=(32,))
    (point,) = controller(cells)
    assert point["best_fixed"] == "off"
    assert point["regret"] > 0.05


def test_findings_are_json_and_say_it_in_words(cells) -> None:
    found = findings(cells, plan())
    json.dumps(found)
    assert "best with K=4 at concurrency 1" in found["summary"]
    assert "surely faster up to 16 at once" in found["summary"]
    assert {"cells", "sweet_spots", "break_even", "controller"} <= set(found)
    assert found["cells"][0]["null_interval"] is not None
    assert found["prediction"] == {}


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path) -> None:
    class Breaks(Known):
        def run(self, asks, *, concurrency, tick=lambda reply: None):
            if concurrency == 16:
                raise KeyboardInterrupt
            return super().run(asks, concurrency=concurrency, tick=tick)

    path, identity = tmp_path / "sweep.json", plan().identity()
    with pytest.raises(KeyboardInterrupt), open_journal(path, identity) as journal:
        swept(Breaks(), journal)
    after = Known()
    with open_journal(path, identity, resume=True) as journal:
        cells, sweep = swept(after, journal)
    assert {len(asked) for _, asked, *_ in after.runs} == {32}  # the loads before it were done
    whole, _ = swept()
    assert [cell.ratio for cell in cells] == pytest.approx([cell.ratio for cell in whole])
    assert [block["concurrency"] for block in sweep.blocks] == list(LOADS)


def test_too_few_prompts_for_a_load_are_told() -> None:
    with pytest.raises(ConfigError, match="concurrency 16 needs as many prompts, there are 5"):
        SweepPlan(arms=(ARM,), questions=questions(5), concurrencies=(1, 16))


def test_an_arm_that_says_its_k_has_that_one_alone() -> None:
    arm = Arm(name="mine", speculation=SpeculationParams(method="ngram", num_draft_tokens=3))
    other = Arm(name="server", extra={"speculation": True})
    asked = SweepPlan(arms=(arm, other), questions=questions(20), depths=(1, 2))
    assert [(v.arm.name, v.k) for v in asked.fixed()] == [("mine", 3), ("server", None)]
    assert [v.arm.speculation.num_draft_tokens for v in asked.adaptive()] == [3]
    assert BASE.speculation.is_off


def test_a_server_has_no_contexts_to_choose() -> None:
    with pytest.raises(ConfigError, match="tells no tokens"):
        lengthened(Known(), questions(2), 64, 8)
    with pytest.raises(ConfigError, match="tells no tokens"):
        swept(contexts=(64,))


def test_without_a_path_the_journal_only_remembers() -> None:
    journal = Journal(None, {})
    cells, _ = swept(journal=journal, concurrencies=(1,), depths=(2,))
    again, _ = swept(journal=journal, concurrencies=(1,), depths=(2,))
    assert [cell.ratio for cell in again] == [cell.ratio for cell in cells]
