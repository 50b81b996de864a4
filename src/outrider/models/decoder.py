"""The lean decoder: dense Llama-family networks over a ragged pass of chains and draft trees.

Shape legend: N rows of the pass, R rows whose logits are wanted, V vocabulary, D hidden width
(of a head where heads are named), H query heads, G key/value heads, J = H + G, I inner width of
the feed-forward layer, X = H + 2 G heads of the fused projection.
"""

from collections.abc import Callable, MutableMapping, Sequence
from copy import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.models.base import KVShape, ModelSpec
from outrider.models.config import DecoderConfig, LayerConfig
from outrider.models.rope import RopeTable, Turn, rotate_
from outrider.models.weights import (
    EMBEDDING,
    FINAL_NORM,
    Weights,
    check_tensors,
    gate_up_names,
    num_parameters,
    qkv_names,
)
from outrider.ops.base import DecoderParts, LayerKV, LayerParts, Layout, Ops, Passed
from outrider.quant.schemes import AS_STORED, Scheme


class Decoder:
    """A `Network` of the Llama family; what a row yields depends on its own path only.

    Args:
        tensors: weights by their Hugging Face names, in any float dtype; emptied on the way.
        ops: kernels; they pack the weights.
        dtype: of weights, activations and KV.
        scheme: how the weights of products are quantised.

    Raises:
        ModelError: a tensor is missing, unexpected, or of the wrong shape.
    """

    def __init__(
        self,
        config: DecoderConfig,
        tensors: MutableMapping[str, Tensor],
        ops: Ops,
        *,
        name: str = "decoder",
        eos_token_ids: tuple[int, ...] = (),
        fingerprint: str = "",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        scheme: Scheme = AS_STORED,
    ) -> None:
        check_tensors(tensors, config)
        self.config = config
        self.ops = ops
        device = torch.device(device)
        weights = Weights(tensors, dtype=dtype, device=device, scheme=scheme)
        self._rope = RopeTable(config.rope, dtype=dtype, device=device)
        self._layers = [
            Layer(config, layer, weights, f"model.layers.{index}.", ops)
            for index, layer in enumerate(config.layers)
        ]
        self._norm = RMSNorm(weights.take(FINAL_NORM), config.norm_eps)
        self._embedding_VD = weights.take(EMBEDDING)
        self._head = ops.linear(weights.take_head(config.is_tied, self._embedding_VD))
        self._fused = ops.fuse(self._parts())
        if self._fused is not None:  # one copy is enough
            self._embedding_VD = self._fused.embedding_VD
        self.spec = ModelSpec(
            name=name,
            family=config.family,
            vocab_size=config.vocab_size,
            max_positions=config.max_positions,
            eos_token_ids=eos_token_ids,
            kv_shapes=(KVShape(config.num_kv_heads, config.head_dim, config.head_dim),)
            * len(config.layers),
            dtype=dtype,
            device=device,
            num_parameters=num_parameters(config),
            fingerprint=fingerprint,
            mask_token_id=config.mask_token_id,
            hidden_size=config.hidden_size,
            num_layers=len(config.layers),
        )

    def forward(
        self, tokens_N: Tensor, layout: Layout, kv: list[LayerKV], wanted_R: Tensor
    ) -> Tensor:
        """Runs all rows, returns float32 logits_RV of the rows `wanted_R` indexes."""
        assert len(kv) == len(self._layers)
        if self._fused is not None:
            tables = self._rope.tables(layout)
            return self._fused(tokens_N, layout, kv, wanted_R, *tables).logits_RV
        return self.forward_by_layer(tokens_N, layout, kv, wanted_R).logits_RV

    def forward_tapped(
        self,
        tokens_N: Tensor,
        layout: Layout,
        kv: list[LayerKV],
        wanted_R: Tensor,
        taps: Sequence[int],
    ) -> Passed:
        """As `forward`, with the residual stream at the boundaries `taps` (see `ShowsStates`)."""
        if self._fused is not None:
            tables = self._rope.tables(layout)
            return self._fused(tokens_N, layout, kv, wanted_R, *tables, taps=taps)
        return self.forward_by_layer(tokens_N, layout, kv, wanted_R, taps)

    def forward_by_layer(
        self,
        tokens_N: Tensor,
        layout: Layout,
        kv: list[LayerKV],
        wanted_R: Tensor,
        taps: Sequence[int] = (),
    ) -> Passed:
        """As `forward_tapped`, one operation at a time: the twin of a fused pass."""
        hidden_ND = self.embed(tokens_N)
        turn = self._rope.at(layout)
        states = [hidden_ND]
        for layer, layer_kv in zip(self._layers, kv, strict=True):
            hidden_ND = layer(hidden_ND, turn, layout, layer_kv)
            states.append(hidden_ND)
        tapped = [states[boundary] for boundary in taps]
        tapped_AND = torch.stack(tapped) if tapped else hidden_ND.new_empty(0)
        return Passed(self.head(self._norm(hidden_ND.index_select(0, wanted_R))), tapped_AND)

    def embed(self, tokens_N: Tensor) -> Tensor:
        """The tokens' embeddings_ND, in the network's dtype."""
        return F.embedding(tokens_N, self._embedding_VD).to(self.spec.dtype)

    def final_norm(self, hidden_ND: Tensor) -> Tensor:
        """The norm before the head."""
        return self._norm(hidden_ND)

    def head(self, hidden_RD: Tensor) -> Tensor:
        """float32 logits_RV of normed states."""
        return self._head(hidden_RD).float()

    def truncated(self, num_layers: int) -> "Decoder":
        """The first layers between the same embedding, last norm and head; all weights are shared.

        A fused pass serves both: it runs as many layers as it is given KV of.
        """
        assert 1 <= num_layers <= len(self._layers)
        first = copy(self)
        first.config = replace(self.config, layers=self.config.layers[:num_layers])
        first._layers = self._layers[:num_layers]
        first.spec = replace(
            self.spec,
            name=f"{self.spec.name}[:{num_layers}]",
            kv_shapes=self.spec.kv_shapes[:num_layers],
            num_layers=num_layers,
            num_parameters=num_parameters(first.config),
            fingerprint=f"{self.spec.fingerprint}[:{num_layers}]",
        )
        return first

    def _parts(self) -> DecoderParts:
        config = self.config
        return DecoderParts(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            norm_eps=config.norm_eps,
            attention_scale=config.attention_scale,
            rotated_width=config.rope.width,
            embedding_VD=self._embedding_VD,
            final_norm_D=self._norm.weight,
            head=self._head,
            layers=[layer.parts() for layer in self._layers],
        )


class Layer:
    """Attention and feed-forward with their norms and residual sums."""

    def __init__(
        self, config: DecoderConfig, layer: LayerConfig, weights: Weights, prefix: str, ops: Ops
    ) -> None:
        self._attention_norm = RMSNorm(
            weights.take(f"{prefix}input_layernorm.weight"), config.norm_eps
        )
        self._attention = Attention(config, layer, weights, f"{prefix}self_attn.", ops)
        self._mlp_norm = RMSNorm(
            weights.take(f"{prefix}post_attention_layernorm.weight"), config.norm_eps
        )
        self._mlp = MLP(config, weights, f"{prefix}mlp.", ops)

    def __call__(self, hidden_ND: Tensor, turn: Turn, layout: Layout, kv: LayerKV) -> Tensor:
        hidden_ND = hidden_ND + self._attention(self._attention_norm(hidden_ND), turn, layout, kv)
        return hidden_ND + self._mlp(self._mlp_norm(hidden_ND))

    def parts(self) -> LayerParts:
        attention, mlp = self._attention, self._mlp
        return LayerParts(
            attention_norm_D=self._attention_norm.weight,
            mlp_norm_D=self._mlp_norm.weight,
            query_norm_D=attention.query_norm_D,
            key_norm_D=attention.key_norm_D,
            qkv=attention.qkv,
            output=attention.output,
            gate_up=mlp.gate_up,
            down=mlp.down,
            window=attention.window,
            has_rope=attention.has_rope,
        )


class Attention:
    """Grouped-query attention over the KV pool; queries and keys are normed and turned as one."""

    def __init__(
        self, config: DecoderConfig, layer: LayerConfig, weights: Weights, prefix: str, ops: Ops
    ) -> None:
        names = [f"{prefix}{name}" for name in qkv_names(config)]
        self.qkv = ops.linear(
            weights.take_product(*(f"{name}.weight" for name in names)),
            weights.take_optional(config.has_qkv_bias, *(f"{name}.bias" for name in names)),
        )
        self.output = ops.linear(
            weights.take_product(f"{prefix}o_proj.weight"),
            weights.take_optional(config.has_output_bias, f"{prefix}o_proj.bias"),
        )
        self.query_norm_D, self.key_norm_D = (
            weights.take_optional(config.has_qk_norm, f"{prefix}{name}_norm.weight")
            for name in ("q", "k")
        )
        self._head_norm = self._joint_norm(config)
        self.has_rope = layer.has_rope
        self.window = layer.window
        self._scale = config.attention_scale
        self._num_heads = config.num_heads
        self._num_turned = config.num_heads + config.num_kv_heads
        self._shape_XD = (config.num_heads + 2 * config.num_kv_heads, config.head_dim)
        self._ops = ops

    def __call__(self, hidden_ND: Tensor, turn: Turn, layout: Layout, kv: LayerKV) -> Tensor:
        qkv_NXD = self.qkv(hidden_ND).view(-1, *self._shape_XD)
        heads_NJD = qkv_NXD[:, : self._num_turned]
        if self._head_norm is not None:
            heads_NJD = self._head_norm(heads_NJD)
        if self.has_rope:
            rotate_(heads_NJD, turn)
        query_NHD, keys_NGD = heads_NJD[:, : self._num_heads], heads_NJD[:, self._num_heads :]
        self._ops.write_kv(kv, keys_NGD, qkv_NXD[:, self._num_turned :], layout)
        out_NHD = self._ops.attend(query_NHD, kv, layout, scale=self._scale, window=self.window)
        return self.output(out_NHD.flatten(1))

    def _joint_norm(self, config: DecoderConfig) -> "RMSNorm | None":
        """One norm for the heads of queries and keys."""
        if self.query_norm_D is None or self.key_norm_D is None:
            return None
        rows = (
            self.query_norm_D.expand(config.num_heads, -1),
            self.key_norm_D.expand(config.num_kv_heads, -1),
        )
        return RMSNorm(torch.cat(rows), config.norm_eps)


class MLP:
    """The gated feed-forward layer: down(silu(gate) * up)."""

    def __init__(self, config: DecoderConfig, weights: Weights, prefix: str, ops: Ops) -> None:
        names = [f"{prefix}{name}" for name in gate_up_names(config)]
        self.gate_up = ops.linear(
            weights.take_product(*(f"{name}.weight" for name in names)),
            weights.take_optional(config.has_mlp_bias, *(f"{name}.bias" for name in names)),
        )
        self.down = ops.linear(
            weights.take_product(f"{prefix}down_proj.weight"),
            weights.take_optional(config.has_mlp_bias, f"{prefix}down_proj.bias"),
        )
        is_reference = weights.device.type == "cpu" and weights.dtype == torch.float32
        self._silu: Callable[[Tensor], Tensor] = silu_anywhere if is_reference else F.silu

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        gate_NI, up_NI = self.gate_up(hidden_ND).chunk(2, dim=-1)
        return self.down(self._silu(gate_NI).mul_(up_NI))


class RMSNorm:
    """x / rms(x) * weight, the quotient in float32 (Zhang and Sennrich 2019).

    A weight of several rows, one per head, serves heads of different norms at once.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self._width = weight.shape[-1:]
        self._eps = eps
        self._is_one_call = weight.dtype == torch.float32 and weight.dim() == 1

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        if self._is_one_call:
            return torch.rms_norm(hidden_ND, self._width, self.weight, self._eps)
        normed_ND = torch.rms_norm(hidden_ND.float(), self._width, None, self._eps)
        return normed_ND.to(hidden_ND.dtype) * self.weight


def silu_anywhere(x_NI: Tensor) -> Tensor:
    """x / (1 + exp(-x)), with the same bits wherever an element stands.

    `F.silu` on the CPU is vectorised but for the last elements of each thread's share, whose
    exponential differs in the last bit, so a row would depend on the number of rows beside it.
    """
    return x_NI / x_NI.neg().exp_().add_(1)
