"""SpanTable: the spans of a pass as the kernels read them."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from outrider.ops.base import Span


@dataclass(frozen=True)
class SpanTable:
    """The spans as the kernels read them; `blocks` keeps alive what they point to."""

    records: "array[int]"
    parents: "array[int]"
    blocks: Sequence[Sequence[int]]

    @property
    def spans_address(self) -> int:
        return self.records.buffer_info()[0]

    @property
    def parents_address(self) -> int:
        return self.parents.buffer_info()[0]


def span_table(spans: list[Span]) -> SpanTable:
    blocks = [s.blocks if isinstance(s.blocks, array) else array("i", s.blocks) for s in spans]
    records: list[int] = []
    parents: list[int] = []
    for span, table in zip(spans, blocks, strict=True):
        address, size = table.buffer_info()
        assert span.num_cached + span.num_rows <= size * span.block_size, "places without slots"
        records += (address, span.block_size, span.num_cached, span.num_chain, len(span.parents))
        parents += span.parents
    return SpanTable(array("q", records), array("q", parents), blocks)
