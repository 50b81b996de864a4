"""NativeVotes: search and vote of a datastore in C++, behind the interface of their plain twin."""

import ctypes
import weakref
from array import array
from collections.abc import Sequence as Items

import numpy as np

from outrider.draft.datastore import LONGEST, Datastore
from outrider.draft.votes import Ask, Branches


class NativeVotes:
    """One call into C++ per draft; for one thread at a time.

    Args:
        library: `native.library.datastore_library()`.
        datastore: it is read where it lies, in memory or in a mapped file.
    """

    def __init__(self, library: ctypes.CDLL, datastore: Datastore) -> None:
        tokens = np.ascontiguousarray(datastore.tokens, dtype=np.int32)
        is_wide = datastore.positions.dtype.itemsize > 4
        kind = np.int64 if is_wide else np.int32
        positions = np.ascontiguousarray(datastore.positions, dtype=kind)
        self._arrays = tokens, positions  # C++ holds their addresses only
        self._library = library
        self._store: int = library.datastore_new(
            tokens.ctypes.data, len(tokens), positions.ctypes.data, len(positions), is_wide
        )
        self._make_room(64)
        weakref.finalize(self, library.datastore_free, self._store)

    def search(self, context: Items[int], shortest: int = 1) -> tuple[int, int, int]:
        given, out = array("i", context[-LONGEST:]), array("q", (0, 0))
        length = self._library.datastore_search(
            self._store,
            given.buffer_info()[0],
            len(given),
            shortest,
            LONGEST,
            out.buffer_info()[0],
        )
        return int(length), out[0], out[1]

    def draft(self, context: Items[int], ask: Ask) -> Branches:
        given = array("i", context[-LONGEST:])
        if ask.num_nodes > self._room:
            self._make_room(ask.num_nodes)
        count = self._library.datastore_draft(
            self._store,
            given.buffer_info()[0],
            len(given),
            ask.shortest,
            LONGEST,
            ask.max_occurrences,
            ask.depth,
            ask.width,
            ask.num_nodes,
            *self._addresses,
        )
        return Branches(tuple(self._tokens[:count]), tuple(self._parents[:count]))

    def _make_room(self, num_nodes: int) -> None:
        """For what a draft returns."""
        self._room = num_nodes
        self._tokens, self._parents = (array("i", bytes(4 * num_nodes)) for _ in range(2))
        self._addresses = self._tokens.buffer_info()[0], self._parents.buffer_info()[0]
