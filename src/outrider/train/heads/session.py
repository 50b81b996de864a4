"""One whole run: target, data, training, evaluation, export, and perhaps promotion."""

import hashlib
import logging
from pathlib import Path
from typing import Any, NamedTuple

from outrider.errors import ConfigError, unknown
from outrider.train.heads.acceptance import COPY, NGRAM, Scores, score
from outrider.train.heads.card import acceptance_table, conditional_table, facts, write_card
from outrider.train.heads.forecast import Forecast, Prices, forecast, measure, told
from outrider.train.heads.incumbent import Incumbent, load_incumbent
from outrider.train.heads.kinds import find_kind
from outrider.train.heads.losses import find_loss
from outrider.train.heads.material import Report, device_of, gather, vocabulary_of
from outrider.train.heads.objective import Objective
from outrider.train.heads.pieces import Piece, PieceBatches, Split
from outrider.train.heads.promote import (
    Comparison,
    Tally,
    check_in_use,
    compare,
    replace_head,
    tally_of,
)
from outrider.train.heads.roundtrip import RoundTrip, write_checked
from outrider.train.heads.serving import tally_served
from outrider.train.heads.settings import DraftTraining
from outrider.train.heads.student import Student
from outrider.train.heads.teacher import Teacher
from outrider.train.heads.trainer import Finished, HeadTrainer, LoopConfig

logger = logging.getLogger(__name__)

CHECKPOINT = "trainer.pt"
NUM_EVALUATIONS = 10
DEPTHS_SCORED = 5  # where the kind has no bound of its own
TOKENS_ON_THE_WAY, TOKENS_AT_THE_END = 4096, 32_768
MANY_LOOPS = 0.1


class Outcome(NamedTuple):
    """What a run gave.

    Attributes:
        folder: of the head, ready to be served.
        promotion: how it compares with the head in use, if one was named.
    """

    folder: Path
    finished: Finished
    scores: Scores
    forecast: Forecast
    round_trip: RoundTrip
    promotion: Comparison | None = None


def train_draft(settings: DraftTraining, report: Report = logger.info) -> Outcome:
    """Trains a draft and writes it to `settings.out`, with a card.

    Args:
        report: told, line by line, what a user wants to see.

    Raises:
        ConfigError, ModelError, TokenizerError: with the value at fault and what to do.
    """
    kind, loss = find_kind(settings.kind), find_loss(settings.loss)
    layout = _layout(settings, kind)
    if settings.promote is not None:
        check_in_use(settings.promote)
    teacher = Teacher.load(settings.target, device=device_of(settings), dtype=settings.dtype)
    in_use = None if settings.promote is None else _in_use(settings, settings.promote, teacher)
    data, tokenizer = gather(settings, teacher, report)
    student = kind.fresh(teacher, settings, vocabulary_of(settings, kind, teacher, tokenizer, data))
    student = student.to(teacher.spec.device)
    report(_begin(settings, teacher, student, data))
    run = _Run(settings, teacher, student, in_use, data.held_out, report)
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
    return run.finish(trainer.run(), layout)


def _in_use(settings: DraftTraining, folder: Path, teacher: Teacher) -> Incumbent:
    return load_incumbent(folder, teacher, device=settings.device, dtype=settings.dtype)


class _Run:
    """What is looked at on the way, and done at the end."""

    def __init__(
        self,
        settings: DraftTraining,
        teacher: Teacher,
        student: Student,
        in_use: Incumbent | None,
        held_out: list[Piece],
        report: Report,
    ) -> None:
        self._settings = settings
        self._teacher = teacher
        self._student = student
        self._in_use = in_use
        self._held_out = held_out
        self._report = report
        self._num_depths = student.max_depth or max(DEPTHS_SCORED, student.depths)
        self._prices: Prices | None = None

    def look(self, step: int) -> float:
        """Scores a part of the held-out text; the acceptance length."""
        scores = self._scored(self._student, self._num_depths, TOKENS_ON_THE_WAY)
        rates = scores.rates()
        conditional = " ".join(f"{rate:.2f}" for rate in rates.conditional)
        baselines = ", ".join(f"{name} {scores.rates(name).length:.2f}" for name in (NGRAM, COPY))
        self._report(
            f"step {step}: acceptance length {rates.length:.2f} drawn, "
            f"{scores.rates(greedy=True).length:.2f} greedy; by depth {conditional} ({baselines}); "
            f"{told(self._forecast(scores), self._settings.concurrency)}{_loops(scores)}"
        )
        return rates.length

    def finish(self, finished: Finished, layout: str) -> Outcome:
        """Scores, writes, reads back, and compares with the head in use."""
        settings, teacher, student = self._settings, self._teacher, self._student
        if finished.is_plateau:
            self._report(f"stopped after {finished.num_steps} steps: nothing improves any more")
        scores = self._scored(self._student, self._num_depths)
        guess = self._forecast(scores)
        about = facts(settings, finished, scores, num_parameters=student.num_parameters)
        trip = write_checked(student, teacher, settings.out, layout, about, self._held_out)
        sentence = told(guess, settings.concurrency)
        write_card(
            settings.out,
            settings,
            finished,
            scores,
            facts=[
                ("parameters", f"{student.num_parameters:,}"),
                ("tokens it can say", _num_said(student, teacher)),
                ("layout", layout),
                ("after writing", trip.told()),
            ],
            notes=[f"On the machine that trained it: {sentence}."],
        )
        for line in (acceptance_table(scores), conditional_table(scores), sentence, trip.told()):
            self._report(line)
        self._report(f"wrote {settings.out}{_loops(scores)}")
        promotion = None if self._in_use is None else self._promote(self._in_use)
        return Outcome(settings.out, finished, scores, guess, trip, promotion)

    def _promote(self, in_use: Incumbent) -> Comparison:
        """Puts the new head in the place of the one in use if it is surely better."""
        found = self._compared(in_use)
        self._report(found.told())
        if found.is_better:
            previous = replace_head(in_use.folder, self._settings.out)
            self._report(f"{in_use.folder} is the new head now; the one before is in {previous}")
        else:
            self._report(f"{in_use.folder} stays as it is")
        return found

    def _compared(self, in_use: Incumbent) -> Comparison:
        """At depths that both have."""
        num_depths = min(self._num_depths, in_use.max_depth or self._num_depths)
        if in_use.student is None:
            self._report(f"the trainer does not run {in_use.folder}: both draft in the engine now")
            folders = (self._settings.out, in_use.folder)
            return compare(*(self._served(folder, num_depths) for folder in folders))
        students = (self._student, in_use.student)
        return compare(*(tally_of(self._scored(student, num_depths)) for student in students))

    def _served(self, folder: Path, num_depths: int) -> Tally:
        settings = self._settings
        return tally_served(
            settings.target,
            folder,
            _first(self._held_out, TOKENS_AT_THE_END),
            num_draft_tokens=num_depths,
            seed=settings.seed,
            device=settings.device,
            dtype=settings.dtype,
        )

    def _scored(
        self, student: Student, num_depths: int, num_tokens: int = TOKENS_AT_THE_END
    ) -> Scores:
        return score(student, self._teacher, _first(self._held_out, num_tokens), num_depths)

    def _forecast(self, scores: Scores) -> Forecast:
        if self._prices is None:  # of passes, which training does not change
            self._prices = measure(
                self._teacher,
                self._student,
                self._num_depths,
                concurrency=self._settings.concurrency,
            )
        return forecast(self._prices, scores.rates())


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


def _first(pieces: list[Piece], num_tokens: int) -> list[Piece]:
    """As many as have so many tokens, spread over the units by their digests."""
    chosen: list[Piece] = []
    room = num_tokens
    for piece in sorted(pieces, key=lambda piece: piece.digest):
        room -= len(piece.text.tokens)
        if chosen and room < 0:
            break
        chosen.append(piece)
    return chosen


def _begin(settings: DraftTraining, teacher: Teacher, student: Student, data: Split) -> str:
    counts = [sum(len(piece.text.tokens) for piece in part) for part in data]
    share = student.num_parameters / teacher.spec.num_parameters
    return (
        f"{settings.kind} for {settings.target}: {student.num_parameters / 1e6:.2f}M parameters "
        f"({share:.0%} of the target), {_num_said(student, teacher)} tokens to say; "
        f"{counts[0]:,} tokens of text to learn from, {counts[1]:,} held out"
    )


def _num_said(student: Student, teacher: Teacher) -> str:
    count = teacher.target.vocab_size if student.ids_D is None else len(student.ids_D)
    return f"{count:,} of {teacher.target.vocab_size:,}"


def _loops(scores: Scores) -> str:
    if scores.loop_share <= MANY_LOOPS:
        return ""
    return f"; CAUTION: {scores.loop_share:.0%} of the text repeats itself, where any draft stands"
