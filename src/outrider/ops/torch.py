"""The reference kernels, in torch, for every device; batch-invariant on the CPU in float32.

How a row's attention is made independent of its company: keys are taken in the order of the row's
own path (cached positions, chain, ancestors, itself), cut into tiles of `TILE` positions that
begin at position 0, and the tiles' partial sums are added in order. Masked keys contribute exact
zeros, so neither the split into passes nor branches beside the path change a bit. Matrix products
get at least `MIN_ROWS` rows, below which the libraries change kernels.

Shape legend: N rows of the pass, B lanes (paths computed side by side), n rows of a lane,
L keys of a lane (a multiple of TILE), J tiles, T positions of a tile, H query heads, G key/value
heads, R = H / G, D/E key/value width.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from outrider.ops import linear, quantized
from outrider.ops.base import (
    DecoderParts,
    DecoderPass,
    Int4Weight,
    Int8Weight,
    LayerKV,
    Layout,
    Linear,
    Span,
    Weight,
    Window,
)

TILE = 64
MIN_ROWS = 16
SHORT = 16
MAX_LANE_ROWS = 256


class Lane(NamedTuple):
    """Rows that share one path: `slots` in path order, `rows` of the pass, their positions."""

    slots: list[int]
    rows: list[int]
    positions: list[int]


@dataclass(frozen=True)
class Group:
    """Lanes of similar length, padded to one shape."""

    slots_BL: Tensor
    rows_Bn: Tensor
    positions_Bn: Tensor
    kept_M: Tensor | None
    is_whole_pass: bool
    masks: dict[Window, Tensor] = field(default_factory=dict)

    def hidden_BnL(self, window: Window) -> Tensor:
        """True where a row must not look; made once per pass and window."""
        if window not in self.masks:
            key_L = torch.arange(self.slots_BL.shape[1], device=self.slots_BL.device)
            row_Bn1 = self.positions_Bn.unsqueeze(-1)
            hidden = key_L > row_Bn1
            if window.sliding:
                hidden |= key_L <= row_Bn1 - window.sliding
            if window.chunk:
                hidden |= key_L // window.chunk != row_Bn1 // window.chunk
            self.masks[window] = hidden
        return self.masks[window]


class TorchOps:
    """The reference implementation of `Ops`.

    Args:
        batch_invariant: keep rows bitwise independent of their company where that is possible
            (float32 on the CPU); otherwise `F.linear` as it comes, and `is_batch_invariant` turns
            False with the first such layer.
    """

    name = "torch"

    def __init__(self, *, batch_invariant: bool = True) -> None:
        self.is_batch_invariant = batch_invariant

    def layout(self, spans: list[Span], device: torch.device) -> Layout:
        slots: list[int] = []
        positions: list[int] = []
        lanes: list[Lane] = []
        for span in spans:
            places = span.slots()
            lanes += _lanes(span, places, len(slots))
            slots += places[span.num_cached :]
            positions += _positions(span)
        groups = [_group(part, len(slots), device) for part in _alike(lanes)]
        return Layout(
            spans=spans,
            positions_N=torch.tensor(positions, device=device),
            slots_N=torch.tensor(slots, device=device),
            plan=groups,
        )

    def linear(self, weight: Weight, bias_O: Tensor | None = None) -> Linear:
        if not isinstance(weight, Tensor):
            return self._quantized(weight, bias_O)
        return self._float(weight, bias_O)

    def _float(self, weight_OI: Tensor, bias_O: Tensor | None) -> Linear:
        is_reference = weight_OI.device.type == "cpu" and weight_OI.dtype == torch.float32
        if self.is_batch_invariant and is_reference:
            return linear.invariant(weight_OI, bias_O)
        self.is_batch_invariant = False
        return linear.plain(weight_OI, bias_O)

    def _quantized(self, weight: Int8Weight | Int4Weight, bias_O: Tensor | None) -> Linear:
        if weight.scales.device.type != "cpu":
            self.is_batch_invariant = False
            return quantized.expanded(weight, bias_O)
        if weight.activation_bits:
            return quantized.quantized(weight, bias_O)
        return self._float(quantized.dequantized(weight), bias_O)

    def write_kv(self, kv: LayerKV, keys_NGD: Tensor, values_NGE: Tensor, layout: Layout) -> None:
        kv.keys.index_copy_(0, layout.slots_N, keys_NGD.to(kv.keys.dtype))
        kv.values.index_copy_(0, layout.slots_N, values_NGE.to(kv.values.dtype))

    def attend(
        self,
        query_NHD: Tensor,
        kv: LayerKV,
        layout: Layout,
        *,
        scale: float,
        window: Window = Window(),
        softcap: float = 0.0,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        groups = layout.plan
        assert isinstance(groups, list)
        shape = (*query_NHD.shape[:2], kv.values.shape[-1])
        if len(groups) == 1 and groups[0].is_whole_pass:
            out = _attend(query_NHD, kv, groups[0], scale, window, softcap, sinks_H)
            return out.reshape(shape).contiguous()
        out_NHE = query_NHD.new_empty(shape)
        for group in groups:
            out_MHE = _attend(query_NHD, kv, group, scale, window, softcap, sinks_H).flatten(0, 1)
            rows_M = group.rows_Bn.flatten()
            if group.kept_M is not None:
                rows_M, out_MHE = rows_M[group.kept_M], out_MHE[group.kept_M]
            out_NHE[rows_M] = out_MHE
        return out_NHE

    def argmax(self, logits_RV: Tensor) -> list[int]:
        peak_R, token_R = logits_RV.max(dim=-1)
        tokens: list[int] = torch.where(peak_R.isfinite(), token_R, -1).tolist()
        return tokens

    def fuse(self, parts: DecoderParts) -> DecoderPass | None:
        return None


def _positions(span: Span) -> list[int]:
    """Positions of the new rows: the chain goes on from the cache, nodes stand below parents."""
    positions = list(range(span.num_cached, span.num_cached + span.num_chain))
    root = positions[-1]
    depths: list[int] = []
    for parent in span.parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 1)
    return positions + [root + depth for depth in depths]


def _lanes(span: Span, places: list[int], first_row: int) -> list[Lane]:
    """One lane for the chain with the first root-to-leaf path, one per further leaf."""
    num_context = span.num_cached + span.num_chain
    chain = list(range(span.num_chain))
    lanes: list[Lane] = []
    placed: set[int] = set()
    for path in _leaf_paths(span.parents) or [[]]:
        fresh = [node for node in path if node not in placed]
        placed.update(fresh)
        offsets = (chain if not lanes else []) + [span.num_chain + node for node in fresh]
        slots = places[:num_context] + [places[num_context + node] for node in path]
        depth_of = {node: depth for depth, node in enumerate(path)}
        positions = [] if lanes else [span.num_cached + i for i in chain]
        positions += [num_context + depth_of[node] for node in fresh]
        lanes.append(Lane(slots, [first_row + offset for offset in offsets], positions))
    return [piece for lane in lanes for piece in _pieces(lane)]


def _leaf_paths(parents: tuple[int, ...]) -> list[list[int]]:
    """Root-to-leaf paths, as node indices, in order of the leaves."""
    inner = set(parents)
    paths = []
    for leaf in range(len(parents)):
        if leaf not in inner:
            path, node = [], leaf
            while node >= 0:
                path.append(node)
                node = parents[node]
            paths.append(path[::-1])
    return paths


def _pieces(lane: Lane) -> list[Lane]:
    """A long prefill in pieces that bound the memory of its scores."""
    return [
        Lane(
            lane.slots[: lane.positions[min(at + MAX_LANE_ROWS, len(lane.rows)) - 1] + 1],
            lane.rows[at : at + MAX_LANE_ROWS],
            lane.positions[at : at + MAX_LANE_ROWS],
        )
        for at in range(0, len(lane.rows), MAX_LANE_ROWS)
    ]


def _alike(lanes: list[Lane]) -> list[list[Lane]]:
    """Short lanes (decode, verify) of similar length together; a long one (prefill) by itself."""
    short: dict[int, list[Lane]] = {}
    for lane in lanes:
        if len(lane.rows) <= SHORT:
            short.setdefault((len(lane.slots) // TILE).bit_length(), []).append(lane)
    return [*short.values(), *([lane] for lane in lanes if len(lane.rows) > SHORT)]


def _group(lanes: list[Lane], num_rows: int, device: torch.device) -> Group:
    width = max(len(lane.rows) for lane in lanes)
    length = max(len(lane.slots) for lane in lanes)
    length += -length % TILE
    slots: list[list[int]] = []
    rows: list[list[int]] = []
    positions: list[list[int]] = []
    kept: list[int] = []
    for at, lane in enumerate(lanes):
        missing = width - len(lane.rows)
        kept += range(at * width, at * width + len(lane.rows))
        slots.append(lane.slots + [lane.slots[0]] * (length - len(lane.slots)))
        rows.append(lane.rows + [lane.rows[0]] * missing)
        positions.append(lane.positions + [lane.positions[0]] * missing)
    is_padded = len(kept) < width * len(lanes)
    in_order = not is_padded and [r for lane in rows for r in lane] == list(range(num_rows))
    return Group(
        slots_BL=torch.tensor(slots, device=device),
        rows_Bn=torch.tensor(rows, device=device),
        positions_Bn=torch.tensor(positions, device=device),
        kept_M=torch.tensor(kept, device=device) if is_padded else None,
        is_whole_pass=in_order,
    )


def _attend(
    query_NHD: Tensor,
    kv: LayerKV,
    group: Group,
    scale: float,
    window: Window,
    softcap: float,
    sinks_H: Tensor | None,
) -> Tensor:
    """Attention of one group; returns [B, n, H, E] in the dtype of the query."""
    num_lanes, length = group.slots_BL.shape
    num_rows = group.rows_Bn.shape[1]
    num_heads, num_groups = query_NHD.shape[1], kv.keys.shape[1]
    ratio = num_heads // num_groups
    query = query_NHD if group.is_whole_pass else query_NHD[group.rows_Bn.flatten()]
    query = query.view(num_lanes, num_rows, num_groups, ratio, -1).transpose(1, 2)
    query_XMD = query.reshape(num_lanes * num_groups, num_rows * ratio, -1)
    if num_rows * ratio < MIN_ROWS:
        pad = MIN_ROWS - num_rows * ratio
        query_XMD = torch.nn.functional.pad(query_XMD, (0, 0, 0, pad))
    keys_XLD = _gather(kv.keys, group.slots_BL)
    values_XLE = _gather(kv.values, group.slots_BL)
    scores = torch.bmm(query_XMD, keys_XLD.transpose(1, 2))[:, : num_rows * ratio].float() * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(num_lanes, num_groups, num_rows, ratio, length)
    hidden = group.hidden_BnL(window)[:, None, :, None, :]
    scores = scores.masked_fill(hidden, float("-inf"))
    out = _softmax_sum(scores, values_XLE, sinks_H)
    out = out.view(num_lanes, num_groups, num_rows, ratio, -1).transpose(1, 2)
    return out.reshape(num_lanes, num_rows, num_heads, -1).to(query_NHD.dtype)


def _gather(pool_SGD: Tensor, slots_BL: Tensor) -> Tensor:
    """[B * G, L, D]: the keys or values of each lane, head by head."""
    num_lanes, length = slots_BL.shape
    rows = pool_SGD.index_select(0, slots_BL.flatten())
    rows = rows.view(num_lanes, length, *pool_SGD.shape[1:]).transpose(1, 2)
    return rows.reshape(num_lanes * pool_SGD.shape[1], length, -1)


def _softmax_sum(scores_BGnRL: Tensor, values_XLE: Tensor, sinks_H: Tensor | None) -> Tensor:
    """softmax(scores) @ values, tile by tile; [B, G, n * R, E] in float32."""
    num_lanes, num_groups, num_rows, ratio, length = scores_BGnRL.shape
    num_tiles = length // TILE
    top = scores_BGnRL.amax(dim=-1, keepdim=True)
    if sinks_H is not None:
        sinks = sinks_H.float().view(1, num_groups, 1, ratio, 1)
        top = torch.maximum(top, sinks)
    weights = torch.exp(scores_BGnRL - top)
    weights = weights.view(num_lanes * num_groups, num_rows * ratio, num_tiles, TILE)
    total = _in_order(weights.sum(-1).unbind(-1))
    if sinks_H is not None:
        total = total + torch.exp(sinks - top).view_as(total)
    weights = weights.transpose(1, 2).reshape(-1, num_rows * ratio, TILE)
    if num_rows * ratio < MIN_ROWS:
        weights = torch.nn.functional.pad(weights, (0, 0, 0, MIN_ROWS - num_rows * ratio))
    values = values_XLE.reshape(-1, TILE, values_XLE.shape[-1])
    parts = torch.bmm(weights.to(values.dtype), values)[:, : num_rows * ratio].float()
    parts = parts.view(num_lanes * num_groups, num_tiles, num_rows * ratio, -1)
    return _in_order(parts.unbind(1)) / total.unsqueeze(-1)


def _in_order(parts: tuple[Tensor, ...]) -> Tensor:
    """Their sum from the first to the last: one order, whatever the number of tiles."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
