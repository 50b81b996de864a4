"""The layers of a block drafter: over the slots of blocks, and what they make of context rows.

Shape legend: N rows of a pass, D width of the head, L its layers, J query and key heads, H query
heads, G key/value heads, X = H + 2 G, W width of a head.
"""

import torch
from torch import Tensor

from outrider.models.config import DecoderConfig
from outrider.models.decoder import MLP, RMSNorm
from outrider.models.heads.block_past import Past, Sight
from outrider.models.rope import Turn, rotate_
from outrider.models.weights import Weights
from outrider.ops.base import LayerKV, Ops


class ContextProducts:
    """Keys and values of context rows in all layers, from one product."""

    def __init__(self, config: DecoderConfig, tensors: dict[str, Tensor], ops: Ops) -> None:
        starts = [f"layers.{index}.self_attn." for index in range(len(config.layers))]
        stacked = {
            kind: torch.cat([tensors[f"{s}{name}_proj.{kind}"] for s in starts for name in "kv"])
            for kind in (("weight", "bias") if config.has_qkv_bias else ("weight",))
        }
        self._product = ops.linear(stacked["weight"], stacked.get("bias"))
        self._shape = (len(starts), 2, config.num_kv_heads, config.head_dim)
        norms = [tensors.get(f"{start}k_norm.weight") for start in starts]
        gains = [gain for gain in norms if gain is not None]
        self._norm = RMSNorm(torch.stack(gains).unsqueeze(1), config.norm_eps) if gains else None

    def __call__(self, rows_ND: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        """keys_NLGW and values_NLGW."""
        keys_NLGW, values_NLGW = self._product(rows_ND).unflatten(1, self._shape).unbind(2)
        keys_NLGW = keys_NLGW.contiguous() if self._norm is None else self._norm(keys_NLGW)
        rotate_(keys_NLGW.flatten(1, 2), turn)
        return keys_NLGW, values_NLGW


class BlockLayer:
    """One layer over the slots of blocks."""

    def __init__(
        self, config: DecoderConfig, weights: Weights, index: int, sight: Sight, ops: Ops
    ) -> None:
        prefix, eps = f"layers.{index}.", config.norm_eps
        attention = f"{prefix}self_attn."
        names = [f"{attention}{name}_proj" for name in "qkv"]
        self._norm = RMSNorm(weights.take(f"{prefix}input_layernorm.weight"), eps)
        self._qkv = ops.linear(
            weights.take(*(f"{name}.weight" for name in names)),
            weights.take_optional(config.has_qkv_bias, *(f"{name}.bias" for name in names)),
        )
        self._output = ops.linear(
            weights.take(f"{attention}o_proj.weight"),
            weights.take_optional(config.has_output_bias, f"{attention}o_proj.bias"),
        )
        self._head_norm = _head_norm(config, weights, attention)
        self._mlp_norm = RMSNorm(weights.take(f"{prefix}post_attention_layernorm.weight"), eps)
        self._mlp = MLP(config, weights, f"{prefix}mlp.", ops)
        self._num_heads = config.num_heads
        self._num_turned = config.num_heads + config.num_kv_heads
        self._shape_XW = (config.num_heads + 2 * config.num_kv_heads, config.head_dim)
        self._sight = sight

    def __call__(self, hidden_ND: Tensor, turn: Turn, past: Past, kv: LayerKV) -> Tensor:
        qkv_NXW = self._qkv(self._norm(hidden_ND)).unflatten(1, self._shape_XW)
        heads_NJW, values_NGW = qkv_NXW[:, : self._num_turned], qkv_NXW[:, self._num_turned :]
        if self._head_norm is not None:
            heads_NJW = self._head_norm(heads_NJW)
        rotate_(heads_NJW, turn)
        query_NHW, keys_NGW = heads_NJW[:, : self._num_heads], heads_NJW[:, self._num_heads :]
        out_NHW = past.attend(query_NHW, keys_NGW, values_NGW, kv, self._sight)
        hidden_ND = hidden_ND + self._output(out_NHW.flatten(1))
        return hidden_ND + self._mlp(self._mlp_norm(hidden_ND))


def _head_norm(config: DecoderConfig, weights: Weights, prefix: str) -> RMSNorm | None:
    """One norm for the heads of queries and keys."""
    if not config.has_qk_norm:
        return None
    query_W, key_W = weights.take(f"{prefix}q_norm.weight"), weights.take(f"{prefix}k_norm.weight")
    rows = (query_W.expand(config.num_heads, -1), key_W.expand(config.num_kv_heads, -1))
    return RMSNorm(torch.cat(rows), config.norm_eps)
