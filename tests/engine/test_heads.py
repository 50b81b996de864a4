"""Draft heads by name: folders of every family next to a target on disk, through `LLM`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from outrider.engine.heads import is_head
from outrider.engine.llm import LLM
from outrider.engine.warmth import Warmth
from outrider.errors import ConfigError, OutriderError, PairError
from outrider.request import SamplingParams, SpeculationParams
from tests.models.heads import kv_heads, layouts
from tests.models.heads.heads_for_tests import target_decoder
from tests.models.heads.layouts import (
    DECODER,
    ROPE,
    H,
    L,
    medusa_names,
    mtp_names,
    random_block,
    random_dspark,
    random_eagle1,
    random_eagle3,
    random_medusa,
    random_mtp,
    write,
    write_eagle,
    write_eagle1,
    write_speculators,
    zlab_config,
)

PROMPT = [5, 6, 7, 5, 6, 7, 9, 11, 5, 6]
SAMPLED = SamplingParams(max_tokens=16, temperature=1.0, seed=3, ignore_eos=True)
GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
MEDUSA_CONFIG = {"model_type": "medusa", "medusa_num_heads": 3, "medusa_num_layers": 1}


def write_target(folder: Path, extra: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """A random decoder of the sizes that `layouts` makes heads for."""
    values = {**DECODER, **ROPE, "num_hidden_layers": L, "initializer_range": 0.3, **config}
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**{k: v for k, v in values.items() if k != "model_type"})
    )
    folder.mkdir(parents=True)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file({**tensors, **(extra or {})}, folder / "model.safetensors", {"format": "pt"})
    write_config = {**model.config.to_dict(), **config, "model_type": "llama"}
    (folder / "config.json").write_text(layouts.json.dumps(write_config))
    return folder


def medusa(folder: Path) -> Path:
    tensors = medusa_names(random_medusa())
    return write(folder, MEDUSA_CONFIG, tensors, "medusa_lm_head.safetensors")


def block(folder: Path) -> Path:
    return write(folder, zlab_config(), random_block())


def dspark(folder: Path) -> Path:
    tensors = layouts.renamed(random_block() | random_dspark(), *layouts.DSPARK_NAMES)
    return write(folder, layouts.speculators_block_config("dspark"), tensors)


def peagle(folder: Path) -> Path:
    head = random_eagle3()
    head.tensors["mask_hidden"] = layouts.Random(9)(1, 1, 3 * H)
    return write_speculators(folder, head, "peagle", mask_token_id=39)


def kv(folder: Path) -> Path:
    return kv_heads.write(folder, kv_heads.random_head(target_decoder()))


FAMILIES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "eagle1": ("eagle", lambda folder: write_eagle1(folder, random_eagle1())),
    "eagle3": ("eagle", lambda folder: write_eagle(folder, random_eagle3())),
    "speculators": ("eagle", lambda folder: write_speculators(folder, random_eagle3())),
    "medusa": ("medusa", medusa),
    "peagle": ("eagle", peagle),
    "dflash": ("block", block),
    "dspark": ("block", dspark),
    "kv": ("kv_draft", kv),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("heads") / "target")


@pytest.fixture(scope="module")
def plain(target: Path) -> dict[float, list[int]]:
    llm = LLM(str(target), load_tokenizer=False)
    return {s.temperature: answer(llm, s, "off") for s in (GREEDY, SAMPLED)}


def answer(
    llm: LLM, sampling: SamplingParams, method: str | None, prompt: list[int] = PROMPT
) -> list[int]:
    spec = SpeculationParams(method=method) if method else None
    (output,) = llm.generate([prompt], sampling, spec)
    return list(output.token_ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_named_as_draft_model_drafts(
    name: str, target: Path, plain: dict[float, list[int]], tmp_path: Path
) -> None:
    drafter, make = FAMILIES[name]
    folder = make(tmp_path / name)
    assert is_head(str(folder))
    assert not is_head(str(target))
    llm = LLM(str(target), draft_model=folder, load_tokenizer=False)
    assert llm.engine.default_drafter == drafter
    spec = SpeculationParams(num_draft_tokens=3)
    for sampling in (GREEDY, SAMPLED):
        (output,) = llm.generate([PROMPT], sampling, spec)
        assert list(output.token_ids) == plain[sampling.temperature]
    assert llm.engine.stats.num_drafts > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_restart_finds_what_a_head_had_computed(name: str, target: Path, tmp_path: Path) -> None:
    """Another process knows the head by its weights, wherever it lies now."""
    drafter, make = FAMILIES[name]
    llm = LLM(str(target), draft_model=make(tmp_path / name), load_tokenizer=False)
    log = [*PROMPT, *answer(llm, SAMPLED, drafter)] * 2
    log += answer(llm, SAMPLED, drafter, log)
    kept = Warmth(llm.engine, tmp_path / "kept").snapshot(log)
    assert kept.kv_tokens > 48
    later = LLM(str(target), draft_model=make(tmp_path / "moved"), load_tokenizer=False)
    report = Warmth(later.engine, tmp_path / "kept").restore(log)
    assert report.kv_tokens == kept.kv_tokens
    assert report.drafters[drafter] == ("R2", kept.watermarks[drafter], "")
    assert kept.watermarks[drafter] == kept.kv_tokens
    assert not report.is_half_warm


def test_several_heads_serve_one_engine(
    target: Path, plain: dict[float, list[int]], tmp_path: Path
) -> None:
    folders = [FAMILIES[name][1](tmp_path / name) for name in ("medusa", "eagle3", "dflash")]
    llm = LLM(str(target), heads=folders, load_tokenizer=False)
    assert llm.engine.default_drafter == "medusa"
    for method in ("medusa", "eagle", "block", "auto", None):
        assert answer(llm, GREEDY, method) == plain[0.0]
        assert answer(llm, SAMPLED, method) == plain[1.0]
    both = LLM(str(target), heads=folders[:2], load_tokenizer=False).engine.draft_fingerprint
    assert (
        both != LLM(str(target), heads=folders[1:], load_tokenizer=False).engine.draft_fingerprint
    )


def test_modules_in_the_targets_own_files_are_native(
    plain: dict[float, list[int]], tmp_path: Path
) -> None:
    names = mtp_names(random_mtp(), "model.layers.{}.", layouts.DEEPSEEK_PARTS, first=L)
    folder = write_target(tmp_path / "native", names, num_nextn_predict_layers=1)
    llm = LLM(str(folder), draft_model="native", load_tokenizer=False)
    assert llm.engine.default_drafter == "mtp"
    assert answer(llm, GREEDY, "mtp") == plain[0.0]
    assert answer(llm, SAMPLED, "mtp") == plain[1.0]
    assert answer(LLM(str(folder), load_tokenizer=False), GREEDY, None) == plain[0.0]


def test_medusa_heads_in_a_full_model_are_native(
    plain: dict[float, list[int]], tmp_path: Path
) -> None:
    names = medusa_names(random_medusa(), "medusa_head.")
    folder = write_target(tmp_path / "full", names, medusa_num_heads=3, medusa_num_layers=1)
    llm = LLM(str(folder), heads=["native"], load_tokenizer=False)
    assert llm.engine.default_drafter == "medusa"
    assert answer(llm, SAMPLED, "medusa") == plain[1.0]


@pytest.mark.parametrize(
    ("heads", "told"),
    [
        (["eagle3", "speculators"], "both run by 'eagle'"),
        (["target"], "hold no MTP modules"),
        (["native"], "hold no MTP modules"),
    ],
)
def test_heads_that_cannot_serve_are_refused(
    heads: list[str], told: str, target: Path, tmp_path: Path
) -> None:
    folders = [
        str(target) if name == "target" else name if name == "native"
        else str(FAMILIES[name][1](tmp_path / name))
        for name in heads
    ]  # fmt: skip
    with pytest.raises(OutriderError, match=told):
        LLM(str(target), heads=folders, load_tokenizer=False)


def test_a_head_of_another_target_is_refused(tmp_path: Path) -> None:
    wide = write_target(tmp_path / "wide", hidden_size=2 * H, head_dim=8)
    with pytest.raises(PairError, match="width"):
        LLM(str(wide), draft_model=FAMILIES["eagle1"][1](tmp_path / "head"), load_tokenizer=False)


def test_a_drafter_without_its_head_says_what_to_give(target: Path) -> None:
    with pytest.raises(ConfigError, match="head"):
        LLM(str(target), drafters=["eagle"], load_tokenizer=False)
