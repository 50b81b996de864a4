"""Every rule of detection, and every way in which config and tensors can disagree."""

from typing import Any

import pytest

from outrider.errors import ConfigError
from outrider.models.heads.detect import Shapes, detect
from outrider.models.heads.spec import Family

ATTENTION = {
    "layers.0.self_attn.q_proj.weight": (16, 16),
    "layers.0.self_attn.o_proj.weight": (16, 16),
}
EAGLE1: Shapes = {"fc.weight": (16, 32), **ATTENTION}
EAGLE3: Shapes = {
    "fc.weight": (16, 48),
    "midlayer.self_attn.q_proj.weight": (16, 32),
    "midlayer.self_attn.o_proj.weight": (16, 16),
    "midlayer.input_layernorm.weight": (16,),
}
PEAGLE: Shapes = {**EAGLE3, "mask_hidden": (1, 1, 48)}
BLOCK: Shapes = {
    "fc.weight": (16, 32),
    "hidden_norm.weight": (16,),
    "layers.0.input_layernorm.weight": (16,),
    **ATTENTION,
}
DECODER: Shapes = {
    "model.embed_tokens.weight": (40, 16),
    "model.layers.0.input_layernorm.weight": (16,),
    **{f"model.{name}": shape for name, shape in ATTENTION.items()},
}
MEDUSA: Shapes = {"0.0.linear.weight": (16, 16), "0.1.weight": (40, 16)}
HYDRA: Shapes = {"hydra_mlp.0.0.linear.weight": (16, 32)}
MLP: Shapes = {"speculator.emb.0.weight": (40, 16)}
DEEPSEEK: Shapes = {**DECODER, "model.layers.8.eh_proj.weight": (16, 32)}
QWEN: Shapes = {**DECODER, "mtp.fc.weight": (16, 32)}
MIMO: Shapes = {**DECODER, "model.mtp_layers.0.input_proj.weight": (16, 32)}
PARD2: Shapes = {**DECODER, "target_proj.weight": (16, 64)}
DFLASH = {"dflash_config": {"mask_token_id": 3}}

AGREED: list[tuple[dict[str, Any], Shapes, Family]] = [
    ({"speculators_model_type": "eagle3"}, EAGLE3, Family.EAGLE3),
    ({"speculators_model_type": "peagle"}, PEAGLE, Family.PEAGLE),
    ({"speculators_model_type": "eagle"}, EAGLE1, Family.EAGLE),
    ({"speculators_model_type": "dflash"}, BLOCK, Family.BLOCK),
    ({"speculators_model_type": "dspark"}, BLOCK, Family.BLOCK),
    ({"speculators_model_type": "mtp"}, {"mtp_layers.0.input_proj.weight": (16, 32)}, Family.MTP),
    (DFLASH, BLOCK, Family.BLOCK),
    ({"architectures": ["Qwen3DSparkModel"]}, BLOCK, Family.BLOCK),
    ({"architectures": ["DominoDraftModel"]}, BLOCK, Family.BLOCK),
    ({"pard2": True, "pard_token": 3}, PARD2, Family.PARD2),
    ({"spd_type": "pard2"}, PARD2, Family.PARD2),
    ({"pard_token": 3}, DECODER, Family.PARD),
    ({"pard_token": 3}, PEAGLE, Family.PEAGLE),
    ({"medusa_num_heads": 2}, MEDUSA, Family.MEDUSA),
    ({"model_type": "medusa"}, {"blocks.0.layers.0.weight": (16, 16)}, Family.MEDUSA),
    (
        {"medusa_num_heads": 2},
        {**DECODER, "medusa_head.0.0.linear.weight": (16, 16)},
        Family.MEDUSA,
    ),
    ({"hydra_num_heads": 2}, HYDRA, Family.HYDRA),
    ({"model_type": "mlp_speculator"}, MLP, Family.MLP_SPECULATOR),
    ({"n_predict": 3}, MLP, Family.MLP_SPECULATOR),
    ({}, PEAGLE, Family.PEAGLE),
    ({}, EAGLE3, Family.EAGLE3),
    ({}, EAGLE1, Family.EAGLE),
    ({"num_nextn_predict_layers": 1}, DEEPSEEK, Family.MTP),
    ({"num_nextn_predict_layers": 1}, MIMO, Family.MTP),
    ({"mtp_num_hidden_layers": 1}, QWEN, Family.MTP),
    ({"text_config": {"mtp_num_hidden_layers": 1}}, QWEN, Family.MTP),
    ({}, DECODER, Family.DRAFT_MODEL),
    ({"num_nextn_predict_layers": 0}, DECODER, Family.DRAFT_MODEL),
]


@pytest.mark.parametrize(("config", "tensors", "family"), AGREED)
def test_config_and_tensors_agree(config: dict[str, Any], tensors: Shapes, family: Family) -> None:
    assert detect(config, tensors) is family


def test_architectures_are_not_believed_for_eagle() -> None:
    assert detect({"architectures": ["LlamaForCausalLM"]}, EAGLE1) is Family.EAGLE
    assert detect({"architectures": ["LlamaForCausalLM"]}, EAGLE3) is Family.EAGLE3


def test_two_features_are_told_from_eagle_1_by_the_attention() -> None:
    two = {**EAGLE3, "fc.weight": (16, 32)}
    assert detect({}, two) is Family.EAGLE3
    assert detect({}, EAGLE1) is Family.EAGLE


def test_a_config_copied_from_a_target_with_mtp_does_not_make_a_head_one() -> None:
    assert detect({"num_nextn_predict_layers": 1}, EAGLE3) is Family.EAGLE3


DISAGREED: list[tuple[dict[str, Any], Shapes, str]] = [
    (
        {"speculators_model_type": "eagle"},
        EAGLE3,
        "='eagle', so eagle, but the tensors show attention that reads 32 = 2 x 16 values, so e",
    ),
    ({"speculators_model_type": "eagle3"}, EAGLE1, "so eagle3, but .* fc .* so eagle:"),
    ({"speculators_model_type": "peagle"}, EAGLE3, "so peagle, but .* so eagle3"),
    ({"speculators_model_type": "eagle3"}, PEAGLE, "so eagle3, but .*'mask_hidden', so peagle"),
    ({"speculators_model_type": "eagle4"}, EAGLE3, "unknown speculators_model_type 'eagle4'; did"),
    (DFLASH, EAGLE3, "says dflash_config, so block, but .* so eagle3"),
    ({}, BLOCK, "show fc and hidden_norm .* so block, but config.json says nothing of it"),
    ({"pard_token": 3}, EAGLE3, "says pard_token=3, so pard, but .* so eagle3"),
    ({"pard_token": 3}, PARD2, "so pard, but .*'target_proj.weight'.* so pard2"),
    ({"pard2": True}, DECODER, "says pard2, so pard2, but the tensors show a full decoder"),
    ({}, MEDUSA, "residual blocks per head, so medusa, but config.json says nothing"),
    ({"medusa_num_heads": 2}, EAGLE1, "so medusa, but .* so eagle"),
    ({}, HYDRA, "so hydra, but config.json says nothing of it: .* hydra_num_heads"),
    ({"hydra_num_heads": 2}, MEDUSA, "so hydra, but .* so medusa"),
    ({}, MLP, "so mlp_speculator, but config.json says nothing"),
    ({}, DEEPSEEK, "so mtp, but config.json says nothing of it: .* num_nextn_predict_layers"),
    ({"num_nextn_predict_layers": 1}, DECODER, "so mtp, but the tensors show a full decoder"),
    ({}, {"x.weight": (1,), "y.weight": (1,)}, r"no known draft head: .* \(x.weight, y.weight\)"),
    ({}, {}, "none at all"),
    (
        {},
        {**EAGLE3, "midlayer.self_attn.q_proj.weight": (16, 33)},
        "the first attention reads 33 values and writes 16",
    ),
]


@pytest.mark.parametrize(("config", "tensors", "message"), DISAGREED)
def test_disagreement_says_who_says_what(
    config: dict[str, Any], tensors: Shapes, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        detect(config, tensors)
    assert "\n" not in str(caught.value)
