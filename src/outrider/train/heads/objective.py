"""What is minimised: at every depth the distance from the target's law where that depth guesses.

Shape legend: N rows of a batch, R rows of a depth, D tokens of the draft vocabulary.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from outrider.train.heads.losses import Loss
from outrider.train.heads.pieces import Packed
from outrider.train.heads.student import Student
from outrider.train.heads.teacher import Taught, Teacher

DEPTH_WEIGHT = 0.8  # of each depth beside the one before
LOSS_ROWS = 512  # rows whose laws are held at a time, where not all can be
HELD_VALUES = 1 << 25  # of one depth, that may be held for the backward pass


class Objective:
    """sum over depths k of 0.8^k times the mean loss of the rows that guess there.

    p is restricted to the draft vocabulary and made to sum to one again; rows whose likeliest token
    lies outside of it teach nothing.
    """

    def __init__(self, teacher: Teacher, loss: Loss) -> None:
        self._teacher = teacher
        self._loss = loss

    def __call__(self, student: Student, batch: Packed, taught: Taught) -> Tensor:
        target_ND, likeliest_N = self._teacher.laws_on(taught.final_NH, student.ids_D)
        is_known_N = _is_known(likeliest_N, student.ids_D)
        total = torch.zeros((), device=batch.device)
        for depth, states_ND in enumerate(student.states(batch, taught, student.depths)):
            rows_R = batch.rows(student.lead, depth)
            laws_R = rows_R + student.lead + depth
            is_taught_R = is_known_N[laws_R]
            rows_R, laws_R = rows_R[is_taught_R], laws_R[is_taught_R]
            if len(rows_R):
                lost = self._sum(student, depth, states_ND[rows_R], target_ND, laws_R)
                total = total + DEPTH_WEIGHT**depth * lost / len(rows_R)
        return total

    def _sum(
        self, student: Student, depth: int, states_RD: Tensor, target_ND: Tensor, laws_R: Tensor
    ) -> Tensor:
        """If they are many, few at a time; their logits are computed again for the gradient."""
        if len(states_RD) * target_ND.shape[1] <= HELD_VALUES:
            return self._chunk(student, depth, states_RD, target_ND[laws_R])
        parts = [
            checkpoint(
                self._chunk,
                student,
                depth,
                rows,
                target_ND[laws],
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for rows, laws in zip(states_RD.split(LOSS_ROWS), laws_R.split(LOSS_ROWS), strict=True)
        ]
        return torch.stack(parts).sum()

    def _chunk(self, student: Student, depth: int, states_RD: Tensor, target_RD: Tensor) -> Tensor:
        log_q_RD = student.logits(depth, states_RD).log_softmax(-1)
        return self._loss(target_RD.log_softmax(-1), log_q_RD).sum()


def _is_known(likeliest_N: Tensor, ids_D: Tensor | None) -> Tensor:
    if ids_D is None:
        return torch.ones_like(likeliest_N, dtype=torch.bool)
    return torch.isin(likeliest_N, ids_D)
