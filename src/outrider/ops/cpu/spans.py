"""SpanTable: the spans of a pass as the kernels read them."""

from array import array
from dataclasses import dataclass

from outrider.ops.base import Span


@dataclass(frozen=True)
class SpanTable:
    """The spans as the kernels read them.

    Attributes:
        records: five numbers a span: address of its block table, block size, cached positions,
            rows of the chain, nodes of the tree.
        parents: of the nodes of all spans.
        views: of the block tables; while they are held, a table that is resized raises
            BufferError instead of leaving the kernels an address that is gone.
    """

    records: "array[int]"
    parents: "array[int]"
    views: list[memoryview]

    @property
    def spans_address(self) -> int:
        return self.records.buffer_info()[0]

    @property
    def parents_address(self) -> int:
        return self.parents.buffer_info()[0]


def span_table(spans: list[Span]) -> SpanTable:
    records: list[int] = []
    parents: list[int] = []
    views: list[memoryview] = []
    for blocks, num_cached, num_chain, nodes, block_size in spans:
        table = blocks if isinstance(blocks, array) else array("i", blocks)
        address, size = table.buffer_info()
        num_places = num_cached + num_chain + len(nodes)
        assert table.itemsize == 4, "block tables hold 32-bit integers"
        assert num_places <= size * block_size, "places without slots"
        records += (address, block_size, num_cached, num_chain, len(nodes))
        parents += nodes
        views.append(memoryview(table))
    return SpanTable(array("q", records), array("q", parents), views)
