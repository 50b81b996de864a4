"""Detokenizer: token ids to text piece by piece, whole characters only, stop texts found."""

from copy import copy
from typing import NamedTuple, Protocol

MAX_WINDOW = 8  # a longer one costs more with each token, a shorter one moves on more often


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...


class Stop(NamedTuple):
    """A stop text ended the output: after `num_tokens` of the tokens just added."""

    text: str
    num_tokens: int


class Detokenizer:
    """Text of one completion. `take` hands out what is new and can no longer change.

    A window of ids that begins at a settled character boundary is decoded anew with each
    token, since its text depends on its neighbours; now and then it moves on. Tokens enter one
    by one, so that the text never depends on how many a step has committed.

    Args:
        stop: texts that end the output; text that may turn out to begin one is held back.
        keeps_stop: whether the stop text stays in the output.
        context: token ids before the output, whose text decides how its first token reads.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        *,
        stop: tuple[str, ...] = (),
        keeps_stop: bool = False,
        skip_special_tokens: bool = True,
        context: tuple[int, ...] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._longest_stop = max(map(len, stop), default=0)
        self._keeps_stop = keeps_stop
        self._skip_special_tokens = skip_special_tokens
        self._text = ""  # settled, not taken yet
        self._window: list[int] = list(context)
        self._num_settled = len(context)
        self._settled = self._decode(self._window)  # the text of that many
        self._is_closed = False

    def add(self, tokens: tuple[int, ...], *, may_stop: bool = True) -> Stop | None:
        """Adds tokens; stops after the first that completes a stop text and forgets the rest."""
        may_stop = may_stop and bool(self._stop)
        for count, token in enumerate(tokens, start=1):
            start = len(self._text)
            self._push(token)
            found = self._find(start) if may_stop else None
            if found is not None:
                self._cut(*found)
                return Stop(found[1], count)
        return None

    def take(self, *, is_last: bool = False) -> str:
        """New text since the last call; with `is_last` all that is left, incomplete ends too."""
        if is_last and not self._is_closed:
            self._text += self._pending()
            self._is_closed = True
        is_all = self._is_closed or not self._stop
        end = len(self._text) - (0 if is_all else self._held_back())
        new, self._text = self._text[:end], self._text[end:]
        return new

    def preview(self, tokens: tuple[int, ...]) -> tuple[int, str]:
        """(n, text): what would be told if the first n of these tokens came now.

        n is the most of them after which all characters are whole and no stop text may have
        begun, neither here nor in what is held back already. Nothing is changed.
        """
        found = (0, "")
        if self._text:
            return found
        ahead = copy(self)
        ahead._window = list(self._window)
        for count, token in enumerate(tokens, start=1):
            if ahead.add((token,)) is not None:
                break
            if ahead._is_whole() and not (self._stop and ahead._held_back()):
                found = (count, ahead._text)
        return found

    def _is_whole(self) -> bool:
        """Whether every token so far reads as whole characters."""
        return self._num_settled == len(self._window) or not self._pending()

    def _push(self, token: int) -> None:
        window = self._window
        window.append(token)
        whole = self._tokenizer.decode(window, self._skip_special_tokens)
        num_told = len(self._settled)
        if len(whole) > num_told and whole[-1] != "\ufffd":
            self._text += whole[num_told:]
            if len(window) >= MAX_WINDOW:
                # What was added last stays as context for the next token.
                window = self._window = window[self._num_settled :]
                whole = self._decode(window)
            self._num_settled, self._settled = len(window), whole

    def _pending(self) -> str:
        return self._decode(self._window)[len(self._settled) :]

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        return self._tokenizer.decode(ids, self._skip_special_tokens)

    def _find(self, start: int) -> tuple[int, str] | None:
        """(position, stop text) of the first stop that ends after `start`.

        None begins in text that was taken: its beginning would have been held back.
        """
        found = [(self._text.find(s, max(0, start - len(s) + 1)), s) for s in self._stop]
        hits = [(at, s) for at, s in found if at >= 0]
        return min(hits, key=lambda hit: hit[0] + len(hit[1])) if hits else None

    def _cut(self, at: int, stop: str) -> None:
        self._text = self._text[: at + len(stop) if self._keeps_stop else at]
        self._window, self._num_settled, self._settled, self._is_closed = [], 0, "", True

    def _held_back(self) -> int:
        """Length of the longest ending that begins a stop text."""
        for size in range(min(self._longest_stop - 1, len(self._text)), 0, -1):
            if any(s.startswith(self._text[-size:]) for s in self._stop):
                return size
        return 0
