"""What a drafter may offer so that its state outlives the sequences that made it.

All of it is optional: a drafter that offers nothing here starts from the tokens.

Shape legend: A boundaries between layers of the target, R positions, H its hidden width.
"""

from collections.abc import Mapping, Sequence as Items
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from outrider.cache.pool import KVPool
from outrider.cache.table import BlockManager, BlockTable
from outrider.models.base import ModelSpec
from outrider.ops.base import Ops


class Described(Protocol):
    """What KV depends on of the network that made it."""

    spec: ModelSpec
    ops: Ops


class HasPool(Protocol):
    """Whoever runs a network with its KV in a pool."""

    pool: KVPool

    @property
    def network(self) -> Described: ...


class PrefixCache(NamedTuple):
    """Where a draft model's or a head's KV of a token log is.

    Attributes:
        tokens: the log as the blocks are hashed by it.
        num_unsettled: ids behind those that stand for the end of the log and may still change.
        salt: what the hashes begin with beside the tenant: of the log, what `tokens` leave out.
    """

    runner: HasPool
    manager: BlockManager
    tokens: Items[int]
    num_unsettled: int = 0
    salt: str = ""


@runtime_checkable
class CachesPrefixes(Protocol):
    """A drafter with KV of its own, shared between sequences by the hashes of its blocks."""

    def prefix_cache(self, tokens: Items[int]) -> PrefixCache: ...


@runtime_checkable
class MadeOfStates(Protocol):
    """One of those whose KV is made of hidden states of the target (R2).

    Attributes:
        boundaries: which, rising (see `step.States`).
    """

    boundaries: tuple[int, ...]

    def rerun(self, table: BlockTable, tokens: Items[int], start: int, tapped_ARH: Tensor) -> None:
        """Writes it anew from position `start` of a log on, in the slots of `table`.

        Args:
            tokens: as `prefix_cache` has them.
            tapped_ARH: states of these positions, as many as are to be written.
        """
        ...


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
