"""EAGLE-3 and P-EAGLE: one head in four layouts is one head; whatever is wrong is said."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.errors import ConfigError, ModelError, PairError
from outrider.models.heads.load import load_head
from outrider.models.heads.spec import Family, Head
from tests.models.heads.layouts import (
    BOUNDARIES,
    DRAFT_IDS,
    EAGLE3_WRITERS,
    HEAD_DIM,
    HEADS,
    INNER,
    KV_HEADS,
    TARGET,
    VD,
    Eagle3,
    H,
    L,
    V,
    maps,
    prefixed,
    random_eagle3,
    renamed,
    without,
    write,
    write_eagle,
    write_specforge,
    write_speculators,
)

PLAIN = random_eagle3()


def same(first: Head, second: Head) -> bool:
    return (
        first.spec == second.spec
        and first.tensors.keys() == second.tensors.keys()
        and all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    )


def load_plain(folder: Path, head: Eagle3 = PLAIN, **config: Any) -> Head:
    """Through EAGLE's own layout, whose config is flat."""
    return load_head(write_eagle(folder, replace(head, flags=head.flags | config)), TARGET)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_qwen": True},
        {"input_norm": "all"},
        {"input_norm": "each"},
        {"num_layers": 2},
        {"own_embedding": False},
        {"hidden": 8},
        {"flags": {"norm_before_residual": True, "norm_output": True}},
        {"ids": tuple(range(V))},
    ],
    ids=str,
)
def test_every_layout_gives_the_same_head(tmp_path: Path, options: dict[str, Any]) -> None:
    made = random_eagle3(**options)
    heads = [
        load_head(write_head(tmp_path / name, made), TARGET)
        for name, write_head in EAGLE3_WRITERS.items()
    ]
    assert all(same(head, heads[0]) for head in heads)
    expected = dict(made.tensors)
    if len(made.ids) < V:
        expected["target_ids"] = torch.tensor(made.ids)
    assert heads[0].tensors.keys() == expected.keys()
    assert all(torch.equal(heads[0].tensors[name], expected[name]) for name in expected)


def test_the_description(tmp_path: Path) -> None:
    spec = load_plain(tmp_path).spec
    assert spec.family is Family.EAGLE3
    widths = spec.widths
    assert (widths.target_hidden, widths.hidden, widths.vocab, widths.draft_vocab) == (H, H, V, VD)
    assert widths.num_features == 3
    decoder = spec.decoder
    assert decoder is not None
    assert (decoder.num_heads, decoder.num_kv_heads, decoder.head_dim) == (
        HEADS,
        KV_HEADS,
        HEAD_DIM,
    )
    assert (decoder.num_layers, decoder.intermediate_size, decoder.norm_eps) == (1, INNER, 1e-5)
    assert (decoder.rope.theta, decoder.rope.max_positions) == (5000.0, 128)
    chosen = spec.conventions
    assert chosen.feature_layers == (2, L // 2, L - 3)
    assert (chosen.vocabulary_map, chosen.lm_head, chosen.embedding) == ("offset", "own", "own")
    assert (chosen.input_norm, chosen.feedback, chosen.rope_style) == (
        "none",
        "pre-norm",
        "half-split",
    )


def test_flags_become_conventions(tmp_path: Path) -> None:
    flags = {"norm_before_residual": True, "norm_output": True}
    chosen = load_plain(tmp_path / "a", random_eagle3(input_norm="each", flags=flags)).spec
    assert chosen.conventions.norm_before_residual
    assert chosen.conventions.feedback == "post-norm"
    assert chosen.conventions.input_norm == "each"


def test_an_absent_flag_is_assumed_as_each_layout_means_it(tmp_path: Path) -> None:
    ours = load_plain(tmp_path / "eagle").spec
    assert not ours.conventions.norm_before_residual
    assert ours.assumed == {"norm_before_residual", "feature_layers", "feedback"}
    silent = {"norm_before_residual": None, "norm_output": None}
    theirs = load_head(write_speculators(tmp_path / "s", PLAIN, **silent), TARGET).spec
    assert theirs.conventions.norm_before_residual
    assert theirs.assumed == {"norm_before_residual", "feedback"}
    stated = load_head(write_speculators(tmp_path / "t", PLAIN), TARGET).spec
    assert stated.assumed == frozenset()
    assert not stated.conventions.norm_before_residual


def test_older_norm_names_and_prefixes(tmp_path: Path) -> None:
    made = random_eagle3(input_norm="each")
    old = renamed(
        made.tensors,
        ("fc_norm.0.", "aux_norm_low."),
        ("fc_norm.1.", "aux_norm_mid."),
        ("fc_norm.2.", "aux_norm_high."),
    )
    expected = load_plain(tmp_path / "new", made)
    assert same(load_plain(tmp_path / "old", replace(made, tensors=old)), expected)
    model = replace(made, tensors=prefixed("model.", made.tensors))
    assert same(load_head(write_speculators(tmp_path / "m", model), TARGET), expected)


def test_a_later_layer_may_call_its_input_norm_hidden_norm(tmp_path: Path) -> None:
    made = random_eagle3(num_layers=2)
    sglang = renamed(made.tensors, ("layers.1.input_layernorm.", "layers.1.hidden_norm."))
    assert same(
        load_plain(tmp_path / "a", replace(made, tensors=sglang)), load_plain(tmp_path / "b", made)
    )


def test_missing_parts_are_the_targets(tmp_path: Path) -> None:
    bare = replace(PLAIN, tensors=without(PLAIN.tensors, "lm_head.weight", "embed_tokens.weight"))
    head = load_plain(tmp_path, bare)
    assert head.spec.widths.draft_vocab == VD
    assert (head.spec.conventions.lm_head, head.spec.conventions.embedding) == ("target", "target")
    assert head.tensors["target_ids"].tolist() == list(DRAFT_IDS)


def test_no_maps_mean_the_targets_vocabulary(tmp_path: Path) -> None:
    made = random_eagle3(ids=tuple(range(V)))
    config = {**made.values, "eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
    head = load_head(write(tmp_path, config, made.tensors), TARGET)
    assert head.spec.widths.draft_vocab == V
    assert head.spec.conventions.vocabulary_map == "none"
    assert "target_ids" not in head.tensors


def test_one_map_is_enough(tmp_path: Path) -> None:
    config = {**PLAIN.values, "draft_vocab_size": VD}
    for name in ("d2t", "t2d"):
        tensors = PLAIN.tensors | {name: maps()[name]}
        head = load_head(write(tmp_path / name, config, tensors), TARGET)
        assert head.tensors["target_ids"].tolist() == list(DRAFT_IDS)


def test_two_features_are_not_mistaken_for_eagle_1(tmp_path: Path) -> None:
    made = random_eagle3(num_features=2, boundaries=(3, 6))
    spec = load_head(write_specforge(tmp_path, made), TARGET).spec
    assert spec.family is Family.EAGLE3
    assert spec.conventions.feature_layers == (3, 6)


def test_a_head_without_features_reads_the_last_state(tmp_path: Path) -> None:
    config = {**PLAIN.values, "eagle_config": {"use_aux_hidden_state": False}}
    tensors = without(PLAIN.tensors, "fc.weight") | maps()
    spec = load_head(write(tmp_path, config, tensors), TARGET).spec
    assert spec.widths.num_features == 0
    assert spec.conventions.feature_layers == ()
    assert spec.conventions.input_state == "normed"


def test_the_nested_key_names_outputs_and_the_other_boundaries(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = {**PLAIN.values, "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}}
    tensors = PLAIN.tensors | maps()
    nested = load_head(write(tmp_path / "n", config, tensors), TARGET).spec
    assert nested.conventions.feature_layers == (2, 4, 5)
    both = {**config, "eagle_aux_hidden_state_layer_ids": [1, 3, 4]}
    with caplog.at_level(logging.WARNING):
        top = load_head(write(tmp_path / "b", both, tensors), TARGET).spec
    assert top.conventions.feature_layers == (1, 3, 4)
    assert "[1, 3, 4]" in caplog.text
    assert "[2, 4, 5]" in caplog.text


BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "width of a head": (
        {"midlayer.self_attn.v_proj.weight": torch.zeros(9, 2 * H)},
        {},
        ModelError,
        r"1 misshapen tensors: midlayer.self_attn.v_proj.weight is \[9, 32\], expected \[8, 32\]",
    ),
    "width of fc": (
        {"fc.weight": torch.zeros(H, 3 * H + 1)},
        {},
        ConfigError,
        "fc.weight reads 49 values, which is no multiple of the 16 of a feature",
    ),
    "neither width": (
        {"midlayer.self_attn.q_proj.weight": torch.zeros(H, 3 * H)},
        {},
        ConfigError,
        "the first attention reads 48 values and writes 16",
    ),
    "missing": (
        {"midlayer.mlp.up_proj.weight": None},
        {},
        ModelError,
        "1 missing tensors: layers.0.mlp.up_proj.weight",
    ),
    "missing norm": ({"norm.weight": None}, {}, ModelError, "missing tensors: norm.weight"),
    "unknown": (
        {"midlayer.surprise.weight": torch.zeros(1)},
        {},
        ModelError,
        "1 unknown tensors: midlayer.surprise.weight",
    ),
    "twice": (
        {"layers.0.input_layernorm.weight": torch.zeros(H)},
        {},
        ModelError,
        "'layers.0.input_layernorm.weight' and 'midlayer.input_layernorm.weight' mean the same",
    ),
    "quantised": (
        {"fc.weight": torch.zeros(H, 3 * H, dtype=torch.int8)},
        {},
        ModelError,
        "quantised tensors: fc.weight is torch.int8",
    ),
    "number of layers": (
        {},
        {"num_hidden_layers": 2},
        ConfigError,
        "says num_hidden_layers=2",
    ),
    "number of heads": (
        {},
        {"num_key_value_heads": 4},
        ConfigError,
        r"num_key_value_heads=4, but midlayer.self_attn.k_proj.weight \[8, 32\] shows 2",
    ),
    "inner width": ({}, {"intermediate_size": 32}, ConfigError, "intermediate_size=32"),
    "draft vocabulary": ({}, {"draft_vocab_size": 11}, ConfigError, "draft_vocab_size=11"),
    "activation": ({}, {"hidden_act": "gelu"}, ConfigError, "hidden_act='gelu' is not served"),
    "no positions": ({}, {"max_position_embeddings": None}, ConfigError, "max_position_embedd"),
    "flag without tensor": (
        {},
        {"norm_before_fc": True},
        ConfigError,
        "norm_before_fc=True, but the files hold no tensor 'input_norm.weight'",
    ),
    "tensor without flag": (
        {"input_norm.weight": torch.ones(3 * H)},
        {"norm_before_fc": False},
        ConfigError,
        "norm_before_fc=False, but the files hold tensor 'input_norm.weight'",
    ),
    "both norms": (
        {"input_norm.weight": torch.ones(3 * H), "fc_norm.0.weight": torch.ones(H)},
        {},
        ConfigError,
        "both input_norm and fc_norm",
    ),
    "bias without flag": (
        {
            "midlayer.self_attn.q_proj.bias": torch.zeros(16),
            "midlayer.self_attn.k_proj.bias": torch.zeros(8),
            "midlayer.self_attn.v_proj.bias": torch.zeros(8),
        },
        {"attention_bias": False},
        ConfigError,
        "attention_bias=False, but the files hold bias of query, key and value",
    ),
    "other target": ({}, {"vocab_size": 41}, PairError, "has vocab_size 41, target 'tiny' has 40"),
    "other width": ({}, {"target_hidden_size": 12}, PairError, "target_hidden_size 12"),
    "too many layers": (
        {},
        {"eagle_aux_hidden_state_layer_ids": [1, 2, 3, 4]},
        ConfigError,
        "names 4 feature layers, but fc reads 3",
    ),
    "layers outside": (
        {},
        {"eagle_aux_hidden_state_layer_ids": [1, 2, 9]},
        ConfigError,
        "the state before layer 9, but the target has 8",
    ),
    "layers no list": (
        {},
        {"eagle_aux_hidden_state_layer_ids": "1,2,3"},
        ConfigError,
        "must be a list of layer numbers",
    ),
    "latent attention": (
        {"midlayer.self_attn.q_a_proj.weight": torch.zeros(4, 2 * H)},
        {},
        ConfigError,
        "latent attention",
    ),
    "norm of heads in a llama": (
        {"midlayer.self_attn.q_norm.weight": torch.ones(HEAD_DIM)},
        {},
        ModelError,
        "1 unknown tensors: midlayer.self_attn.q_norm.weight",
    ),
    "modelopt": (
        {},
        {"eagle_config": {"use_mtp_layernorm": True}},
        ConfigError,
        "use_mtp_layernorm=True is not served",
    ),
    "aux states unsaid": (
        {},
        {"eagle_config": {"use_aux_hidden_state": False}},
        ConfigError,
        "use_aux_hidden_state=False, but the files hold tensor 'fc.weight'",
    ),
    "incomplete map": (
        {"d2t": None, "t2d": None},
        {},
        ModelError,
        "10 draft tokens of 40, but neither d2t nor t2d",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_every_fault_has_its_own_message(tmp_path: Path, case: str) -> None:
    changes, config, kind, message = BROKEN[case]
    tensors = renamed(PLAIN.tensors, ("layers.0.", "midlayer.")) | maps() | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    values = {**PLAIN.values, "draft_vocab_size": VD, **config}
    folder = write(tmp_path, values, tensors)
    with pytest.raises(kind, match=message) as caught:
        load_head(folder, TARGET)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_features_without_a_rule_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fc reads 2 features, but config.json names no layers"):
        load_plain(tmp_path, random_eagle3(num_features=2))


def test_a_narrow_head_needs_its_own_embedding(tmp_path: Path) -> None:
    with pytest.raises(PairError, match="width without an embedding of its own 8"):
        load_plain(tmp_path, random_eagle3(hidden=8, own_embedding=False))


def test_parallel_heads_keep_the_mask_feature(tmp_path: Path) -> None:
    mask = torch.arange(3.0 * H)
    made = replace(PLAIN, tensors=PLAIN.tensors | {"mask_hidden": mask.view(1, 1, -1)})
    extra = {"norm_before_residual": None}
    folder = write_speculators(tmp_path / "s", made, "peagle", mask_token_id=39, **extra)
    theirs = load_head(folder, TARGET)
    assert theirs.spec.family is Family.PEAGLE
    assert theirs.spec.mask_token_id == 39
    assert not theirs.spec.conventions.norm_before_residual
    assert torch.equal(theirs.tensors["mask_feature"], mask)
    for key in ("mask_token_id", "pard_token", "ptd_token_id"):
        assert same(load_plain(tmp_path / key, made, **{key: 39}), theirs)
    with pytest.raises(ConfigError, match=r"'mask_hidden', but config.json no mask_token_id"):
        load_plain(tmp_path / "none", made)
    with pytest.raises(ConfigError, match="mask_token_id=40 must be a token id below 40"):
        load_plain(tmp_path / "far", made, mask_token_id=40)


def test_default_layers_are_those_of_eagle() -> None:
    assert BOUNDARIES == (2, 4, 5)
