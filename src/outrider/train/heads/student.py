"""Student: what every kind of draft offers the trainer, the evaluation and the export.

Shape legend: N rows of a batch, R rows, D width of a state, Vd draft vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from outrider.train.heads.pieces import Packed, Piece
from outrider.train.heads.settings import DraftTraining
from outrider.train.heads.teacher import Taught, Teacher
from outrider.train.heads.texts import Text


class Student(nn.Module, ABC):
    """Something that guesses what the target will say. Its parameters are what is learned.

    Row t guesses at depth k the token at t + lead + 1 + k, given the text up to there; it learns
    the target's law at position t + lead + k.

    Attributes:
        kind: as in `kinds.KINDS`. layouts: how it may be written, the usual one first.
        lead: tokens that a row knows beyond its own position: 1 for heads, which are given the
            next token, 0 for a decoder.
        boundaries: of the target's states that it reads.
        depths: that are trained. max_depth: deepest guess; None is any.
        ids_D: the target's tokens that it can say, rising; None is all.
    """

    kind: ClassVar[str]
    layouts: ClassVar[tuple[str, ...]]
    lead: ClassVar[int]
    has_draft_vocabulary: ClassVar[bool] = True
    boundaries: tuple[int, ...]
    depths: int
    max_depth: int | None
    ids_D: Tensor | None
    _teacher: Teacher

    @classmethod
    @abstractmethod
    def fresh(cls, teacher: Teacher, settings: DraftTraining, ids_D: Tensor | None) -> Self:
        """An untrained one. ConfigError where the settings do not fit the target."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, teacher: Teacher) -> Self:
        """One that was written, by us or by others, run as its files say.

        Raises:
            ConfigError, ModelError, PairError: it cannot be read, or is not for this target.
        """

    @abstractmethod
    def states(self, batch: Packed, taught: Taught, num_depths: int) -> Iterator[Tensor]:
        """Per depth states_ND of all rows, of which `logits` makes the guess."""

    @abstractmethod
    def logits(self, depth: int, states_RD: Tensor) -> Tensor:
        """float32 logits over the draft vocabulary."""

    @abstractmethod
    def num_passes(self, depth: int) -> int:
        """Passes one after the other that a draft so deep takes."""

    @abstractmethod
    def write(
        self, folder: Path, layout: str, about: Mapping[str, Any], dtype: torch.dtype
    ) -> None:
        """Writes config and weights so that the engine, and others, read them.

        Args:
            about: facts for the sidecar, beside the conventions.
        """

    def serving_pass(self, num_sequences: int) -> Callable[[], object]:
        """One of the passes that drafting takes, for timing; as the engine runs it, if we know.

        Here it is the trainer's own, without context.
        """
        text = Text("", [0, 0], [True, True], 1)
        batch = Packed([Piece(text, "", "")] * num_sequences, self._teacher.spec.device)
        taught = self._teacher.teach(batch, self.boundaries)

        def run() -> Tensor:
            states_ND = next(iter(self.states(batch, taught, 1)))
            return self.logits(0, states_ND[:num_sequences])

        return run

    @property
    def num_parameters(self) -> int:
        """That are learned."""
        return sum(weight.numel() for weight in self.parameters() if weight.requires_grad)

    def keep_ids(self, ids_D: Tensor | None) -> None:
        """Remembers the draft vocabulary; it moves with the weights and is not saved with them."""
        self.register_buffer("ids_D", ids_D, persistent=False)


@torch.no_grad()
def reset(student: nn.Module, seed: int) -> None:
    """Normal matrices of deviation 1 / sqrt(inputs); half of it where the residual is added to."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in student.named_parameters():
        if weight.dim() == 2:
            deviation = weight.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                deviation *= 0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)
        elif name.endswith("bias"):
            weight.zero_()
