"""One tiny target, its texts, and heads trained on it, for all tests of the doctor."""

from collections.abc import Callable
from pathlib import Path

import pytest

from outrider.doctor.texts import Written, write_texts
from outrider.engine.llm import LLM
from outrider.models.heads.spec import Conventions
from tests.doctor.training import (
    TRUTH,
    Lesson,
    Tensors,
    make_lesson,
    open_target,
    prompts,
    train,
    write_head,
    write_target,
)

WriteHead = Callable[[Path, str, Conventions], Path]


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def llm(target: Path) -> LLM:
    return open_target(target)


@pytest.fixture(scope="session")
def lesson(llm: LLM, target: Path) -> Lesson:
    return make_lesson(llm, target)


@pytest.fixture(scope="session")
def written(llm: LLM) -> Written:
    return write_texts(llm, prompts(), num_positions=2 * len(prompts()) * 22)


@pytest.fixture(scope="session")
def trained(lesson: Lesson) -> Callable[[str], Tensors]:
    """A head's tensors; each family is trained once."""
    held: dict[str, Tensors] = {}

    def get(family: str) -> Tensors:
        if family not in held:
            held[family] = train(family, TRUTH[family], lesson)
        return held[family]

    return get


@pytest.fixture(scope="session")
def write(trained: Callable[[str], Tensors], target: Path) -> WriteHead:
    """Writes a trained head that declares these conventions."""

    def write_one(folder: Path, family: str, declared: Conventions) -> Path:
        return write_head(folder, family, trained(family), declared, target)

    return write_one
