"""A block drafter's tensors in one form, and its layers as those of a lean decoder."""

from torch import Tensor

from outrider.models.config import DecoderConfig
from outrider.models.heads import eagle_parts
from outrider.models.heads.network import ShownTarget
from outrider.models.heads.normal_form import normal_form
from outrider.models.heads.spec import DecoderShape, Head, HeadSpec

WHOLE = ("target_ids",)


def plain_tensors(head: Head, target: ShownTarget) -> dict[str, Tensor]:
    """Copies on the target's device and of its dtype, by canonical name, in `normal_form`."""
    dtype, device = target.spec.dtype, target.spec.device
    tensors = normal_form(head.tensors, head.spec.conventions, shape_of(head.spec))
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
    return eagle_parts.decoder_config(spec, shape, eagle_parts.rope_config(spec, shape, target))


def shape_of(spec: HeadSpec) -> DecoderShape:
    assert spec.decoder is not None, "a block drafter has layers"
    return spec.decoder
