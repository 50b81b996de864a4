"""The round trip: what was written, read again and run, must say what the trainer's head says."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from outrider.errors import ModelError
from outrider.train.heads.kinds import load_student
from outrider.train.heads.pieces import Packed, Piece
from outrider.train.heads.student import Student
from outrider.train.heads.teacher import Teacher

TOLERANCE = {torch.float32: 1e-4}
LOOSE = 0.1  # of the largest logit, where weights are stored in half the bits
CHECKED_TOKENS = 512
STALE = ("config.json", "model.safetensors", "medusa_lm_head.safetensors")  # of another kind


class RoundTrip(NamedTuple):
    """The largest difference of logits, and the largest logit."""

    difference: float
    scale: float

    def told(self) -> str:
        return (
            f"read again, its logits differ by at most {self.difference:.2g} from the trainer's "
            f"(largest logit {self.scale:.3g})"
        )


def write_checked(
    student: Student,
    teacher: Teacher,
    folder: Path,
    layout: str,
    about: dict[str, Any],
    pieces: Sequence[Piece],
) -> RoundTrip:
    """Writes a head where it can be read back; what fails never reaches `folder`.

    Weights are stored in the target's dtype.

    Raises:
        ModelError: the logits of what was written are others.
    """
    dtype = teacher.spec.dtype
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as place:
        made = Path(place) / "head"
        student.write(made, layout, about, dtype)
        trip = compared(student, load_student(made, teacher), teacher, pieces)
        if not trip.difference <= TOLERANCE.get(dtype, LOOSE) * max(trip.scale, 1.0):
            raise ModelError(f"the written head is not the trained one: {trip.told()}")
        for name in STALE:
            (folder / name).unlink(missing_ok=True)
        for path in made.iterdir():
            path.replace(folder / path.name)
    return trip


@torch.no_grad()
def compared(
    student: Student, other: Student, teacher: Teacher, pieces: Sequence[Piece]
) -> RoundTrip:
    """Logits of both at every depth that is trained, on the first tokens of some text."""
    batch = Packed(_few(pieces), teacher.spec.device)
    taught = teacher.teach(batch, sorted({*student.boundaries, *other.boundaries}))
    student.eval()
    depths = student.depths
    difference = scale = 0.0
    both = (model.states(batch, taught, depths) for model in (student, other))
    for depth, (own_ND, read_ND) in enumerate(zip(*both, strict=True)):
        rows_R = batch.rows(student.lead, depth)
        own_RD = student.logits(depth, own_ND[rows_R])
        read_RD = other.logits(depth, read_ND[rows_R])
        if own_RD.shape != read_RD.shape:
            raise ModelError(
                f"the written head has logits {list(read_RD.shape)} for {list(own_RD.shape)}"
            )
        if len(rows_R):
            difference = max(difference, float((own_RD - read_RD).abs().max()))
            scale = max(scale, float(own_RD.abs().max()))
    return RoundTrip(difference, scale)


def _few(pieces: Sequence[Piece]) -> list[Piece]:
    room, chosen = CHECKED_TOKENS, list(pieces[:1])
    for piece in pieces[1:]:
        room -= len(piece.text.tokens)
        if room < 0:
            break
        chosen.append(piece)
    return chosen
