"""The committed text in a draft model's tokens, kept up at a cost its length does not raise."""

import codecs
from collections.abc import Callable, Sequence as Items
from itertools import islice
from typing import Protocol

from outrider.draft.vocabulary_map import Dialect

LOOK_BEHIND = 64  # characters that are encoded anew, at least; at most about twice as many
MAX_LOOK_BEHIND = 8 * LOOK_BEHIND
NUM_CUTS = 4  # places of each kind that are tried for a cut


class DraftLog(Protocol):
    """What the draft model reads in place of the token log.

    Attributes:
        tokens: draft ids.
        num_covered: committed tokens that were taken in.
    """

    tokens: list[int]
    num_covered: int

    @property
    def num_settled(self) -> int:
        """Leading draft ids that no later text can change."""
        ...

    def follow(self, log: Items[int]) -> int:
        """Takes in what was committed since; returns how many leading draft ids did not change."""
        ...


class TokenLog:
    """Token by token; `spell` gives the draft ids of one target id."""

    def __init__(self, opening: Items[int], spell: Callable[[int], Items[int]]) -> None:
        self.tokens = list(opening)
        self.num_covered = 0
        self._spell = spell

    @property
    def num_settled(self) -> int:
        return len(self.tokens)

    def follow(self, log: Items[int]) -> int:
        num_kept = len(self.tokens)
        for token in log[self.num_covered :]:
            self.tokens += self._spell(token)
        self.num_covered = len(log)
        return num_kept


class TextLog:
    """As text, encoded as the draft model's tokenizer would encode it whole.

    Only the end of it is encoded anew. What lies further back is settled where a cut is seen to
    be harmless: the text behind it, encoded by itself, gives the tokens it has in the whole. A cut
    before a space is preferred, since words do not merge across it whatever follows.

    Attributes:
        text: the end that is not settled yet.
        partial: bytes of a character that the last tokens have begun.
    """

    def __init__(self, target: Dialect, draft: Dialect) -> None:
        self.tokens = list(draft.opening)
        self.num_covered = 0
        self.text = ""
        self.partial = b""
        self._target = target
        self._draft = draft
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_settled = len(self.tokens)
        self._has_text = False
        self._encode = draft.encode

    @property
    def num_settled(self) -> int:
        return self._num_settled

    def follow(self, log: Items[int]) -> int:
        new = self._read(log)
        num_kept = self._num_settled if new else len(self.tokens)
        if new:
            self.text += new
            self.tokens[self._num_settled :] = self._encode(self.text)
            self._settle()
        return num_kept

    def _read(self, log: Items[int]) -> str:
        """New text, whole characters only; special tokens stand for none."""
        new = b"".join(map(self._target.bytes_of, log[self.num_covered :]))
        self.num_covered = len(log)
        text = self._decoder.decode(new)
        self.partial = self._decoder.getstate()[0]
        if text and not self._has_text:
            self._has_text = True
            text = text.removeprefix(" ") if self._target.adds_space else text
        return text

    def _settle(self) -> None:
        if len(self.text) < 2 * LOOK_BEHIND:
            return
        for cut in _cuts(self.text):
            rest = self._draft.go_on(self.text[cut:])
            at = len(self.tokens) - len(rest)
            if at >= self._num_settled and self.tokens[at:] == rest:
                self._cut(cut, at)
                return
        if len(self.text) >= MAX_LOOK_BEHIND:  # a tokenizer without places to cut: append from now
            self._cut(len(self.text), len(self.tokens))

    def _cut(self, cut: int, num_settled: int) -> None:
        self.text, self._num_settled = self.text[cut:], num_settled
        self._encode = self._draft.go_on


def whole_characters(data: bytes) -> str:
    """The text at the start of these bytes, up to what is no character or not a whole one."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()


def common_length(a: Items[int], b: Items[int], start: int) -> int:
    """Length of the longest common prefix, of which the first `start` are known."""
    end = min(len(a), len(b))
    start = min(start, end)
    while start < end and a[start] == b[start]:
        start += 1
    return start


def _cuts(text: str) -> list[int]:
    """Places to cut at, the best first: the last ones between a word and a space, then any."""
    last = len(text) - LOOK_BEHIND
    spaces = (at for at in range(last, 0, -1) if text[at] == " " and not text[at - 1].isspace())
    return [*islice(spaces, NUM_CUTS), *range(last, max(0, last - NUM_CUTS), -1)]
