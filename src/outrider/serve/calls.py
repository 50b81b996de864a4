"""CallParser: content and tool calls read out of an answer's text as it comes.

Each parser is a fold over characters: what it says depends on the text alone, never on how the
text was cut into chunks. What has been said is never taken back.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

ARGUMENTS = ("arguments", "parameters")
MAX_NAME = 128  # characters; a longer one is no function name
_OUTSIDE_STRINGS = frozenset(' \t\r\n,:{}[]"-+.')


class Text(NamedTuple):
    """Content: what the model says beside its calls."""

    text: str


class CallStart(NamedTuple):
    """The model calls a function; its arguments follow."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    name: str


class CallArguments(NamedTuple):
    """A further part of the JSON text of a call's arguments."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    text: str


Piece: TypeAlias = Text | CallStart | CallArguments


class Call(NamedTuple):
    """A whole call; `arguments` is JSON text as the model wrote it (perhaps cut off)."""

    name: str
    arguments: str


class Reply(NamedTuple):
    """What a text comes to: its content, and the calls in it."""

    content: str
    calls: tuple[Call, ...]


def read(parser: "CallParser", text: str) -> Reply:
    """A whole text at once."""
    return gather([*parser.feed(text), *parser.finish()])


def gather(pieces: Iterable[Piece]) -> Reply:
    """What pieces come to, put together."""
    content = ""
    calls: dict[int, list[str]] = {}
    for piece in pieces:
        if isinstance(piece, Text):
            content += piece.text
        elif isinstance(piece, CallStart):
            calls[piece.index] = [piece.name, ""]
        else:
            calls[piece.index][1] += piece.text
    return Reply(content, tuple(Call(name, arguments) for name, arguments in calls.values()))


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
        self._reader: _Reader = _CallReader(0)
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

    def _open_call(self, opening: str, reader: "_Reader") -> None:
        self._opening, self._reader, self._state = opening, reader, self._in_call

    def _new_call(self, **options: Any) -> "_CallReader":
        return _CallReader(self._num_calls, **options)

    def _in_call(self, char: str) -> bool:
        try:
            self._reader.push(char)
        except _MalformedError:
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
        return _merged(out)


class HermesParser(CallParser):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number (Hermes, Qwen)."""

    OPEN, CLOSE = "<tool_call>", "</tool_call>"

    def __init__(self, names: frozenset[str] = frozenset()) -> None:
        super().__init__(names)
        self._seen = ""
        self._state = self._content

    def _content(self, char: str) -> bool:
        self._held += char
        while not self.OPEN.startswith(self._held):
            self._say(self._held[0])
            self._held = self._held[1:]
        if self._held == self.OPEN:
            self._held = ""
            self._open_call(self.OPEN, self._new_call())
        return True

    def _after_call(self, char: str) -> bool:
        """Up to the closing tag; a new call may open without it."""
        self._seen = (self._seen + char)[-len(self.CLOSE) :]
        if self._seen.endswith(self.CLOSE):
            self._seen, self._state = "", self._content
        elif self._seen.endswith(self.OPEN):
            self._seen = ""
            self._open_call(self.OPEN, self._new_call())
        return True

    def _after_broken(self, char: str) -> bool:
        self._state = self._after_call
        return False

    def _after_no_call(self, char: str) -> bool:
        self._state = self._content
        return False


class LlamaParser(CallParser):
    """The whole answer is `{"name": ..., "parameters": {...}}`, more after `;` (Llama 3).

    An object that calls no known function is content.
    """

    TAG = "<|python_tag|>"

    def __init__(self, names: frozenset[str] = frozenset()) -> None:
        super().__init__(names)
        self._state = self._begin

    def _begin(self, char: str) -> bool:
        if not self._held and (char.isspace() or char == "{"):
            return self._between(char)
        self._held += char
        if self._held == self.TAG:
            self._opening, self._held, self._state = self.TAG, "", self._between
        elif not self.TAG.startswith(self._held):
            self._say(self._held)
            self._held, self._state = "", self._plain
        return True

    def _between(self, char: str) -> bool:
        if char == "{":
            self._open_call(self._opening, self._new_call(names=self._names, needs_arguments=True))
            self._opening = self._opening or ""
            return False
        if char.isspace():
            self._blanks += char
            return True
        if char == ";" and self._num_calls:
            return True
        self._say(self._opening)
        self._opening, self._state = "", self._plain
        return False

    def _after_call(self, char: str) -> bool:
        self._opening, self._state = "", self._between
        return False


class _ListParser(CallParser):
    """Calls in a list, as JSON; a subclass says where lists are."""

    def _in_list(self, char: str) -> bool:
        """Between the calls of a list."""
        if char == "{":
            opening, self._held = self._held, ""
            self._open_call(opening, self._new_call())
            return False
        if char.isspace() or char == ",":
            return True
        self._held = self._held if not self._num_calls else ""
        self._state = self._after_list
        return char == "]" and not self._held

    def _after_list(self, char: str) -> bool:
        self._say(self._held)
        self._held, self._state = "", self._plain
        return False

    def _after_call(self, char: str) -> bool:
        self._state = self._in_list
        return False


class ForcedCallsParser(_ListParser):
    """`[{"name": ..., "arguments": {...}}, ...]` and nothing else, as a grammar forces it.

    A call that is cut off before its arguments is left out.
    """

    def __init__(self, names: frozenset[str] = frozenset()) -> None:
        super().__init__(names)
        self._state = self._list_head

    def finish(self) -> list[Piece]:
        self._held = ""
        return super().finish()

    def _give_back(self) -> None:
        """Nothing: half a call is no text that anybody asked for."""

    def _list_head(self, char: str) -> bool:
        if char == "[":
            self._held, self._state = "[", self._in_list
            return True
        if char.isspace():
            return True
        self._state = self._plain
        return False


class MistralParser(_ListParser):
    """`[TOOL_CALLS]` and a list of calls, or (newer) `[TOOL_CALLS]name[ARGS]{...}` for each."""

    MARKER = "[TOOL_CALLS]"

    def __init__(self, names: frozenset[str] = frozenset()) -> None:
        super().__init__(names)
        self._state = self._content

    def _content(self, char: str) -> bool:
        self._held += char
        while not self.MARKER.startswith(self._held):
            self._say(self._held[0])
            self._held = self._held[1:]
        if self._held == self.MARKER:
            self._state = self._head
        return True

    def _head(self, char: str) -> bool:
        """Right after the marker, which is held until there is a call."""
        if char.isspace():
            return True
        if char == "[":
            self._held, self._state = self.MARKER + "[", self._in_list
            return True
        self._held, self._state = "", self._name
        return False

    def _name(self, char: str) -> bool:
        if char == "{":
            name, self._held = self._held.partition("[")[0].strip(), ""
            if name:
                self._open_call(self.MARKER + name, _ArgumentsReader(self._num_calls, name))
            else:
                self._open_call(self.MARKER, self._new_call())
            return False
        self._held += char
        if char == "\n" or len(self._held) > MAX_NAME:
            self._say(self.MARKER + self._held)
            self._held, self._state = "", self._content
        return True

    def finish(self) -> list[Piece]:
        if self._state == self._name:
            self._held = self.MARKER + self._held
        return super().finish()

    def _after_list(self, char: str) -> bool:
        self._say(self._held)
        self._held, self._state = "", self._content
        return False

    def _after_call(self, char: str) -> bool:
        is_list = isinstance(self._reader, _CallReader)
        self._state = self._in_list if is_list else self._content
        return False

    def _after_no_call(self, char: str) -> bool:
        self._state = self._content
        return False


class ForcedArgumentsParser(CallParser):
    """The answer is the arguments of one function, as a grammar forces it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._open_call("", _ArgumentsReader(0, name))


PARSERS: dict[str, Callable[[frozenset[str]], CallParser]] = {
    "hermes": HermesParser,
    "llama3_json": LlamaParser,
    "mistral": MistralParser,
}


class _MalformedError(Exception):
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
            raise _MalformedError
        if not self._depth and self.text and (char in ",}]" or char.isspace()):
            self.is_whole = True
            return False
        if not self._depth and (
            (self.text and char in '{["') or (not self.text and char in ",:}]")
        ):
            raise _MalformedError
        if char == '"':
            self._is_in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.is_whole = not self._depth
        return True


class _CallReader:
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
        """Takes the next character; _MalformedError if it does not fit."""
        self._state(char)
        if not self.has_begun:
            self.raw += char

    def _open(self, char: str) -> None:
        if char == "{":
            self._state = self._before_key
        elif not char.isspace():
            raise _MalformedError

    def _before_key(self, char: str) -> None:
        if char == '"':
            self._value = _Value()
            self._value.push(char)
            self._state = self._in_key
        elif char == "}":
            self._close()
        elif char != "," and not char.isspace():
            raise _MalformedError

    def _in_key(self, char: str) -> None:
        self._value.push(char)
        if self._value.is_whole:
            self._key = str(_loads(self._value.text))
            self._state = self._colon

    def _colon(self, char: str) -> None:
        if char == ":":
            self._state = self._before_value
        elif not char.isspace():
            raise _MalformedError

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
                raise _MalformedError
            self._name = value
        elif key in ARGUMENTS and not self._has_arguments:
            if value is not None and not isinstance(value, str):
                raise _MalformedError
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
            raise _MalformedError
        if not self._has_arguments:
            self._arguments = "{}"
        self._begin_if_ready()
        self.is_over = True


class _ArgumentsReader:
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
            raise _MalformedError
        if not self.has_begun:
            self.has_begun = True
            self.pieces.append(CallStart(self._index, self._name))
        self.pieces.append(CallArguments(self._index, char))
        self.is_over = self._value.is_whole


_Reader: TypeAlias = _CallReader | _ArgumentsReader


def _loads(text: str) -> Any:
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        raise _MalformedError from None
    if isinstance(value, str):
        _refuse_halves(value)
    return value


def _refuse_halves(text: str) -> None:
    """Half a surrogate pair is a string in JSON, but no text that could be sent."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _MalformedError from None


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one kind and call as one piece."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if isinstance(piece, Text) and isinstance(last, Text):
            merged[-1] = Text(last.text + piece.text)
        elif (
            isinstance(piece, CallArguments)
            and isinstance(last, CallArguments)
            and piece.index == last.index
        ):
            merged[-1] = CallArguments(piece.index, last.text + piece.text)
        else:
            merged.append(piece)
    return merged
