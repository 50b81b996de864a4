"""Slow MTP modules that read like their definition: whole sequences in every call, no cache.

Written from the formulas and not from the product, whose twin they are in tests.

Shape legend: T rows, H hidden width, J heads, W width of a head, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from outrider.models.config import DecoderConfig
from outrider.models.heads.spec import Head

Layer = Callable[[int, Tensor], Tensor]
"""From a module's number and hidden_TH of rows at positions 0 to T - 1 to hidden_TH behind it."""


class ReferenceMTP:
    """All modules of a head.

    Args:
        target: the target's tensors, by Hugging Face names.
        layer: the decoder layers of the modules; `dense_layer` makes them for lean targets.
    """

    def __init__(self, head: Head, target: Mapping[str, Tensor], layer: Layer, eps: float) -> None:
        self._spec, self._tensors = head
        assert self._spec.mtp is not None
        self.num_modules = self._spec.mtp.num_modules
        self._target = target
        self._layer = layer
        self._eps = eps

    def feature(self, raw_TH: Tensor) -> Tensor:
        """What module 0 reads of the residual stream behind the target's last layer."""
        if self._spec.conventions.input_state == "raw":
            return raw_TH
        return rms(raw_TH, self._target["model.norm.weight"], self._eps)

    def draft(self, raw_TH: Tensor, tokens: Sequence[int], path: Sequence[int]) -> list[Tensor]:
        """logits_V after the log, and after each token of a drafted path.

        Args:
            raw_TH: states of positions 0 to n - 1; tokens: x_0 to x_n.
        """
        num_true, logits = len(raw_TH), []
        feeds = [list(self.feature(raw_TH)), *([] for _ in range(1, self.num_modules))]
        handed = self._run_all(feeds, [*tokens], num_true)
        for step in range(len(path) + 1):
            turn = step % self.num_modules
            logits.append(self._logits(turn, handed[turn][0][-1]))
            if step < len(path):
                tokens = [*tokens, path[step]]
                feeds[0].append(handed[-1][1][-1])
                handed = self._run_all(feeds, tokens, num_true + step + 1)
        return logits

    def _run_all(
        self, feeds: list[list[Tensor]], tokens: Sequence[int], num_rows: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Per module its states and what they hand on; module m begins with row m.

        Every module reads in row r what the one before it handed on in row r - 1.
        """
        found: list[tuple[Tensor, Tensor]] = []
        for number, feed in enumerate(feeds):
            if number:
                feed[:] = list(found[-1][1])[: num_rows - number]
            found.append(self.rows(number, tokens[number + 1 : num_rows + 1], torch.stack(feed)))
        return found

    def rows(
        self, number: int, tokens: Sequence[int], features_TH: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of one module: states_TH, and what they hand on."""
        chosen, start = self._spec.conventions, f"modules.{number}."
        own = self._tensors.get(f"{start}embed_tokens.weight")
        table = own if chosen.embedding == "own" else self._target["model.embed_tokens.weight"]
        assert table is not None
        embedded = table[torch.tensor(tokens)]
        if chosen.is_first_embedding_zero:
            embedded = torch.cat([torch.zeros_like(embedded[:1]), embedded[1:]])
        pair = [
            self._norm(embedded, f"{start}embedding_norm"),
            self._norm(features_TH, f"{start}feature_norm"),
        ]
        if chosen.concatenation == "feature-first":
            pair.reverse()
        hidden = self._layer(number, torch.cat(pair, dim=-1) @ self._tensors[f"{start}fc.weight"].T)
        normed = self._norm(hidden, f"{start}norm")
        return normed, normed if chosen.feedback == "post-norm" else hidden

    def _logits(self, number: int, normed_H: Tensor) -> Tensor:
        own = self._tensors.get(f"modules.{number}.lm_head.weight")
        table = own if self._spec.conventions.lm_head == "own" else None
        return (self._target["lm_head.weight"] if table is None else table) @ normed_H

    def _norm(self, x: Tensor, name: str) -> Tensor:
        plus = 1.0 if self._spec.conventions.norm_gain == "one-plus-weight" else 0.0
        return rms(x, self._tensors[f"{name}.weight"] + plus, self._eps)


def dense_layer(head: Head, config: DecoderConfig) -> Layer:
    """The layers of modules that ship with a Llama, Qwen2 or Qwen3 target."""
    plus = 1.0 if head.spec.conventions.norm_gain == "one-plus-weight" else 0.0
    is_paired = head.spec.conventions.rope_style == "interleaved"

    def run(number: int, x: Tensor) -> Tensor:
        t = {
            name.removeprefix(f"modules.{number}.layer."): tensor
            for name, tensor in head.tensors.items()
        }

        def norm(x: Tensor, name: str) -> Tensor:
            return rms(x, t[f"{name}.weight"] + plus, config.norm_eps)

        def heads(x: Tensor, name: str, count: int) -> Tensor:
            start = f"self_attn.{name}_proj"
            rows = x @ t[f"{start}.weight"].T + t.get(f"{start}.bias", 0)
            rows = rows.view(len(x), count, config.head_dim)
            return (
                norm(rows, f"self_attn.{name}_norm")
                if f"self_attn.{name}_norm.weight" in t
                else rows
            )

        seen = norm(x, "input_layernorm")
        q = turned(heads(seen, "q", config.num_heads), config.rope.theta, is_paired)
        k = turned(heads(seen, "k", config.num_kv_heads), config.rope.theta, is_paired)
        v = heads(seen, "v", config.num_kv_heads)
        x = x + causal(q, k, v) @ t["self_attn.o_proj.weight"].T
        seen = norm(x, "post_attention_layernorm")
        gate = seen @ t["mlp.gate_proj.weight"].T
        inner = gate * gate.sigmoid() * (seen @ t["mlp.up_proj.weight"].T)
        return x + inner @ t["mlp.down_proj.weight"].T

    return run


def causal(q_TJW: Tensor, k_TJW: Tensor, v_TJW: Tensor) -> Tensor:
    """Attention head by head, outputs side by side."""
    num_rows, num_heads, width = q_TJW.shape
    share, later = num_heads // k_TJW.shape[1], torch.ones(num_rows, num_rows).triu(1).bool()
    outputs = []
    for head in range(num_heads):
        scores = q_TJW[:, head] @ k_TJW[:, head // share].T / math.sqrt(width)
        weights = scores.masked_fill(later, -math.inf).softmax(-1)
        outputs.append(weights @ v_TJW[:, head // share])
    return torch.cat(outputs, dim=-1)


def turned(heads_TJW: Tensor, theta: float, is_paired: bool) -> Tensor:
    """Position t for row t; pairs are neighbours, or the two halves of a head."""
    width = heads_TJW.shape[-1]
    frequencies = theta ** -(torch.arange(0, width, 2) / width)
    angles = torch.arange(len(heads_TJW))[:, None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    if is_paired:
        a, b = heads_TJW[..., 0::2], heads_TJW[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    a, b = heads_TJW.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain
