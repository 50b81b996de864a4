"""MTPNetwork: multi-token-prediction modules, each one decoder layer of the target's own kind.

DeepSeek-V3 (2024, section 2.2); checkpoints 5.8. Row t of module 0 reads the target's feature of
position t and the token at t + 1, and its law is that of the token at t + 2.

Shape legend: N rows of a pass, R rows that are wanted, V vocabulary, H hidden width, A boundaries
between layers of the target.
"""

import re
from collections.abc import Mapping, Sequence as Items
from copy import copy
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.cache.pool import KVPool
from outrider.errors import ConfigError
from outrider.models.base import KVShape, ModelSpec
from outrider.models.decoder import Decoder, RMSNorm
from outrider.models.heads.fingerprint import head_fingerprint
from outrider.models.heads.given import adds_one_to_gain
from outrider.models.heads.mtp_lean import LeanLayer
from outrider.models.heads.mtp_turns import own_rows, parent_slots, steps_of
from outrider.models.heads.network import HeadOutput, HeadPiece, HeadRunner, ShownTarget
from outrider.models.heads.spec import Conventions, Head, MTPShape
from outrider.models.runner import upload
from outrider.ops.base import LayerKV, Layout, Ops

LAYER = "layer."
_NORM = re.compile(r".*norm\.weight$")
_PART = re.compile(r"modules\.(\d+)\.(.+)$")


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


class MTPNetwork:
    """Modules that take turns: the draft's step k is that of module k mod D, D modules in all.

    One module alone runs step after step, fed with its own state.

    Of several, module m reads in row r what module m - 1 handed on in row r - 1, so all of them
    pair row r with the token at r + 1 and speak of the token at r + 2; its first row is row m, at
    position 0. This is how they are trained: the paper counts rows of module m from there. Every
    module runs over all committed rows; so the keys and values it sees at its turn are true ones
    up to the last committed row, and those of the draft's own rows after it. Module 0 reads the
    target's feature there, and in a drafted row what the last module handed on.

    That a state is found again in a later pass, the pool keeps it, as further layers: it is shared,
    saved and rolled back with keys and values.

    Attributes:
        target: whose states it reads, and whose embedding, norm and head it shares.

    Raises:
        ConfigError: a layer of this target, or a convention, cannot be run.
    """

    def __init__(self, head: Head, target: ShownTarget, ops: Ops) -> None:
        spec = head.spec
        assert spec.mtp is not None
        _check(spec.conventions)
        self.ops = ops
        self.target = target
        self._is_normed = spec.conventions.input_state == "normed"
        self.boundaries: tuple[int, ...] = (target.spec.num_layers,)
        self._modules = [
            MTPModule(spec.conventions, spec.mtp, _tensors_of(head, number), target, ops)
            for number in range(spec.mtp.num_modules)
        ]
        num_modules, hidden = len(self._modules), target.spec.hidden_size
        kept = (KVShape(1, hidden, 0),) * (num_modules - 1)
        self.spec = replace(
            target.spec,
            name=spec.source or "mtp",
            family="mtp",
            kv_shapes=tuple(module.kv_shape for module in self._modules) + kept,
            num_parameters=sum(tensor.numel() for tensor in head.tensors.values()),
            fingerprint=head_fingerprint(head),
            hidden_size=0,
            num_layers=0,
        )

    def read(self, tapped_ARH: Tensor) -> Tensor:
        """See `RowNetwork`; with several modules, a column for the step, 0, beside the feature."""
        (feature_RH,) = tapped_ARH
        if self._is_normed:
            feature_RH = self.target.final_norm(feature_RH)
        return feature_RH if len(self._modules) == 1 else F.pad(feature_RH, (0, 1))

    def forward(
        self,
        tokens_N: Tensor,
        inputs_ND: Tensor,
        layout: Layout,
        kv: list[LayerKV],
        wanted_R: Tensor,
        steps: Items[int] | None = None,
        is_behind_gap_N: Tensor | None = None,
    ) -> HeadOutput:
        """See `RowNetwork`.

        Args:
            steps: of the wanted rows, where the host knows; else it is asked of the device.
            is_behind_gap_N: rows of sequences whose place 0 is not position 0; None for none.
        """
        if len(self._modules) > 1:
            rows = _Rows(tokens_N, layout, is_behind_gap_N)
            return self._in_turns(rows, inputs_ND, kv, wanted_R, steps)
        (module,) = self._modules
        states = module(_Rows(tokens_N, layout, is_behind_gap_N), inputs_ND, kv[0])
        return HeadOutput(module.logits(states.normed_NH[wanted_R]), states.handed_NH)

    def by_layer(self) -> "MTPNetwork":
        """The same modules, one operation at a time: the twin of fused layers."""
        slow = copy(self)
        slow._modules = [module.by_layer() for module in self._modules]
        return slow

    def _in_turns(
        self,
        rows: "_Rows",
        inputs_ND: Tensor,
        kv: list[LayerKV],
        wanted_R: Tensor,
        steps: Items[int] | None,
    ) -> HeadOutput:
        num_modules, layout = len(self._modules), rows.layout
        parents_N = upload(parent_slots(layout.spans), layout.slots_N.device)
        feature_NH, step_N1 = inputs_ND[:, :-1], inputs_ND[:, -1:]
        states, all_states = _States(feature_NH, feature_NH), []
        for number, module in enumerate(self._modules):
            if number:
                kept = kv[num_modules + number - 1].keys
                kept.index_copy_(0, layout.slots_N, states.handed_NH.unsqueeze(1))
                feature_NH = kept.index_select(0, parents_N).squeeze(1)
            states = self._in_own_rows(module, number, states, rows, feature_NH, kv[number])
            all_states.append(states)
        if steps is None:
            steps = step_N1[wanted_R, 0].long().tolist()
        turns = [step % num_modules for step in steps]
        feedback_ND = torch.cat((states.handed_NH, step_N1 + 1), dim=1)
        return HeadOutput(self._logits(all_states, wanted_R, turns), feedback_ND)

    def _in_own_rows(
        self,
        module: "MTPModule",
        number: int,
        before: "_States",
        rows: "_Rows",
        feature_NH: Tensor,
        kv: LayerKV,
    ) -> "_States":
        """What a module says; in rows before its first one, what the module before it said."""
        device = rows.layout.slots_N.device
        own, spans = own_rows(rows.layout.spans, number)
        if own is None:
            layout = self.ops.layout(spans, device) if number else rows.layout
            return module(rows._replace(layout=layout), feature_NH, kv)
        if not own:
            return before
        own_n = upload(own, device)
        ran = module(rows.picked(own_n, self.ops.layout(spans, device)), feature_NH[own_n], kv)
        pairs = zip(before, ran, strict=True)
        return _States(*(old.index_copy(0, own_n, new) for old, new in pairs))

    def _logits(self, said: "list[_States]", wanted_R: Tensor, turns: list[int]) -> Tensor:
        """logits_RV, each row's by the module whose turn it is."""
        device = wanted_R.device
        logits_RV = torch.empty(len(turns), self.spec.vocab_size, device=device)
        for number, (module, states) in enumerate(zip(self._modules, said, strict=True)):
            own = [row for row, turn in enumerate(turns) if turn == number]
            if own:
                own_r = upload(own, device)
                logits_RV[own_r] = module.logits(states.normed_NH[wanted_R[own_r]])
        return logits_RV


class MTPRunner(HeadRunner):
    """Tells the modules which step each row is, and who begins behind a gap."""

    def __init__(self, network: MTPNetwork, pool: KVPool) -> None:
        super().__init__(network, pool)
        self._modules = network

    def forward(
        self,
        pieces: list[HeadPiece],
        tokens_N: Tensor,
        inputs_ND: Tensor,
        layout: Layout,
        wanted_R: Tensor,
    ) -> HeadOutput:
        is_behind_gap_N = None
        if any(piece.is_behind_gap for piece in pieces):
            is_behind = [
                int(piece.is_behind_gap)
                for piece in pieces
                for _ in range(len(piece.chain) + len(piece.tree))
            ]
            is_behind_gap_N = upload(is_behind, tokens_N.device).bool()
        return self._modules.forward(
            tokens_N,
            inputs_ND,
            layout,
            self.pool.layers,
            wanted_R,
            list(steps_of(pieces)),
            is_behind_gap_N,
        )


class _Rows(NamedTuple):
    """Tokens of the rows of a pass, and where they stand.

    Attributes:
        is_behind_gap_N: see `MTPNetwork.forward`.
    """

    tokens_N: Tensor
    layout: Layout
    is_behind_gap_N: Tensor | None

    def picked(self, rows_n: Tensor, layout: Layout) -> "_Rows":
        """Some of them."""
        is_behind_N = self.is_behind_gap_N
        is_behind_n = None if is_behind_N is None else is_behind_N[rows_n]
        return _Rows(self.tokens_N[rows_n], layout, is_behind_n)

    def is_first_N(self) -> Tensor:
        """The row of position 0."""
        is_first_N = self.layout.positions_N == 0
        if self.is_behind_gap_N is not None:
            is_first_N &= ~self.is_behind_gap_N
        return is_first_N


class _States(NamedTuple):
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

    def __call__(self, rows: _Rows, feature_NH: Tensor, kv: LayerKV) -> _States:
        embedding_NH = self._embed(rows.tokens_N)
        if self._conventions.is_first_embedding_zero:
            embedding_NH = embedding_NH.masked_fill(rows.is_first_N().unsqueeze(1), 0.0)
        parts = [self._embedding_norm(embedding_NH), self._feature_norm(feature_NH)]
        if self._conventions.concatenation == "feature-first":
            parts.reverse()
        hidden_NH = self._layer(self._fc(torch.cat(parts, dim=1)), rows.layout, kv)
        normed_NH = self._norm(hidden_NH)
        is_normed = self._conventions.feedback == "post-norm"
        return _States(normed_NH, normed_NH if is_normed else hidden_NH)

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


def _check(conventions: Conventions) -> None:
    if conventions.rope_origin != "target":
        raise ConfigError(
            f"convention rope_origin={conventions.rope_origin!r}: an MTP module is a layer of its "
            "target and has no frequencies of its own; use 'target'"
        )


def _tensors_of(head: Head, number: int) -> dict[str, Tensor]:
    found = ((_PART.match(name), tensor) for name, tensor in head.tensors.items())
    return {m[2]: tensor for m, tensor in found if m is not None and int(m[1]) == number}


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
