"""The whole recipe in small: two folders with weights, tokenizer and card; then a resume."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from outrider.train import demo
from outrider.train.corpus import Corpus, Domain, read_corpus
from outrider.train.evaluate import EvaluationConfig

FEW = EvaluationConfig(
    window=32, max_windows=2, num_prompts=2, prompt_length=8, num_generated=6, num_draft_tokens=2
)


def few_documents(folder: Path | None) -> Corpus:
    whole = read_corpus(folder)
    (code,) = whole.domains
    few = Domain(name="code", training=code.training[:60], held_out=code.held_out[:4])
    return Corpus(domains=(few,), sources=whole.sources)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "WINDOW", 65)
        patch.setattr(demo, "read_corpus", few_documents)
        demo.train_demo(folder, num_target_steps=2, num_draft_steps=1, batch_size=1, evaluation=FEW)
    return folder


@pytest.mark.parametrize("role", ["target", "draft"])
def test_folder_loads(out: Path, role: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(out / role)
    tokens_BT = AutoTokenizer.from_pretrained(out / role)("def main(", return_tensors="pt")
    assert torch.isfinite(model(**tokens_BT).logits).all()


def test_pair_shares_its_tokenizer(out: Path) -> None:
    target, draft = (out / role / "tokenizer.json" for role in ("target", "draft"))
    assert target.read_bytes() == draft.read_bytes()


def test_both_fit_into_thirty_megabytes(out: Path) -> None:
    files = [path for role in ("target", "draft") for path in (out / role).iterdir()]
    assert sum(path.stat().st_size for path in files) < 30e6


@pytest.mark.parametrize("role", ["target", "draft"])
def test_card_tells_terms_and_results_but_no_paths(out: Path, role: str) -> None:
    card = (out / role / "README.md").read_text()
    assert "Python standard library | code | PSF-2.0" in card
    assert "draft model, T=0" in card
    assert not re.search(r"(?<![\w/<|.])/[a-z]+/|~/|[A-Z]:\\\\", card)
    assert str(Path.home()) not in card


def test_finished_work_is_resumed_not_repeated(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "WINDOW", 65)
    monkeypatch.setattr(demo, "read_corpus", few_documents)
    before = (out / "target/model.safetensors").read_bytes()
    demo.train_demo(out, num_target_steps=2, num_draft_steps=1, batch_size=1, evaluation=FEW)
    assert (out / "target/model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="seed 9"):
        demo.train_demo(out, num_target_steps=2, batch_size=1, seed=9)
    with pytest.raises(ValueError, match="num_steps 1 is below the 2"):
        demo.train_demo(out, num_target_steps=1, batch_size=1)
