"""Prompts: messages as tokens behind a session's log, and places within its answers."""

from array import array
from collections.abc import Iterable, Mapping, Sequence as Items
from contextlib import suppress
from typing import Any, NamedTuple

from outrider.errors import RequestError, SessionNotFound
from outrider.serve.base import Server
from outrider.serve.chat_template import template_of, with_tools
from outrider.serve.continuation import continuation, opening
from outrider.serve.response_store import Stored
from outrider.serve.session_store import SessionStore
from outrider.serve.tools import ToolUse, instructions
from outrider.session.records import Head, Session

Message = dict[str, Any]
SILENT = "input=[]: say something"


class Preamble(NamedTuple):
    """What the model is told before a conversation."""

    instructions: str | None = None
    tool_use: ToolUse = ToolUse()

    def as_dict(self) -> dict[str, Any]:
        """What there is to tell, as JSON."""
        tools = self.tool_use.tools if self.tool_use.is_active else ()
        told = {
            "instructions": self.instructions,
            "tools": [tool.as_function() for tool in tools],
        }
        return {key: value for key, value in told.items() if value}


class Added(NamedTuple):
    """Tokens that messages add to a log.

    Attributes:
        note: what the model knows of instructions and tools from then on, to be kept with them.
    """

    tokens: list[int]
    note: dict[str, Any]


class Prompts:
    """Puts words into tokens by the model's chat template, and never encodes an answer anew.

    What a model has been told before a conversation is kept with the tokens that tell it, so it
    is known in every log that holds these, and in no other.
    """

    def __init__(self, server: Server, store: SessionStore) -> None:
        self._server = server
        self._store = store

    async def template(
        self,
        tenant: str,
        session: Session,
        at: Head,
        log: "array[int]",
        messages: Items[Message],
        preamble: Preamble,
        awaits_answer: bool,
    ) -> Added:
        """The tokens that messages add to a log, and what the model must be told with them.

        Args:
            at: the head whose log it is.
        """
        given = session.settings.get("instructions")
        note = {"given": given, **preamble.as_dict()} if given else preamble.as_dict()
        if not log:
            return Added(self.opening(messages, preamble, awaits_answer, given), note)
        tokenizer = self._server.needed_tokenizer()
        template = template_of(tokenizer)
        known = await self._known(tenant, at)
        told = _texts(*_news(known, note, preamble))
        if not (told or messages):
            raise RequestError(SILENT)
        plain, _ = with_tools([*told, *messages], ToolUse(), template)
        _, more = with_tools([{"role": "user", "content": ""}], preamble.tool_use, template)
        is_open = await self._is_open(tenant, session, at, log)
        tokens = continuation(
            tokenizer, log, plain, more, is_open=is_open, awaits_answer=awaits_answer
        )
        return Added(tokens, _changes(known, note))

    def opening(
        self,
        messages: Items[Message],
        preamble: Preamble,
        awaits_answer: bool,
        given: str | None = None,
    ) -> list[int]:
        tokenizer = self._server.needed_tokenizer()
        told = [*_texts(given, preamble.instructions), *messages]
        if not told:
            raise RequestError(SILENT)
        told, more = with_tools(told, preamble.tool_use, template_of(tokenizer))
        return opening(tokenizer, told, more, awaits_answer=awaits_answer)

    async def _known(self, tenant: str, at: Head) -> dict[str, Any]:
        """What the model has been told on the way to a head, the last of each kind."""
        known: dict[str, Any] = {}
        for note in await self._store.call(self._store.log.notes, tenant, at):
            if "given" in note and note["given"] != known.get("given"):
                known["instructions"] = note["given"]
            known |= note
        return known

    async def _is_open(self, tenant: str, session: Session, at: Head, log: "array[int]") -> bool:
        """Whether the log ends in an answer: at its end, or cut within it by fork or rewind."""
        if await self._store.call(self._store.log.response_at, tenant, at) is not None:
            return True
        branches = await self._store.call(self._store.log.branches, tenant, session.id)
        for stored in self._store.responses.of_sessions(tenant, branches):
            if stored.num_prompt < len(log) <= stored.num_tokens:
                with suppress(SessionNotFound):
                    head = await self._store.call(
                        self._store.log.head_of_response, tenant, stored.id
                    )
                    whole = await self._store.call(self._store.log.tokens, tenant, head)
                    if whole[: len(log)] == log:
                        return True
        return False

    async def answer(self, tenant: str, session: Session, response_id: str | None) -> Stored:
        """A response of the session's present branch; the last one if none is named."""
        name = response_id
        if name is None:
            name = await self._store.call(self._store.log.response_at, tenant, session.head)
        if name is None:
            raise RequestError(
                "response_id=None: the session does not end in a response; name the one you mean"
            )
        stored = self._store.responses.get(tenant, name)
        head = await self._store.call(self._store.log.head_of_response, tenant, name)
        whole = await self._store.call(self._store.log.tokens, tenant, head)
        log = await self._store.call(self._store.log.tokens, tenant, session.head)
        if stored is None or log[: len(whole)] != whole:
            raise SessionNotFound(
                f"response_id={name!r}: is not part of session {session.id!r} as it stands"
            )
        return stored

    def num_within(self, answer: Items[int], chars: int | None) -> int:
        """Tokens of an answer whose text has at most `chars` characters."""
        tokenizer, num_kept = self._server.needed_tokenizer(), 0
        for count in range(1, len(answer) + 1):
            text = tokenizer.decode(answer[:count])
            if len(text) > (chars or 0):
                break
            num_kept = count if not text.endswith("\ufffd") else num_kept
        return num_kept

    def check(self, tokens: Items[int]) -> None:
        vocab_size = self._server.llm.engine.spec.vocab_size
        wrong = next((token for token in tokens if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise RequestError(f"token_ids={wrong}: ids lie in [0, {vocab_size - 1}]")


def _texts(*texts: str | None) -> list[Message]:
    """One message of the system, or none."""
    told = "\n\n".join(dict.fromkeys(text for text in texts if text))
    return [{"role": "system", "content": told}] if told else []


def _changes(known: Mapping[str, Any], note: Mapping[str, Any]) -> dict[str, Any]:
    """Of a note, what says more than is known."""
    if note.get("given") != known.get("given"):
        return dict(note)
    return {name: value for name, value in note.items() if known.get(name) != value}


def _news(known: Mapping[str, Any], note: Mapping[str, Any], new: Preamble) -> Iterable[str]:
    """What a model that has been told what is `known` must still be told."""
    last = known.get("instructions")
    if note.get("given") != known.get("given") and note.get("given"):
        yield note["given"]
        last = note["given"]
    if new.instructions and new.instructions != last:
        yield new.instructions
    if "tools" in note and note["tools"] != known.get("tools"):
        yield instructions(new.tool_use.tools)
