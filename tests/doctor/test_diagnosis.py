"""The doctor finds each wrong declaration of a trained head, and is silent on the right one."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.doctor.advice import advice
from outrider.doctor.diagnosis import Diagnosis, diagnose_head, to_json
from outrider.doctor.pinning import write_pins
from outrider.doctor.subject import read_subject
from outrider.doctor.texts import Written
from outrider.engine.llm import LLM
from outrider.errors import ConfigError, ModelError, PairError
from outrider.models.heads.spec import Conventions
from tests.doctor.conftest import WriteHead
from tests.doctor.training import (
    BOUNDARIES,
    IDS,
    TRUTH,
    Lesson,
    Tensors,
    V,
    fresh,
    train,
    write_head,
    write_target,
)
from tests.models.heads.layouts import write as write_files

# family, and what its files wrongly declare
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("eagle", {"input_state": "raw"}),
    ("eagle", {"concatenation": "feature-first"}),
    ("eagle3", {"feature_layers": (0, 2, 4)}),
    ("eagle3", {"feature_layers": BOUNDARIES[::-1]}),
    ("eagle3", {"norm_before_residual": False}),
    ("mtp", {"feedback": "pre-norm"}),
    ("block", {"block_masks": ("causal",)}),
    ("block", {"sample_from_anchor": True}),
    ("block", {"rope_style": "interleaved"}),
    ("medusa", {"input_state": "raw"}),
]
WRONG_TOO: list[tuple[str, dict[str, Any]]] = [
    ("mtp", {"concatenation": "feature-first"}),
    ("block", {"feature_layers": (3, 5)}),
    ("block", {"feature_layers": (1, 3)}),
    ("block", {"feature_layers": (4, 2)}),
    ("eagle3", {"rope_style": "interleaved"}),
]


def cases() -> list[Any]:
    """Of each convention one that is quickly told, and others."""
    marked = [(case, ()) for case in WRONG] + [(case, pytest.mark.slow) for case in WRONG_TOO]
    return [
        pytest.param(family, declared, id=f"{family}-{name}={value}", marks=marks)
        for (family, declared), marks in marked
        for name, value in declared.items()
    ]


@pytest.fixture
def diagnose(llm: LLM, target: Path, written: Written) -> Callable[[Path], Diagnosis]:
    def run(folder: Path) -> Diagnosis:
        subject = read_subject(str(folder), str(target))
        return diagnose_head(subject, llm.engine.runner.network, written)

    return run


@pytest.mark.parametrize("family", TRUTH)
def test_it_is_silent_on_the_right_one(
    family: str, tmp_path: Path, write: WriteHead, diagnose: Callable[[Path], Diagnosis]
) -> None:
    found = diagnose(write(tmp_path, family, TRUTH[family]))
    assert found.findings is not None
    assert found.findings.declared.conventions == TRUTH[family]
    assert len(found.findings.rows) > 2
    assert found.winner is None
    assert found.score is not None
    assert found.score.value > 0.4
    assert any("stand" in line for line in advice(found))


@pytest.mark.parametrize(("family", "declared"), cases())
def test_it_finds_what_is_wrong(
    family: str,
    declared: dict[str, Any],
    tmp_path: Path,
    write: WriteHead,
    diagnose: Callable[[Path], Diagnosis],
) -> None:
    found = diagnose(write(tmp_path, family, replace(TRUTH[family], **declared)))
    assert found.findings is not None
    assert found.findings.declared.conventions == replace(TRUTH[family], **declared)
    assert found.winner is not None
    assert found.winner.conventions == TRUTH[family]
    assert found.winner.changes == {name: getattr(TRUTH[family], name) for name in declared}
    assert found.winner.difference is not None
    assert found.winner.difference.low > 0.0
    (name,) = declared
    assert any(name in line and "--pin" in line for line in advice(found))


def test_it_finds_two_at_once(
    tmp_path: Path, write: WriteHead, diagnose: Callable[[Path], Diagnosis]
) -> None:
    wrong = {"feature_layers": BOUNDARIES[::-1], "norm_before_residual": False}
    found = diagnose(write(tmp_path, "eagle3", replace(TRUTH["eagle3"], **wrong)))
    assert found.winner is not None
    assert found.winner.conventions == TRUTH["eagle3"]
    assert found.findings is not None
    assert len(found.findings.rows) <= 32


@pytest.mark.slow
def test_layers_off_by_one_and_in_reverse(
    tmp_path: Path, write: WriteHead, diagnose: Callable[[Path], Diagnosis]
) -> None:
    found = diagnose(write(tmp_path, "block", replace(TRUTH["block"], feature_layers=(5, 3))))
    assert found.winner is not None
    assert found.winner.conventions.feature_layers == (2, 4)


def test_a_map_that_cannot_be_read_as_declared(
    tmp_path: Path,
    trained: Callable[[str], Tensors],
    diagnose: Callable[[Path], Diagnosis],
    target: Path,
) -> None:
    folder = write_head(tmp_path, "eagle3", trained("eagle3"), TRUTH["eagle3"], target)
    config = json.loads((folder / "config.json").read_text())
    write_files(folder, config, trained("eagle3") | {"d2t": torch.tensor(IDS)})
    found = diagnose(folder)
    assert found.findings is not None
    assert "d2t" in found.findings.declared.refusal
    assert found.winner is not None
    assert found.winner.name == "vocabulary_map=absolute"
    told = advice(found)
    assert "cannot be read as declared" in told[0]
    subject = read_subject(str(folder), str(target))
    pins = subject.pins_for(found.winner.conventions)
    assert pins == {"vocabulary_map": "absolute"}
    write_pins(folder, pins)
    assert diagnose(folder).winner is None


@pytest.mark.slow
def test_a_map_that_can_be_read_both_ways(
    tmp_path: Path, lesson: Lesson, diagnose: Callable[[Path], Diagnosis], target: Path
) -> None:
    """Of every second token: offsets 0, 1, 2 ... are tokens, too."""
    evens, truth = tuple(range(0, V, 2)), TRUTH["eagle3"]
    tensors = train("eagle3", truth, lesson, ids=evens)
    wrong = replace(truth, vocabulary_map="absolute")
    found = diagnose(write_head(tmp_path, "eagle3", tensors, wrong, target, ids=evens))
    assert found.winner is not None
    assert found.winner.changes == {"vocabulary_map": "offset"}


def test_pins_are_obeyed_and_other_sections_stay(
    tmp_path: Path, write: WriteHead, diagnose: Callable[[Path], Diagnosis], target: Path
) -> None:
    wrong = replace(TRUTH["eagle"], input_state="raw", rope_origin="target")
    folder = write(tmp_path, "eagle", wrong)
    side = folder / "outrider.json"
    side.write_text(json.dumps({**json.loads(side.read_text()), "written_by": "a test"}))
    found = diagnose(folder)
    assert any("rope_origin" in note for note in found.notes)
    assert found.winner is not None
    subject = read_subject(str(folder), str(target))
    path = write_pins(folder, subject.pins_for(found.winner.conventions))
    held = json.loads(path.read_text())
    assert held["written_by"] == "a test"
    assert held["conventions"]["input_state"] == "normed"
    again = diagnose(folder)
    assert again.winner is None
    assert again.findings is not None
    assert again.findings.declared.conventions == found.winner.conventions


def test_tuples_are_pinned_as_lists(tmp_path: Path, write: WriteHead, target: Path) -> None:
    folder = write(tmp_path, "block", TRUTH["block"])
    subject = read_subject(str(folder), str(target))
    other = replace(subject.declared, feature_layers=(1, 3), block_masks=("causal",))
    write_pins(folder, subject.pins_for(other))
    assert read_subject(str(folder), str(target)).declared == other


def test_pins_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "outrider.json").write_text("[]")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        write_pins(tmp_path, {"feedback": "pre-norm"})
    with pytest.raises(ConfigError, match="into a folder of yours"):
        write_pins(tmp_path / "nowhere", {"feedback": "pre-norm"})


@pytest.mark.slow
def test_runs_are_limited_and_hopeless_ones_end_early(
    tmp_path: Path, write: WriteHead, llm: LLM, target: Path, written: Written
) -> None:
    subject = read_subject(str(write(tmp_path, "eagle3", TRUTH["eagle3"])), str(target))
    network = llm.engine.runner.network
    found = diagnose_head(subject, network, written, most_runs=4).findings
    assert found is not None
    assert len(found.rows) == 4
    whole = diagnose_head(subject, network, written).findings
    assert whole is not None
    cut = [row for row in whole.rows if row.is_cut]
    assert "lm_head=target" in [row.name for row in cut]
    assert all(row.difference and row.difference.high < 0.0 for row in cut)


def test_an_untrained_head_is_told_of(
    tmp_path: Path, lesson: Lesson, diagnose: Callable[[Path], Diagnosis], target: Path
) -> None:
    tensors = fresh("eagle", lesson)
    found = diagnose(write_head(tmp_path, "eagle", tensors, TRUTH["eagle"], target))
    told = " ".join(advice(found))
    assert "fits better" in told
    assert "no setting explains" in told


def test_another_targets_head_is_refused(tmp_path: Path, write: WriteHead) -> None:
    other = write_target(tmp_path / "other", hidden_size=64)
    folder = write(tmp_path / "head", "eagle3", TRUTH["eagle3"])
    with pytest.raises(PairError, match="another model"):
        read_subject(str(folder), str(other))


def test_what_is_neither_head_nor_model_is_refused(tmp_path: Path, target: Path) -> None:
    write_files(tmp_path / "strange", {}, {"a.weight": torch.ones(3)})
    with pytest.raises((ConfigError, ModelError)):
        read_subject(str(tmp_path / "strange"), str(target))


def test_the_result_as_json(
    tmp_path: Path, write: WriteHead, diagnose: Callable[[Path], Diagnosis]
) -> None:
    found = diagnose(write(tmp_path, "medusa", replace(TRUTH["medusa"], input_state="raw")))
    held = json.loads(json.dumps(to_json(found)))
    assert held["changes"] == {"input_state": "normed"}
    assert held["rows"][0]["name"] == "as declared"
    assert held["rows"][0]["difference"] is None or held["rows"][0]["difference"] == 0.0
    best = next(row for row in held["rows"] if row["name"] == held["winner"])
    assert best["interval"][0] > 0.0
    assert best["is_clear"]
    assert {one["kind"] for one in held["outlook"]} == {"sampled", "greedy"}
    assert held["baselines"]["the last token again"]["value"] > 0.0


def test_conventions_of_the_truth_are_the_readers(
    tmp_path: Path, write: WriteHead, target: Path
) -> None:
    """What tests call the truth is what the loader reads of it."""
    for family, chosen in TRUTH.items():
        subject = read_subject(str(write(tmp_path / family, family, chosen)), str(target))
        assert isinstance(subject.declared, Conventions)
        assert subject.declared == chosen
        assert not subject.refusal
