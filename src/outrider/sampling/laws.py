"""Laws: the target's next-token laws over the root and nodes of one draft tree.

Shape legend: M nodes of the tree, R = M + 1 rows (the root's first), V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from outrider.sampling.grammar import GrammarState
from outrider.sampling.rng import Stream
from outrider.sampling.shaper import Shaper


class Laws(Protocol):
    """p after every node of a tree, all sampling settings applied; node -1 is the root."""

    def law(self, node: int) -> Tensor:
        """Probabilities [V], float64."""
        ...

    def log_law(self, node: int) -> Tensor:
        """Log-probabilities [V], float64; -inf where a token is forbidden."""
        ...

    def argmax(self, node: int) -> int:
        """The most likely token, the lowest id of equals."""
        ...

    def draw(self, node: int, stream: Stream) -> int:
        """A token from the law; a greedy one leaves the stream alone."""
        ...


class TargetLaws:
    """Laws made from the target's logits when a verifier asks: only visited nodes cost anything.

    Args:
        logits_RV: raw logits, the root's row first, then one per node.
        argmax_R: argmax of each row, on the host.
        tokens: committed tokens; the last is the root.
        path_tokens: draft tokens from the root down to a node (`DraftTree.path_tokens`).
        grammar: state after the committed tokens, when the output is constrained.
    """

    def __init__(
        self,
        shaper: Shaper,
        logits_RV: Tensor,
        argmax_R: Sequence[int],
        tokens: Sequence[int],
        path_tokens: Callable[[int], tuple[int, ...]],
        grammar: GrammarState | None = None,
    ) -> None:
        self._shaper = shaper
        self._logits_RV = logits_RV
        self._argmax_R = argmax_R
        self._tokens = tokens
        self._path_tokens = path_tokens
        self._grammar = grammar
        self._log_laws: dict[int, Tensor] = {}

    def law(self, node: int) -> Tensor:
        return self.log_law(node).softmax(dim=0)  # exp would start threads for one row

    def log_law(self, node: int) -> Tensor:
        if node not in self._log_laws:
            self._log_laws[node] = self._shape(node)
        return self._log_laws[node]

    def argmax(self, node: int) -> int:
        if self._shaper.is_plain_greedy and self._argmax_R[node + 1] >= 0:
            return self._argmax_R[node + 1]
        return int(self.log_law(node).argmax())

    def draw(self, node: int, stream: Stream) -> int:
        if self._shaper.is_greedy:
            return self.argmax(node)
        return stream.pick(self.law(node))

    def _shape(self, node: int) -> Tensor:
        path = self._path_tokens(node) if node >= 0 else ()
        mask_V = self._grammar.mask(path) if self._grammar else None
        return self._shaper.log_law(self._logits_RV[node + 1], self._tokens, path, mask_V)
