"""How models write calls: a parser for each format, and for what a grammar forces."""

from collections.abc import Callable

from outrider.serve.call_parser import CallParser
from outrider.serve.call_reader import ArgumentsReader, CallReader
from outrider.serve.calls import Piece

MAX_NAME = 128  # characters; a longer one is no function name


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
                self._open_call(self.MARKER + name, ArgumentsReader(self._num_calls, name))
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
        is_list = isinstance(self._reader, CallReader)
        self._state = self._in_list if is_list else self._content
        return False

    def _after_no_call(self, char: str) -> bool:
        self._state = self._content
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


class ForcedArgumentsParser(CallParser):
    """The answer is the arguments of one function, as a grammar forces it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._open_call("", ArgumentsReader(0, name))


PARSERS: dict[str, Callable[[frozenset[str]], CallParser]] = {
    "hermes": HermesParser,
    "llama3_json": LlamaParser,
    "mistral": MistralParser,
}
