"""What networks of EAGLE and block heads are put together from: sizes, rope, a first layer."""

from dataclasses import replace

import torch
from torch import Tensor

from outrider.errors import ConfigError
from outrider.models.base import KVShape, ModelSpec
from outrider.models.config import DecoderConfig, LayerConfig
from outrider.models.decoder import MLP, Attention, Decoder, RMSNorm
from outrider.models.heads.fingerprint import head_fingerprint
from outrider.models.heads.network import ShownTarget
from outrider.models.heads.spec import DecoderShape, Head, HeadSpec
from outrider.models.rope import Turn
from outrider.models.rope_scaling import RopeConfig
from outrider.models.weights import Weights
from outrider.ops.base import Entry, LayerKV, LayerParts, Layout, Ops, Window


class FirstLayer:
    """A decoder layer that is told what its queries, keys and values are made from.

    Attributes:
        nothing_D: stands where kernels want a weight that this layer does not have.
    """

    def __init__(self, config: DecoderConfig, weights: Weights, ops: Ops) -> None:
        start = "layers.0."
        self._attention = Attention(config, config.layers[0], weights, f"{start}self_attn.", ops)
        gain_D = weights.take(f"{start}post_attention_layernorm.weight")
        self._mlp_norm = RMSNorm(gain_D, config.norm_eps)
        self._mlp = MLP(config, weights, f"{start}mlp.", ops)
        self.nothing_D = torch.zeros_like(gain_D)

    def __call__(self, entry: Entry, turn: Turn, layout: Layout, kv: LayerKV) -> Tensor:
        assert entry.first_NX is not None
        hidden_ND = entry.hidden_ND + self._attention(entry.first_NX, turn, layout, kv)
        return hidden_ND + self._mlp(self._mlp_norm(hidden_ND))

    def parts(self) -> LayerParts:
        attention, mlp = self._attention, self._mlp
        return LayerParts(
            attention_norm_D=self.nothing_D,
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


def boundaries_of(about: HeadSpec, num_layers: int) -> tuple[int, ...]:
    """Rising, and each once."""
    layers = about.conventions.feature_layers if about.widths.num_features else ()
    return tuple(sorted(set(layers))) or (num_layers,)


def decoder_config(about: HeadSpec, decoder: DecoderShape, rope: RopeConfig) -> DecoderConfig:
    return DecoderConfig(
        family=decoder.family,
        vocab_size=about.widths.draft_vocab,
        hidden_size=about.widths.hidden,
        intermediate_size=decoder.intermediate_size,
        num_heads=decoder.num_heads,
        num_kv_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        norm_eps=decoder.norm_eps,
        attention_scale=decoder.head_dim**-0.5,
        rope=rope,
        layers=tuple(LayerConfig(Window(sliding=width), True) for width in decoder.windows),
        has_qkv_bias=decoder.has_qkv_bias,
        has_output_bias=decoder.has_output_bias,
        has_qk_norm=decoder.has_qk_norm,
    )


def rope_config(about: HeadSpec, decoder: DecoderShape, target: ShownTarget) -> RopeConfig:
    if about.conventions.rope_origin == "own":
        return decoder.rope
    if not isinstance(target, Decoder):
        raise ConfigError(
            "convention rope_origin='target': the rope of a target is known in the lean decoder "
            "only; pin rope_origin='own'"
        )
    rope = target.config.rope
    if rope.short_factors and rope.width != decoder.rope.width:
        raise ConfigError(
            f"convention rope_origin='target': the target's LongRoPE turns {rope.width} values of "
            f"a head, the draft head {decoder.rope.width}; pin rope_origin='own'"
        )
    return replace(rope, width=decoder.rope.width)


def check_widths(about: HeadSpec) -> None:
    hidden, wanted = about.widths.hidden, about.widths.target_hidden
    for name in ("embedding", "lm_head"):
        if getattr(about.conventions, name) == "target" and hidden != wanted:
            raise ConfigError(
                f"convention {name}='target': the target's is {wanted} wide, the head {hidden}; "
                f"pin {name}='own'"
            )


def model_spec(head: Head, config: DecoderConfig, target: ModelSpec) -> ModelSpec:
    """Positions beyond those that the head was trained on only make worse drafts."""
    kv_shape = KVShape(config.num_kv_heads, config.head_dim, config.head_dim)
    return ModelSpec(
        name=head.spec.source or str(head.spec.family),
        family=str(head.spec.family),
        vocab_size=target.vocab_size,
        max_positions=target.max_positions,
        eos_token_ids=target.eos_token_ids,
        kv_shapes=(kv_shape,) * len(config.layers),
        dtype=target.dtype,
        device=target.device,
        num_parameters=sum(tensor.numel() for tensor in head.tensors.values()),
        fingerprint=head_fingerprint(head),
        mask_token_id=head.spec.mask_token_id,
    )
