"""The training loop: Muon and AdamW, a schedule that ends near zero, and exact resume.

Shape legend: B sequences, T window length.
"""

import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from outrider.train.network import Decoder
from outrider.train.packing import PackedBatches

logger = logging.getLogger(__name__)

Objective = Callable[[torch.nn.Module, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long and how fast one model learns.

    The rate rises over `num_warmup_steps`, stays, and falls linearly to zero over the last
    `decay_share` of `num_steps` (warm-up, stable, decay); `num_steps` may change on resume.

    Raises:
        ValueError: a count below one, or a share outside (0, 1].
    """

    num_steps: int
    matrix_rate: float = 3e-3
    other_rate: float = 3e-3
    weight_decay: float = 0.1
    num_warmup_steps: int = 50
    decay_share: float = 0.4
    max_gradient_norm: float = 1.0
    num_steps_per_checkpoint: int = 100
    num_steps_per_report: int = 20
    compiled: bool = False

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_steps_per_checkpoint", "num_steps_per_report"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is too small; choose at least 1")
        if not 0.0 < self.decay_share <= 1.0:
            raise ValueError(f"decay_share {self.decay_share} is no share; choose one in (0, 1]")


class LossPoint(NamedTuple):
    """Mean loss in nats over the steps since the point before, and seconds trained so far."""

    step: int
    loss: float
    seconds: float


class Trainer:
    """Trains `model` in place; `checkpoint` names the file that a later run resumes from."""

    def __init__(
        self,
        model: Decoder,
        objective: Objective,
        batches: PackedBatches,
        config: TrainerConfig,
        *,
        device: str = "cpu",
        checkpoint: Path | None = None,
    ) -> None:
        self.curve: list[LossPoint] = []
        self._model = model.to(device).train()
        self._batches = batches
        self._config = config
        self._device = torch.device(device)
        self._checkpoint = checkpoint
        self._optimizers = _optimizers(model, config)
        self._step = 0
        self._seconds = 0.0
        self._loss = torch.compile(objective) if config.compiled else objective

    def resume(self) -> bool:
        """Continue from the checkpoint file; False when there is none.

        Raises:
            ValueError: it was trained for more steps than asked, or with other settings.
        """
        if self._checkpoint is None or not self._checkpoint.is_file():
            return False
        state = torch.load(self._checkpoint, map_location=self._device, weights_only=True)
        if state["step"] > self._config.num_steps:
            raise ValueError(
                f"num_steps {self._config.num_steps} is below the {state['step']} steps of the "
                "checkpoint; ask for more, or train without resume"
            )
        self._batches.load_state_dict(state["batches"])
        self._model.load_state_dict(state["model"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["generator"].cpu())
        self._step, self._seconds = state["step"], state["seconds"]
        self.curve = [LossPoint(*point) for point in state["curve"]]
        return True

    def run(self, *, max_steps: int | None = None) -> list[LossPoint]:
        """Train to `num_steps`, or for at most `max_steps` more, and return the loss curve."""
        last = self._config.num_steps
        if max_steps is not None:
            last = min(last, self._step + max_steps)
        losses: list[Tensor] = []
        with progress_bar() as progress:
            task = progress.add_task("training", total=last, completed=self._step)
            while self._step < last:
                started = time.perf_counter()
                losses.append(self._train_step())
                self._seconds += time.perf_counter() - started
                progress.update(task, completed=self._step)
                if self._step % self._config.num_steps_per_report == 0 or self._step == last:
                    self._report(losses)
                if self._step % self._config.num_steps_per_checkpoint == 0 or self._step == last:
                    self.save()
        return self.curve

    def _train_step(self) -> Tensor:
        rate = _rate_factor(self._step, self._config)
        tokens_BT = self._batches.next_batch().to(self._device)
        with torch.autocast(self._device.type, torch.bfloat16):
            loss = self._loss(self._model, tokens_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._config.max_gradient_norm)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * rate
            optimizer.step()
            optimizer.zero_grad()
        self._step += 1
        return loss.detach()

    def _report(self, losses: list[Tensor]) -> None:
        loss = float(torch.stack(losses).mean())
        losses.clear()
        self.curve.append(LossPoint(self._step, loss, self._seconds))
        logger.info("step %d loss %.4f after %.0f s", self._step, loss, self._seconds)

    def save(self) -> None:
        """Write the checkpoint, if there is to be one."""
        if self._checkpoint is not None:
            write_state(self._state(), self._checkpoint)

    def _state(self) -> dict[str, Any]:
        return {
            "model": self._model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "batches": self._batches.state_dict(),
            "generator": torch.get_rng_state(),
            "step": self._step,
            "seconds": self._seconds,
            "curve": [tuple(point) for point in self.curve],
        }


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Writes a checkpoint so that a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(dict(state), partial)
    partial.replace(path)


def progress_bar(*columns: ProgressColumn) -> Progress:
    """On stderr, if that is a terminal; `columns` come before the time that is left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )


def _optimizers(model: Decoder, config: TrainerConfig) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) turns hidden matrices, AdamW the embedding and the norms."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    chosen = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    muon = torch.optim.Muon(
        [{"params": matrices, "peak_lr": config.matrix_rate}],
        lr=config.matrix_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        [{"params": others, "peak_lr": config.other_rate}],
        lr=config.other_rate,
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    return [muon, adamw]


def _rate_factor(step: int, config: TrainerConfig) -> float:
    """Share of the peak rate for the step with this index, counted from zero."""
    warmup = (step + 1) / (config.num_warmup_steps + 1)
    decay = (config.num_steps - step) / (config.decay_share * config.num_steps)
    return min(warmup, 1.0, decay)
