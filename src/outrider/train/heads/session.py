"""One whole run: target, data, training, evaluation, export, and perhaps promotion."""

import hashlib
import logging
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError, unknown
from outrider.models.hub import SHIPPED, resolve
from outrider.train.folders import check_apart, check_folder
from outrider.train.heads.incumbent import Incumbent, load_incumbent
from outrider.train.heads.kinds import find_kind
from outrider.train.heads.losses import find_loss
from outrider.train.heads.material import Report, device_of, gather, vocabulary_of
from outrider.train.heads.memory import forget_peak
from outrider.train.heads.objective import Objective
from outrider.train.heads.pieces import PieceBatches, Split
from outrider.train.heads.promote import check_in_use, check_out
from outrider.train.heads.run import Outcome, Run, num_said
from outrider.train.heads.settings import DraftTraining
from outrider.train.heads.student import Student
from outrider.train.heads.teacher import Teacher
from outrider.train.heads.trainer import HeadTrainer, LoopConfig

logger = logging.getLogger(__name__)

CHECKPOINT = "trainer.pt"
NUM_EVALUATIONS = 10


def train_draft(settings: DraftTraining, report: Report = logger.info) -> Outcome:
    """Trains a draft and writes it to `settings.out`, with a card.

    Args:
        report: told, line by line, what a user wants to see.

    Raises:
        ConfigError, ModelError, TokenizerError: with the value at fault and what to do.
    """
    kind, loss = find_kind(settings.kind), find_loss(settings.loss)
    layout = _layout(settings, kind)
    _check_places(settings)
    teacher = Teacher.load(settings.target, device=device_of(settings), dtype=settings.dtype)
    in_use = None if settings.promote is None else _in_use(settings, settings.promote, teacher)
    data, tokenizer = gather(settings, teacher, report)
    student = kind.fresh(teacher, settings, vocabulary_of(settings, kind, teacher, tokenizer, data))
    student = student.to(teacher.spec.device)
    report(_begin(settings, teacher, student, data))
    run = Run(settings, teacher, student, in_use, data.held_out, report)
    trainer = HeadTrainer(
        student,
        teacher,
        Objective(teacher, loss),
        PieceBatches(data.training, tokens_per_step=settings.tokens_per_step, seed=settings.seed),
        _loop(settings, teacher),
        evaluate=run.look,
        checkpoint=settings.work / CHECKPOINT,
        settings=_identity(settings, teacher, student),
    )
    if settings.resume and trainer.resume():
        report("resumed from the last checkpoint")
    forget_peak(teacher.spec.device)
    return run.finish(trainer.run(), layout)


def _check_places(settings: DraftTraining) -> None:
    """ConfigError if writing to `out` would fail, or cost what is there; told before any work."""
    if settings.promote is not None:
        check_in_use(settings.promote)
        check_out(settings.promote, settings.out)
    check_folder(settings.work)
    if settings.target in SHIPPED or Path(settings.target).expanduser().is_dir():
        check_apart(settings.out, resolve(settings.target), "target")


def _in_use(settings: DraftTraining, folder: Path, teacher: Teacher) -> Incumbent:
    return load_incumbent(folder, teacher, device=settings.device, dtype=settings.dtype)


def _loop(settings: DraftTraining, teacher: Teacher) -> LoopConfig:
    return LoopConfig(
        num_steps=settings.steps,
        rate=settings.peak_rate(teacher.target.hidden_size),
        steps_per_evaluation=max(1, settings.steps // NUM_EVALUATIONS),
        patience=settings.patience,
    )


def _identity(settings: DraftTraining, teacher: Teacher, student: Student) -> dict[str, Any]:
    """What a checkpoint must agree with; the number of steps may be another."""
    ids_D = student.ids_D
    said = "all" if ids_D is None else hashlib.sha256(repr(ids_D.tolist()).encode()).hexdigest()
    return {
        "target": teacher.spec.fingerprint,
        "loss": settings.loss,
        "rate": settings.peak_rate(teacher.target.hidden_size),
        "depths": student.depths,
        "num_layers": settings.num_layers,
        "feature_layers": list(student.boundaries),
        "draft vocabulary": said[:16],
    }


def _layout(settings: DraftTraining, kind: type[Student]) -> str:
    if settings.layout is None:
        return kind.layouts[0]
    if settings.layout not in kind.layouts:
        raise ConfigError(
            unknown(f"layout of kind {settings.kind!r}", settings.layout, list(kind.layouts))
        )
    return settings.layout


def _begin(settings: DraftTraining, teacher: Teacher, student: Student, data: Split) -> str:
    counts = [sum(len(piece.text.tokens) for piece in part) for part in data]
    share = student.num_parameters / teacher.spec.num_parameters
    return (
        f"{settings.kind} for {settings.target}: {student.num_parameters / 1e6:.2f}M parameters "
        f"({share:.0%} of the target), {num_said(student, teacher)} tokens to say; "
        f"{counts[0]:,} tokens of text to learn from, {counts[1]:,} held out"
    )
