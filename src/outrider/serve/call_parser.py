"""CallParser: content and tool calls read out of an answer's text as it comes.

Each parser is a fold over characters: what it says depends on the text alone, never on how the
text was cut into chunks. What has been said is never taken back.
"""

from collections.abc import Callable
from typing import Any

from outrider.serve.call_reader import CallReader, MalformedError, Reader
from outrider.serve.calls import CallStart, Piece, Reply, Text, gather, merged


class CallParser:
    """Reads content and calls out of an answer's text; a subclass says where calls are.

    Blanks before a call, after one, and between calls are no content.

    Args:
        names: functions that there are; for formats where a call looks like any JSON text.
    """

    def __init__(self, names: frozenset[str] = frozenset()) -> None:
        self._names = names
        self._out: list[Piece] = []
        self._blanks = ""
        self._held = ""
        self._num_calls = 0
        self._reader: Reader = CallReader(0)
        self._opening = ""  # what led to the call being read
        self._state: Callable[[str], bool] = self._plain

    def feed(self, text: str) -> list[Piece]:
        """What these further characters say for certain."""
        for char in text:
            while not self._state(char):
                pass
        return self._drain()

    def finish(self) -> list[Piece]:
        """What is left when no more comes."""
        if not self._reader.is_over and self._state == self._in_call:
            self._give_back()
        self._say(self._held)
        self._held = ""
        if not self._num_calls and self._blanks:
            self._out.append(Text(self._blanks))
        self._blanks = ""
        return self._drain()

    def _plain(self, char: str) -> bool:
        """Content to the end."""
        self._say(char)
        return True

    def _ignore(self, char: str) -> bool:
        """The rest of a call that went wrong after it had begun."""
        return True

    def _open_call(self, opening: str, reader: Reader) -> None:
        self._opening, self._reader, self._state = opening, reader, self._in_call

    def _new_call(self, **options: Any) -> CallReader:
        return CallReader(self._num_calls, **options)

    def _in_call(self, char: str) -> bool:
        try:
            self._reader.push(char)
        except MalformedError:
            if self._reader.has_begun:
                self._state = self._after_broken
            else:
                self._give_back()
                self._state = self._after_no_call
            return False
        self._take_pieces()
        if self._reader.is_over:
            self._state = self._after_call
        return True

    def _after_call(self, char: str) -> bool:
        return self._plain(char)

    def _after_broken(self, char: str) -> bool:
        return self._ignore(char)

    def _after_no_call(self, char: str) -> bool:
        return self._plain(char)

    def _take_pieces(self) -> None:
        for piece in self._reader.pieces:
            if isinstance(piece, CallStart):
                self._blanks = ""
                self._num_calls += 1
            self._out.append(piece)
        self._reader.pieces.clear()

    def _give_back(self) -> None:
        """What looked like a call is content after all."""
        if not self._reader.has_begun:
            self._say(self._opening + self._reader.raw)

    def _say(self, text: str) -> None:
        for char in text:
            self._blanks += char
            if not char.isspace():
                self._out.append(Text(self._blanks))
                self._blanks = ""

    def _drain(self) -> list[Piece]:
        out, self._out = self._out, []
        return merged(out)


def read(parser: CallParser, text: str) -> Reply:
    """A whole text at once."""
    return gather([*parser.feed(text), *parser.finish()])
