"""The draft in use, which a new one has to beat: any that an engine runs with this target."""

from pathlib import Path
from typing import Any, NamedTuple

from outrider.engine.heads import is_head
from outrider.errors import ConfigError
from outrider.models.heads.load import load_head
from outrider.models.heads.spec import HeadSpec
from outrider.train.heads.kinds import load_student
from outrider.train.heads.serving import drafting
from outrider.train.heads.student import Student
from outrider.train.heads.teacher import Teacher


class Incumbent(NamedTuple):
    """A draft in use.

    Attributes:
        student: the same for the trainer; None where only the engine runs it.
        max_depth: deepest guess; None is any.
    """

    folder: Path
    student: Student | None
    max_depth: int | None


def load_incumbent(folder: Path, teacher: Teacher, **options: Any) -> Incumbent:
    """What lies in a folder; what only the engine runs is tried in one.

    Args:
        options: for `LLM` (device, dtype ...).

    Raises:
        ConfigError, ModelError, PairError: no engine runs it with this target, or it is the target.
    """
    target = teacher.target.folder
    if target is not None and target.samefile(folder):
        raise ConfigError(
            f"promote={str(folder)!r} is the target itself, which a new head must not replace: "
            "name the folder of a draft"
        )
    try:
        student = load_student(folder, teacher)
    except ConfigError:
        drafting(teacher.target.name, folder, **options)
        spec = load_head(folder, teacher.target).spec if is_head(str(folder)) else None
        return Incumbent(folder, None, None if spec is None else _deepest(spec))
    return Incumbent(folder, student, student.max_depth)


def _deepest(spec: HeadSpec) -> int | None:
    if spec.medusa is not None:
        return spec.medusa.num_heads
    if spec.block_size is not None:
        return spec.block_size - (not spec.conventions.sample_from_anchor)
    return None
