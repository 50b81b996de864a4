"""Prompts: messages as tokens behind a session's log, and places within its answers."""

from array import array
from collections.abc import Iterable, Sequence as Items
from contextlib import suppress
from typing import Any, NamedTuple

from outrider.errors import RequestError, SessionNotFound
from outrider.serve.base import Server
from outrider.serve.chat_template import template_of, with_tools
from outrider.serve.continuation import continuation, opening
from outrider.serve.response_store import Stored
from outrider.serve.session_store import SessionStore
from outrider.serve.tools import ToolUse, instructions
from outrider.session.records import Session

Message = dict[str, Any]


class Preamble(NamedTuple):
    """What the model is told before a conversation."""

    instructions: str | None = None
    tool_use: ToolUse = ToolUse()

    def as_dict(self) -> dict[str, Any]:
        """What there is to tell, as JSON."""
        tools = [tool.as_function() for tool in self.tool_use.tools]
        told = {"instructions": self.instructions, "tools": tools}
        return {key: value for key, value in told.items() if value}


class Prompts:
    """Puts words into tokens by the model's chat template, and never encodes an answer anew."""

    def __init__(self, server: Server, store: SessionStore) -> None:
        self._server = server
        self._store = store

    async def template(
        self,
        tenant: str,
        session: Session,
        log: "array[int]",
        messages: Items[Message],
        preamble: Preamble,
        awaits_answer: bool,
    ) -> list[int]:
        """The tokens that messages add to a log, and what the model must be told with them."""
        if not log:
            given = session.settings.get("instructions")
            return self.opening(messages, preamble, awaits_answer, given)
        tokenizer = self._server.needed_tokenizer()
        template = template_of(tokenizer)
        told = _texts(*_news(session, preamble))
        plain, _ = with_tools([*told, *messages], ToolUse(), template)
        _, more = with_tools([{"role": "user", "content": ""}], preamble.tool_use, template)
        is_open = await self._is_open(tenant, session, log)
        return continuation(
            tokenizer, log, plain, more, is_open=is_open, awaits_answer=awaits_answer
        )

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
            raise RequestError("input is empty: say something")
        told, more = with_tools(told, preamble.tool_use, template_of(tokenizer))
        return opening(tokenizer, told, more, awaits_answer=awaits_answer)

    async def note(self, tenant: str, session: Session, new: Preamble) -> None:
        known = dict(session.settings.get("preamble", {}))
        if {**known, **new.as_dict()} != known:
            settings = {**session.settings, "preamble": {**known, **new.as_dict()}}
            await self._store.call(self._store.log.update, tenant, session.id, settings=settings)

    async def _is_open(self, tenant: str, session: Session, log: "array[int]") -> bool:
        """Whether the log ends in an answer: at its end, or cut within it by fork or rewind."""
        if session.head.response_id is not None and session.head.num_tokens == len(log):
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
        name = response_id or session.head.response_id
        if name is None:
            raise RequestError("response_id is missing: the session does not end in a response")
        stored = self._store.responses.get(tenant, name)
        head = await self._store.call(self._store.log.head_of_response, tenant, name)
        whole = await self._store.call(self._store.log.tokens, tenant, head)
        log = await self._store.call(self._store.log.tokens, tenant, session.head)
        if stored is None or log[: len(whole)] != whole:
            raise SessionNotFound(f"response {name!r} is not part of session {session.id!r}")
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
            raise RequestError(f"token_ids: {wrong} is none of the ids 0 to {vocab_size - 1}")


def _texts(*texts: str | None) -> list[Message]:
    """One message of the system, or none."""
    told = "\n\n".join(dict.fromkeys(text for text in texts if text))
    return [{"role": "system", "content": told}] if told else []


def _news(session: Session, new: Preamble) -> Iterable[str]:
    """What a model that knows the log must still be told."""
    known, given = session.settings.get("preamble", {}), new.as_dict()
    if given.get("instructions", "") not in (
        "",
        known.get("instructions"),
        session.settings.get("instructions"),
    ):
        yield given["instructions"]
    if given.get("tools") and given["tools"] != known.get("tools") and new.tool_use.is_active:
        yield instructions(new.tool_use.tools)
