"""The kinds of drafts that can be trained, by name, imported when used."""

from importlib import import_module
from pathlib import Path

from outrider.errors import ConfigError, unknown
from outrider.models.checkpoint import read_config
from outrider.models.heads.detect import detect
from outrider.models.heads.files import HeadFiles
from outrider.models.heads.spec import Family
from outrider.train.heads.student import Student
from outrider.train.heads.teacher import Teacher

KINDS = {
    "medusa": "outrider.train.heads.medusa:Medusa",
    "eagle3": "outrider.train.heads.eagle3:Eagle3",
    "kv": "outrider.train.heads.kv:KVHead",
    "draft_model": "outrider.train.heads.small:Small",
}
OF_FAMILY = {
    Family.MEDUSA: "medusa",
    Family.EAGLE3: "eagle3",
    Family.KV: "kv",
    Family.DRAFT_MODEL: "draft_model",
}


def find_kind(name: str) -> type[Student]:
    """The class of a kind. ConfigError if there is none such in this version."""
    if name not in KINDS:
        raise ConfigError(unknown("kind of draft", name, list(KINDS)))
    module, _, attribute = KINDS[name].partition(":")
    try:
        found: type[Student] = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ConfigError(f"kind {name!r} cannot be trained in this version") from None
    return found


def load_student(folder: Path, teacher: Teacher) -> Student:
    """Whatever draft of a kind that can be trained lies in a folder.

    Raises:
        ConfigError, ModelError, PairError: there is none, or it is not for this target.
    """
    family = detect(read_config(folder), HeadFiles(folder).shapes)
    if family not in OF_FAMILY:
        raise ConfigError(
            f"{str(folder)!r} is of the family {family}, which the trainer does not run "
            f"(it runs {', '.join(OF_FAMILY.values())})"
        )
    return find_kind(OF_FAMILY[family]).load(folder, teacher).to(teacher.spec.device)
