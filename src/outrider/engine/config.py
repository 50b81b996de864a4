"""EngineConfig: how large a step is, how much KV there is, what is cached."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch

from outrider.cache.pool import KVPool
from outrider.errors import ConfigError, unknown
from outrider.models.base import ModelSpec

CPU_KV_BYTES = 1 << 30
GPU_KV_SHARE = 0.5
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of one engine; names, units and meanings as in vLLM where the thing is the same.

    Attributes:
        max_num_seqs: most sequences running at once.
        max_num_batched_tokens: most rows (prompt tokens, decoded tokens and draft nodes) a step.
        max_model_len: longest sequence, prompt and output; None is the model's own limit, or what
            the KV memory holds if that is less.
        block_size: tokens per KV block.
        kv_cache_memory_bytes: for the target's KV and again for the draft model's; None is 1 GiB
            on the CPU and half of what is free on a GPU, but never more than
            max_num_seqs * max_model_len tokens need.
        enable_prefix_caching: share KV of equal prefixes within a tenant.
        long_prefill_token_threshold: most prompt tokens of one sequence per step; 0 is no limit.
        check_integrity: prove after every step that no KV block is lost (slow; for tests).
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    block_size: int = 16
    kv_cache_memory_bytes: int | None = None
    enable_prefix_caching: bool = True
    long_prefill_token_threshold: int = 0
    check_integrity: bool = False

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            _at_least(1, name, getattr(self, name))
        for name in ("max_model_len", "kv_cache_memory_bytes"):
            if getattr(self, name) is not None:
                _at_least(1, name, getattr(self, name))
        _at_least(0, "long_prefill_token_threshold", self.long_prefill_token_threshold)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens}: must be at least "
                f"max_num_seqs={self.max_num_seqs}, or running sequences would starve"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From keyword options; an unknown key is an error."""
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(unknown("engine option", key, known))
        return cls(**values)

    def model_len(self, spec: ModelSpec) -> int:
        """Longest sequence for this model, before its KV pool takes the memory."""
        if self.max_model_len is None:
            return self._affordable_len(spec)
        if self.max_model_len > spec.max_positions:
            raise ConfigError(
                f"max_model_len={self.max_model_len}: {spec.name} has {spec.max_positions} "
                "positions; ask for no more"
            )
        return self.max_model_len

    def _affordable_len(self, spec: ModelSpec) -> int:
        per_block = KVPool.bytes_per_block(spec.kv_shapes, self.block_size, spec.dtype)
        num_tokens = self._kv_bytes(spec.device) // per_block * self.block_size
        if num_tokens >= spec.max_positions:
            return spec.max_positions
        logger.warning(
            "max_model_len is %d of the %d positions of %s: KV for more does not fit; raise "
            "kv_cache_memory_bytes",
            num_tokens, spec.max_positions, spec.name,
        )  # fmt: skip
        return max(num_tokens, 1)

    def num_blocks(self, spec: ModelSpec, max_model_len: int) -> int:
        """KV blocks for a model: what memory allows, or what could ever be used.

        ConfigError when not even one longest sequence fits.
        """
        per_block = KVPool.bytes_per_block(spec.kv_shapes, self.block_size, spec.dtype)
        per_sequence = -(-max_model_len // self.block_size)
        affordable = self._kv_bytes(spec.device) // per_block
        if affordable < per_sequence:
            raise ConfigError(
                f"kv_cache_memory_bytes={self._kv_bytes(spec.device)}: a sequence of "
                f"{max_model_len} tokens needs {per_sequence * per_block} in {spec.name}; "
                "raise it or lower max_model_len"
            )
        return int(min(affordable, per_sequence * self.max_num_seqs))

    def _kv_bytes(self, device: torch.device) -> int:
        if self.kv_cache_memory_bytes is not None:
            return self.kv_cache_memory_bytes
        if device.type == "cuda":
            return int(torch.cuda.mem_get_info(device)[0] * GPU_KV_SHARE)
        return CPU_KV_BYTES


def _at_least(least: int, name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}={value!r}: must be an integer >= {least}")
