"""The shipped EAGLE-3 head, declared with the other feedback: what that costs, and who finds it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from outrider.doctor.diagnosis import diagnose_head
from outrider.doctor.subject import read_subject
from outrider.doctor.texts import write_texts
from outrider.engine.llm import LLM
from outrider.models.hub import resolve
from outrider.train.heads.serving import Served, measure_served

QUESTIONS = (
    "Write a Python function that merges intervals.",
    "Explain why the sky is blue.",
    "List five uses of a paper clip.",
    "Summarise the rules of chess.",
    "Write a short letter that asks for a refund.",
    "What is 17 times 23? Show your work.",
    "Translate 'good morning' into three languages.",
    "Give me a recipe for lentil soup.",
)
PROMPTS = [[{"role": "user", "content": question}] for question in QUESTIONS]


@pytest.fixture
def declared(tmp_path: Path) -> Callable[[bool], Path]:
    """The head with its feedback declared so, and no pins."""

    def write(is_normed: bool) -> Path:
        folder = tmp_path / str(is_normed)
        shutil.copytree(resolve("demo-eagle3"), folder)
        (folder / "outrider.json").unlink()
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "norm_output": is_normed}))
        return folder

    return write


@pytest.mark.slow
def test_the_doctor_finds_the_feedback(declared: Callable[[bool], Path]) -> None:
    """The first depth has none, so all that is wrong shows from the second on."""
    llm = LLM("demo", draft_model="off", device="cpu")
    written = write_texts(llm, PROMPTS, num_positions=600)
    network = llm.engine.runner.network
    found = diagnose_head(read_subject(str(declared(True)), "demo"), network, written, most_runs=14)
    assert found.winner is not None
    assert found.winner.changes == {"feedback": "pre-norm"}
    assert found.findings is not None
    wrong, right = found.findings.declared.score, found.winner.score
    assert wrong is not None
    assert right is not None
    assert wrong.by_depth[0] == right.by_depth[0]
    for depth in (1, 2):
        assert wrong.by_depth[depth] < 0.7 * right.by_depth[depth]
        assert wrong.matches[depth] < 0.7 * right.matches[depth]
    silent = diagnose_head(
        read_subject(str(declared(False)), "demo"), network, written, most_runs=14
    )
    assert silent.winner is None


@pytest.mark.slow
def test_served_with_the_other_feedback_deep_drafts_fall(declared: Callable[[bool], Path]) -> None:
    """Whatever was drafted above: given that it stood, fewer of the next stand."""

    def rates(is_normed: bool) -> tuple[float, float]:
        first, second, _ = served(declared(is_normed)).joint
        return first, second / first

    right, wrong = rates(False), rates(True)
    assert wrong[0] == pytest.approx(right[0], abs=0.05)
    assert wrong[1] < 0.7 * right[1]


def served(folder: Path) -> Served:
    return measure_served(
        "demo",
        folder,
        PROMPTS,
        num_draft_tokens=3,
        max_tokens=96,
        temperature=1.0,
        seed=3,
        device="cpu",
    )
