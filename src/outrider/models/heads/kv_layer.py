"""KVLayer: one layer of a head that attends to the target's own keys and values.

Shape legend: N rows of a pass, h hidden width of the head, J query heads, G key/value heads, D key
width, E value width, X heads one beside the other.
"""

from dataclasses import replace

import torch
from torch import Tensor

from outrider.models.decoder import MLP, Decoder, RMSNorm
from outrider.models.heads.kv_head import KVHeadShape
from outrider.models.rope import Turn, rotate_
from outrider.models.weights import Weights
from outrider.ops.base import LayerKV, LayerParts, Layout


class KVLayer:
    """Attention to one layer of the target's KV, and a feed-forward, each behind its norm."""

    def __init__(self, shape: KVHeadShape, index: int, target: Decoder, weights: Weights) -> None:
        prefix, config, eps = f"layers.{index}.", target.config, shape.norm_eps
        self._ops = target.ops
        self._shape = shape
        self._attention_norm = RMSNorm(weights.take(f"{prefix}input_layernorm.weight"), eps)
        parts = ("q", "k", "v") if shape.sees_drafts else ("q",)
        names = [f"{prefix}self_attn.{part}_proj.weight" for part in parts]
        self._qkv = self._ops.linear(weights.take_product(*names))
        self._head_norms = [
            RMSNorm(weights.take(f"{prefix}self_attn.{part}_norm.weight"), eps)
            for part in parts[:2]
            if shape.has_qk_norm
        ]
        self._out = self._ops.linear(weights.take_product(f"{prefix}self_attn.o_proj.weight"))
        self._mlp_norm = RMSNorm(weights.take(f"{prefix}post_attention_layernorm.weight"), eps)
        plain = replace(config, is_fused=False, has_mlp_bias=False)
        self._mlp = MLP(plain, weights, f"{prefix}mlp.", self._ops)
        self._read = config.layers[shape.kv_layers[index]]
        self._scale = config.attention_scale

    def __call__(self, hidden_Nh: Tensor, turn: Turn, seeing: Layout, kv: LayerKV) -> Tensor:
        normed_Nh = self._attention_norm(hidden_Nh)
        hidden_Nh = hidden_Nh + self._attend(normed_Nh, turn, seeing, kv)
        return hidden_Nh + self._mlp(self._mlp_norm(hidden_Nh))

    def parts(self) -> LayerParts:
        query, key = (
            (norm.weight for norm in self._head_norms) if self._head_norms else (None, None)
        )
        return LayerParts(
            attention_norm_D=self._attention_norm.weight,
            mlp_norm_D=self._mlp_norm.weight,
            query_norm_D=query,
            key_norm_D=key,
            qkv=self._qkv,
            output=self._out,
            gate_up=self._mlp.gate_up,
            down=self._mlp.down,
            window=self._read.window,
            has_rope=self._read.has_rope,
        )

    def _attend(self, normed_Nh: Tensor, turn: Turn, seeing: Layout, kv: LayerKV) -> Tensor:
        shape = self._shape
        qkv_NX = self._qkv(normed_Nh)
        num_turned = shape.num_heads + (shape.num_kv_heads if shape.sees_drafts else 0)
        split = num_turned * shape.key_width
        turned_NXD = self._turned(qkv_NX[:, :split], turn)
        if shape.sees_drafts:
            keys_NGD = turned_NXD[:, shape.num_heads :]
            values_NGE = qkv_NX[:, split:].unflatten(1, (shape.num_kv_heads, -1))
            self._ops.write_kv(kv, keys_NGD, values_NGE, seeing)
        query_NJD = turned_NXD[:, : shape.num_heads]
        out_NJE = self._ops.attend(
            query_NJD, kv, seeing, scale=self._scale, window=self._read.window
        )
        return self._out(out_NJE.flatten(1))

    def _turned(self, flat_NX: Tensor, turn: Turn) -> Tensor:
        """Heads of queries, and of keys behind them if there are any, normed and turned."""
        heads_NXD = flat_NX.unflatten(1, (-1, self._shape.key_width))
        if self._head_norms:
            parts = heads_NXD.tensor_split((self._shape.num_heads,), dim=1)
            normed = [norm(part) for norm, part in zip(self._head_norms, parts, strict=False)]
            heads_NXD = torch.cat(normed, dim=1)
        return rotate_(heads_NXD, turn) if self._read.has_rope else heads_NXD
