"""Readers: the JSON text of one call, character by character, told as early as it can be."""

import json
from collections.abc import Callable
from typing import Any, TypeAlias

from outrider.serve.calls import CallArguments, CallStart, Piece

ARGUMENTS = ("arguments", "parameters")
_OUTSIDE_STRINGS = frozenset(' \t\r\n,:{}[]"-+.')


class CallReader:
    """Reads one object with a name and arguments, its keys in any order.

    Attributes:
        raw: what was read, until the call has begun.
        has_begun: whether name and arguments are known well enough to be told.
        pieces: what can be told; whoever takes them clears them.
    """

    def __init__(
        self, index: int, *, names: frozenset[str] = frozenset(), needs_arguments: bool = False
    ) -> None:
        self.raw = ""
        self.has_begun = self.is_over = False
        self.pieces: list[Piece] = []
        self._index = index
        self._names = names
        self._needs_arguments = needs_arguments
        self._name: str | None = None
        self._arguments: str | None = None  # not told yet
        self._key = ""
        self._value = _Value()
        self._state: Callable[[str], None] = self._open

    def push(self, char: str) -> None:
        """Takes the next character; MalformedError if it does not fit."""
        self._state(char)
        if not self.has_begun:
            self.raw += char

    def _open(self, char: str) -> None:
        if char == "{":
            self._state = self._before_key
        elif not char.isspace():
            raise MalformedError

    def _before_key(self, char: str) -> None:
        if char == '"':
            self._value = _Value()
            self._value.push(char)
            self._state = self._in_key
        elif char == "}":
            self._close()
        elif char != "," and not char.isspace():
            raise MalformedError

    def _in_key(self, char: str) -> None:
        self._value.push(char)
        if self._value.is_whole:
            self._key = str(_loads(self._value.text))
            self._state = self._colon

    def _colon(self, char: str) -> None:
        if char == ":":
            self._state = self._before_value
        elif not char.isspace():
            raise MalformedError

    def _before_value(self, char: str) -> None:
        if not char.isspace():
            self._value = _Value()
            self._state = self._in_value
            if self._key in ARGUMENTS and char == "{" and not self._has_arguments:
                self._arguments = ""
                self._state = self._in_arguments
                self._begin_if_ready()
            self._state(char)

    def _in_value(self, char: str) -> None:
        is_taken = self._value.push(char)
        if self._value.is_whole:
            self._state = self._before_key
            self._take(self._key, _loads(self._value.text))
        if not is_taken:
            self._state(char)

    def _in_arguments(self, char: str) -> None:
        self._value.push(char)
        if self.has_begun:
            self.pieces.append(CallArguments(self._index, char))
        else:
            self._arguments = (self._arguments or "") + char
        if self._value.is_whole:
            self._state = self._before_key

    def _take(self, key: str, value: Any) -> None:
        if key == "name" and self._name is None:
            is_known = not self._names or value in self._names
            if not isinstance(value, str) or not is_known or not value.isprintable() or not value:
                raise MalformedError
            self._name = value
        elif key in ARGUMENTS and not self._has_arguments:
            if value is not None and not isinstance(value, str):
                raise MalformedError
            self._arguments = value or "{}"
        self._begin_if_ready()

    @property
    def _has_arguments(self) -> bool:
        return self._arguments is not None or self.has_begun

    def _begin_if_ready(self) -> None:
        if self._name is None or self._arguments is None or self.has_begun:
            return
        self.has_begun = True
        self.pieces.append(CallStart(self._index, self._name))
        if self._arguments:
            self.pieces.append(CallArguments(self._index, self._arguments))

    def _close(self) -> None:
        if self._name is None or (self._needs_arguments and not self._has_arguments):
            raise MalformedError
        if not self._has_arguments:
            self._arguments = "{}"
        self._begin_if_ready()
        self.is_over = True


class ArgumentsReader:
    """Reads one JSON value, the arguments of a function that is known already."""

    def __init__(self, index: int, name: str) -> None:
        self.raw = ""
        self.has_begun = self.is_over = False
        self.pieces: list[Piece] = []
        self._index = index
        self._name = name
        self._value = _Value()

    def push(self, char: str) -> None:
        if not self.has_begun and char.isspace():
            return
        if not self._value.push(char):
            raise MalformedError
        if not self.has_begun:
            self.has_begun = True
            self.pieces.append(CallStart(self._index, self._name))
        self.pieces.append(CallArguments(self._index, char))
        self.is_over = self._value.is_whole


Reader: TypeAlias = CallReader | ArgumentsReader


class MalformedError(Exception):
    """This character cannot go on the JSON text that was begun."""


class _Value:
    """One JSON value, up to its end."""

    def __init__(self) -> None:
        self.text = ""
        self.is_whole = False
        self._depth = 0
        self._is_in_string = self._is_escaped = False

    def push(self, char: str) -> bool:
        """False: the value, a number or a word, ended before this character."""
        is_taken = self._push_in_string(char) if self._is_in_string else self._push(char)
        if is_taken:
            self.text += char
        return is_taken

    def _push_in_string(self, char: str) -> bool:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._is_in_string, self.is_whole = False, not self._depth
        return True

    def _push(self, char: str) -> bool:
        if not (char.isalnum() or char in _OUTSIDE_STRINGS):
            raise MalformedError
        if not self._depth and self.text and (char in ",}]" or char.isspace()):
            self.is_whole = True
            return False
        if not self._depth and (
            (self.text and char in '{["') or (not self.text and char in ",:}]")
        ):
            raise MalformedError
        if char == '"':
            self._is_in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.is_whole = not self._depth
        return True


def _loads(text: str) -> Any:
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        raise MalformedError from None
    if isinstance(value, str):
        _refuse_halves(value)
    return value


def _refuse_halves(text: str) -> None:
    """Half a surrogate pair is a string in JSON, but no text that could be sent."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise MalformedError from None
