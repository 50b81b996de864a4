"""Laws: the target's next-token laws over the root and nodes of one draft tree.

Shape legend: N rows of the step, R of them roots, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from outrider.sampling.grammar import GrammarState
from outrider.sampling.rng import Stream
from outrider.sampling.shaper import Shaper, laws_together


class Laws(Protocol):
    """p after every node of a tree, all sampling settings applied; node -1 is the root."""

    def law(self, node: int) -> Tensor:
        """Probabilities [V], float64."""
        ...

    def log_law(self, node: int) -> Tensor:
        """Log-probabilities [V], float64; -inf where a token is forbidden."""
        ...

    def own_law(self, node: int) -> Tensor:
        """The model's own probabilities [V], float64: no setting applied, not even temperature."""
        ...

    def allows(self, node: int, token: int) -> bool:
        """Whether the token can come, at temperature 0 as if the temperature were not 0."""
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
        logits_NV: raw logits of the whole step; `first` is the root's row, then one per node.
        argmax_N: argmax of each row, on the host.
        tokens: committed tokens; the last is the root.
        path_tokens: draft tokens from the root down to a node (`DraftTree.path_tokens`).
        grammar: state after the committed tokens, when the output is constrained.
    """

    def __init__(
        self,
        shaper: Shaper,
        logits_NV: Tensor,
        argmax_N: Sequence[int],
        tokens: Sequence[int],
        path_tokens: Callable[[int], tuple[int, ...]],
        grammar: GrammarState | None = None,
        first: int = 0,
    ) -> None:
        self.shaper = shaper
        self.first = first  # in logits_NV
        self._logits_NV = logits_NV
        self._argmax_N = argmax_N
        self._tokens = tokens
        self._path_tokens = path_tokens
        self._grammar = grammar
        self._rows: dict[int, Tensor] = {}
        self._laws: dict[int, Tensor] = {}

    def law(self, node: int) -> Tensor:
        if node not in self._laws:
            self._laws[node] = self._row(node).softmax(dim=0)
        return self._laws[node]

    def log_law(self, node: int) -> Tensor:
        return self._row(node).log_softmax(dim=0)

    def own_law(self, node: int) -> Tensor:
        return self._logits_NV[self.first + 1 + node].double().softmax(dim=0)

    def allows(self, node: int, token: int) -> bool:
        if self.shaper.is_greedy:
            return float(self.shaper.weigh(*self._raw(node))[token]) > -math.inf
        return float(self.law(node)[token]) > 0.0

    def argmax(self, node: int) -> int:
        if self.shaper.is_plain_greedy:
            token = self._argmax_N[self.first + 1 + node]
            if token >= 0:
                return token
        return int(self._row(node).argmax())

    def draw(self, node: int, stream: Stream) -> int:
        if self.shaper.is_greedy:
            return self.argmax(node)
        return stream.pick(self.law(node))

    def keep_root(self, law_V: Tensor) -> None:
        """Takes the root's law, made elsewhere from the same row."""
        self._laws[-1] = law_V

    def _row(self, node: int) -> Tensor:
        """The shaped logits of a node."""
        if node not in self._rows:
            self._rows[node] = self.shaper.shape(*self._raw(node))
        return self._rows[node]

    def _raw(self, node: int) -> tuple[Tensor, Sequence[int], tuple[int, ...], Tensor | None]:
        """Logits of a node as the model gave them, and what shapes them."""
        path = self._path_tokens(node) if node >= 0 else ()
        mask_V = self._grammar.mask(path) if self._grammar else None
        return self._logits_NV[self.first + 1 + node], self._tokens, path, mask_V


def shape_roots(logits_NV: Tensor, laws: Sequence[TargetLaws]) -> None:
    """Makes laws of roots together where a temperature alone shapes them: all rules begin there."""
    laws = [p for p in laws if p.shaper.is_only_scaled]
    if not laws:
        return
    is_whole_step = len(laws) == len(logits_NV)  # as in plain decoding: nothing to gather
    logits_RV = logits_NV if is_whole_step else logits_NV[[p.first for p in laws]]
    made = laws_together(logits_RV, [p.shaper for p in laws])
    for p, law_V in zip(laws, made, strict=True):
        if law_V is not None:
            p.keep_root(law_V)
