"""Which rows a module of several runs, where, and after whom.

Module m's first row is row m (see `MTPNetwork`): its sequence begins at place m of the pool.
"""

from array import array
from collections.abc import Iterator, Sequence as Items
from itertools import chain

import numpy as np

from outrider.models.heads.network import HeadPiece
from outrider.ops.base import Span, slots_of


def own_rows(spans: list[Span], number: int) -> tuple[list[int] | None, list[Span]]:
    """The rows of a pass that module `number` runs, None for all, and the spans they make.

    Where even the last committed row is before a module's first, it runs none of the sequence.
    """
    rows: list[range] = []
    own: list[Span] = []
    start = 0
    for span in spans:
        num_before = max(number - span.num_cached, 0)  # rows of the chain that are not its own
        if num_before < span.num_chain:
            own.append(_from_place(span, number))
            rows.append(range(start + num_before, start + span.num_rows))
        start += span.num_rows
    is_all = sum(map(len, rows)) == start
    return None if is_all else list(chain.from_iterable(rows)), own


def parent_slots(spans: list[Span]) -> list[int]:
    """Per row of the pass the slot of the row before it; a sequence's first row names its own."""
    return [slot for span in spans for slot in _parents(span)]


def steps_of(pieces: Items[HeadPiece]) -> Iterator[int]:
    """Per row whose logits are wanted, how many drafted tokens it has read."""
    for piece in pieces:
        if piece.wants_logits:
            steps = [piece.num_drafted]
            for parent in piece.tree.parents:
                steps.append(steps[parent + 1] + 1)
            yield from steps


def _slots(span: Span, first: int) -> "array[int]":
    """Of the sequence's places from `first` on; numpy's, for contexts are long."""
    size, stop = span.block_size, span.num_cached + span.num_rows
    blocks = np.asarray(span.blocks, dtype=np.int32)[: -(-stop // size), None]
    slots = (blocks * size + np.arange(size, dtype=np.int32)).ravel()[first:stop]
    return array("i", slots.tobytes())


def _from_place(span: Span, first: int) -> Span:
    """The sequence without its first places."""
    if not first:
        return span
    return Span(
        _slots(span, first),
        max(span.num_cached - first, 0),
        span.num_chain - max(first - span.num_cached, 0),
        span.parents,
    )


def _parents(span: Span) -> list[int]:
    before, root = span.num_cached, span.num_cached + span.num_chain - 1
    first = max(before - 1, 0)
    slots = slots_of(span.blocks, span.block_size, first, root + 1)
    if not before:
        slots = [slots[0], *slots]
    root_slot = slots[-1]
    nodes = slots_of(span.blocks, span.block_size, root + 1, root + 1 + len(span.parents))
    return slots[:-1] + [root_slot if node < 0 else nodes[node] for node in span.parents]
