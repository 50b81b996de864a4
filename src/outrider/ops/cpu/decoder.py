"""FusedDecoder: all layers of a dense decoder as one call of the kernels.

Shape legend: N rows of the pass, R rows whose logits are wanted, V vocabulary, P positions,
W rotated width.
"""

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from outrider.ops.base import DecoderParts, Entry, LayerKV, LayerParts, Layout, Passed
from outrider.ops.cpu.library import (
    BFLOAT16,
    FLOAT32,
    CallStruct,
    DecoderStruct,
    KVStruct,
    LayerStruct,
    Library,
    LinearStruct,
)
from outrider.ops.cpu.linear import CpuLinear, stored
from outrider.ops.cpu.memory import Arena
from outrider.ops.cpu.spans import SpanTable

NOTHING = torch.empty(0)


class FusedDecoder:
    """A `DecoderPass`; one pass at a time, for it works in memory of its own.

    Given KV of the first layers only, it runs those, then the last norm and the head.

    That memory grows to the largest pass and stays: per row of it, and four bytes each, about
    three times the feed-forward width and six times the hidden width.

    Attributes:
        embedding_VD: as the kernels read it, in bfloat16 if that loses nothing.
    """

    def __init__(self, library: Library, arena: Arena, parts: DecoderParts) -> None:
        self._library = library
        self._scratch = library.decoder_scratch()
        self._kept: list[object] = []
        self._vocab_size = self._linear(parts.head).outputs
        self._model = self._describe(arena, parts)
        self._cuts: dict[int, Cut] = {}

    def __del__(self) -> None:
        self._library.decoder_free(self._scratch)

    def __call__(
        self,
        tokens_N: Tensor,
        layout: Layout,
        kv: list[LayerKV],
        wanted_R: Tensor,
        cos_PW: Tensor,
        sin_PW: Tensor,
        *,
        entry: Entry | None = None,
        taps: Sequence[int] = (),
    ) -> Passed:
        table = layout.plan
        assert isinstance(table, SpanTable)
        num_wanted = wanted_R.shape[0]
        logits_RV = torch.empty(num_wanted, self._vocab_size)
        cut = self._cut(kv)
        hidden_ND, first_NX = (None, None) if entry is None else map(_floats, entry)
        boundaries = array("i", taps)
        tapped_AND = self._tapped(len(taps), layout) if taps else NOTHING
        call = CallStruct(
            tokens_N.data_ptr(),
            table.spans_address,
            table.parents_address,
            wanted_R.data_ptr(),
            cos_PW.data_ptr(),
            sin_PW.data_ptr(),
            cut.kv_address,
            logits_RV.data_ptr(),
            None if hidden_ND is None else hidden_ND.data_ptr(),
            None if first_NX is None else first_NX.data_ptr(),
            boundaries.buffer_info()[0],
            tapped_AND.data_ptr(),
            len(layout.spans),
            num_wanted,
            torch.get_num_threads(),
            len(taps),
        )
        status = self._library.decoder(cut.model_address, ctypes.addressof(call), self._scratch)
        if status:
            raise IndexError(f"a token id is not in [0, {self.embedding_VD.shape[0]})")
        return Passed(logits_RV, tapped_AND)

    def _tapped(self, num_taps: int, layout: Layout) -> Tensor:
        return torch.empty(num_taps, layout.positions_N.shape[0], self._model.hidden)

    def _cut(self, kv: list[LayerKV]) -> "Cut":
        """Through as many layers as there is KV of; the same pool comes every time."""
        cut = self._cuts.get(len(kv))
        if cut is None or cut.kv is not kv:
            cut = self._cuts[len(kv)] = Cut(self._model, kv)
        return cut

    def _describe(self, arena: Arena, parts: DecoderParts) -> DecoderStruct:
        head = self._linear(parts.head)
        layers = (LayerStruct * len(parts.layers))(*(self._layer(part) for part in parts.layers))
        self.embedding_VD = embedding_VD = self._embedding(arena, parts)
        kind = BFLOAT16 if embedding_VD.dtype == torch.bfloat16 else FLOAT32
        self._kept.append(layers)
        return DecoderStruct(
            embedding_VD.shape[1],
            parts.num_heads,
            parts.num_kv_heads,
            parts.head_dim,
            parts.intermediate_size,
            self._vocab_size,
            len(parts.layers),
            parts.rotated_width,
            parts.norm_eps,
            parts.attention_scale,
            embedding_VD.data_ptr(),
            kind,
            embedding_VD.shape[0],
            self._address_of(parts.final_norm_D),
            head,
            layers,
        )

    @staticmethod
    def _embedding(arena: Arena, parts: DecoderParts) -> Tensor:
        """That of a tied head, if its weight is kept in floats; else a copy."""
        assert isinstance(parts.head, CpuLinear)
        if parts.head.source == parts.embedding_VD.data_ptr():
            return parts.head.kept[0]
        return arena.place(stored(parts.embedding_VD))

    def _layer(self, parts: LayerParts) -> LayerStruct:
        return LayerStruct(
            self._address_of(parts.attention_norm_D),
            self._address_of(parts.mlp_norm_D),
            self._address_of(parts.query_norm_D),
            self._address_of(parts.key_norm_D),
            self._linear(parts.qkv),
            self._linear(parts.output),
            self._linear(parts.gate_up),
            self._linear(parts.down),
            parts.window.sliding,
            parts.window.chunk,
            parts.has_rope,
        )

    def _linear(self, product: object) -> LinearStruct:
        assert isinstance(product, CpuLinear)
        self._kept.append(product.kept)
        return product.struct

    def _address_of(self, vector_D: Tensor | None) -> int | None:
        if vector_D is None:
            return None
        vector_D = vector_D.float().contiguous()
        self._kept.append(vector_D)
        return vector_D.data_ptr()


class Cut:
    """The first layers of a model, all perhaps, with their keys and values in one pool.

    Attributes:
        model_address: of the model's struct, cut to those layers.
        kv_address: where the addresses of the pool's tensors stand.
    """

    def __init__(self, model: DecoderStruct, kv: list[LayerKV]) -> None:
        assert 1 <= len(kv) <= model.num_layers
        assert all(part.dtype == torch.float32 for layer in kv for part in layer)
        self.kv = kv
        self._model = DecoderStruct.from_buffer_copy(model)
        self._model.num_layers = len(kv)
        structs = [KVStruct(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in kv]
        self._pool = (KVStruct * len(kv))(*structs)
        self.model_address = ctypes.addressof(self._model)
        self.kv_address = ctypes.addressof(self._pool)


def _floats(rows: Tensor | None) -> Tensor | None:
    """As the kernels read them; who calls keeps them until the pass is over."""
    return None if rows is None else rows.float().contiguous()


def is_fusable(parts: DecoderParts) -> bool:
    """Whether every product is one of the kernels' own."""
    products: list[object] = [parts.head]
    for layer in parts.layers:
        products += [layer.qkv, layer.output, layer.gate_up, layer.down]
    return all(isinstance(product, CpuLinear) for product in products)
