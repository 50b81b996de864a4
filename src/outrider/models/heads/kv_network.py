"""KVNetwork: a head whose attention reads the target's own keys and values.

All rows of a draft see the same frozen KV: positions 0 to n - 1 of the committed text, for a token
x_n that has none yet. Row 0 pairs x_n with the feature of position n - 1; a row k below it pairs
the k-th drafted token with the state that the row before handed on. The relative of this in
production gives every row the same position; here row k stands at n + k, the position of its own
token, so that distances to keys are those the target was trained with, and its layers can begin
as copies of the target's.

A head that `sees_drafts` has keys and values of its own for rows 0 to k. They stand in the slots
that are reserved for the pass that verifies, which writes the target's there, layer by layer: what
is read as committed is never touched. Any other head writes nothing.

Shape legend: N rows of a pass, R rows whose logits are wanted, H hidden width of the target, h of
the head, J query heads, G key/value heads, D key width, E value width, V vocabulary of the target,
C of the head.
"""

from collections.abc import Iterator, Sequence as Items
from typing import NamedTuple

import torch
from torch import Tensor

from outrider.cache.pool import KVPool
from outrider.errors import ConfigError, PairError
from outrider.models.base import KVShape
from outrider.models.decoder import Decoder, RMSNorm
from outrider.models.heads.kv_head import KVHeadSpec
from outrider.models.heads.kv_layer import KVLayer
from outrider.models.heads.network import HeadOutput, HeadPiece
from outrider.models.heads.spec import Head
from outrider.models.rope import RopeTable
from outrider.models.runner import upload
from outrider.models.weights import Weights
from outrider.ops.base import DecoderParts, Entry, LayerKV, Layout, Linear, Ops, Span
from outrider.step import TargetOutput


class Rows(NamedTuple):
    """Where the rows of a pass stand, and what they see.

    Attributes:
        standing: has the positions of their tokens.
        seeing: what attention goes by.
    """

    standing: Layout
    seeing: Layout


class KVNetwork:
    """One head over one target.

    Args:
        head: as `read_kv` gave it.
        target: the lean decoder whose KV it reads.

    Raises:
        PairError: the target has layers whose KV is of another shape.

    Attributes:
        boundaries: of the target's states that it reads.
    """

    def __init__(self, head: Head, target: Decoder) -> None:
        spec = head.spec
        assert isinstance(spec, KVHeadSpec)
        check_kv(spec, target)
        self.head_spec = spec
        self.target = target
        self.spec = target.spec
        self.ops: Ops = target.ops
        self.boundaries = (target.spec.num_layers,)
        dtype, device, eps = target.spec.dtype, target.spec.device, spec.kv.norm_eps
        weights = Weights(dict(head.tensors), dtype=dtype, device=device)
        self._rope = RopeTable(target.config.rope, dtype=dtype, device=device)
        self._embedding_norm = RMSNorm(weights.take("embedding_norm.weight"), eps)
        self._feature_norm = RMSNorm(weights.take("feature_norm.weight"), eps)
        self._fc = self.ops.linear(weights.take_product("fc.weight"))
        self._layers = [KVLayer(spec.kv, i, target, weights) for i in range(spec.kv.num_layers)]
        self._norm = RMSNorm(weights.take("norm.weight"), eps)
        self._output = self._own("output.weight", weights, "output.weight" in head.tensors)
        self._lm_head = self._own("lm_head.weight", weights, spec.conventions.lm_head == "own")
        self._fused = self.ops.fuse(self._parts()) if self._is_decoder() else None
        self._pools: list[LayerKV] = []
        ids_C = head.tensors.get("target_ids")
        self._ids_C = None if ids_C is None else ids_C.to(device)

    def read(self, tapped_RH: Tensor) -> Tensor:
        """What row 0 is fed with, from the target's last states before their norm."""
        is_normed = self.head_spec.conventions.input_state == "normed"
        return self.target.final_norm(tapped_RH) if is_normed else tapped_RH

    def rows(self, spans: list[Span], num_keys: Items[int]) -> Rows:
        """The rows of these spans, each over as many frozen keys, at least 1.

        Without keys of its own a row stands in for the last position that it sees: `Ops.attend`
        lets it see the cached positions and its own slot, which holds that position's keys and
        values. A sliding window is counted from there too.
        """
        standing = self.ops.layout(spans, self.spec.device)
        if self.head_spec.kv.sees_drafts:
            return Rows(standing, standing)
        alone = [
            Span(span.blocks, count - 1, 1, (), span.block_size)
            for span, count in zip(spans, num_keys, strict=True)
            for _ in range(span.num_rows)
        ]
        return Rows(standing, self.ops.layout(alone, self.spec.device))

    def forward(
        self,
        tokens_N: Tensor,
        inputs_NH: Tensor,
        rows: Rows,
        kv: Items[LayerKV],
        wanted_R: Tensor | None = None,
    ) -> HeadOutput:
        """Runs rows.

        Args:
            inputs_NH: of `read` for row 0 of a draft, the feedback of the row before for others.
            kv: of all layers of the target.
            wanted_R: rows whose logits are wanted; None for all.
        """
        if self._fused is None:
            return self.forward_by_layer(tokens_N, inputs_NH, rows, kv, wanted_R)
        passed = self._fused(
            tokens_N,
            rows.seeing,
            self._own_pools(kv),
            rows.seeing.positions_N[:0],
            *self._rope.tables(rows.standing),
            entry=Entry(self._enter(tokens_N, inputs_NH)),
            taps=(len(self._layers),),
        )
        return self._leave(passed.tapped_AND[0], wanted_R)

    @torch.inference_mode()
    def forward_by_layer(
        self,
        tokens_N: Tensor,
        inputs_NH: Tensor,
        rows: Rows,
        kv: Items[LayerKV],
        wanted_R: Tensor | None = None,
    ) -> HeadOutput:
        """As `forward`, one operation at a time: the twin of a fused pass."""
        hidden_Nh = self._enter(tokens_N, inputs_NH)
        turn = self._rope.at(rows.standing)
        for layer, j in zip(self._layers, self.head_spec.kv.kv_layers, strict=True):
            hidden_Nh = layer(hidden_Nh, turn, rows.seeing, kv[j])
        return self._leave(hidden_Nh, wanted_R)

    def _enter(self, tokens_N: Tensor, inputs_NH: Tensor) -> Tensor:
        both = (
            self._embedding_norm(self.target.embed(tokens_N)),
            self._feature_norm(inputs_NH),
        )
        is_embedding_first = self.head_spec.conventions.concatenation == "embedding-first"
        return self._fc(torch.cat(both if is_embedding_first else both[::-1], dim=-1))

    def _leave(self, hidden_Nh: Tensor, wanted_R: Tensor | None) -> HeadOutput:
        state_NH = self._hand_on(self._norm(hidden_Nh))
        is_normed = self.head_spec.conventions.feedback == "post-norm"
        feedback_NH = state_NH if is_normed else self._hand_on(hidden_Nh)
        state_RH = state_NH if wanted_R is None else state_NH.index_select(0, wanted_R)
        return HeadOutput(self._logits(state_RH), feedback_NH)

    def _is_decoder(self) -> bool:
        """Whether its layers are those of an ordinary decoder over the target's KV."""
        kv = self.head_spec.kv
        return kv.sees_drafts and kv.key_width == kv.value_width

    def _own_pools(self, kv: Items[LayerKV]) -> list[LayerKV]:
        """Of the layers that are read; the same list every time, by which a fused pass knows it."""
        first = kv[self.head_spec.kv.kv_layers[0]]
        if not self._pools or self._pools[0] is not first:
            self._pools = [kv[j] for j in self.head_spec.kv.kv_layers]
        return self._pools

    def _parts(self) -> DecoderParts:
        """For kernels that fuse; they embed nothing, and last norm and head come after them."""
        kv, config = self.head_spec.kv, self.target.config
        unused_1h = self._norm.weight.new_zeros(1, self.head_spec.widths.hidden)
        return DecoderParts(
            num_heads=kv.num_heads,
            num_kv_heads=kv.num_kv_heads,
            head_dim=kv.key_width,
            intermediate_size=kv.intermediate_size,
            norm_eps=kv.norm_eps,
            attention_scale=config.attention_scale,
            rotated_width=config.rope.width,
            embedding_VD=unused_1h,
            final_norm_D=unused_1h[0],
            head=self.ops.linear(unused_1h),
            layers=[layer.parts() for layer in self._layers],
        )

    def _own(self, name: str, weights: Weights, is_used: bool) -> Linear | None:
        return self.ops.linear(weights.take_product(name)) if is_used else None

    def _hand_on(self, hidden_Nh: Tensor) -> Tensor:
        """In the target's width."""
        return hidden_Nh if self._output is None else self._output(hidden_Nh)

    def _logits(self, state_RH: Tensor) -> Tensor:
        """Over the target's vocabulary; -inf for tokens outside the head's."""
        if self._lm_head is None:
            return self.target.head(state_RH)
        logits_RC = self._lm_head(state_RH).float()
        if self._ids_C is None:
            return logits_RC
        logits_RV = logits_RC.new_full((len(logits_RC), self.spec.vocab_size), float("-inf"))
        return logits_RV.index_copy_(1, self._ids_C, logits_RC)


class KVRunner:
    """Runs a head over the KV of its target in `pool`."""

    def __init__(self, network: KVNetwork, pool: KVPool) -> None:
        self.network = network
        self.pool = pool

    @torch.inference_mode()
    def run(self, pieces: list[HeadPiece], num_keys: Items[int]) -> tuple[TargetOutput, Tensor]:
        """One pass; output as a target's, and feedback_NH of all rows, piece after piece.

        Args:
            pieces: of drafts, with tables of the target; all logits are computed.
            num_keys: per piece, positions that have KV of the target.
        """
        network, device = self.network, self.network.spec.device
        tokens = [token for piece in pieces for token in (*piece.chain, *piece.tree.tokens)]
        spans = [
            Span(p.table.blocks, p.num_cached, len(p.chain), p.tree.parents, p.table.block_size)
            for p in pieces
        ]
        logits_RV, feedback_NH = network.forward(
            upload(tokens, device),
            torch.cat([piece.inputs_PD for piece in pieces]),
            network.rows(spans, num_keys),
            self.pool.layers,
        )
        is_asked = any(piece.wants_argmax for piece in pieces)
        argmax_R = network.ops.argmax(logits_RV) if is_asked else []
        return TargetOutput(logits_RV, list(_starts(spans)), argmax_R), feedback_NH


def check_kv(spec: KVHeadSpec, target: Decoder) -> None:
    """PairError unless the head reads layers that the target has, in their shape."""
    kv, shapes = spec.kv, target.spec.kv_shapes
    wanted = KVShape(kv.num_kv_heads, kv.key_width, kv.value_width)
    for layer in kv.kv_layers:
        found = tuple(shapes[layer]) if layer < len(shapes) else None
        if found != tuple(wanted):
            raise PairError(
                f"the head {spec.source!r} reads KV of layer {layer} as {tuple(wanted)} (heads, "
                f"key width, value width); target {target.spec.name!r} has {found}: it was made "
                "for another model"
            )


def as_lean(network: object, name: str) -> Decoder:
    """The target as the lean decoder. ConfigError if it is not: how keys are turned is unknown."""
    if isinstance(network, Decoder):
        return network
    model = getattr(getattr(network, "spec", None), "name", "the target")
    raise ConfigError(
        f"drafter {name!r} reads the target's keys, and how they are turned is known in the lean "
        f"decoder only: load {model!r} with network='lean' if its family is known there, or leave "
        f"{name!r} out of drafters=..."
    )


def _starts(spans: Items[Span]) -> Iterator[int]:
    """Row at which each span begins."""
    at = 0
    for span in spans:
        yield at
        at += span.num_rows
