"""Configs of every family, as their checkpoints write them, and what is refused."""

from typing import Any

import pytest

from outrider.errors import ModelError
from outrider.models.config import DecoderConfig, is_lean
from tests.models.tiny import BASE

NUM_LAYERS = 4


def values_of(family: str, **changes: Any) -> dict[str, Any]:
    values = {**BASE, "num_hidden_layers": NUM_LAYERS, "model_type": family, **changes}
    return {key: value for key, value in values.items() if value != "absent"}


def read(family: str, **changes: Any) -> DecoderConfig:
    return DecoderConfig.from_dict(values_of(family, **changes))


def windows(config: DecoderConfig) -> list[int]:
    return [layer.window.sliding for layer in config.layers]


def test_llama_as_its_first_checkpoints_were_written() -> None:
    config = read("llama", num_key_value_heads="absent", tie_word_embeddings="absent")
    assert (config.num_kv_heads, config.head_dim, config.is_tied) == (4, 8, False)
    assert (config.norm_eps, config.rope.theta) == (1e-6, 10000.0)
    assert not config.has_qkv_bias
    assert config.attention_scale == 8**-0.5


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {}, [0, 0, 0, 0]),
        ("mistral", {}, [4096] * 4),
        ("mistral", {"sliding_window": None}, [0, 0, 0, 0]),
        ("mistral", {"sliding_window": 7}, [7, 7, 7, 7]),
        ("phi3", {"sliding_window": 7}, [7, 7, 7, 7]),
        ("phi3", {}, [0, 0, 0, 0]),
        ("qwen2", {"sliding_window": 7}, [0, 0, 0, 0]),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}, [0, 0, 0, 4096]),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 7,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            [7, 0, 7, 0],
        ),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 7}, [0, 0, 0, 7]),
        ("smollm3", {"sliding_window": 7}, [0, 0, 0, 0]),
    ],
)
def test_sliding_windows(family: str, changes: dict[str, Any], expected: list[int]) -> None:
    assert windows(read(family, **changes)) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [True, True, True, False]),
        ({"no_rope_layer_interval": 2}, [True, False, True, False]),
        ({"no_rope_layers": [0, 1, 1, 1, 0]}, [False, True, True, True]),
    ],
)
def test_layers_without_rope(changes: dict[str, Any], expected: list[bool]) -> None:
    config = read("smollm3", **changes)
    assert [layer.has_rope for layer in config.layers] == expected
    assert config.rope.theta == 2e6


def test_biases() -> None:
    qwen2 = read("qwen2", attention_bias=False)
    assert (qwen2.has_qkv_bias, qwen2.has_output_bias) == (True, False)
    qwen3 = read("qwen3", attention_bias=True)
    assert (qwen3.has_qkv_bias, qwen3.has_output_bias, qwen3.has_mlp_bias) == (True, True, False)
    assert (qwen3.has_qk_norm, qwen3.head_dim) == (True, 128)


def test_phi3_names_its_scaling_otherwise() -> None:
    factors = {"short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
    config = read(
        "phi3",
        rope_scaling={"type": "su", **factors},
        original_max_position_embeddings=32,
        partial_rotary_factor=0.75,
    )
    assert (config.rope.kind, config.rope.width, config.max_positions) == ("longrope", 6, 32)
    assert config.is_fused


REFUSALS = [
    ("gpt2", {}, r"model_type 'gpt2' is not of the lean decoder \(llama, mistral, qwen2"),
    ("llama", {"hidden_act": "relu"}, r"hidden_act 'relu' is not known \(known: silu, swish\)"),
    ("llama", {"quantization_config": {"bits": 4}}, r"the weights are quantised"),
    ("llama", {"rope_scaling": {"type": "spiral"}}, r"rope type 'spiral' is not known"),
    ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5 is not a setting of ll"),
    (
        "qwen2",
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        r"partial_rotary_factor=0.5 is not a setting of qwen2",
    ),
    ("llama", {"sliding_window": 7}, r"sliding_window=7 is not a setting of llama"),
    (
        "mistral",
        {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2},
        r"layer_types of mistral mixes full and sliding attention",
    ),
    (
        "qwen3",
        {"layer_types": ["sliding_attention"] * 4},
        r"layer_types names sliding attention, but no sliding_window is in use",
    ),
    ("qwen3", {"layer_types": ["chunked_attention"] * 4}, r"layer type 'chunked_attention' is not"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSALS)
def test_left_to_the_adapter(family: str, changes: dict[str, Any], message: str) -> None:
    assert not is_lean(values_of(family, **changes))
    with pytest.raises(ModelError, match=message + ".*; the transformers adapter may run it$"):
        read(family, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "absent"}, r"must give hidden_size as a positive integer, got None"),
        ({"vocab_size": 0}, r"must give vocab_size as a positive integer, got 0"),
        ({"num_key_value_heads": 3}, r"num_attention_heads=4 is no multiple of num_key_value_h"),
        ({"head_dim": 7}, r"rope turns 7 of 7 dimensions: it must be even"),
        ({"layer_types": ["full_attention"]}, r"layer_types names 1 layers, num_hidden_layers=4"),
    ],
)
def test_impossible_values(changes: dict[str, Any], message: str) -> None:
    assert is_lean(values_of("llama", **changes))
    with pytest.raises(ModelError, match=message):
        read("llama", **changes)


def test_too_few_no_rope_layers() -> None:
    with pytest.raises(ModelError, match=r"no_rope_layers names 2 layers, the model has 4"):
        read("smollm3", no_rope_layers=[1, 0])


def test_is_lean() -> None:
    assert all(is_lean(values_of(f)) for f in ("llama", "mistral", "qwen2", "qwen3", "phi3"))
    assert not is_lean({})
