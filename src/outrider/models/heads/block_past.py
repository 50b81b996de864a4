"""Past: what the slots of blocks see, the rows behind them in the pool and one another.

No layout of `Ops` lets a row see rows that come after it, so attention is torch's, over keys and
values that are gathered block by block. Sequences of similar length go side by side.

Shape legend: B sequences, Q of them in one group, T slots of a block, P places behind it (padded),
S = P + T, H query heads, G key/value heads, R = H / G, W width of a head.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.models.runner import Blocks, upload
from outrider.ops.base import LayerKV


class Sight(NamedTuple):
    """What the slots of a layer see.

    Attributes:
        is_causal: of their block, only what comes before them.
        window: only so many places up to their own, and what comes after it; 0 is all.
    """

    is_causal: bool
    window: int = 0


@dataclass(eq=False)
class _Group:
    """Sequences whose tables have about as many blocks.

    Attributes:
        rows_Q: which of the pass; None where they are all of it.
        places: blocks of each, padded with any, [Q, blocks].
    """

    rows_Q: Tensor | None
    places: Tensor
    lengths_Q: Tensor
    masks: dict[Sight, Tensor] = field(default_factory=dict)


class Past:
    """The rows with KV of the sequences of one pass.

    Args:
        tables: where they lie.
        lengths: how many there are; 0 is allowed.
        num_slots: T.

    Attributes:
        positions_N: of all slots, block after block: they follow the rows.
        longest: largest of `lengths`.
    """

    def __init__(
        self, tables: Items[Blocks], lengths: Items[int], num_slots: int, device: torch.device
    ) -> None:
        self.longest = max(lengths)
        self._num_slots = num_slots
        self._block_size = tables[0].block_size
        lengths_B = upload(list(lengths), device)
        steps_T = torch.arange(num_slots, device=device)
        self.positions_N = (lengths_B.unsqueeze(1) + steps_T).flatten()
        blocks = [
            list(table.blocks[: -(-length // self._block_size)])
            for table, length in zip(tables, lengths, strict=True)
        ]
        self._groups = [_group(rows, blocks, lengths_B) for rows in _alike(blocks)]

    def attend(
        self, query_NHW: Tensor, keys_NGW: Tensor, values_NGW: Tensor, kv: LayerKV, sight: Sight
    ) -> Tensor:
        """out_NHW of all slots; their own keys and values are given, and enter no pool."""
        query, keys, values = (
            heads.unflatten(0, (-1, self._num_slots)) for heads in (query_NHW, keys_NGW, values_NGW)
        )
        if self._groups[0].rows_Q is None:
            return self._attend(self._groups[0], query, keys, values, kv, sight).flatten(0, 1)
        out = torch.empty_like(query)
        for group in self._groups:
            rows_Q = group.rows_Q
            own = query[rows_Q], keys[rows_Q], values[rows_Q]
            out[rows_Q] = self._attend(group, *own, kv, sight)
        return out.flatten(0, 1)

    def _attend(
        self,
        group: _Group,
        query_QTHW: Tensor,
        keys_QTGW: Tensor,
        values_QTGW: Tensor,
        kv: LayerKV,
        sight: Sight,
    ) -> Tensor:
        num_slots, num_heads, width = query_QTHW.shape[1:]
        num_groups = keys_QTGW.shape[2]
        ratio = num_heads // num_groups
        query_QGXW = query_QTHW.unflatten(2, (num_groups, ratio)).transpose(1, 2).flatten(2, 3)
        mask_Q1XS = self._mask(group, sight).repeat_interleave(ratio, dim=1).unsqueeze(1)
        out_QGXW = F.scaled_dot_product_attention(
            query_QGXW,
            self._whole(group, kv.keys, keys_QTGW),
            self._whole(group, kv.values, values_QTGW),
            attn_mask=mask_Q1XS,
            scale=width**-0.5,
        )
        out_QTGRW: Tensor = out_QGXW.unflatten(2, (num_slots, ratio)).transpose(1, 2)
        return out_QTGRW.flatten(2, 3)

    def _whole(self, group: _Group, pool: Tensor, own_QTGW: Tensor) -> Tensor:
        """[Q, G, S, W]: what the pool holds of each sequence, padded, and then its block's own."""
        blocks = pool.unflatten(0, (-1, self._block_size))
        held = blocks.index_select(0, group.places.flatten())
        num_places = group.places.shape[1] * self._block_size
        held_QPGW = held.view(len(own_QTGW), num_places, *pool.shape[1:])
        return torch.cat((held_QPGW, own_QTGW), dim=1).transpose(1, 2)

    def _mask(self, group: _Group, sight: Sight) -> Tensor:
        """seen_QTS, made once per pass and kind of sight."""
        if sight not in group.masks:
            group.masks[sight] = self._seen(group, sight)
        return group.masks[sight]

    def _seen(self, group: _Group, sight: Sight) -> Tensor:
        num_places, num_slots = group.places.shape[1] * self._block_size, self._num_slots
        key_S = torch.arange(num_places + num_slots, device=group.places.device)
        lengths_Q1 = group.lengths_Q.unsqueeze(1)
        is_own_S = key_S >= num_places
        is_there_QS = is_own_S | (key_S < lengths_Q1)
        position_QS = torch.where(is_own_S, lengths_Q1 + key_S - num_places, key_S)
        slot_QT = lengths_Q1 + key_S[:num_slots]
        ahead_QTS = slot_QT.unsqueeze(2) - position_QS.unsqueeze(1)
        seen_QTS: Tensor = is_there_QS.unsqueeze(1).expand(-1, num_slots, -1)
        if sight.is_causal:
            seen_QTS = seen_QTS & (ahead_QTS >= 0)
        if sight.window:
            seen_QTS = seen_QTS & (ahead_QTS < sight.window)
        return seen_QTS


def _alike(blocks: list[list[int]]) -> list[list[int]]:
    """Sequences of which none has more than twice as many blocks as another; all of the pass."""
    groups: dict[int, list[int]] = {}
    for row, held in enumerate(blocks):
        groups.setdefault(len(held).bit_length(), []).append(row)
    return list(groups.values())


def _group(rows: list[int], blocks: list[list[int]], lengths_B: Tensor) -> _Group:
    """A sequence with fewer blocks repeats its first, which nobody sees there."""
    most, device = max(len(blocks[row]) for row in rows), lengths_B.device
    padded = [
        block
        for held in (blocks[row] for row in rows)
        for block in (*held, *held[:1] * (most - len(held)))
    ]
    places = upload(padded, device).view(len(rows), most)
    if len(rows) == len(blocks):
        return _Group(None, places, lengths_B)
    rows_Q = upload(rows, device)
    return _Group(rows_Q, places, lengths_B[rows_Q])
