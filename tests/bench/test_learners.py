"""Learners: what one arm's requests teach a policy, another arm's never hear of."""

import threading

import pytest

from outrider.bench.ab import Plan, measure
from outrider.bench.by_arm import ByArm
from outrider.bench.inprocess import InProcess
from outrider.bench.learners import Learners
from outrider.bench.target import Arm, Ask, Question
from outrider.control.base import PLAIN
from outrider.engine.llm import LLM
from outrider.request import SamplingParams, SpeculationParams
from tests.engine.tiny_checkpoint import write_checkpoint

OFF = Arm(name="off", speculation=SpeculationParams(method="off"))
FIXED = Arm(name="fixed", speculation=SpeculationParams(method="ngram", num_draft_tokens=2))
ADAPTIVE = Arm(
    name="adaptive",
    speculation=SpeculationParams(method="ngram", num_draft_tokens=2, policy="pupil"),
)
SAMPLING = SamplingParams(max_tokens=6, ignore_eos=True)


class Pupil:
    """Notes the arms' names of all steps that it sees."""

    name = "pupil"
    needs_clock = False

    def __init__(self):
        self.options, self.seen = {}, set()

    def rests(self, num_rows):
        return False

    def plan(self, rooms, load):
        return [PLAIN] * len(rooms)

    def observe(self, step):
        self.seen |= {row.seq.request.tenant for row in step.batch.rows}

    def explain(self):
        return {}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return LLM(str(write_checkpoint(tmp_path_factory.mktemp("target"))))


@pytest.fixture
def pupils(llm):
    """All copies of a pupil among the engine's policies, the engine's own first."""
    made = []

    class Listed(Pupil):
        def __init__(self):
            super().__init__()
            made.append(self)

        def __deepcopy__(self, memo):
            return type(self)()

    policies = llm.engine.controller.policies
    policies["pupil"] = Listed()
    yield made
    del policies["pupil"]


def ask(arm, number=0, **fields):
    question = Question(id=str(number), prompt=[5, 6, 7, 5, 6])
    return Ask(question=question, sampling=SAMPLING, arm=arm, tenant=arm.name, **fields)


def test_an_arm_is_taught_by_its_own_requests_alone(llm, pupils):
    target = InProcess(llm)
    for arm in (FIXED, ADAPTIVE, FIXED):
        target.run([ask(arm)], concurrency=1)
    assert [one.seen for one in pupils if one.seen] == [{"fixed"}, {"adaptive"}]
    assert not pupils[0].seen, "the engine's own learned nothing from what was measured"
    assert llm.engine.controller.policies["pupil"] is pupils[0]


def test_lessons_are_kept_from_run_to_run_until_they_are_forgotten(llm, pupils):
    target = InProcess(llm)
    for _ in range(2):
        target.run([ask(FIXED)], concurrency=1)
    before = len(pupils)
    ByArm({"fixed": target}).forget()
    target.run([ask(FIXED)], concurrency=1)
    assert len(pupils) == before + 1


def test_in_a_comparison_the_null_arm_learns_for_itself_too(llm, pupils):
    plan = Plan(
        arms=(ADAPTIVE, FIXED, OFF),
        questions=(Question(id="q", prompt=[5, 6, 7, 5, 6]),),
        sampling=SAMPLING,
        num_rounds=1,
        budget_s=1.0,
    )
    measure(InProcess(llm), plan)
    taught = [{tenant.split()[1] for tenant in one.seen} for one in pupils if one.seen]
    assert sorted(map(sorted, taught)) == [["-1"], ["0"], ["1"], ["2"]]


def test_those_that_only_watch_stay(llm, pupils):
    policies = llm.engine.controller.policies
    learners = Learners(llm.engine)
    with learners.teaching("a"):
        own = policies["pupil"]
        policies["watcher"] = watcher = Pupil()
        with learners.teaching("b"):
            assert policies["watcher"] is watcher
            assert policies["pupil"] is not own
        assert policies["pupil"] is own
    assert policies.pop("watcher") is watcher


def test_the_adaptive_policy_begins_with_what_the_engine_knew_and_leaves_it_alone(llm):
    policies = llm.engine.controller.policies
    before = policies["adaptive"]
    steps = before.lessons.step
    target = InProcess(llm)
    asked = Arm(name="x", speculation=SpeculationParams(method="ngram", policy="adaptive"))
    target.run([ask(asked)], concurrency=1)
    assert policies["adaptive"] is before
    assert before.lessons.step == steps


def test_a_policy_that_cannot_be_copied_is_shared_and_named(llm, monkeypatch):
    stubborn = Pupil()
    stubborn.lock = threading.Lock()
    monkeypatch.setitem(llm.engine.controller.policies, "pupil", stubborn)
    target = InProcess(llm)
    target.run([ask(FIXED)], concurrency=1)
    assert stubborn.seen
    assert target.describe()["policies_shared_by_arms"] == ["pupil"]
