"""A slow EAGLE-3 head that reads like its definition: the whole sequence in every call, no cache.

Written from the formulas and not from the product, whose twin it is in tests.

Shape legend: T rows, D width of the head, F width of all features, C width of one, J heads,
W width of a head, V draft vocabulary. Row t holds the features of position t and token t + 1.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from outrider.models.heads.spec import DecoderShape, Head


class Rows(NamedTuple):
    """What the rows of one call give: logits over the draft vocabulary, and what they hand on."""

    logits_TV: Tensor
    feedback_TD: Tensor


class ReferenceEagle3:
    """One EAGLE-3 head.

    Args:
        head: as loaded.
        embedding_VD: the target's, for a head without one of its own.
        lm_head_VD: likewise; the rows of the draft vocabulary are chosen here.
    """

    def __init__(
        self, head: Head, embedding_VD: Tensor | None = None, lm_head_VD: Tensor | None = None
    ) -> None:
        self._spec, self._tensors = head
        chosen = self._spec.conventions
        own_embedding = self._tensors.get("embed_tokens.weight")
        self._embedding = own_embedding if chosen.embedding == "own" else embedding_VD
        if chosen.lm_head == "own":
            self._lm_head = self._tensors["lm_head.weight"]
        else:
            assert lm_head_VD is not None
            ids = self._tensors.get("target_ids")
            self._lm_head = lm_head_VD if ids is None else lm_head_VD[ids]

    def fuse(self, features_TF: Tensor) -> Tensor:
        """g of the first pass: the projected features of true positions."""
        kind = self._spec.conventions.input_norm
        if kind == "all":
            features_TF = self._norm(features_TF, "input_norm")
        if kind == "each":
            chunks = features_TF.chunk(self._spec.widths.num_features, dim=-1)
            normed = [self._norm(chunk, f"fc_norm.{i}") for i, chunk in enumerate(chunks)]
            features_TF = torch.cat(normed, dim=-1)
        if "fc.weight" not in self._tensors:
            return features_TF
        projected = features_TF @ self._tensors["fc.weight"].T
        return projected + self._tensors.get("fc.bias", 0)

    def rows(self, inputs_TD: Tensor, tokens_T: Tensor) -> Rows:
        """All rows at once, each seeing itself and those before it.

        Args:
            inputs_TD: g per row: `fuse` of true features, or the feedback of the row before.
            tokens_T: of position t + 1 for row t.
        """
        decoder = self._spec.decoder
        assert decoder is not None
        hidden = self._first_layer(inputs_TD, tokens_T, decoder)
        for index in range(1, decoder.num_layers):
            hidden = self._later_layer(hidden, index, decoder)
        normed = self._norm(hidden, "norm")
        is_normed = self._spec.conventions.feedback == "post-norm"
        return Rows(normed @ self._lm_head.T, normed if is_normed else hidden)

    def draft(self, features_TF: Tensor, tokens_T: Tensor, num_tokens: int) -> list[Tensor]:
        """Logits over the draft vocabulary of a greedy chain; tokens_T are one ahead of features.

        Rows after the true ones see their parents' feedback; everything is computed anew for
        every token.
        """
        inputs, tokens, logits = self.fuse(features_TF), tokens_T, []
        for _ in range(num_tokens):
            rows = self.rows(inputs, tokens)
            logits.append(rows.logits_TV[-1])
            pick = self.target_id(int(logits[-1].argmax()))
            inputs = torch.cat([inputs, rows.feedback_TD[-1:]])
            tokens = torch.cat([tokens, torch.tensor([pick])])
        return logits

    def target_id(self, draft_id: int) -> int:
        """The target's token of a draft id."""
        ids = self._tensors.get("target_ids")
        return draft_id if ids is None else int(ids[draft_id])

    def _first_layer(self, g_TD: Tensor, tokens_T: Tensor, decoder: DecoderShape) -> Tensor:
        assert self._embedding is not None
        e = self._norm(self._embedding[tokens_T], "layers.0.input_layernorm")
        n = self._norm(g_TD, "layers.0.hidden_norm")
        residual = n if self._spec.conventions.norm_before_residual else g_TD
        u = residual + self._attention(torch.cat([e, n], dim=-1), 0, decoder)
        return u + self._mlp(self._norm(u, "layers.0.post_attention_layernorm"), 0)

    def _later_layer(self, x_TD: Tensor, index: int, decoder: DecoderShape) -> Tensor:
        start = f"layers.{index}."
        u = x_TD + self._attention(self._norm(x_TD, f"{start}input_layernorm"), index, decoder)
        return u + self._mlp(self._norm(u, f"{start}post_attention_layernorm"), index)

    def _attention(self, x: Tensor, index: int, decoder: DecoderShape) -> Tensor:
        num_rows, width = x.shape[0], decoder.head_dim
        q = self._heads(x, index, "q", decoder.num_heads, width)
        k = self._heads(x, index, "k", decoder.num_kv_heads, width)
        v = self._linear(x, index, "v").view(num_rows, decoder.num_kv_heads, width)
        q, k = self._rotated(q, decoder), self._rotated(k, decoder)
        share = decoder.num_heads // decoder.num_kv_heads
        outputs = []
        for head in range(decoder.num_heads):
            scores = q[:, head] @ k[:, head // share].T / math.sqrt(width)
            later = torch.ones(num_rows, num_rows).triu(1).bool()
            weights = scores.masked_fill(later, -math.inf).softmax(-1)
            outputs.append(weights @ v[:, head // share])
        return self._linear(torch.cat(outputs, dim=-1), index, "o")

    def _heads(self, x: Tensor, index: int, name: str, num_heads: int, width: int) -> Tensor:
        heads = self._linear(x, index, name).view(-1, num_heads, width)
        norm = f"layers.{index}.self_attn.{name}_norm"
        return self._norm(heads, norm) if f"{norm}.weight" in self._tensors else heads

    def _rotated(self, heads_TJW: Tensor, decoder: DecoderShape) -> Tensor:
        """Position t for row t; pairs are the two halves of a head, or neighbours."""
        width = decoder.head_dim
        assert (decoder.rope.kind, decoder.rope.width) == ("default", width)
        exponents = torch.arange(0, width, 2) / width
        angles = torch.arange(heads_TJW.shape[0])[:, None] * decoder.rope.theta**-exponents
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        if self._spec.conventions.rope_style == "interleaved":
            a, b = heads_TJW[..., 0::2], heads_TJW[..., 1::2]
            return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        a, b = heads_TJW.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def _mlp(self, x: Tensor, index: int) -> Tensor:
        start = f"layers.{index}.mlp."
        gate, up, down = (
            self._tensors[f"{start}{name}_proj.weight"] for name in ("gate", "up", "down")
        )
        gated = x @ gate.T
        return (gated * gated.sigmoid() * (x @ up.T)) @ down.T

    def _linear(self, x: Tensor, index: int, name: str) -> Tensor:
        start = f"layers.{index}.self_attn.{name}_proj."
        return x @ self._tensors[f"{start}weight"].T + self._tensors.get(f"{start}bias", 0)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        decoder = self._spec.decoder
        assert decoder is not None
        gain = self._tensors[f"{name}.weight"]
        if self._spec.conventions.norm_gain == "one-plus-weight":
            gain = 1 + gain
        return x / (x.square().mean(-1, keepdim=True) + decoder.norm_eps).sqrt() * gain
