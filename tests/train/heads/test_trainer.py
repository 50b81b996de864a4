"""Training learns, resumes to the same bits, skips what is no number, and knows when to stop."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from outrider.errors import ConfigError, ModelError
from outrider.train.heads import trainer as trainer_module
from outrider.train.heads.kinds import find_kind
from outrider.train.heads.losses import kl
from outrider.train.heads.objective import Objective
from outrider.train.heads.pieces import PieceBatches
from outrider.train.heads.trainer import HeadTrainer, LoopConfig
from tests.train.heads.conftest import random_pieces, settings

KINDS = ("medusa", "eagle3", "kv", "draft_model")


def make(teacher, kind="eagle3", *, objective=None, path=None, evaluate=None, **loop):
    config = LoopConfig(
        **{
            "num_steps": 8,
            "rate": 3e-3,
            "steps_per_evaluation": 100,
            "steps_per_checkpoint": 2,
            **loop,
        }
    )
    student = find_kind(kind).fresh(teacher, settings(kind), None)
    return HeadTrainer(
        student,
        teacher,
        objective or Objective(teacher, kl),
        PieceBatches(random_pieces(*range(10, 18)), tokens_per_step=40, seed=0),
        config,
        checkpoint=path,
        evaluate=evaluate,
        settings={"rate": config.rate},
    )


@pytest.mark.parametrize("kind", KINDS)
def test_loss_falls(teacher, kind):
    trainer = make(teacher, kind, num_steps=60, steps_per_evaluation=5)
    curve = trainer.run().curve
    assert curve[-1].loss < 0.9 * curve[0].loss
    assert all(earlier.step < later.step for earlier, later in pairwise(curve))


@pytest.mark.parametrize("kind", KINDS)
def test_resume_gives_the_same_bits(teacher, tmp_path, kind):
    make(teacher, kind, path=tmp_path / "whole.pt").run()
    make(teacher, kind, path=tmp_path / "parts.pt").run(max_steps=3)
    saved = torch.load(tmp_path / "parts.pt", weights_only=True)["random"]
    torch.rand(5)  # whatever else the process drew
    second = make(teacher, kind, path=tmp_path / "parts.pt")
    assert not torch.equal(torch.get_rng_state(), saved)
    assert second.resume()
    assert torch.equal(torch.get_rng_state(), saved)
    assert second.run().num_steps == 8
    whole, parts = (
        torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "parts.pt")
    )
    for name, weight in whole["student"].items():
        assert torch.equal(weight, parts["student"][name]), name
    first, other = (state["optimizer"]["state"] for state in (whole, parts))
    assert all(torch.equal(first[k]["exp_avg"], other[k]["exp_avg"]) for k in first)
    assert whole["new_losses"] == parts["new_losses"]


def test_without_a_checkpoint_there_is_nothing_to_resume(teacher, tmp_path):
    assert not make(teacher, path=tmp_path / "none.pt").resume()


def test_other_settings_are_refused(teacher, tmp_path):
    path = tmp_path / "a.pt"
    make(teacher, path=path).run(max_steps=1)
    with pytest.raises(ConfigError, match=r"rate is 0\.5"):
        make(teacher, path=path, rate=0.5).resume()
    assert make(teacher, path=path, num_steps=20).resume(), "more steps may be asked for"


def test_a_broken_checkpoint_is_told(teacher, tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ModelError, match="cannot be read"):
        make(teacher, path=path).resume()


class Poisoned(Objective):
    """No number in some steps."""

    def __init__(self, teacher, when):
        super().__init__(teacher, kl)
        self._when = when
        self._step = 0

    def __call__(self, student, batch, taught):
        loss = super().__call__(student, batch, taught)
        self._step += 1
        return loss * float("nan") if self._when(self._step) else loss


def test_steps_without_numbers_are_counted_and_change_nothing(teacher):
    poisoned = make(teacher, objective=Poisoned(teacher, lambda step: step in (2, 5)))
    finished = poisoned.run()
    assert (finished.num_steps, finished.num_skipped) == (8, 2)
    weights = poisoned._student.state_dict()
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    none = make(teacher, objective=Poisoned(teacher, lambda step: True))
    before = {name: w.clone() for name, w in none._student.state_dict().items()}
    none.run()
    assert all(torch.equal(w, before[name]) for name, w in none._student.state_dict().items())


def test_nothing_but_such_steps_ends_training(teacher, monkeypatch):
    monkeypatch.setattr(trainer_module, "MOST_SKIPPED", 3)
    with pytest.raises(ConfigError, match="lower the rate"):
        make(teacher, objective=Poisoned(teacher, lambda step: True)).run()


def test_the_rate_rises_and_falls_to_zero():
    config = LoopConfig(num_steps=1000, rate=2.0, steps_per_evaluation=1)
    assert config.rate_at(0) == pytest.approx(0.1)
    assert config.rate_at(19) == config.rate_at(20) == pytest.approx(2.0)
    assert config.rate_at(510) == pytest.approx(1.0)
    assert 0 < config.rate_at(999) < 1e-4


def test_the_first_look_comes_after_one_percent():
    config = LoopConfig(num_steps=400, rate=1.0, steps_per_evaluation=100)
    looked = [step for step in range(1, 401) if config.is_evaluated(step)]
    assert looked == [4, 100, 200, 300], "the end has an evaluation of its own"


def test_it_stops_where_nothing_improves(teacher):
    lengths = iter([1.2, 1.8, 1.5, 1.801, 1.79, 9.0])
    trainer = make(
        teacher,
        num_steps=50,
        steps_per_evaluation=1,
        patience=3,
        evaluate=lambda step: next(lengths),
    )
    finished = trainer.run()
    assert (finished.num_steps, finished.is_plateau) == (5, True)
    patient = make(
        teacher, num_steps=6, steps_per_evaluation=1, patience=0, evaluate=lambda step: 1.5
    )
    assert patient.run()[0] == 6


def test_the_target_is_left_alone(teacher):
    before = teacher.head_weight()
    make(teacher).run()
    assert torch.equal(before, teacher.head_weight())


def test_a_part_written_is_never_read(teacher, tmp_path):
    make(teacher, path=tmp_path / "a.pt").run(max_steps=2)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["a.pt"]
