"""A dense causal Llama for training, whose parameters carry the names transformers gives them.

Shape legend: B sequences, T positions, V vocabulary, D hidden, H heads, G kv heads, E head width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """Sizes of one decoder.

    Raises:
        ValueError: heads that cannot share kv heads evenly, or an odd head width.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads "
                f"{self.num_kv_heads}; choose head counts that divide"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions need pairs")


class Decoder(nn.Module):
    """Causal language model with tied embeddings; `state_dict` has the keys of LlamaForCausalLM."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.model = _Trunk(shape)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits for the token after each position, (B, T, V)."""
        logits_BTV: Tensor = self.lm_head(self.model(tokens_BT))
        return logits_BTV

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw normal weights of deviation 0.02, the residual outputs smaller by sqrt(2 layers)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            is_residual_output = name.endswith(("o_proj.weight", "down_proj.weight"))
            deviation = 0.02 / (2 * self.shape.num_layers) ** 0.5 if is_residual_output else 0.02
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)


class _Trunk(nn.Module):
    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.num_layers))
        self.norm = _RMSNorm(shape)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        hidden_BTD: Tensor = self.embed_tokens(tokens_BT)
        rotation = _rotation(self.shape, tokens_BT.shape[1], tokens_BT.device)
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD, rotation)
        normed_BTD: Tensor = self.norm(hidden_BTD)
        return normed_BTD


class _Layer(nn.Module):
    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.input_layernorm = _RMSNorm(shape)
        self.self_attn = _Attention(shape)
        self.post_attention_layernorm = _RMSNorm(shape)
        self.mlp = _FeedForward(shape)

    def forward(self, hidden_BTD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        hidden_BTD = hidden_BTD + self.self_attn(self.input_layernorm(hidden_BTD), rotation)
        residual_BTD: Tensor = self.mlp(self.post_attention_layernorm(hidden_BTD))
        return hidden_BTD + residual_BTD


class _Attention(nn.Module):
    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        query_size = shape.num_heads * shape.head_dim
        kv_size = shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, shape.hidden_size, bias=False)

    def forward(self, hidden_BTD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        query_BHTE = _rotate(self._heads(self.q_proj(hidden_BTD)), rotation)
        key_BGTE = _rotate(self._heads(self.k_proj(hidden_BTD)), rotation)
        value_BGTE = self._heads(self.v_proj(hidden_BTD))
        group = self.shape.num_heads // self.shape.num_kv_heads
        # Repeated keys keep the fused CPU kernel; enable_gqa falls back to the slow one there.
        mixed_BHTE = F.scaled_dot_product_attention(
            query_BHTE,
            key_BGTE.repeat_interleave(group, dim=1),
            value_BGTE.repeat_interleave(group, dim=1),
            is_causal=True,
        )
        out_BTD: Tensor = self.o_proj(mixed_BHTE.transpose(1, 2).flatten(2))
        return out_BTD

    def _heads(self, flat: Tensor) -> Tensor:
        split: Tensor = flat.unflatten(2, (-1, self.shape.head_dim))
        return split.transpose(1, 2)


class _FeedForward(nn.Module):
    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        out_BTD: Tensor = self.down_proj(
            F.silu(self.gate_proj(hidden_BTD)) * self.up_proj(hidden_BTD)
        )
        return out_BTD


class _RMSNorm(nn.Module):
    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.eps = shape.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(shape.hidden_size))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        wide_BTD = hidden_BTD.float()
        scale_BT1 = torch.rsqrt(wide_BTD.square().mean(-1, keepdim=True) + self.eps)
        normed_BTD: Tensor = (wide_BTD * scale_BT1).to(hidden_BTD.dtype) * self.weight
        return normed_BTD


def _rotation(shape: DecoderShape, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each (T, E), both halves of E alike."""
    exponent_E = torch.arange(0, shape.head_dim, 2, device=device).float() / shape.head_dim
    position_T = torch.arange(length, device=device).float()
    angle_TE = torch.outer(position_T, shape.rope_theta**-exponent_E).repeat(1, 2)
    return angle_TE.cos(), angle_TE.sin()


def _rotate(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs (i, i + E/2), the half-rotation convention of transformers."""
    cosine_TE, sine_TE = (part.to(heads.dtype) for part in rotation)
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine_TE + torch.cat((-second, first), dim=-1) * sine_TE
