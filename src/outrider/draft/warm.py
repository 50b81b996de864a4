"""What a drafter may offer so that its state outlives the sequences that made it.

All of it is optional: a drafter that offers nothing here starts from the tokens.
"""

from collections.abc import Mapping, Sequence as Items
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from outrider.cache.table import BlockManager
from outrider.models.runner import Runner


class PrefixCache(NamedTuple):
    """Where a draft model's KV of a token log is.

    Attributes:
        tokens: the log as the draft model's blocks are hashed by it.
        num_unsettled: ids behind those that stand for the end of the log and may still change.
    """

    runner: Runner
    manager: BlockManager
    tokens: Items[int]
    num_unsettled: int = 0


@runtime_checkable
class CachesPrefixes(Protocol):
    """A drafter with KV of its own, shared between sequences by the hashes of its blocks (R1)."""

    def prefix_cache(self, tokens: Items[int]) -> PrefixCache: ...


@runtime_checkable
class Remembers(Protocol):
    """A drafter that looks up other answers of a tenant (R0)."""

    def remember(self, tenant: str, answer: Items[int]) -> int:
        """Enters an answer from a log; returns its tokens, 0 if that answer is known already."""
        ...


@runtime_checkable
class SharesTensors(Protocol):
    """A drafter with a small state per tenant that tokens alone do not bring back."""

    def shared(self, tenant: str) -> dict[str, Tensor]:
        """Copies of it, on the host; empty if there is none."""
        ...

    def take_shared(self, tenant: str, tensors: Mapping[str, Tensor]) -> int:
        """Fills in what is not known yet, and returns how much that was.

        What was learnt since is kept. Tensors that `shared` cannot have returned are ignored.
        """
        ...
