"""Right rules pass; rules and drafters with known mistakes are found, and by whom is told."""

import pytest

from outrider.bench.journal import Journal, open_journal
from outrider.bench.lossless.check import ALIKE, LOSSLESS, LOSSY, NOT_LOSSLESS, check_lossless
from outrider.bench.lossless.trial import FAIL, PASS, UNDECIDED, Plan
from outrider.bench.result import Result, from_json
from outrider.bench.target import Arm, Reply
from outrider.errors import ConfigError, RequestError
from outrider.request import SpeculationParams
from tests.bench.lossless import wrong


def arm(name, **keys):
    given = {"method": "draft_model", "num_draft_tokens": 3, **keys}
    return Arm(name=name, speculation=SpeculationParams(**given))


@pytest.fixture
def check(questions):
    def check(target, *arms, journal=None, **plan):
        given = {"num_draws": 250, "concurrency": 64, "max_tokens": 48, **plan}
        asked = Plan(arms=arms, questions=questions, **given)
        return check_lossless(target, asked, Journal(None, {}) if journal is None else journal)

    return check


def verdicts(found, name):
    return {(c.level, c.test): c.verdict for c in found.checks if c.arm == name}


RIGHT = {
    "sampled": arm("sampled"),
    "uncoupled": arm("uncoupled", draft_sample_method="probabilistic"),
    "block": arm("block", verifier="block"),
    "picks": arm("picks", verifier="rejection", draft_sample_method="greedy"),
    "tree": arm("tree", verifier="tree", width=2),
}


def test_right_rules_are_lossless(target, check):
    found = check(target(), *RIGHT.values(), num_draws=120, max_tokens=40)
    assert {one.arm: one.verdict for one in found.arms} == dict.fromkeys(RIGHT, LOSSLESS)
    assert found.passes
    assert found.rounding.is_bitwise
    assert found.rounding.largest == 0.0
    assert not found.differences
    assert verdicts(found, "sampled")["L1", "tokens of a seed"] == PASS
    accepted = {name for name in RIGHT if ("L3", "drafts accepted") in verdicts(found, name)}
    assert accepted == {"uncoupled", "picks"}, "block and trees are no coins, coupled drafts know"


@pytest.mark.parametrize(
    ("wrong_arm", "seen_by"),
    [
        (
            arm("q of another temperature", verifier="other_temperature"),
            {("L2", "rule, every choice"), ("L3", "tokens emitted, towards the draft")},
        ),
        (
            arm("softmax q", verifier="softmax_of_pick", draft_sample_method="greedy"),
            {
                ("L2", "rule, every choice"),
                ("L2", "counts per context"),
                ("L3", "drafts accepted"),
                ("L3", "tokens emitted, towards the draft"),
            },
        ),
        (
            arm("other noise", verifier="other_noise"),
            {("L1", "tokens of a seed"), ("L2", "rule, every choice")},
        ),
        (arm("one too many", verifier="one_too_many"), {("L1", "greedy tokens")}),
    ],
    ids=lambda value: value.name if isinstance(value, Arm) else "",
)
def test_an_injected_wrong_verifier_is_found(wrong_rules, target, check, wrong_arm, seen_by):
    found = check(target(), wrong_arm)
    told = verdicts(found, wrong_arm.name)
    assert found.arms[0].verdict == NOT_LOSSLESS
    assert not found.passes
    assert seen_by <= {key for key, verdict in told.items() if verdict == FAIL}


@pytest.mark.parametrize("drafter", [wrong.PicksButRecordsSoftmax, wrong.RecordsFlatter])
def test_a_drafter_that_records_other_laws_is_found_and_named(drafting, check, drafter):
    mine = arm("mine", method="mine", verifier="rejection", draft_sample_method="probabilistic")
    told = verdicts(check(drafting(drafter), mine), "mine")
    assert told["L2", "rule, every choice"] == PASS, "the rule itself is right"
    assert told["L2", "counts per context"] == FAIL
    assert told["L3", "drafts drawn as recorded"] == FAIL


def test_lossy_rules_are_called_nothing_else(target, check):
    found = check(target(), arm("typical", verifier="typical"), levels=("L1",))
    assert found.arms[0].verdict == LOSSY
    assert found.arms[0].exactness == "lossy"
    assert found.passes


class Rounds:
    """A runner whose verifying passes are off by a little, as on hardware that sums otherwise."""

    def __init__(self, engine, nats):
        self._run, self._nats = engine.runner.run, nats
        engine.runner.run = self.run

    def run(self, pieces, taps=()):
        output = self._run(pieces, taps)
        if not any(piece.tree.tokens for piece in pieces):
            return output
        logits = output.logits_NV.clone()
        logits[:, ::2] += self._nats
        return output._replace(logits_NV=logits, argmax_N=logits.argmax(dim=1).tolist())


@pytest.mark.parametrize("nats", [0.001, 0.5])
def test_a_promise_of_equal_bits_is_held_to(target, check, nats):
    """Of rows that change with the width, those that were promised not to are no excuse."""
    rounding = target()
    Rounds(rounding.llm.engine, nats)
    found = check(rounding, arm("sampled"), levels=("L1",))
    assert verdicts(found, "sampled")["L1", "bitwise rows"] == FAIL
    assert not found.passes


def test_without_that_promise_near_ties_are_excused(target, check):
    rounding = target()
    engine = rounding.llm.engine
    engine.runner.network.ops.is_batch_invariant = False
    Rounds(engine, 0.3)
    found = check(rounding, arm("sampled"), levels=("L1",))
    assert found.rounding.tie_eps == pytest.approx(0.3, abs=1e-4)
    assert found.differences, "else nothing was excused"
    assert all(one["is_near_tie"] for one in found.differences)
    assert all(abs(one["margin_nats"]) <= found.rounding.tie_eps for one in found.differences)
    assert found.arms[0].verdict == ALIKE, "L1 alone says nothing of laws"


def test_without_that_promise_other_differences_are_found(wrong_rules, target, check):
    other = target()
    other.llm.engine.runner.network.ops.is_batch_invariant = False
    found = check(other, arm("wrong", verifier="one_too_many"), levels=("L1",))
    assert found.arms[0].verdict == NOT_LOSSLESS
    assert not found.differences[0]["is_near_tie"]
    assert found.differences[0]["margin_nats"] > 0.0


class Server:
    """A target that shows answers only; `answers` makes the text of an arm's n-th run."""

    name = "server"

    def __init__(self, answers):
        self._answers, self._runs = answers, {}

    def describe(self):
        return {"name": self.name}

    def counters(self):
        return None

    def run(self, asks, *, concurrency, tick=lambda reply: None):
        name = asks[0].arm.name
        self._runs[name] = run = self._runs.get(name, 0) + 1
        return [self._reply(ask, name, run) for ask in asks]

    def _reply(self, ask, name, run):
        text = self._answers(name, run)
        error = "" if text else "no answer"
        return Reply(ask=ask, due_s=0.0, sent_s=0.0, text=text, num_tokens=len(text), error=error)


@pytest.mark.parametrize(
    ("answers", "verdict"),
    [
        (lambda name, run: "same", PASS),
        (lambda name, run: "same" if name == "off" else "sane", FAIL),
        (lambda name, run: f"same {run}" if name == "off" else "sane", UNDECIDED),
        (lambda name, run: "same" if name == "off" else "", UNDECIDED),
    ],
    ids=["equal", "another text", "off differs from itself", "no answer"],
)
def test_a_server_is_judged_by_its_answers(check, answers, verdict):
    found = check(Server(answers), arm("on"))
    assert [(one.level, one.verdict) for one in found.checks] == [("L1", verdict)]
    assert found.rounding is None
    assert found.passes == (verdict == PASS)
    assert "server" in found.summary


def test_a_rule_for_greedy_requests_has_one_level(target, check):
    found = check(target(), arm("greedy", verifier="greedy"))
    assert {one.level for one in found.checks} == {"L1"}
    assert found.arms[0].verdict == LOSSLESS


def test_text_parts_at_a_character(check):
    found = check(Server(lambda name, run: "same" if name == "off" else "sane"), arm("on"))
    first = found.differences[0]
    assert (first["position"], first["base"], first["arm"]) == (2, "m", "n")
    assert first["is_near_tie"] is None


def test_without_time_nothing_is_claimed(target, check):
    found = check(target(), arm("sampled"), budget_s=-1.0)
    assert {one.verdict for one in found.checks} == {UNDECIDED}
    assert not found.passes


def test_what_is_done_is_not_done_again(target, check, tmp_path):
    path, plan = tmp_path / "lossless.json", {"plan": 1}
    with open_journal(path, plan) as journal:
        first = check(target(), arm("block", verifier="block"), journal=journal)
    broken = target()
    broken.run = None  # whoever asks it anything fails
    with open_journal(path, plan, resume=True) as journal:
        again = check(broken, arm("block", verifier="block"), journal=journal)
    assert again.checks == first.checks
    assert again.rounding == first.rounding


def test_findings_go_through_a_file(target, check):
    found = check(target(), arm("sampled"), levels=("L1",))
    held = from_json(Result(kind="lossless", findings=found.to_json()).to_json())
    assert held.findings["passes"] is True
    assert held.findings["arms"][0]["verdict"] == ALIKE
    assert held.findings["checks"][0]["level"] == "L1"


def test_what_cannot_be_checked_is_refused(target, check):
    with pytest.raises(ConfigError, match="drafts nothing"):
        check(target(), Arm(name="off", speculation=SpeculationParams(method="off")))
    with pytest.raises(ConfigError, match="temperature=0"):
        check(target(), arm("sampled"), temperature=0.0)
    with pytest.raises(ConfigError, match="unknown level 'L4'"):
        check(target(), arm("sampled"), levels=("L4",))
    with pytest.raises(RequestError, match="unknown method 'draft_modl'"):
        check(target(), arm("typo", method="draft_modl"))
    with pytest.raises(ConfigError, match="no arm"):
        check(target())
