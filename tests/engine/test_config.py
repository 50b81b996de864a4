"""EngineConfig: what is refused, and how memory becomes blocks."""

import pytest
import torch

from outrider.engine.config import EngineConfig
from outrider.errors import ConfigError
from outrider.models.base import KVShape, ModelSpec


def spec(max_positions=1000, dtype=torch.float32):
    """2 layers of 2 heads of 8 + 8 numbers: 64 numbers per token."""
    return ModelSpec(
        name="model",
        family="llama",
        vocab_size=256,
        max_positions=max_positions,
        eos_token_ids=(3,),
        kv_shapes=(KVShape(2, 8, 8), KVShape(2, 8, 8)),
        dtype=dtype,
        device=torch.device("cpu"),
        num_parameters=0,
        fingerprint="",
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs=0: must be an integer >= 1"),
        ({"max_num_batched_tokens": -5}, "max_num_batched_tokens=-5"),
        ({"block_size": 2.0}, "block_size=2.0"),
        ({"block_size": True}, "block_size=True"),
        ({"max_model_len": 0}, "max_model_len=0"),
        ({"max_model_len": "8k"}, "max_model_len='8k'"),
        ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes=0"),
        ({"long_prefill_token_threshold": -1}, "long_prefill_token_threshold=-1: .* >= 0"),
        ({"long_prefill_token_threshold": "x"}, "long_prefill_token_threshold='x'"),
        (
            {"max_num_batched_tokens": 8, "max_num_seqs": 9},
            "max_num_batched_tokens=8: must be at least max_num_seqs=9",
        ),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**values)


def test_unknown_options_are_errors_with_the_nearest_name():
    with pytest.raises(ConfigError, match="'max_num_seq'; did you mean 'max_num_seqs'"):
        EngineConfig.from_dict({"max_num_seq": 3})
    assert EngineConfig.from_dict({"max_num_seqs": 3}).max_num_seqs == 3


def test_the_longest_sequence_is_the_models_unless_asked_for_less():
    assert EngineConfig().model_len(spec()) == 1000
    assert EngineConfig(max_model_len=10).model_len(spec()) == 10
    with pytest.raises(ConfigError, match="max_model_len=1001: model has 1000 positions"):
        EngineConfig(max_model_len=1001).model_len(spec())


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_memory_becomes_blocks(dtype, width):
    per_block = 16 * 64 * width
    config = EngineConfig(kv_cache_memory_bytes=10 * per_block + 5, block_size=16)
    assert config.num_blocks(spec(dtype=dtype), 160) == 10


def test_no_more_blocks_than_could_be_used():
    config = EngineConfig(kv_cache_memory_bytes=1 << 30, block_size=16, max_num_seqs=3)
    assert config.num_blocks(spec(), 100) == 3 * 7


def test_one_longest_sequence_must_fit():
    config = EngineConfig(kv_cache_memory_bytes=6 * 16 * 64 * 4, block_size=16)
    assert config.num_blocks(spec(), 96) == 6
    with pytest.raises(ConfigError, match=r"97 tokens needs 28672 in model; raise it or lower"):
        config.num_blocks(spec(), 97)
