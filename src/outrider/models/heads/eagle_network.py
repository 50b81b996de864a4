"""EagleNetwork: the forward of EAGLE-1/2, EAGLE-3 and P-EAGLE heads over a ragged pass of rows.

Li et al. 2024 ("EAGLE"), Li et al. 2025 ("EAGLE-3"); checkpoints 5.1 to 5.3.

Shape legend: N rows of a pass, R rows whose logits are wanted or features to read, A boundaries of
the target that are read, H hidden width of the target, D of the head, F = a * H width of all
features, V vocabulary of the target, U of the head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.models.config import DecoderConfig
from outrider.models.decoder import Layer, RMSNorm
from outrider.models.heads.eagle_parts import (
    FirstLayer,
    boundaries_of,
    check_widths,
    decoder_config,
    model_spec,
    rope_config,
)
from outrider.models.heads.network import HeadOutput, ShownTarget
from outrider.models.heads.normal_form import normal_form
from outrider.models.heads.spec import Family, Head
from outrider.models.rope import RopeTable
from outrider.models.weights import Weights
from outrider.ops.base import DecoderParts, Entry, LayerKV, Layout, Ops


class EagleNetwork:
    """A `RowNetwork` of the EAGLE family.

    EAGLE-3: g = fc(features) or what the row before handed on, e = the embedding of the next token;
    the first layer's queries, keys and values read [norm(e) ; norm(g)], its residual is g or
    norm(g). EAGLE-1: fc([e ; f]) enters a layer without input norm, and what comes out is the next
    f, which the target's head reads as it is (through the target's last norm if f is raw).

    Args:
        head: of the families eagle, eagle3 and peagle; its tensors are left as they are.
        target: what the head was trained for; embedding and LM head are taken from it where the
            head has none of its own.
        ops: kernels; None takes the target's.

    Attributes:
        mask_token_id, mask_input_1D: of the rows that draft in parallel (P-EAGLE), else None.

    Raises:
        ConfigError: the conventions ask for what the target or the head does not have.
    """

    def __init__(self, head: Head, target: ShownTarget, ops: Ops | None = None) -> None:
        about, chosen = head.spec, head.spec.conventions
        assert about.family in (Family.EAGLE, Family.EAGLE3, Family.PEAGLE)
        assert about.decoder is not None
        check_widths(about)
        self.ops = ops or target.ops
        self._target = target
        self._head = about
        config = decoder_config(about, about.decoder, rope_config(about, about.decoder, target))
        device, dtype = target.spec.device, target.spec.dtype
        tensors = normal_form(head.tensors, chosen, about.decoder)
        weights = Weights(tensors, dtype=dtype, device=device)
        ids_U = tensors.pop("target_ids", None)
        self._ids_U = None if ids_U is None else ids_U.to(device)
        mask_F = tensors.pop("mask_feature", None)
        self._rope = RopeTable(config.rope, dtype=dtype, device=device)
        self.boundaries = boundaries_of(about, target.spec.num_layers)
        # The order of concatenation need not be the rising one in which states come.
        self._order = [self.boundaries.index(layer) for layer in chosen.feature_layers]
        self._take_parts(weights, tensors, config)
        self._fused = self.ops.fuse(self._parts(config))
        self.spec = model_spec(head, config, target.spec)
        self.mask_token_id = about.mask_token_id
        self.mask_input_1D: Tensor | None = None
        if mask_F is not None:
            self.mask_input_1D = self._fuse(mask_F.to(device, dtype).view(1, -1))

    @torch.inference_mode()
    def read(self, tapped_ARH: Tensor) -> Tensor:
        """Features of the target as rows are fed with them, inputs_RD."""
        if self._head.widths.num_features:
            features_RF = torch.cat([tapped_ARH[place] for place in self._order], dim=-1)
            return self._fuse(features_RF)
        is_normed = self._head.conventions.input_state == "normed"
        return self._target.final_norm(tapped_ARH[0]) if is_normed else tapped_ARH[0]

    def forward(
        self,
        tokens_N: Tensor,
        inputs_ND: Tensor,
        layout: Layout,
        kv: list[LayerKV],
        wanted_R: Tensor,
    ) -> HeadOutput:
        """See `RowNetwork`."""
        if self._fused is None:
            return self.forward_by_layer(tokens_N, inputs_ND, layout, kv, wanted_R)
        entry, tables = self._enter(tokens_N, inputs_ND), self._rope.tables(layout)
        is_whole = self._lm_head is not None and self._norm is not None
        logits_RU, tapped_1ND = self._fused(
            tokens_N,
            layout,
            kv,
            wanted_R if is_whole else wanted_R[:0],
            *tables,
            entry=entry,
            taps=(len(kv),),
        )
        return self._leave(tapped_1ND[0], wanted_R, logits_RU if is_whole else None)

    @torch.inference_mode()
    def forward_by_layer(
        self,
        tokens_N: Tensor,
        inputs_ND: Tensor,
        layout: Layout,
        kv: list[LayerKV],
        wanted_R: Tensor,
    ) -> HeadOutput:
        """As `forward`, one operation at a time: the twin of a fused pass."""
        turn = self._rope.at(layout)
        hidden_ND = self._first(self._enter(tokens_N, inputs_ND), turn, layout, kv[0])
        for layer, layer_kv in zip(self._layers, kv[1:], strict=True):
            hidden_ND = layer(hidden_ND, turn, layout, layer_kv)
        return self._leave(hidden_ND, wanted_R)

    def _enter(self, tokens_N: Tensor, inputs_ND: Tensor) -> Entry:
        """What the first layer gets of tokens and of what rows are fed with."""
        e_ND, f_ND = self._embed(tokens_N), inputs_ND
        if self._embedding_norm is not None:
            e_ND = self._embedding_norm(e_ND)
        if self._feature_norm is not None:
            f_ND = self._feature_norm(f_ND)
        if self._head.family is Family.EAGLE:
            is_rising = self._head.conventions.concatenation == "embedding-first"
            assert self._fc is not None
            x_ND = self._fc(torch.cat((e_ND, f_ND) if is_rising else (f_ND, e_ND), dim=-1))
            return Entry(x_ND, x_ND)
        residual_ND = f_ND if self._head.conventions.norm_before_residual else inputs_ND
        return Entry(residual_ND, torch.cat((e_ND, f_ND), dim=-1))

    def _leave(
        self, hidden_ND: Tensor, wanted_R: Tensor, logits_RU: Tensor | None = None
    ) -> HeadOutput:
        """Logits of the wanted rows and the feedback of all.

        Args:
            logits_RU: of the head's own LM head, where a fused pass has them already.
        """
        feedback_ND = hidden_ND
        if self._norm is not None and self._head.conventions.feedback == "post-norm":
            feedback_ND = self._norm(hidden_ND)
        if self._lm_head is None:
            return HeadOutput(self._ask_target(hidden_ND.index_select(0, wanted_R)), feedback_ND)
        if logits_RU is None:
            logits_RU = self._lm_head(self._normed(hidden_ND.index_select(0, wanted_R))).float()
        return HeadOutput(self._scattered(logits_RU), feedback_ND)

    def _ask_target(self, hidden_RD: Tensor) -> Tensor:
        """The target's logits of its own tokens, of those that the head knows."""
        if self._head.family is Family.EAGLE and self._head.conventions.input_state == "raw":
            hidden_RD = self._target.final_norm(hidden_RD)
        logits_RV = self._target.head(self._normed(hidden_RD))
        return logits_RV if self._ids_U is None else self._scattered(logits_RV[:, self._ids_U])

    def _scattered(self, logits_RU: Tensor) -> Tensor:
        """Over the target's vocabulary; -inf where the head has no token."""
        if self._ids_U is None:
            return logits_RU
        logits_RV = logits_RU.new_full((len(logits_RU), self._head.widths.vocab), -math.inf)
        return logits_RV.index_copy_(1, self._ids_U, logits_RU)

    def _normed(self, hidden_RD: Tensor) -> Tensor:
        return hidden_RD if self._norm is None else self._norm(hidden_RD)

    def _embed(self, tokens_N: Tensor) -> Tensor:
        if self._embedding_VD is None:
            return self._target.embed(tokens_N)
        return F.embedding(tokens_N, self._embedding_VD)

    def _fuse(self, features_RF: Tensor) -> Tensor:
        """g of true features (and of the one that stands for unknown ones)."""
        if self._input_norms:
            chunks = features_RF.chunk(len(self._input_norms), dim=-1)
            normed = [norm(chunk) for norm, chunk in zip(self._input_norms, chunks, strict=True)]
            features_RF = torch.cat(normed, dim=-1)
        assert self._fc is not None
        return self._fc(features_RF)

    def _take_parts(
        self, weights: Weights, tensors: dict[str, Tensor], config: DecoderConfig
    ) -> None:
        chosen, eps = self._head.conventions, config.norm_eps

        def take(name: str) -> Tensor | None:
            return weights.take_optional(name in tensors, name)

        def norm(name: str) -> RMSNorm | None:
            weight_D = take(f"{name}.weight")
            return None if weight_D is None else RMSNorm(weight_D, eps)

        is_first = self._head.family is Family.EAGLE
        self._embedding_norm = norm("embedding_norm" if is_first else "layers.0.input_layernorm")
        self._feature_norm = norm("feature_norm" if is_first else "layers.0.hidden_norm")
        names = {
            "none": [],
            "all": ["input_norm"],
            "each": [f"fc_norm.{index}" for index in range(self._head.widths.num_features)],
        }[chosen.input_norm]
        self._input_norms = [made for name in names if (made := norm(name)) is not None]
        fc, bias_D = take("fc.weight"), take("fc.bias")
        self._fc = None if fc is None else self.ops.linear(fc, bias_D)
        self._norm = norm("norm")
        lm_head = take("lm_head.weight") if chosen.lm_head == "own" else None
        self._lm_head = None if lm_head is None else self.ops.linear(lm_head)
        self._embedding_VD = take("embed_tokens.weight") if chosen.embedding == "own" else None
        self._first = FirstLayer(config, weights, self.ops)
        self._layers = [
            Layer(config, layer, weights, f"layers.{index}.", self.ops)
            for index, layer in enumerate(config.layers[1:], start=1)
        ]

    def _parts(self, config: DecoderConfig) -> DecoderParts:
        """For kernels that fuse; they embed nothing and predict by the head's own norm and head."""
        nothing_1D = self._first.nothing_D.unsqueeze(0)
        return DecoderParts(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            norm_eps=config.norm_eps,
            attention_scale=config.attention_scale,
            rotated_width=config.rope.width,
            embedding_VD=nothing_1D,
            final_norm_D=self._first.nothing_D if self._norm is None else self._norm.weight,
            head=self._lm_head or self.ops.linear(nothing_1D),
            layers=[self._first.parts(), *(layer.parts() for layer in self._layers)],
        )
