"""Arena: weights side by side in large pages; reading them then waits less for page tables."""

import contextlib
import mmap

import torch
from torch import Tensor

CHUNK_BYTES = 64 << 20
LARGE_PAGE = 2 << 20
LINE = 64


class Arena:
    """Hands out memory from chunks that the system is asked to back with large pages.

    A chunk lives as long as a tensor in it.
    """

    def __init__(self) -> None:
        self._chunk: mmap.mmap | None = None
        self._used = 0

    def place(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of the tensor."""
        copy = self._take(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)

    def _take(self, size: int) -> Tensor:
        if size == 0:
            return torch.empty(0, dtype=torch.uint8)
        if self._chunk is None or self._used + size > len(self._chunk):
            self._chunk = _large_pages(max(CHUNK_BYTES, size))
            self._used = 0
        taken = torch.frombuffer(self._chunk, dtype=torch.uint8, count=size, offset=self._used)
        self._used += -(-size // LINE) * LINE
        return taken


def _large_pages(size: int) -> mmap.mmap:
    """Private memory; where the system has no large pages, its ordinary ones."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    chunk = mmap.mmap(-1, -(-size // LARGE_PAGE) * LARGE_PAGE, flags=flags)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        with contextlib.suppress(OSError):
            chunk.madvise(advice)
    return chunk
