"""Block drafters: DFlash and DSpark from z-lab's, SpecForge's and speculators' layouts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.errors import ConfigError, ModelError, PairError
from outrider.models.heads.load import load_head
from outrider.models.heads.spec import Family
from tests.models.heads.layouts import (
    BLOCK_DECODER,
    DRAFT_IDS,
    DSPARK_NAMES,
    TARGET,
    VD,
    H,
    Random,
    V,
    maps,
    random_block,
    random_dspark,
    renamed,
    save,
    speculators_block_config,
    write,
    zlab_config,
)
from tests.models.heads.test_eagle3 import same

BODY = random_block()


def test_every_layout_gives_the_same_head(tmp_path: Path) -> None:
    zlab = load_head(write(tmp_path / "z", zlab_config(), BODY), TARGET)
    theirs = load_head(write(tmp_path / "s", speculators_block_config(), BODY), TARGET)
    old = renamed(BODY, ("fc.", "encoder.fc."), ("hidden_norm.", "encoder.output_norm_enc."))
    assert same(zlab, theirs)
    assert same(load_head(write(tmp_path / "e", zlab_config(), old), TARGET), zlab)
    assert zlab.tensors.keys() == BODY.keys()
    assert all(torch.equal(zlab.tensors[name], BODY[name]) for name in BODY)


def test_the_description(tmp_path: Path) -> None:
    spec = load_head(write(tmp_path, zlab_config(), BODY), TARGET).spec
    assert spec.family is Family.BLOCK
    assert (spec.mask_token_id, spec.block_size, spec.markov) == (39, 8, None)
    chosen = spec.conventions
    assert chosen.feature_layers == (2, 6)
    assert chosen.block_masks == ("bidirectional", "bidirectional")
    assert (chosen.lm_head, chosen.embedding, chosen.sample_from_anchor) == (
        "target",
        "target",
        False,
    )
    assert spec.assumed == {"block_masks", "sample_from_anchor"}
    assert spec.widths.num_features == 2


MASKS: list[tuple[dict[str, Any], tuple[str, str], tuple[int, int]]] = [
    ({}, ("bidirectional", "causal"), (0, 32)),
    ({"sliding_window_non_causal": True}, ("bidirectional", "bidirectional"), (0, 32)),
    ({"sliding_window_non_causal": False}, ("bidirectional", "causal"), (0, 32)),
    ({"is_causal": True}, ("causal", "causal"), (0, 32)),
    ({"is_causal": False}, ("bidirectional", "bidirectional"), (0, 32)),
    ({"dflash_config": {"mask_token_id": 39, "causal": True}}, ("causal", "causal"), (0, 32)),
]


@pytest.mark.parametrize(("config", "masks", "windows"), MASKS)
def test_masks_and_windows(
    tmp_path: Path, config: dict[str, Any], masks: tuple[str, str], windows: tuple[int, int]
) -> None:
    kinds = ["full_attention", "sliding_attention"]
    decoder = {**BLOCK_DECODER, "layer_types": kinds, "sliding_window": 32}
    values = speculators_block_config(transformer_layer_config=decoder, **config)
    spec = load_head(write(tmp_path, values, BODY), TARGET).spec
    assert spec.conventions.block_masks == masks
    assert spec.decoder is not None
    assert spec.decoder.windows == windows


def test_heads_are_normed_whatever_the_config_calls_itself(tmp_path: Path) -> None:
    spec = load_head(write(tmp_path, {**zlab_config(), "model_type": "llama"}, BODY), TARGET).spec
    assert spec.decoder is not None
    assert spec.decoder.has_qk_norm


def test_a_window_of_zlab_is_for_all_layers(tmp_path: Path) -> None:
    config = zlab_config(use_swa=True, swa_window_size=16)
    del config["layer_types"]
    spec = load_head(write(tmp_path, config, BODY), TARGET).spec
    assert spec.decoder is not None
    assert spec.decoder.windows == (16, 16)


def test_a_draft_vocabulary(tmp_path: Path) -> None:
    tensors = BODY | {"lm_head.weight": Random(3)(VD, H)} | maps()
    config = speculators_block_config(draft_vocab_size=VD)
    head = load_head(write(tmp_path, config, tensors), TARGET)
    assert head.tensors["target_ids"].tolist() == list(DRAFT_IDS)
    assert (head.spec.conventions.lm_head, head.spec.widths.draft_vocab) == ("own", VD)
    with pytest.raises(ModelError, match=r"missing tensors: lm_head.weight"):
        load_head(write(tmp_path / "m", config, BODY | maps()), TARGET)


def test_an_embedding_larger_than_the_targets(tmp_path: Path) -> None:
    tensors = BODY | {"embed_tokens.weight": Random(3)(V + 1, H)}
    config = speculators_block_config(mask_token_id=V)
    spec = load_head(write(tmp_path / "a", config, tensors), TARGET).spec
    assert (spec.mask_token_id, spec.conventions.embedding) == (V, "own")
    with pytest.raises(ConfigError, match="mask_token_id=40 must be a token id below 40"):
        load_head(write(tmp_path / "b", config, BODY), TARGET)


def test_the_mask_may_have_an_embedding_of_its_own(tmp_path: Path) -> None:
    config = zlab_config()
    del config["dflash_config"]["mask_token_id"]
    folder = write(tmp_path, config, BODY)
    embedding = Random(5)(1, H)
    save(folder / "mask_embedding.pt", {"embedding": embedding, "mask_token_id": 12})
    head = load_head(folder, TARGET)
    assert head.spec.mask_token_id == 12
    assert torch.equal(head.tensors["mask_embedding"], embedding.flatten())
    write(tmp_path, zlab_config(), BODY)
    with pytest.raises(ConfigError, match=r"for token 12, but config.json says mask_token_id=39"):
        load_head(folder, TARGET)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_dspark_in_both_layouts(tmp_path: Path, kind: str) -> None:
    tensors = BODY | random_dspark(kind=kind)
    names = renamed(tensors, *DSPARK_NAMES)
    keys = {
        "markov_rank": 6,
        "markov_head_type": kind,
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "sample_from_anchor": True,
    }
    theirs = load_head(
        write(tmp_path / "s", speculators_block_config("dspark", **keys), names), TARGET
    )
    forge = zlab_config(projector_type="dspark", **keys)
    assert same(load_head(write(tmp_path / "f", forge, names), TARGET), theirs)
    markov = theirs.spec.markov
    assert markov is not None
    assert (markov.kind, markov.rank, markov.confidence) == (kind, 6, "state-and-token")
    assert theirs.spec.conventions.sample_from_anchor
    assert theirs.tensors.keys() == tensors.keys()


def test_silent_files_draft_from_the_anchor_where_their_readers_do(tmp_path: Path) -> None:
    """DSpark's runtime does; of a file of speculators, and of DFlash, the reader does not."""
    dspark = renamed(BODY | random_dspark(), *DSPARK_NAMES)
    spoken = {
        name: value
        for name, value in speculators_block_config("dspark").items()
        if name != "sample_from_anchor"
    }
    for folder, config, tensors, is_from_anchor in (
        ("forge", zlab_config(projector_type="dspark"), dspark, True),
        ("speculators", spoken, dspark, False),
        ("dflash", zlab_config(), BODY, False),
        ("said", zlab_config(projector_type="dspark", sample_from_anchor=False), dspark, False),
    ):
        spec = load_head(write(tmp_path / folder, config, tensors), TARGET).spec
        assert spec.conventions.sample_from_anchor is is_from_anchor, folder
        assert ("sample_from_anchor" in spec.assumed) is (folder != "said")


@pytest.mark.parametrize(
    "config",
    [
        zlab_config(projector_type="dspark"),
        zlab_config(markov_rank=6),
        speculators_block_config("dspark"),
    ],
    ids=["projector", "rank", "speculators"],
)
def test_dspark_without_its_finish_is_no_dflash(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"missing tensors: markov\.w1"):
        load_head(write(tmp_path, config, BODY), TARGET)


def test_a_confidence_that_reads_the_state_alone(tmp_path: Path) -> None:
    tensors = BODY | random_dspark() | {"confidence.weight": Random(1)(1, H)}
    names = renamed(tensors, *DSPARK_NAMES)
    spec = load_head(write(tmp_path, speculators_block_config("dspark"), names), TARGET).spec
    assert spec.markov is not None
    assert spec.markov.confidence == "state"


FC = {"fc.weight": torch.zeros(H, 3 * H)}
BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "unknown": ({"extra.weight": torch.zeros(1)}, {}, ModelError, "unknown tensors: extra.weight"),
    "missing": (
        {"layers.1.self_attn.k_norm.weight": None},
        {},
        ModelError,
        "missing tensors: layers.1.self_attn.k_norm.weight",
    ),
    "features": (FC, {}, ConfigError, "names 2 feature layers, but fc reads 3"),
    "layers": ({}, {"num_target_layers": 9}, PairError, "num_target_layers 9, target 'tiny' has 8"),
    "no block": ({}, {"block_size": None}, ConfigError, "block_size=None"),
    "small block": ({}, {"block_size": 1}, ConfigError, "block_size=1"),
    "no window": (
        {},
        {"layer_types": ["full_attention", "sliding_attention"]},
        ConfigError,
        "gives no window",
    ),
    "sink": ({}, {"attention_sink_bias": True}, ConfigError, "attention_sink_bias=True is not se"),
    "markov type": ({}, {"markov_head_type": "gated"}, ModelError, "missing tensors: markov.w1"),
    "domino": (
        {"prefix_gru.weight_ih_l0": torch.zeros(1)},
        {},
        ConfigError,
        r"is of Domino \(prefix_gru.weight_ih_l0\), which is not served",
    ),
    "dflash2": (
        {"layers.0.attention_conv.base_kernel": torch.zeros(1)},
        {},
        ConfigError,
        "is of DFlash2",
    ),
    "said": ({}, {"projector_type": "domino"}, ConfigError, "is of Domino .as its config says."),
    "vocabulary": ({}, {"vocab_size": V + 1}, PairError, f"vocab_size {V + 1}, target 'tiny' has"),
    "xpress": ({"refiner_head.in_proj.weight": torch.zeros(1)}, {}, ConfigError, "is of XPress"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_every_fault_has_its_own_message(tmp_path: Path, case: str) -> None:
    changes, config, kind, message = BROKEN[case]
    tensors = {name: t for name, t in (BODY | changes).items() if t is not None}
    with pytest.raises(kind, match=message):
        load_head(write(tmp_path, {**zlab_config(), **config}, tensors), TARGET)


MARKOV_BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"markov_head_type": "rnn"}, "markov_head_type='rnn', but the tensors are of 'vanilla'"),
    ({"markov_rank": 7}, r"markov_rank=7, but markov_head.markov_w1.weight \[40, 6\] shows 6"),
    ({"enable_confidence_head": False}, "enable_confidence_head=False, but the files hold tensor"),
    ({"confidence_head_with_markov": False}, "confidence_head_with_markov=False, but the files"),
]


@pytest.mark.parametrize(("config", "message"), MARKOV_BROKEN)
def test_a_finish_that_config_and_tensors_describe_differently(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    names = renamed(BODY | random_dspark(), *DSPARK_NAMES)
    folder = write(tmp_path, speculators_block_config("dspark", **config), names)
    with pytest.raises(ConfigError, match=message):
        load_head(folder, TARGET)
