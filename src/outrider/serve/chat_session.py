"""ChatSession: one answer of a chat whose conversation a session keeps."""

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from outrider.engine.outputs import Completion
from outrider.errors import RequestError, SessionError
from outrider.serve.base import Server
from outrider.serve.calls import Reply
from outrider.serve.generation import Answer, generate
from outrider.serve.response_store import Stored
from outrider.serve.schemas_chat import ChatBody
from outrider.serve.session_prompts import Message, Preamble
from outrider.serve.session_service import Sessions, SessionTurn
from outrider.serve.turns import Turn
from outrider.serve.usage import exactness, metrics_of
from outrider.session.records import Session
from outrider.stream.events import Committed, Event, RequestMetrics


class ChatSession:
    """A turn of a session's log, asked for in the words of chat: its messages are what is new.

    `async with await ChatSession.open(...) as talk:`; an answer that does not come to its end
    leaves the session where it was.

    Attributes:
        turn: the body's, with the whole log before its messages as the prompt.
        report: `outrider.session` of the answer; filled in when it is complete.
    """

    def __init__(self, here: Server, body: ChatBody, turn: Turn, opened: SessionTurn) -> None:
        past = opened.experience(turn.ask.sampling.temperature)
        ask = replace(turn.ask, prompt=opened.prompt, experience=past)
        self.turn = replace(turn, ask=ask)
        self.report: dict[str, Any] = {}
        self._here = here
        self._body = body
        self._opened = opened
        self._kept: Sessions = here.sessions

    @classmethod
    async def open(cls, here: Server, session: Session, body: ChatBody, turn: Turn) -> Self:
        """SessionConflict, RequestError: nothing was changed."""
        options = body.outrider
        opened = await here.sessions.begin(
            turn.ask.tenant,
            session.id,
            body.template_messages(),
            response_id=turn.id,
            preamble=Preamble(None, turn.tool_use),
            if_head=options.if_head,
            on_conflict=options.on_conflict,
        )
        return cls(here, body, turn, opened)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.report:
            with suppress(SessionError):
                await self._kept.abort(self._opened)

    async def events(self) -> AsyncGenerator[Event]:
        """As `generate`; the turn is durable before the last event is told."""
        made = Completion(index=0)
        events = generate(self._here, self.turn.ask, self.turn.id)
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Committed):
                    made.take(event)
                    if event.finish_reason is not None:
                        await self.finish(made)
                yield event

    async def finish(self, answer: Answer | Completion) -> None:
        """The input and the answer become part of the session."""
        token_ids, metrics = answer.token_ids, answer.metrics
        head = await self._kept.finish(
            self._opened,
            token_ids,
            metrics,
            self.turn.ask.sampling.temperature,
        )
        self.report |= self._kept.report(self._opened, head, metrics)
        body = self._response(self.turn.read(answer.text), answer.finish_reason, metrics)
        num_prompt = len(self._opened.prompt)
        stored = Stored(
            id=self.turn.id,
            tenant=self.turn.ask.tenant,
            session=head.session,
            previous=None,
            updated=self._here.clock(),
            num_prompt=num_prompt,
            num_tokens=num_prompt + len(token_ids),
            is_final=True,
            body=body,
            items=items_of(self._body.template_messages()),
        )
        self._kept.responses.put(stored)

    def _response(
        self, reply: Reply, reason: str | None, metrics: RequestMetrics
    ) -> dict[str, Any]:
        """The answer as a response, by which it can be read and followed as any other."""
        stem = self.turn.id.partition("-")[2]
        tools = [tool.as_function()["function"] for tool in self.turn.tool_use.tools]
        num_prompt, num_answer = metrics.num_prompt_tokens, metrics.num_generated_tokens
        return {
            "id": self.turn.id,
            "object": "response",
            "created_at": self._here.now(),
            "status": "completed" if reason == "stop" else "incomplete",
            "conversation": {"id": self._opened.session},
            "instructions": None,
            "model": self._here.model_name,
            "output": output_of(stem, reply),
            "previous_response_id": None,
            "tools": [{"type": "function", **tool} for tool in tools],
            "usage": {
                "input_tokens": num_prompt,
                "input_tokens_details": {"cached_tokens": metrics.num_cached_tokens},
                "output_tokens": num_answer,
                "total_tokens": num_prompt + num_answer,
            },
            "metrics": metrics_of([metrics], self.turn.speculation),
            "outrider": {
                "exactness": exactness(self.turn.speculation, [metrics]),
                "session": dict(self.report),
            },
        }


def check(body: ChatBody) -> None:
    """RequestError for what a chat cannot have in a session, or only there."""
    if body.outrider.session is None:
        if body.outrider.if_head is not None:
            raise RequestError(
                f"outrider.if_head={body.outrider.if_head!r}: only with outrider.session; drop it"
            )
        return
    remedies: dict[str, tuple[Any, Any, str]] = {
        "n": (body.n, 1, "a session has one answer: fork it for more"),
        "cache_salt": (body.cache_salt, None, "a session shares the caches of its key: drop it"),
        "chat_template_kwargs": (
            body.chat_template_kwargs,
            {},
            "a session is told as its log was: drop it",
        ),
    }
    for name, (value, usual, remedy) in remedies.items():
        if value != usual:
            raise RequestError(f"{name}={value!r}: with outrider.session, {remedy}")


def items_of(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages of a chat as input items of the Responses API."""
    return [item for message in messages for item in _items(message)]


def output_of(stem: str, reply: Reply) -> list[dict[str, Any]]:
    """An answer as output items of the Responses API."""
    items: list[dict[str, Any]] = []
    if reply.content or not reply.calls:
        part = {"type": "output_text", "text": reply.content, "annotations": [], "logprobs": []}
        message = {"type": "message", "role": "assistant", "content": [part]}
        items.append({"id": f"msg_{stem}_0", "status": "completed", **message})
    for call in reply.calls:
        place = len(items)
        named = {"call_id": f"call_{stem}_{place}", "name": call.name, "arguments": call.arguments}
        head = {"id": f"fc_{stem}_{place}", "status": "completed", "type": "function_call"}
        items.append({**head, **named})
    return items


def _items(message: Message) -> list[dict[str, Any]]:
    if message["role"] == "tool":
        call_id = str(message.get("tool_call_id", ""))
        output = message["content"]
        return [{"type": "function_call_output", "call_id": call_id, "output": output}]
    items = []
    if message["content"] or not message.get("tool_calls"):
        items.append({"type": "message", "role": message["role"], "content": message["content"]})
    return [*items, *(_call(call) for call in message.get("tool_calls", ()))]


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    given = function["arguments"]
    return {
        "type": "function_call",
        "call_id": str(call.get("id", "")),
        "name": function["name"],
        "arguments": given if isinstance(given, str) else json.dumps(given, ensure_ascii=False),
    }
