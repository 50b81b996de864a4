"""Training learns, resumes to the same bits, and ends with a rate near zero."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from outrider.train.losses import Distillation
from outrider.train.trainer import Trainer, TrainerConfig, _rate_factor
from tests.train.conftest import make_decoder

MakeTrainer = Callable[..., Trainer]


def final_bits(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["model"]
    return state


def test_resume_gives_the_same_bits(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    whole = make_trainer(name="whole.pt")
    assert not whole.resume()
    curve = whole.run()
    make_trainer(name="parts.pt").run(max_steps=3)
    second = make_trainer(name="parts.pt")
    assert second.resume()
    resumed_curve = second.run()
    expected, got = final_bits(tmp_path / "whole.pt"), final_bits(tmp_path / "parts.pt")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert [point[:2] for point in resumed_curve] == [point[:2] for point in curve]


def test_loss_falls(make_trainer: MakeTrainer) -> None:
    curve = make_trainer(num_steps=40).run()
    assert curve[-1].loss < curve[0].loss - 1.0
    assert curve[-1].step == 40


def test_distillation_is_least_when_draft_is_target() -> None:
    target, tokens_BT = make_decoder(seed=5), torch.randint(0, 300, (2, 20))
    loss = Distillation(target, weight=1.0)
    assert float(loss(target, tokens_BT).detach()) == pytest.approx(0.0, abs=1e-5)
    assert float(loss(make_decoder(seed=6), tokens_BT).detach()) > 1e-4


def test_distillation_keeps_the_target_frozen() -> None:
    target, draft = make_decoder(seed=5), make_decoder(seed=6)
    Distillation(target)(draft, torch.randint(0, 300, (2, 20))).backward()
    assert all(weight.grad is None for weight in target.parameters())
    assert all(weight.grad is not None for weight in draft.parameters())


def test_rate_rises_stays_and_falls_to_nearly_zero() -> None:
    config = TrainerConfig(num_steps=100, num_warmup_steps=9, decay_share=0.5)
    rates = [_rate_factor(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:50] == [1.0] * 41
    assert rates[-1] == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("field", "value"), [("num_steps", 0), ("decay_share", 1.5), ("num_steps_per_report", -1)]
)
def test_bad_config_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=str(value)):
        TrainerConfig(**{"num_steps": 1, field: value})
    with pytest.raises(ValueError, match="weight 2"):
        Distillation(make_decoder(seed=0), weight=2.0)
