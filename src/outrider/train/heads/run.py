"""What a run is told by on its way, and what is done once it has learned: scores, files, use."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from outrider.errors import OutriderError
from outrider.train.heads.acceptance import COPY, NGRAM, Scores, score
from outrider.train.heads.by_domain import ByDomain, serve, served_table, served_told
from outrider.train.heads.card import acceptance_table, conditional_table, facts, write_card
from outrider.train.heads.files import add_to_sidecar
from outrider.train.heads.forecast import Forecast, Prices, forecast, measure, told
from outrider.train.heads.incumbent import Incumbent
from outrider.train.heads.material import Report
from outrider.train.heads.memory import peak_memory
from outrider.train.heads.pieces import Piece
from outrider.train.heads.promote import Comparison, Tally, compare, replace_head, tally_of
from outrider.train.heads.roundtrip import RoundTrip, write_checked
from outrider.train.heads.serving import tally_served
from outrider.train.heads.settings import DraftTraining
from outrider.train.heads.student import Student
from outrider.train.heads.teacher import Teacher
from outrider.train.heads.trainer import Finished

DEPTHS_SCORED = 5  # where the kind has no bound of its own
TOKENS_ON_THE_WAY, TOKENS_AT_THE_END = 4096, 32_768
MANY_LOOPS = 0.1


class Outcome(NamedTuple):
    """What a run gave.

    Attributes:
        folder: of the head, ready to be served.
        served: what an engine did with it; None where it was not asked.
        promotion: how it compares with the head in use, if one was named.
    """

    folder: Path
    finished: Finished
    scores: Scores
    forecast: Forecast
    round_trip: RoundTrip
    served: ByDomain | None = None
    promotion: Comparison | None = None


class Run:
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
        """Scores, writes, reads back, serves, and compares with the head in use."""
        settings, teacher, student = self._settings, self._teacher, self._student
        if finished.is_plateau:
            self._report(f"stopped after {finished.num_steps} steps: nothing improves any more")
        memory = peak_memory(teacher.spec.device)
        scores = self._scored(self._student, self._num_depths)
        guess = self._forecast(scores)
        about = facts(
            settings,
            finished,
            scores,
            num_parameters=student.num_parameters,
            peak_memory_bytes=memory,
        )
        trip = write_checked(student, teacher, settings.out, layout, about, self._held_out)
        sentence = told(guess, settings.concurrency)
        card = partial(
            write_card,
            settings.out,
            settings,
            finished,
            scores,
            facts=[
                ("parameters", f"{student.num_parameters:,}"),
                ("tokens it can say", num_said(student, teacher)),
                ("peak memory", _told_memory(memory, teacher.spec.device)),
                ("layout", layout),
                ("after writing", trip.told()),
            ],
            notes=[f"On the machine that trained it: {sentence}."],
        )
        card()
        for line in (acceptance_table(scores), conditional_table(scores), sentence, trip.told()):
            self._report(line)
        self._report(f"wrote {settings.out}{_loops(scores)}")
        found = self._in_engine()
        if found is not None:
            card(served=found)
            add_to_sidecar(settings.out, "served", found.to_json())
            self._report(f"{served_table(found)}\n{served_told(found)}")
        promotion = None if self._in_use is None else self._promote(self._in_use)
        return Outcome(settings.out, finished, scores, guess, trip, found, promotion)

    def _in_engine(self) -> ByDomain | None:
        """None where it was not asked for, or cannot be: the head is written all the same."""
        settings = self._settings
        if not settings.served_prompts:
            return None
        try:
            return serve(
                settings.target,
                settings.out,
                self._held_out,
                num_draft_tokens=self._num_depths,
                num_prompts=settings.served_prompts,
                seed=settings.seed,
                device=settings.device,
                dtype=settings.dtype,
            )
        except OutriderError as error:
            self._report(f"CAUTION: no engine serves it as it is: {error}")
            return None

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


def num_said(student: Student, teacher: Teacher) -> str:
    """Of the target's tokens."""
    count = teacher.target.vocab_size if student.ids_D is None else len(student.ids_D)
    return f"{count:,} of {teacher.target.vocab_size:,}"


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


def _told_memory(num_bytes: int | None, device: torch.device) -> str:
    if num_bytes is None:
        return "not counted on this system"
    what = (
        "tensors on the GPU"
        if device.type == "cuda"
        else "the whole process since it began, target included"
    )
    return f"{num_bytes / 2**30:.2f} GiB ({what})"


def _loops(scores: Scores) -> str:
    if scores.loop_share <= MANY_LOOPS:
        return ""
    return f"; CAUTION: {scores.loop_share:.0%} of the text repeats itself, where any draft stands"
