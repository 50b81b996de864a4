"""A block drafter's tensors in one form: plain gains, and rotated pairs in halves of a head.

Shape legend: J heads, W width of a head.
"""

import torch
from torch import Tensor

from outrider.errors import ConfigError
from outrider.models.config import DecoderConfig, LayerConfig
from outrider.models.decoder import Decoder
from outrider.models.heads.network import ShownTarget
from outrider.models.heads.spec import DecoderShape, Head, HeadSpec
from outrider.models.rope_scaling import RopeConfig
from outrider.ops.base import Window

WHOLE = ("target_ids",)


def plain_tensors(head: Head, target: ShownTarget) -> dict[str, Tensor]:
    """Copies on the target's device and of its dtype, by canonical name, with no convention left.

    Norms of gain 1 + w hold that sum; query and key heads whose rotated pairs are neighbours have
    their rows in another order, which their products do not see.
    """
    spec, dtype, device = head.spec, target.spec.dtype, target.spec.device
    tensors = dict(head.tensors)
    if spec.conventions.rope_style == "interleaved":
        tensors |= _half_split(tensors, shape_of(spec))
    if spec.conventions.norm_gain == "one-plus-weight":
        norms = [name for name in tensors if name.endswith("norm.weight")]
        tensors |= {name: 1.0 + tensors[name].float() for name in norms}
    return {
        name: tensor.to(device) if name in WHOLE else tensor.to(device, dtype)
        for name, tensor in tensors.items()
    }


def decoder_config(spec: HeadSpec, target: ShownTarget) -> DecoderConfig:
    """The layers of a block drafter as those of a lean decoder.

    Raises:
        ConfigError: the target's frequencies are to be used, but they are not known or do not fit.
    """
    shape = shape_of(spec)
    return DecoderConfig(
        family=shape.family,
        vocab_size=spec.widths.vocab,
        hidden_size=spec.widths.hidden,
        intermediate_size=shape.intermediate_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        norm_eps=shape.norm_eps,
        attention_scale=shape.head_dim**-0.5,
        rope=_rope(spec, target),
        layers=tuple(LayerConfig(Window(sliding=width), True) for width in shape.windows),
        has_qkv_bias=shape.has_qkv_bias,
        has_output_bias=shape.has_output_bias,
        has_qk_norm=shape.has_qk_norm,
    )


def shape_of(spec: HeadSpec) -> DecoderShape:
    assert spec.decoder is not None, "a block drafter has layers"
    return spec.decoder


def _rope(spec: HeadSpec, target: ShownTarget) -> RopeConfig:
    shape = shape_of(spec)
    if spec.conventions.rope_origin == "own":
        return shape.rope
    rope = target.config.rope if isinstance(target, Decoder) else None
    if rope is None or rope.width > shape.head_dim:
        raise ConfigError(
            f"convention rope_origin='target': the frequencies of {target.spec.name!r} are not "
            f"known or do not fit heads of {shape.head_dim} values; use 'own'"
        )
    return rope


def _half_split(tensors: dict[str, Tensor], shape: DecoderShape) -> dict[str, Tensor]:
    """Weights, biases and norms of query and key heads with their rows in the other order."""
    order_W = torch.arange(shape.head_dim)
    turned = order_W[: shape.rope.width]
    order_W = torch.cat((turned[0::2], turned[1::2], order_W[shape.rope.width :]))
    moved: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".q_norm." in name or ".k_norm." in name:
            moved[name] = tensor[order_W]
        elif ".q_proj." in name or ".k_proj." in name:
            heads_JW = tensor.unflatten(0, (-1, shape.head_dim))
            moved[name] = heads_JW[:, order_W].flatten(0, 1)
    return moved
