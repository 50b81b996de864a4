"""Recall: guesses at a draft model's next tokens from the text itself (a drafter's own drafter)."""

from collections.abc import Sequence as Items

from outrider.draft.ngram import continuation


class Recall:
    """Where the n-grams of a growing text last stood.

    Unlike `NgramIndex` it looks up endings that are not part of the text, and perhaps never will
    be: the text and a draft after it.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self._shortest = shortest
        self._longest = longest
        self._num_indexed = 0
        self._after: dict[tuple[int, ...], int] = {}

    def follow(self, tokens: Items[int]) -> None:
        """Enters what is new, but for the ending, after which nothing stands yet."""
        for stop in range(max(self._num_indexed + 1, self._shortest), len(tokens)):
            for length in range(self._shortest, min(self._longest, stop) + 1):
                self._after[tuple(tokens[stop - length : stop])] = stop
        self._num_indexed = max(self._num_indexed, len(tokens) - 1)

    def guess(self, tokens: Items[int], drafted: Items[int], count: int) -> list[int]:
        """`count` tokens that may follow the text and the draft, by the longest match; or none."""
        if count < 1:
            return []
        num_old = max(self._longest - len(drafted), 0)
        ending = (*tokens[len(tokens) - min(num_old, len(tokens)) :], *drafted)
        for length in range(min(self._longest, len(ending)), self._shortest - 1, -1):
            start = self._after.get(ending[-length:])
            if start is not None:
                return continuation(tokens, start, count)
        return []
