"""Draft models beside their target: what is checked, what is told, and what to expect."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from outrider.control.cost import CostModel, DraftCounts, PassCounts
from outrider.doctor.advice import advice
from outrider.doctor.diagnosis import Diagnosis, diagnose_model, with_prices
from outrider.doctor.fit import FAULT, GOOD, NOTE, Check, check_models
from outrider.doctor.guessers import ModelGuesser
from outrider.doctor.outlook import Outlook, Prices, priced, read_prices
from outrider.doctor.texts import Written, write_texts
from outrider.engine.llm import LLM
from outrider.errors import ConfigError
from outrider.models.base import ModelSpec
from outrider.tokenizer import Tokenizer, load_tokenizer
from tests.doctor.training import prompts
from tests.engine.tiny_checkpoint import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def spec(**changed: object) -> ModelSpec:
    about = ModelSpec(
        name="m",
        family="llama",
        vocab_size=300,
        max_positions=128,
        eos_token_ids=(0,),
        kv_shapes=(),
        dtype=torch.float32,
        device=torch.device("cpu"),
        num_parameters=1000,
        fingerprint="",
    )
    return replace(about, **changed)  # type: ignore[arg-type]


def checked(
    folder: Path, tokenizers: tuple[Tokenizer | None, Tokenizer | None], **its: object
) -> dict[str, Check]:
    its.setdefault("num_parameters", 100)
    names = (str(folder), str(folder))
    return {c.about: c for c in check_models(spec(), spec(**its), tokenizers, names)}


def test_two_that_fit(folder: Path, tokenizer: Tokenizer) -> None:
    found = checked(folder, (tokenizer, tokenizer))
    assert {check.verdict for check in found.values()} == {GOOD}
    assert set(found) == {
        "vocabulary",
        "tokens that end an answer",
        "chat template",
        "positions",
        "dtype",
        "size",
    }


def test_what_does_not_fit(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "other words entirely, and more of them\n" * 3)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))
    other = load_tokenizer(tmp_path)
    other.backend.chat_template = "{{ messages }}"
    spec_of_it = spec(vocab_size=310, max_positions=64, eos_token_ids=(0, 7), num_parameters=900)
    names = (str(folder), str(tmp_path))
    found = {c.about: c for c in check_models(spec(), spec_of_it, (tokenizer, other), names)}
    assert {name for name, check in found.items() if check.verdict == NOTE} == set(found)
    assert "translated" in found["vocabulary"].told
    assert "[0, 7]" in found["tokens that end an answer"].told
    assert "another one" in found["chat template"].told
    assert "64" in found["positions"].told
    assert "bfloat16" in found["dtype"].told
    assert "90 %" in found["size"].told


def test_without_tokenizers_sizes_must_do(folder: Path, tokenizer: Tokenizer) -> None:
    assert checked(folder, (tokenizer, None))["vocabulary"].verdict == NOTE
    found = checked(folder, (tokenizer, None), vocab_size=301)["vocabulary"]
    assert found.verdict == FAULT
    assert "tokenizer.json" in found.told


def test_padded_laws_are_told_of(folder: Path, tokenizer: Tokenizer) -> None:
    found = checked(folder, (tokenizer, tokenizer), vocab_size=320)["vocabulary"]
    assert found.verdict == GOOD
    assert "cut to fit" in found.told


def test_the_target_as_its_own_draft_stands_always(llm: LLM, written: Written) -> None:
    network = llm.engine.runner.network
    found = diagnose_model(ModelGuesser(network, 32), network, written, ())
    assert found.score is not None
    assert found.score.by_depth == pytest.approx([1.0] * 3, abs=1e-5)
    assert found.score.matches == [1.0] * 3
    sampled, greedy = found.outlooks
    assert (sampled.kind, greedy.kind) == ("sampled", "greedy")
    assert sampled.joint == pytest.approx([1.0] * 8, abs=1e-5)
    assert sampled.lengths[3] == pytest.approx(5.0, abs=1e-4)
    assert greedy.joint == (1.0,) * 8
    assert found.winner is None


def test_one_of_another_vocabulary_has_no_score(llm: LLM, written: Written) -> None:
    checks = [Check(FAULT, "vocabulary", "strange: mend it")]
    found = diagnose_model(None, llm.engine.runner.network, written, checks)
    assert found.score is None
    assert found.baselines
    told = advice(found)
    assert told[0] == "vocabulary: strange: mend it."
    assert "bench advise" in told[1]


def prices(draft_s: float) -> Prices:
    """A pass of 1 ms for up to 16 rows, and `draft_s` for each drafted token."""
    cost = CostModel()
    for _ in range(6):
        for num_rows in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
            cost.passes.observe(num_rows, 0, 0, 1e-3 * max(num_rows, 16) / 16)
    for depth in (1, 4, 8) * 40:
        cost.observe_draft("model", DraftCounts(depth, 1, depth, 0), draft_s * depth)
        cost.rest.observe(PassCounts(1, 0, 0, 1, 0).rest, 1e-5)
    return Prices(cost, "model")


def test_the_forecast_is_the_formulas() -> None:
    alpha = 0.8
    one = Outlook("greedy", tuple(alpha**d for d in range(1, 9)), 100)
    found = priced(one, prices(1e-4), 1)
    for depth, speedup in enumerate(found.speedups, start=1):
        tokens = (1 - alpha ** (depth + 1)) / (1 - alpha)
        assert speedup == pytest.approx(tokens / (1 + 0.1 * depth), rel=0.03)
    assert found.best_depth == 1 + max(range(8), key=lambda d: found.speedups[d])
    assert 1 < found.best_depth < 8


def test_what_does_not_pay_is_said() -> None:
    one = Outlook("sampled", (0.1, 0.01), 100)
    found = priced(one, prices(1e-3), 1)
    assert found.best_depth == 0
    diagnosis = Diagnosis(
        family="draft model", written=Written(()), score=None, baselines={}, outlooks=(found,)
    )
    assert any("does not pay" in line for line in advice(diagnosis))
    untimed = replace(diagnosis, outlooks=(one,))
    assert any("was not timed" in line for line in advice(untimed))
    told = with_prices(replace(untimed), prices(1e-5))
    assert told.outlooks[0].speedups[0] > 1.0


def test_prices_are_read_from_an_engine(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTRIDER_CACHE", str(tmp_path / "cache"))
    llm = LLM(str(folder), draft_model=str(folder), block_size=8)
    found = read_prices(llm, budget_s=1.0)
    assert found is not None
    assert found.drafter == "draft_model"
    outlook = priced(Outlook("sampled", (0.9, 0.8), 10), found, 64)
    assert len(outlook.speedups) == 2
    plain = LLM(str(folder), block_size=8)
    assert read_prices(plain, budget_s=0.5) is None


def test_texts_that_cannot_be_written(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="no prompts"):
        write_texts(llm, [])
    with pytest.raises(ConfigError, match="none of the 1 prompts fits"):
        write_texts(llm, [[1] * 200])
    found = write_texts(llm, [[1] * 200, *prompts()[:2]], num_positions=48)
    assert any("1 prompts were left out" in note for note in found.notes)
    assert any("only 2 prompts" in note for note in found.notes)


def test_every_prompt_is_answered_both_ways(written: Written) -> None:
    for is_sampled in (False, True):
        mine = [text for text in written.texts if text.is_sampled == is_sampled]
        assert {len(text.tokens) for text in mine if not text.num_looped} == {27}
        assert [text.prompt for text in mine] == sorted({text.prompt for text in mine})
    pairs = {text.prompt for text in written.texts}
    assert len(pairs) >= 20
