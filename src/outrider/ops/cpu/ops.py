"""CpuOps: the kernels behind the `Ops` interface, for float32 on the CPU.

Shape legend: N rows of the pass, H query heads, G key/value heads, D/E key/value width, R rows of
logits, V vocabulary.
"""

import ctypes
from array import array

import torch
from torch import Tensor

from outrider.ops.base import (
    DecoderParts,
    DecoderPass,
    LayerKV,
    Layout,
    Linear,
    Span,
    Weight,
    Window,
)
from outrider.ops.cpu.decoder import FusedDecoder, is_fusable
from outrider.ops.cpu.library import AttentionStruct, KVStruct, Library
from outrider.ops.cpu.linear import CpuLinear
from outrider.ops.cpu.memory import Arena
from outrider.ops.cpu.spans import SpanTable, span_table


class CpuOps:
    """`Ops` in C++: batch-invariant at any width, for any number of threads."""

    name = "cpu"
    is_batch_invariant = True

    def __init__(self, library: Library) -> None:
        self._library = library
        self._arena = Arena()

    def layout(self, spans: list[Span], device: torch.device) -> Layout:
        table = span_table(spans)
        num_rows = sum(span.num_rows for span in spans)
        positions_N, slots_N = torch.empty(2, num_rows, dtype=torch.long).unbind()
        self._library.layout(
            table.spans_address,
            len(spans),
            table.parents_address,
            positions_N.data_ptr(),
            slots_N.data_ptr(),
        )
        return Layout(spans=spans, positions_N=positions_N, slots_N=slots_N, plan=table)

    def linear(self, weight: Weight, bias_O: Tensor | None = None) -> Linear:
        return CpuLinear(self._library, self._arena, weight, bias_O)

    def write_kv(self, kv: LayerKV, keys_NGD: Tensor, values_NGE: Tensor, layout: Layout) -> None:
        for pool, rows in ((kv.keys, keys_NGD), (kv.values, values_NGE)):
            assert pool.dtype == rows.dtype == torch.float32
            assert rows.shape == (layout.slots_N.shape[0], *pool.shape[1:])
            rows = _inner_contiguous(rows)
            num_rows, width = rows.shape[0], rows.shape[1] * rows.shape[2]
            self._library.write(
                pool.data_ptr(),
                rows.data_ptr(),
                rows.stride(0),
                layout.slots_N.data_ptr(),
                num_rows,
                width,
            )

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
        table = layout.plan
        assert isinstance(table, SpanTable)
        assert query_NHD.dtype == kv.keys.dtype == kv.values.dtype == torch.float32
        query_NHD = _inner_contiguous(query_NHD)
        num_rows, num_heads, key_width = query_NHD.shape
        num_groups, value_width = kv.values.shape[1:]
        assert num_rows == layout.slots_N.shape[0]
        assert kv.keys.shape[1:] == (num_groups, key_width)
        assert num_heads % num_groups == 0
        out_NHE = query_NHD.new_empty(num_rows, num_heads, value_width)
        sinks_H = None if sinks_H is None else sinks_H.float().contiguous()
        shape = AttentionStruct(
            num_heads,
            num_groups,
            key_width,
            value_width,
            scale,
            softcap,
            window.sliding,
            window.chunk,
            None if sinks_H is None else sinks_H.data_ptr(),
        )
        pool = KVStruct(kv.keys.data_ptr(), kv.values.data_ptr())
        self._library.attend(
            table.spans_address,
            len(layout.spans),
            table.parents_address,
            ctypes.byref(shape),
            ctypes.byref(pool),
            query_NHD.data_ptr(),
            query_NHD.stride(0),
            out_NHE.data_ptr(),
            torch.get_num_threads(),
        )
        return out_NHE

    def argmax(self, logits_RV: Tensor) -> list[int]:
        logits_RV = logits_RV.float().contiguous()
        tokens = array("q", bytes(8 * logits_RV.shape[0]))
        self._library.argmax(
            logits_RV.data_ptr(),
            *logits_RV.shape,
            tokens.buffer_info()[0],
            torch.get_num_threads(),
        )
        return tokens.tolist()

    def fuse(self, parts: DecoderParts) -> DecoderPass | None:
        return FusedDecoder(self._library, self._arena, parts) if is_fusable(parts) else None


def _inner_contiguous(x_NHD: Tensor) -> Tensor:
    """The same rows, each in one piece; rows may stand apart."""
    is_one_piece = x_NHD.stride(2) == 1 and x_NHD.stride(1) == x_NHD.shape[2]
    return x_NHD if is_one_piece else x_NHD.contiguous()
