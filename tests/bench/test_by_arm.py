"""ByArm: each arm is answered by its own target, and the result says that they are apart."""

import pytest

from outrider.bench.ab import Plan, measure
from outrider.bench.by_arm import ByArm
from outrider.bench.pairs import findings, pairs
from outrider.request import SamplingParams
from tests.bench.simulated import OFF, ON, Simulated, questions


class Named(Simulated):
    def __init__(self, name, seconds, version, **options):
        super().__init__(lambda *_: seconds, **options)
        self.name, self.version = name, version

    def describe(self):
        return {"model": "m", "engine_version": self.version}


@pytest.fixture
def both():
    return Named("one", 0.1, "1", tells=False), Named("two", 0.05, "2", tells=False)


def test_arms_go_to_their_own_and_are_compared(both):
    target = ByArm(dict(zip(("off", "on"), both, strict=True)))
    plan = Plan(
        arms=(OFF, ON),
        questions=questions(),
        sampling=SamplingParams(max_tokens=8),
        num_rounds=1,
        budget_s=1e9,
    )
    found = measure(target, plan, clock=lambda: both[0].now + both[1].now)
    assert pairs(found)[0].ratio.ratio == pytest.approx(2.0)
    assert {name for name, *_ in both[0].runs} == {"off"}
    assert {name for name, *_ in both[1].runs} == {"on"}
    assert findings(found)["arms"][1]["acceptance"]["acceptance_length"] == pytest.approx(3.0)


def test_it_tells_what_they_share_and_that_they_are_apart(both):
    told = ByArm(dict(zip(("off", "on"), both, strict=True))).describe()
    assert told["model"] == "m"
    assert "engine_version" not in told
    assert told["by_arm"]["on"]["engine_version"] == "2"
    assert told["name"] == "one, two"
    assert told["one_process"] is False
    assert ByArm({"off": both[0], "on": both[0]}).describe()["one_process"] is True
