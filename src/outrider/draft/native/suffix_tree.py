"""NativeSuffixTree: the suffix tree in C++, behind the interface of its plain twin."""

import ctypes
import weakref
from array import array
from collections.abc import Sequence as Items

from outrider.draft.suffix_tree import Guess, Search


class NativeSuffixTree:
    """O(depth) per token entered, some 100 bytes per token held; one call into C++ per method.

    Args:
        library: `native.library.library()`.
        depth: length of the longest string that is counted, match and draft together.
    """

    def __init__(self, library: ctypes.CDLL, depth: int) -> None:
        self.depth = depth
        self._library = library
        self._tree: int = library.suffix_new(depth)
        weakref.finalize(self, library.suffix_free, self._tree)

    @property
    def num_tokens(self) -> int:
        return int(self._library.suffix_num_tokens(self._tree))

    @property
    def num_nodes(self) -> int:
        """Of the compressed tree, the root counted."""
        return int(self._library.suffix_num_nodes(self._tree))

    @property
    def num_bytes(self) -> int:
        return int(self._library.suffix_bytes(self._tree))

    def open(self) -> int:
        return int(self._library.suffix_open(self._tree))

    def extend(self, text: int, tokens: Items[int]) -> None:
        given = _as_array(tokens)
        self._library.suffix_extend(self._tree, text, given.buffer_info()[0], len(given))

    def remove(self, text: int) -> None:
        self._library.suffix_remove(self._tree, text)

    def count(self, tokens: Items[int]) -> int:
        given = _as_array(tokens)
        return int(self._library.suffix_count(self._tree, given.buffer_info()[0], len(given)))

    def speculate(self, context: Items[int], search: Search) -> Guess:
        given, out = _as_array(context), _Out(search.num_nodes)
        count = self._library.suffix_speculate(
            self._tree,
            given.buffer_info()[0],
            len(given),
            search.depth,
            search.width,
            search.num_nodes,
            search.alpha,
            search.offset,
            search.min_probability,
            *out.addresses,
        )
        return out.read(count)

    def longest(self, context: Items[int], most: int) -> Guess:
        given, out = _as_array(context), _Out(most)
        count = self._library.suffix_longest(
            self._tree, given.buffer_info()[0], len(given), most, *out.addresses
        )
        return out.read(count)


class _Out:
    """Room for what a draft returns."""

    def __init__(self, most: int) -> None:
        self._tokens, self._parents = array("i", bytes(4 * most)), array("i", bytes(4 * most))
        self._numbers = array("d", bytes(8 * (most + 2)))

    @property
    def addresses(self) -> tuple[int, int, int]:
        arrays = (self._tokens, self._parents, self._numbers)
        return arrays[0].buffer_info()[0], arrays[1].buffer_info()[0], arrays[2].buffer_info()[0]

    def read(self, count: int) -> Guess:
        score, match = self._numbers[:2]
        return Guess(
            tuple(self._tokens[:count]),
            tuple(self._parents[:count]),
            tuple(self._numbers[2 : 2 + count]),
            score,
            int(match),
        )


def _as_array(tokens: Items[int]) -> "array[int]":
    return tokens if isinstance(tokens, array) else array("i", tokens)
