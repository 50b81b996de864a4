"""A tiny engine, timed: what is timed, that nothing is left behind, and that it can be saved."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from outrider.bench.calibration import calibrate
from outrider.bench.calibration.calibrate import (
    VERIFIED,
    Calibration,
    Calibrator,
    EveryStep,
    key_of,
    lines,
    with_depth,
)
from outrider.bench.calibration.prediction import Load
from outrider.bench.inprocess import InProcess
from outrider.bench.provenance import machine_fingerprint
from outrider.bench.target import Arm, Question
from outrider.control.base import PLAIN, Facts, Step, StepTimes
from outrider.control.learning import WARM_UP
from outrider.engine.llm import LLM
from outrider.errors import ConfigError
from outrider.request import SamplingParams, SpeculationParams
from outrider.step import Batch, Commit, DraftTree, Row
from tests.engine.tiny_checkpoint import write_checkpoint

ROWS, CONTEXTS = (1, 2, 4), (16, 32)
ARMS = (
    Arm(name="draft_model", speculation=SpeculationParams(method="draft_model")),
    Arm(name="ngram", speculation=SpeculationParams(method="ngram", num_draft_tokens=3)),
)
QUESTIONS = tuple(Question(id=f"q{i}", prompt=f"def f{i}(argv): return") for i in range(4))


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model = write_checkpoint(folder / "target")
    return InProcess(LLM(str(model), draft_model=str(model), max_num_seqs=8))


@pytest.fixture(scope="module")
def told():
    return []


@pytest.fixture(scope="module")
def found(target, told):
    calibrator = Calibrator(target, tick=lambda share, what: told.append((share, what)))
    return calibrator.run(ARMS, QUESTIONS, rows=ROWS, contexts=CONTEXTS, budget_s=0.0)


def test_every_shape_is_timed(found) -> None:
    shapes = [(p.num_sequences, p.rows_each, p.context) for p in found.points]
    assert sorted(shapes) == [(n, 1, c) for n in ROWS for c in CONTEXTS]
    assert {(p.num_sequences, p.rows_each) for p in found.verify_points} == {(1, VERIFIED)}
    assert all(p.seconds > 0 and p.num_timings >= 3 for p in found.points)
    assert found.roofline is not None
    assert [shape.rows_each for shape in found.left_out] == [256]  # longer than the model's 128


def test_nothing_is_left_behind(target, found) -> None:
    engine = target.llm.engine
    assert not engine.has_work()
    assert engine.manager.num_used == 0
    engine.check_integrity()
    assert not {"calibration", "step log"} & set(engine.controller.policies)


def test_progress_rises_to_the_last_run(told, found) -> None:
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert 0.0 <= shares[0] <= shares[-1] < 1.0
    assert [what for _, what in told][-3:] == ["plain decoding", "draft_model", "ngram"]


def test_a_drafter_that_is_the_target_is_always_right(found) -> None:
    profile = found.profile("draft_model", 0.0)
    assert profile.drafter == "draft_model"
    assert profile.forecast.reached == [1.0] * 8
    assert profile.forecast.stands == [1.0] * 8
    assert found.profile("draft_model", 0.7) is None


def test_a_k_of_an_arm_is_kept(found) -> None:
    profile = found.profiles[key_of("ngram", 0.0)]
    assert len(profile.forecast.stands) == 3


def test_prices_predict_something(found) -> None:
    load = Load(batch=2, context=20, is_drawn=False)
    guess = found.predictor.predict(found.profile("draft_model", 0.0), 4, load)
    assert guess.tokens == 5.0
    assert 0.0 < guess.speedup < 5.0
    assert all(part >= 0.0 for part in guess.parts)


def test_it_is_read_back_as_it_was(found) -> None:
    held = json.loads(json.dumps(found.to_json()))
    back = Calibration.from_json(held)
    assert back.points == found.points
    assert back.roofline == found.roofline
    assert back.profiles == dict(found.profiles)
    load = Load(batch=2, context=20, is_drawn=False)
    profile = found.profile("ngram", 0.0)
    mine, its = (one.predictor.predict(profile, 2, load).speedup for one in (found, back))
    assert its == pytest.approx(mine, rel=0.01)


@pytest.mark.parametrize("change", [{"format": 0}, {"cost": {}}, {"points": [{}]}])
def test_what_is_no_calibration_is_refused(found, change) -> None:
    with pytest.raises(ConfigError, match="bench calibrate"):
        Calibration.from_json({**json.loads(json.dumps(found.to_json())), **change})


def test_another_machine_or_model_is_refused(target, found) -> None:
    # Other tests of a process may change its threads, which makes it another machine.
    mine = replace(found, machine=machine_fingerprint())
    mine.check(target.llm.engine)
    for name in ("machine", "model"):
        with pytest.raises(ConfigError, match=f"another {name}.* calibrate here"):
            replace(mine, **{name: "else"}).check(target.llm.engine)


def test_threads_that_change_while_passes_are_timed_are_told(target, monkeypatch) -> None:
    told = iter(("before", "after"))
    monkeypatch.setattr(calibrate, "machine_fingerprint", lambda: next(told))
    with pytest.raises(ConfigError, match="threads was changed while passes were timed"):
        Calibrator(target).run([], [], rows=(1,), contexts=(16,), budget_s=0.0)


def test_the_machine_is_the_one_at_the_first_pass(target, monkeypatch) -> None:
    """Other tests of a process may change its threads behind a calibration: that is no matter."""
    monkeypatch.setattr(calibrate, "machine_fingerprint", lambda: "as it was")
    found = Calibrator(target).run([], [], rows=(1,), contexts=(16,), budget_s=0.0)
    assert found.machine == "as it was"
    monkeypatch.setattr(calibrate, "machine_fingerprint", lambda: "as it is now")
    with pytest.raises(ConfigError, match=r"another machine, or another number of threads"):
        found.check_machine()


def test_how_often_answers_end_is_counted(found, target) -> None:
    assert 0.0 <= found.end_rate(0.0) < 1.0
    assert found.end_rate(0.7) == 0.0, "nothing was answered at that temperature"
    back = Calibration.from_json(json.loads(json.dumps(found.to_json())))
    assert back.end_rates == found.end_rates


def test_the_times_of_every_step_are_learned_from() -> None:
    """Long after the steps that the adaptive policy warms up on."""
    learner = EveryStep(Facts())
    tree = DraftTree.chain((), "x")
    seq = SimpleNamespace(request=SimpleNamespace(sampling=SamplingParams()), tokens=[1, 2, 3])
    for _ in range(3 * WARM_UP):
        step = Step(
            Batch([Row(seq, 1, 0)], []),
            [PLAIN],
            [Commit(seq=seq, tree=tree, tokens=(1,))],
            StepTimes(0.0, 1e-3, 1e-4),
        )
        learner.observe(step)
    assert learner.cost.passes.num_timings == 3 * WARM_UP


def test_shapes_without_room_are_left_out(target) -> None:
    calibrator = Calibrator(target)
    found = calibrator.run([], [], rows=(1, 100_000), contexts=(16, 100_000), budget_s=0.0)
    assert [p.num_rows for p in found.points] == [1]
    assert {shape.num_sequences for shape in found.left_out} >= {100_000}
    assert found.roofline is None
    assert lines(found, target.llm.engine) == {}
    assert found.profiles == {}


def test_a_drafter_that_is_not_here_is_told(target) -> None:
    arm = Arm(name="rest", speculation=SpeculationParams(method="rest"))
    with pytest.raises(ConfigError, match="rest"):
        Calibrator(target).run([arm], QUESTIONS, rows=(1,), contexts=(), budget_s=0.0)


def test_with_depth_overrides_policy() -> None:
    asked = SpeculationParams(method="ngram", policy="table", policy_options={"table": "1-:2"})
    assert with_depth(asked, 5) == SpeculationParams(method="ngram", num_draft_tokens=5)
