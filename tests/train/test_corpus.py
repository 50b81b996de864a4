"""Sources become documents, and held-out documents are never among the training ones."""

import json
from pathlib import Path

import pytest

from outrider.train.corpus import DOMAINS, SOURCES, Corpus, read_corpus


@pytest.fixture(scope="module")
def library_corpus() -> Corpus:
    return read_corpus()


@pytest.fixture(scope="module")
def full_corpus(data_folder: Path) -> Corpus:
    return read_corpus(data_folder)


def test_standard_library_is_enough(library_corpus: Corpus) -> None:
    (code,) = library_corpus.domains
    assert code.name == "code"
    assert sum(len(document.text) for document in code.training) > 1_000_000
    assert [source.name for source in library_corpus.sources] == ["Python standard library"]


def test_build_records_of_this_machine_are_left_out(library_corpus: Corpus) -> None:
    names = [document.name for document in library_corpus.domains[0].training]
    assert not [name for name in names if "_sysconfigdata" in name or "site-packages" in name]


def test_held_out_documents_are_disjoint(library_corpus: Corpus) -> None:
    (code,) = library_corpus.domains
    assert len(code.held_out) >= 4
    assert not {d.text for d in code.held_out} & {d.text for d in code.training}


def test_split_is_deterministic(library_corpus: Corpus) -> None:
    assert read_corpus().domains[0].held_out == library_corpus.domains[0].held_out


def test_math_loses_calculator_marks(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    rows = [{"question": f"{i}+1?", "answer": f"<<{i}+1={i + 1}>>{i + 1}"} for i in range(9)]
    text = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "prompts/gsm8k_train.jsonl").write_text(text)
    math = next(domain for domain in read_corpus(tmp_path).domains if domain.name == "math")
    texts = {document.text for document in math.training + math.held_out}
    assert texts == {f"<|user|>\n{i}+1?<|end|>\n<|assistant|>\n{i + 1}" for i in range(9)}
    assert len(math.held_out) == 4


def test_folder_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gsm8k_train\.jsonl"):
        read_corpus(tmp_path)


def test_every_source_states_its_terms() -> None:
    assert all(source.licence and source.attribution for source in SOURCES)
    assert {source.domain for source in SOURCES} == set(DOMAINS)


def test_shared_folder_fills_all_domains(full_corpus: Corpus) -> None:
    assert [domain.name for domain in full_corpus.domains] == list(DOMAINS)
    for domain in full_corpus.domains:
        assert len(domain.held_out) >= 4
        assert not {d.text for d in domain.held_out} & {d.text for d in domain.training}


def test_separators_of_shared_files_are_gone(full_corpus: Corpus) -> None:
    by_name = {domain.name: domain.training for domain in full_corpus.domains}
    assert not [d.name for d in by_name["books"] if "<<<" in d.text]
    assert not [d.name for d in by_name["code"] if "\n# <<<" in d.text]
    assert sum(d.name.startswith("PEP: ") for d in by_name["docs"]) > 700
    assert all(d.text.startswith("<|") for d in by_name["dialogue"])
