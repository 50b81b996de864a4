"""The training loop of heads: AdamW, warm-up and cosine, and exact resume."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import TextColumn
from torch import Tensor

from outrider.errors import ConfigError, ModelError
from outrider.train.heads.objective import Objective
from outrider.train.heads.pieces import PieceBatches
from outrider.train.heads.student import Student
from outrider.train.heads.teacher import Teacher
from outrider.train.trainer import LossPoint, progress_bar, write_state

logger = logging.getLogger(__name__)

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.01
CLIP = 0.5
WARM_SHARE = 0.02
MOST_SKIPPED = 50  # non-finite steps in a row that are put up with
LEAST_PROGRESS = 0.005  # of acceptance length - 1, that an evaluation must bring to count


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long one head learns and how fast.

    Attributes:
        rate: after the first 2 % of steps, from where it falls as a cosine to zero.
        steps_per_evaluation: the first comes after 1 % of all steps.
        patience: evaluations without progress after which it stops; 0 never stops.
    """

    num_steps: int
    rate: float
    steps_per_evaluation: int
    steps_per_checkpoint: int = 100
    patience: int = 5

    def is_evaluated(self, step: int) -> bool:
        """Whether an evaluation comes after so many steps, before the last."""
        is_due = step == self.first_look or step % self.steps_per_evaluation == 0
        return is_due and step < self.num_steps

    @property
    def first_look(self) -> int:
        return max(1, round(self.num_steps / 100))

    def rate_at(self, step: int) -> float:
        """Of the step with this index, counted from zero."""
        num_warm = max(1, round(WARM_SHARE * self.num_steps))
        if step < num_warm:
            return self.rate * (step + 1) / num_warm
        done = (step - num_warm) / max(1, self.num_steps - num_warm)
        return self.rate * 0.5 * (1.0 + math.cos(math.pi * done))


class Finished(NamedTuple):
    """How training ended.

    Attributes:
        num_steps: that were taken. num_skipped: of these, for a loss or gradient that is no number.
        is_plateau: whether it stopped because nothing improved any more.
    """

    num_steps: int
    num_skipped: int
    is_plateau: bool
    curve: tuple[LossPoint, ...]


class HeadTrainer:
    """Trains `student` in place.

    Args:
        evaluate: called after some steps; gives the acceptance length on held-out text.
        checkpoint: file that a later run resumes from; None keeps none.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        objective: Objective,
        batches: PieceBatches,
        config: LoopConfig,
        *,
        evaluate: Callable[[int], float] | None = None,
        checkpoint: Path | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self._student = student
        self._teacher = teacher
        self._objective = objective
        self._batches = batches
        self._config = config
        self._evaluate = evaluate
        self._checkpoint = checkpoint
        self._settings = {"kind": student.kind, **(settings or {})}
        self._device = teacher.spec.device
        self._optimizer = _optimizer(student, config)
        self._step = self._num_skipped = self._num_skipped_in_a_row = 0
        self._seconds = 0.0
        self._curve: list[LossPoint] = []
        self._new_losses: list[float] = []
        self._lengths: list[float] = []

    def resume(self) -> bool:
        """Continues from the checkpoint; False where there is none.

        Raises:
            ConfigError: it belongs to other settings or data.
            ModelError: it cannot be read.
        """
        path = self._checkpoint
        if path is None or not path.is_file():
            return False
        state = _read(path, self._device)
        for name, value in self._settings.items():
            if state["settings"].get(name) != value:
                raise ConfigError(
                    f"{name} is {value!r}, in {str(path)!r} {state['settings'].get(name)!r}: "
                    "resume with the settings it began with, or start anew without resume"
                )
        self._batches.load_state_dict(state["batches"])
        self._student.load_state_dict(state["student"])
        self._optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"].cpu())
        for name in ("step", "seconds", "num_skipped", "num_skipped_in_a_row"):
            setattr(self, f"_{name}", state[name])
        self._curve = [LossPoint(*point) for point in state["curve"]]
        self._new_losses, self._lengths = list(state["new_losses"]), list(state["lengths"])
        return True

    def run(self, *, max_steps: int | None = None) -> Finished:
        """Trains to the last step, to a plateau, or for at most `max_steps` more."""
        config = self._config
        last = config.num_steps if max_steps is None else self._step + max_steps
        last = min(last, config.num_steps)
        with self._shown() as show:
            while self._step < last and not self._is_plateau():
                started = time.perf_counter()
                self._take_step()
                self._seconds += time.perf_counter() - started
                show()
                if config.is_evaluated(self._step):
                    self._look()
                if self._step % config.steps_per_checkpoint == 0 or self._step == last:
                    self.save()
        self._note_loss()
        is_plateau = self._step < config.num_steps and self._is_plateau()
        return Finished(self._step, self._num_skipped, is_plateau, tuple(self._curve))

    def save(self) -> None:
        """Writes the checkpoint, if there is to be one."""
        if self._checkpoint is not None:
            write_state(self._state(), self._checkpoint)

    def _take_step(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.rate_at(self._step)
        batch = self._batches.next_batch(self._device)
        taught = self._teacher.teach(batch, self._student.boundaries)
        is_half = self._device.type != "cpu"
        self._student.train()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=is_half):
            loss = self._objective(self._student, batch, taught)
        loss.backward()
        weights = [weight for weight in self._student.parameters() if weight.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(weights, CLIP)
        self._learn(loss.detach(), norm)
        self._step += 1

    def _learn(self, loss: Tensor, norm: Tensor) -> None:
        """Moves the weights, unless what would move them is no number."""
        if bool(torch.isfinite(loss) & torch.isfinite(norm)):
            self._optimizer.step()
            self._new_losses.append(float(loss))
            self._num_skipped_in_a_row = 0
        else:
            self._num_skipped += 1
            self._num_skipped_in_a_row += 1
            logger.warning("step %d skipped: the loss or its gradient is no number", self._step)
            if self._num_skipped_in_a_row == MOST_SKIPPED:
                raise ConfigError(
                    f"{MOST_SKIPPED} steps in a row gave no numbers: lower the rate of "
                    f"{self._config.rate:g}, or look at the target's weights"
                )
        self._optimizer.zero_grad(set_to_none=True)

    def _look(self) -> None:
        self._note_loss()
        if self._evaluate is not None:
            self._lengths.append(self._evaluate(self._step))

    def _note_loss(self) -> None:
        if self._new_losses:
            mean = math.fsum(self._new_losses) / len(self._new_losses)
            self._curve.append(LossPoint(self._step, mean, self._seconds))
            self._new_losses = []

    def _is_plateau(self) -> bool:
        """Whether the last evaluations brought nothing beside the best one before them."""
        patience = self._config.patience
        if not patience or len(self._lengths) <= patience:
            return False
        before = max(self._lengths[:-patience])
        return max(self._lengths[-patience:]) - 1.0 < (before - 1.0) * (1.0 + LEAST_PROGRESS)

    def _state(self) -> dict[str, Any]:
        return {
            "settings": self._settings,
            "student": self._student.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "batches": self._batches.state_dict(),
            "random": torch.get_rng_state(),
            "step": self._step,
            "seconds": self._seconds,
            "num_skipped": self._num_skipped,
            "num_skipped_in_a_row": self._num_skipped_in_a_row,
            "curve": [tuple(point) for point in self._curve],
            "new_losses": list(self._new_losses),
            "lengths": list(self._lengths),
        }

    @contextmanager
    def _shown(self) -> Iterator[Callable[[], None]]:
        """A progress bar with the last loss."""
        with progress_bar(TextColumn("loss {task.fields[loss]}")) as progress:
            task = progress.add_task(
                "training", total=self._config.num_steps, completed=self._step, loss="-"
            )

            def show() -> None:
                loss = f"{self._new_losses[-1]:.3f}" if self._new_losses else "-"
                progress.update(task, completed=self._step, loss=loss)

            yield show


def _optimizer(student: Student, config: LoopConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019); vectors are not decayed."""
    learned = [weight for weight in student.parameters() if weight.requires_grad]
    groups = [
        {"params": [w for w in learned if w.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [w for w in learned if w.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.rate, betas=BETAS)


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        # A broken file fails in as many ways as there are formats inside it.
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"the checkpoint {str(path)!r} cannot be read ({first_line}): delete it, or start anew "
            "without resume"
        ) from error
    return state
