"""A slow block drafter that reads like its definition: all context and the block, in every call.

Written from the formulas and not from the product, whose twin it is in tests: no cache, one
sequence, one head at a time.

Shape legend: S context positions, T slots, P = S + T, D width of the head, F width of all features,
J heads, W width of a head, V vocabulary of the target, U of the head, M rank of a finish.
"""

import math

import torch
from torch import Tensor

from outrider.models.heads.spec import Head
from outrider.models.rope_scaling import RopeConfig
from outrider.models.runner import Piece
from outrider.step import EMPTY_TREE
from tests.draft.draft_models import pooled


class ReferenceBlock:
    """One head over one target (a `Decoder`)."""

    def __init__(self, head: Head, target) -> None:
        self.spec, self._tensors = head
        self._target = target
        self._decoder = head.spec.decoder
        self._chosen = head.spec.conventions
        self._rope = self._decoder.rope
        if self._chosen.rope_origin == "target":
            self._rope = target.config.rope

    def features(self, tokens: list[int]) -> Tensor:
        """features_SF of all tokens, from one fresh pass of the target."""
        if not tokens:
            return torch.empty(0, self._tensors["fc.weight"].shape[1])
        runner, manager = pooled(self._target)
        table, _ = manager.open(tokens)
        assert manager.reserve(table, len(tokens))
        taps = tuple(range(self._target.spec.num_layers + 1))
        output = runner.run([Piece(table, 0, tokens, EMPTY_TREE, False)], taps)
        states_ASD = output.states.tapped_AND
        return torch.cat([states_ASD[j] for j in self._chosen.feature_layers], dim=-1)

    def block(self, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """Normed states_TD and logits_TU of all slots behind a text, the last token's first."""
        context_SD = self._norm(
            self.features(tokens[:-1]) @ self._tensors["fc.weight"].T, "hidden_norm"
        )
        slots = [self._embedded(tokens[-1])] + [self._mask()] * (self.spec.block_size - 1)
        x_TD = torch.stack(slots)
        for index in range(self._decoder.num_layers):
            x_TD = self._layer(x_TD, context_SD, index)
        states_TD = self._norm(x_TD, "norm")
        return states_TD, self._head(states_TD) * self.spec.logit_scale

    def slot(self, depth: int) -> int:
        """The slot whose logits are of the token `depth` behind the last one."""
        return depth - 1 if self._chosen.sample_from_anchor else depth

    def logits(self, tokens: list[int], path: list[int]) -> Tensor:
        """logits_V of what follows the text and a drafted path."""
        return self.told(tokens, path)[0]

    def told(self, tokens: list[int], path: list[int]) -> tuple[Tensor, float | None]:
        """Those, and how sure the head is of the token drafted there."""
        states_TD, logits_TU = self.block(tokens)
        states = [states_TD[self.slot(depth)] for depth in range(1, len(path) + 2)]
        added_U, sure = self.finish([tokens[-1], *path], states)
        return self.scattered(logits_TU[self.slot(len(path) + 1)] + added_U), sure

    def finish(
        self, previous: list[int], states: list[Tensor]
    ) -> tuple[Tensor | float, float | None]:
        """The correction at the last of some slots, from the tokens before each of them."""
        if self.spec.markov is None:
            return 0.0, None
        kind, memory_M = self.spec.markov.kind, torch.zeros(self.spec.markov.rank)
        for token, state_D in zip(previous, states, strict=True):
            word_M = self._tensors["markov.w1"][token]
            told_M = word_M
            if kind == "gated":
                read = torch.cat([state_D, word_M])
                told_M = torch.sigmoid(self._linear(read, "markov.gate")) * word_M
            if kind == "rnn":
                read = torch.cat([memory_M, word_M, state_D])
                g, c, o = self._linear(read, "markov.joint").chunk(3)
                memory_M = torch.sigmoid(g) * memory_M + (1 - torch.sigmoid(g)) * torch.tanh(c)
                told_M = torch.tanh(o)
        sure = None
        if self.spec.markov.confidence != "none":
            with_token = self.spec.markov.confidence == "state-and-token"
            read = torch.cat([state_D, word_M]) if with_token else state_D
            sure = float(torch.sigmoid(self._linear(read, "confidence")))
        return self._tensors["markov.w2"] @ told_M, sure

    def scattered(self, logits_U: Tensor) -> Tensor:
        ids = self._tensors.get("target_ids")
        if ids is None:
            return logits_U
        logits_V = torch.full((self.spec.widths.vocab,), -math.inf)
        logits_V[ids] = logits_U
        return logits_V

    def _embedded(self, token: int) -> Tensor:
        if self._chosen.embedding == "own":
            return self._tensors["embed_tokens.weight"][token]
        return self._target.embed(torch.tensor([token]))[0]

    def _mask(self) -> Tensor:
        own = self._tensors.get("mask_embedding")
        return self._embedded(self.spec.mask_token_id) if own is None else own

    def _head(self, states_TD: Tensor) -> Tensor:
        if self._chosen.lm_head == "own":
            return states_TD @ self._tensors["lm_head.weight"].T
        logits_TV = self._target.head(states_TD)
        ids = self._tensors.get("target_ids")
        return logits_TV if ids is None else logits_TV[:, ids]

    def _layer(self, x_TD: Tensor, context_SD: Tensor, index: int) -> Tensor:
        start = f"layers.{index}."
        v_TD = self._norm(x_TD, f"{start}input_layernorm")
        x_TD = x_TD + self._attention(v_TD, context_SD, index)
        read_TD = self._norm(x_TD, f"{start}post_attention_layernorm")
        gate, up, down = (
            self._tensors[f"{start}mlp.{name}_proj.weight"] for name in ("gate", "up", "down")
        )
        gated = read_TD @ gate.T
        return x_TD + (gated * gated.sigmoid() * (read_TD @ up.T)) @ down.T

    def _attention(self, v_TD: Tensor, context_SD: Tensor, index: int) -> Tensor:
        decoder, start = self._decoder, f"layers.{index}.self_attn."
        num_context, num_slots = len(context_SD), len(v_TD)
        both_PD = torch.cat([context_SD, v_TD])
        positions_P = torch.arange(num_context + num_slots)
        q = self._heads(v_TD, f"{start}q", decoder.num_heads)
        k = self._heads(both_PD, f"{start}k", decoder.num_kv_heads)
        v = self._linear(both_PD, f"{start}v_proj").unflatten(-1, (decoder.num_kv_heads, -1))
        q, k = self._rotated(q, positions_P[num_context:]), self._rotated(k, positions_P)
        seen_TP = self._seen(index, num_context, num_slots)
        share, outputs = decoder.num_heads // decoder.num_kv_heads, []
        for head in range(decoder.num_heads):
            scores = q[:, head] @ k[:, head // share].T / math.sqrt(decoder.head_dim)
            weights = scores.masked_fill(~seen_TP, -math.inf).softmax(-1)
            outputs.append(weights @ v[:, head // share])
        return self._linear(torch.cat(outputs, dim=-1), f"{start}o_proj")

    def _seen(self, index: int, num_context: int, num_slots: int) -> Tensor:
        """All context and the whole block; or what the layer's mask and window leave of it."""
        window = self._decoder.windows[index]
        is_causal = self._chosen.block_masks[index] == "causal"
        seen_TP = torch.ones(num_slots, num_context + num_slots, dtype=torch.bool)
        for slot in range(num_slots):
            position = num_context + slot
            for other in range(num_context + num_slots):
                if is_causal and other > position:
                    seen_TP[slot, other] = False
                if window and other <= position - window:
                    seen_TP[slot, other] = False
        return seen_TP

    def _heads(self, x: Tensor, name: str, num_heads: int) -> Tensor:
        heads = self._linear(x, f"{name}_proj").unflatten(-1, (num_heads, -1))
        return self._norm(heads, f"{name}_norm")

    def _rotated(self, heads_PJW: Tensor, positions_P: Tensor) -> Tensor:
        """The leading `rope.width` of each head; pairs are the two halves of it, or neighbours."""
        rope: RopeConfig = self._rope
        assert rope.kind == "default"
        width = rope.width
        angles = positions_P[:, None] * rope.theta ** -(torch.arange(0, width, 2) / width)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        turning, rest = heads_PJW[..., :width], heads_PJW[..., width:]
        if self._chosen.rope_style == "interleaved":
            a, b = turning[..., 0::2], turning[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        else:
            a, b = turning.chunk(2, dim=-1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        return torch.cat([turned, rest], dim=-1)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self._tensors[f"{name}.weight"].T + self._tensors.get(f"{name}.bias", 0)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        gain = self._tensors[f"{name}.weight"]
        if self._chosen.norm_gain == "one-plus-weight":
            gain = 1 + gain
        return x / (x.square().mean(-1, keepdim=True) + self._decoder.norm_eps).sqrt() * gain
