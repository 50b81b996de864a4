"""LeanLayer: one layer like those of a lean decoder, with tensors of its own.

Shape legend: N rows of a pass, H hidden width, O output width of a projection, W head width.
"""

from collections.abc import Mapping
from copy import copy
from typing import Literal

import torch
from torch import Tensor

from outrider.models.base import KVShape
from outrider.models.config import DecoderConfig
from outrider.models.decoder import Decoder, Layer
from outrider.models.rope import RopeTable
from outrider.models.weights import Weights, qkv_names
from outrider.ops.base import DecoderParts, Entry, LayerKV, Layout, Ops

NORMS = ("q_norm", "k_norm")


class LeanLayer:
    """A decoder layer; what a row yields depends on its own path only.

    Args:
        index: of the target's layer that it is like.
        tensors: by their names within a layer.
        rope_style: how its queries and keys pair their values.
    """

    def __init__(
        self,
        target: Decoder,
        index: int,
        tensors: Mapping[str, Tensor],
        ops: Ops,
        rope_style: Literal["half-split", "interleaved"] = "half-split",
    ) -> None:
        config, dtype, device = target.config, target.spec.dtype, target.spec.device
        if rope_style == "interleaved":
            tensors = _half_split(tensors, config)
        weights = Weights(dict(tensors), dtype=dtype, device=device)
        self.kv_shape = KVShape(config.num_kv_heads, config.head_dim, config.head_dim)
        self.norm_eps = config.norm_eps
        self._layer = Layer(config, config.layers[index], weights, "", ops)
        self._rope = RopeTable(config.rope, dtype=dtype, device=device)
        self._fused = ops.fuse(self._parts(config, ops, dtype, device))
        self._kv: list[LayerKV] = []
        self._nobody_R = torch.empty(0, dtype=torch.long, device=device)

    def __call__(self, hidden_NH: Tensor, layout: Layout, kv: LayerKV) -> Tensor:
        if self._fused is None:
            return self._layer(hidden_NH, self._rope.at(layout), layout, kv)
        if not self._kv or self._kv[0] is not kv:
            self._kv = [kv]  # a fused pass knows its pool by the list
        passed = self._fused(
            layout.slots_N,
            layout,
            self._kv,
            self._nobody_R,
            *self._rope.tables(layout),
            entry=Entry(hidden_NH),
            taps=(1,),
        )
        return passed.tapped_AND[0]

    def by_layer(self) -> "LeanLayer":
        """The same layer, one operation at a time."""
        slow = copy(self)
        slow._fused = None
        return slow

    def _parts(
        self, config: DecoderConfig, ops: Ops, dtype: torch.dtype, device: torch.device
    ) -> DecoderParts:
        """The layer as a decoder of one; its embedding, last norm and head are never asked."""
        unused_1H = torch.zeros(1, config.hidden_size, dtype=dtype, device=device)
        return DecoderParts(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            norm_eps=config.norm_eps,
            attention_scale=config.attention_scale,
            rotated_width=config.rope.width,
            embedding_VD=unused_1H,
            final_norm_D=unused_1H[0],
            head=ops.linear(unused_1H),
            layers=[self._layer.parts()],
        )


def _half_split(tensors: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """With the rows of queries and keys in another order: pairs of neighbours to pairs of halves.

    Both turn by the same angles then, and products of queries and keys are the same sums.
    """
    result = dict(tensors)
    num_turned = config.num_heads + config.num_kv_heads
    counts = (num_turned,) if config.is_fused else (config.num_heads, config.num_kv_heads)
    for name, num_heads in zip(qkv_names(config), counts, strict=False):
        for kind in ("weight", "bias"):
            full = f"self_attn.{name}.{kind}"
            if full in result:
                result[full] = _reordered(result[full], num_heads, config)
    for name in NORMS:
        full = f"self_attn.{name}.weight"
        if full in result:
            result[full] = _reordered(result[full], 1, config)
    return result


def _reordered(rows_O: Tensor, num_heads: int, config: DecoderConfig) -> Tensor:
    width, turned = config.head_dim, config.rope.width
    order_W = torch.arange(width)
    order_W[:turned] = torch.cat((torch.arange(0, turned, 2), torch.arange(1, turned, 2)))
    starts = torch.arange(num_heads).unsqueeze(1) * width
    order_O = torch.arange(len(rows_O))
    order_O[: num_heads * width] = (starts + order_W).flatten()
    return rows_O[order_O]
