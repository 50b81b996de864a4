"""MTPModule: one multi-token-prediction module of a target, a decoder layer between norms.

Shape legend: N rows of a pass, n and R some of them, V vocabulary, H hidden width.
"""

import re
from collections.abc import Mapping
from copy import copy
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.errors import ConfigError
from outrider.models.base import KVShape, ModelSpec
from outrider.models.decoder import Decoder, RMSNorm
from outrider.models.heads.given import adds_one_to_gain
from outrider.models.heads.mtp_lean import LeanLayer
from outrider.models.heads.network import ShownTarget
from outrider.models.heads.spec import Conventions, MTPShape
from outrider.ops.base import LayerKV, Layout, Ops

LAYER = "layer."
_NORM = re.compile(r".*norm\.weight$")


class MTPLayer(Protocol):
    """The decoder layer of a module."""

    kv_shape: KVShape
    norm_eps: float

    def __call__(self, hidden_NH: Tensor, layout: Layout, kv: LayerKV) -> Tensor:
        """Runs all rows; writes their keys and values."""
        ...

    def by_layer(self) -> "MTPLayer":
        """The same layer, one operation at a time."""
        ...


class ModuleRows(NamedTuple):
    """Tokens of the rows of a pass, and where they stand.

    Attributes:
        is_behind_gap_N: see `MTPNetwork.forward`.
    """

    tokens_N: Tensor
    layout: Layout
    is_behind_gap_N: Tensor | None

    def picked(self, rows_n: Tensor, layout: Layout) -> "ModuleRows":
        """Some of them."""
        is_behind_N = self.is_behind_gap_N
        is_behind_n = None if is_behind_N is None else is_behind_N[rows_n]
        return ModuleRows(self.tokens_N[rows_n], layout, is_behind_n)

    def is_first_N(self) -> Tensor:
        """The row of position 0."""
        is_first_N = self.layout.positions_N == 0
        if self.is_behind_gap_N is not None:
            is_first_N &= ~self.is_behind_gap_N
        return is_first_N


class ModuleStates(NamedTuple):
    """What a module's rows end in: the state its logits are read from, and what they hand on."""

    normed_NH: Tensor
    handed_NH: Tensor


class MTPModule:
    """fc([norm(embedding) ; norm(feature)]), a decoder layer, a norm; the last maybe with a head.

    Args:
        tensors: by canonical name within the module.
    """

    def __init__(
        self,
        conventions: Conventions,
        shape: MTPShape,
        tensors: Mapping[str, Tensor],
        target: ShownTarget,
        ops: Ops,
    ) -> None:
        spec = target.spec
        self._target = target
        self._conventions = conventions
        tensors = _with_plain_gains(tensors, conventions, spec.family)
        layer = {name.removeprefix(LAYER): t for name, t in tensors.items() if _is_layer(name)}
        own = {name: _like(spec, t) for name, t in tensors.items() if not _is_layer(name)}
        self._layer = _layer(target, shape.layer, layer, ops, conventions)
        self.kv_shape = self._layer.kv_shape
        self._embedding_norm, self._feature_norm, self._norm = (
            RMSNorm(own[f"{name}.weight"], self._layer.norm_eps)
            for name in ("embedding_norm", "feature_norm", "norm")
        )
        self._fc = ops.linear(own["fc.weight"])
        has_head = conventions.lm_head == "own" and "lm_head.weight" in own
        self._head = ops.linear(own["lm_head.weight"]) if has_head else None
        has_embedding = conventions.embedding == "own"
        self._embedding_VH = own.get("embed_tokens.weight") if has_embedding else None

    def __call__(self, rows: ModuleRows, feature_NH: Tensor, kv: LayerKV) -> ModuleStates:
        embedding_NH = self._embed(rows.tokens_N)
        if self._conventions.is_first_embedding_zero:
            embedding_NH = embedding_NH.masked_fill(rows.is_first_N().unsqueeze(1), 0.0)
        parts = [self._embedding_norm(embedding_NH), self._feature_norm(feature_NH)]
        if self._conventions.concatenation == "feature-first":
            parts.reverse()
        hidden_NH = self._layer(self._fc(torch.cat(parts, dim=1)), rows.layout, kv)
        normed_NH = self._norm(hidden_NH)
        is_normed = self._conventions.feedback == "post-norm"
        return ModuleStates(normed_NH, normed_NH if is_normed else hidden_NH)

    def logits(self, normed_RH: Tensor) -> Tensor:
        """float32 logits_RV."""
        if self._head is None:
            return self._target.head(normed_RH)
        return self._head(normed_RH).float()

    def by_layer(self) -> "MTPModule":
        """The same module, one operation at a time."""
        slow = copy(self)
        slow._layer = self._layer.by_layer()
        return slow

    def _embed(self, tokens_N: Tensor) -> Tensor:
        if self._embedding_VH is None:
            return self._target.embed(tokens_N)
        return F.embedding(tokens_N, self._embedding_VH)


def _is_layer(name: str) -> bool:
    return name.startswith(LAYER)


def _like(spec: ModelSpec, tensor: Tensor) -> Tensor:
    return tensor.to(spec.device, spec.dtype)


def _with_plain_gains(
    tensors: Mapping[str, Tensor], conventions: Conventions, family: str
) -> dict[str, Tensor]:
    """With gains as they are used: w of the module's own norms, what the target means in its layer.

    A target whose norms multiply by 1 + w does so in the layer itself.
    """
    added = float(conventions.norm_gain == "one-plus-weight")
    added_in_layer = added - float(adds_one_to_gain(family))
    result = dict(tensors)
    for name, gain in tensors.items():
        more = added_in_layer if _is_layer(name) else added
        if more and _NORM.match(name):
            result[name] = gain.float() + more
    return result


def _layer(
    target: ShownTarget,
    index: int,
    tensors: Mapping[str, Tensor],
    ops: Ops,
    conventions: Conventions,
) -> MTPLayer:
    if isinstance(target, Decoder):
        return LeanLayer(target, index, tensors, ops, conventions.rope_style)
    if conventions.rope_style != "half-split":
        raise ConfigError(
            f"convention rope_style={conventions.rope_style!r}: the layers of target "
            f"{target.spec.name!r} turn as transformers does; use 'half-split'"
        )
    from outrider.models.heads.mtp_adapted import AdaptedLayer  # with transformers, that is slow

    return AdaptedLayer(target, index, tensors, ops)
