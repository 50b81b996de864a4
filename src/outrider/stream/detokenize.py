"""Detokenizer: token ids to text piece by piece, whole characters only, stop texts found."""

from typing import NamedTuple, Protocol


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
    token, since its text depends on its neighbours; it moves on when the end is whole. Tokens
    enter one by one, so that the text never depends on how many a step has committed.

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
        self.text = ""
        self._tokenizer = tokenizer
        self._stop = stop
        self._keeps_stop = keeps_stop
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = list(context)
        self._num_settled = len(context)
        self._num_taken = 0
        self._is_closed = False

    def add(self, tokens: tuple[int, ...], *, may_stop: bool = True) -> Stop | None:
        """Adds tokens; stops after the first that completes a stop text and forgets the rest."""
        for count, token in enumerate(tokens, start=1):
            start = len(self.text)
            self._push(token)
            found = self._find(start) if may_stop else None
            if found is not None:
                self._cut(*found)
                return Stop(found[1], count)
        return None

    def take(self, *, is_last: bool = False) -> str:
        """New text since the last call; with `is_last` all that is left, incomplete ends too."""
        if is_last and not self._is_closed:
            self.text += self._pending()
            self._is_closed = True
        end = len(self.text) if is_last or self._is_closed else len(self.text) - self._held_back()
        new, self._num_taken = self.text[self._num_taken : end], max(end, self._num_taken)
        return new

    def peek(self, tokens: tuple[int, ...]) -> str:
        """What would follow the text taken so far after these tokens; nothing is changed."""
        settled = self._decode(self._window[: self._num_settled])
        added = self._decode([*self._window, *tokens])[len(settled) :]
        return self.text[self._num_taken :] + added

    def _push(self, token: int) -> None:
        self._window.append(token)
        settled = self._decode(self._window[: self._num_settled])
        whole = self._decode(self._window)
        if len(whole) > len(settled) and not whole.endswith("\ufffd"):
            self.text += whole[len(settled) :]
            # The last token added stays as context for the next; older ones are no longer needed.
            self._window = self._window[self._num_settled :]
            self._num_settled = len(self._window)

    def _pending(self) -> str:
        settled = self._decode(self._window[: self._num_settled])
        return self._decode(self._window)[len(settled) :]

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)

    def _find(self, start: int) -> tuple[int, str] | None:
        """(position, stop text) of the first stop that ends after `start`."""
        found = [(self.text.find(s, max(0, start - len(s) + 1)), s) for s in self._stop]
        hits = [(at, s) for at, s in found if at >= 0]
        return min(hits, key=lambda hit: hit[0] + len(hit[1])) if hits else None

    def _cut(self, at: int, stop: str) -> None:
        self.text = self.text[: at + len(stop) if self._keeps_stop else at]
        self._window, self._num_settled, self._is_closed = [], 0, True

    def _held_back(self) -> int:
        """Length of the longest ending that begins a stop text."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for size in range(min(longest, len(self.text)), 0, -1):
            if any(s.startswith(self.text[-size:]) for s in self._stop):
                return size
        return 0
