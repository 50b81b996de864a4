"""Weights of a head rewritten so that its forward needs no switch for how they were stored."""

import re
from collections.abc import Mapping

from torch import Tensor

from outrider.models.heads.spec import Conventions, DecoderShape

_NORM = re.compile(r"norm(\.\d+)?\.weight$")
_TURNED = re.compile(r"self_attn\.([qk])_(proj|norm)\.(weight|bias)$")


def normal_form(
    tensors: Mapping[str, Tensor], conventions: Conventions, decoder: DecoderShape
) -> dict[str, Tensor]:
    """Norms that multiply by their weight, and rope whose pairs are the two halves of a head.

    Args:
        tensors: by canonical names; not changed.
    """
    made = dict(tensors)
    if conventions.norm_gain == "one-plus-weight":
        made |= {name: 1 + made[name].float() for name in made if _NORM.search(name)}
    if conventions.rope_style == "interleaved":
        turned = {name: match for name in made if (match := _TURNED.search(name))}
        for name, match in turned.items():
            made[name] = _halves(made[name], match, decoder)
    return made


def _halves(tensor: Tensor, match: re.Match[str], decoder: DecoderShape) -> Tensor:
    """Rows of each head: the first of every pair, then the second of every pair, then the rest."""
    num_heads = decoder.num_heads if match[1] == "q" else decoder.num_kv_heads
    if match[2] == "norm":
        num_heads = 1
    width = decoder.rope.width
    order = [*range(0, width, 2), *range(1, width, 2), *range(width, decoder.head_dim)]
    heads = tensor.view(num_heads, decoder.head_dim, *tensor.shape[1:])
    return heads[:, order].reshape(tensor.shape)
