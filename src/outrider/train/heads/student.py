"""Student: what every kind of draft offers the trainer, the evaluation and the export.

Shape legend: N rows of a batch, R rows, D width of a state, Vd draft vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from outrider.models.heads.spec import Head, HeadSpec
from outrider.train.heads.pieces import Packed
from outrider.train.heads.settings import DraftTraining
from outrider.train.heads.teacher import Taught, Teacher


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
    def serving_pass(self, num_sequences: int) -> Callable[[], object]:
        """One of the passes that drafting takes, as the engine runs it, for timing."""

    @abstractmethod
    def write(
        self, folder: Path, layout: str, about: Mapping[str, Any], dtype: torch.dtype
    ) -> None:
        """Writes config and weights so that the engine, and others, read them.

        Args:
            about: facts for the sidecar, beside the conventions.
        """

    @property
    def num_parameters(self) -> int:
        """That are learned."""
        return sum(weight.numel() for weight in self.parameters() if weight.requires_grad)

    def keep_ids(self, ids_D: Tensor | None) -> None:
        """Remembers the draft vocabulary; it moves with the weights and is not saved with them."""
        self.register_buffer("ids_D", ids_D, persistent=False)


class HeadStudent(Student):
    """One that is a head: its parameters have the canonical names of tensors.

    Attributes:
        spec: as it would be read from its files.
    """

    spec: HeadSpec

    def head(self) -> Head:
        """As it would be loaded."""
        tensors = {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}
        if self.ids_D is not None:
            tensors["target_ids"] = self.ids_D
        return Head(self.spec, tensors)


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
