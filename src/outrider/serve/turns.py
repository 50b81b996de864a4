"""Turn: one answer of the assistant as a dialect asked for it, and its text as pieces."""

import uuid
from dataclasses import dataclass

from outrider.request import Speculation
from outrider.serve.call_parser import CallParser, read
from outrider.serve.calls import Piece, Reply, Text
from outrider.serve.generation import Ask
from outrider.serve.tools import ToolUse
from outrider.stream.events import Committed


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What is to be generated, and how to read it.

    Attributes:
        id: of the response, and of the request in the engine.
        speculation: `ask.speculation` with its defaults filled in.
        template: the model's chat template, which decides how calls are written.
    """

    id: str
    ask: Ask
    speculation: Speculation
    tool_use: ToolUse
    template: str = ""

    def read(self, text: str) -> Reply:
        """Content and calls of a whole answer."""
        parser = self.parser()
        if parser is None:
            return Reply(text, ())
        reply = read(parser, text)
        return reply if self.tool_use.is_parallel else reply._replace(calls=reply.calls[:1])

    def parser(self) -> CallParser | None:
        """None where the answer is content whatever it says."""
        return self.tool_use.parser(self.template) if self.tool_use.is_active else None

    def pieces(self) -> "Pieces":
        return Pieces(self)


class Pieces:
    """The pieces of one completion, commit by commit; joined they are what `Turn.read` gives."""

    def __init__(self, turn: Turn) -> None:
        self._parser = turn.parser()
        self._is_parallel = turn.tool_use.is_parallel
        self.num_calls = 0

    def take(self, event: Committed) -> list[Piece]:
        found = self._read(event)
        if not self._is_parallel:
            found = [piece for piece in found if isinstance(piece, Text) or piece.index == 0]
        indices = [piece.index for piece in found if not isinstance(piece, Text)]
        self.num_calls = max([self.num_calls, *(index + 1 for index in indices)])
        return found

    def _read(self, event: Committed) -> list[Piece]:
        if self._parser is None:
            return [Text(event.text)] if event.text else []
        pieces = self._parser.feed(event.text)
        return pieces if event.finish_reason is None else [*pieces, *self._parser.finish()]


def new_id(prefix: str) -> str:
    """A name that no other thing has."""
    return prefix + uuid.uuid4().hex
