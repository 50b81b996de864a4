"""What a head's rows are found by: the log from its second token on, and a salt.

Row t has read the token at t + 1.
"""

from collections.abc import Sequence as Items
from typing import overload

from outrider.sequence import Sequence


class FromSecond(Items[int]):
    """A token log without its first token, as rows are hashed by it; a view, so it costs nothing.

    Slices go upwards.
    """

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return max(len(self._tokens) - 1, 0)

    @overload
    def __getitem__(self, at: int) -> int: ...

    @overload
    def __getitem__(self, at: slice) -> list[int]: ...

    def __getitem__(self, at: int | slice) -> int | list[int]:
        places = range(1, len(self._tokens))[at]
        if isinstance(places, int):
            return self._tokens[places]
        return self._tokens[places.start : places.stop : places.step]


def num_common(tokens: Items[int], others: Items[int]) -> int:
    """Length of the prefix that both have."""
    pairs = enumerate(zip(tokens, others, strict=False))
    differing = (index for index, (token, other) in pairs if token != other)
    return next(differing, min(len(tokens), len(others)))


def salt_of(tokens: Items[int]) -> str:
    """Rows are hashed by the tokens from the second on, so the first one is part of the salt."""
    return f"\0{tokens[0]}" if tokens else ""


def salt_of_log(seq: Sequence) -> str:
    """Nobody else's tenant finds its rows."""
    return seq.request.tenant + salt_of(seq.tokens[:1])
