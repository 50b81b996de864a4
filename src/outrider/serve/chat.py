"""/v1/chat/completions: OpenAI's chat, whole and streamed, with outrider-stream/1 where asked."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header
from starlette.responses import JSONResponse, Response

from outrider.engine.build import speculation_params
from outrider.serve.base import Server, server, tenant
from outrider.serve.calls import Call, CallStart, Piece, Text
from outrider.serve.chat_session import ChatSession, check
from outrider.serve.chat_template import prompt_ids, template_of
from outrider.serve.delivery import HEADER, frame, shown, stream_options
from outrider.serve.generation import Answer, Ask, generate, whole
from outrider.serve.logprobs import chat_logprobs
from outrider.serve.schemas_chat import ChatBody
from outrider.serve.schemas_generation import STREAMED
from outrider.serve.sse import DONE, Frame, event_stream
from outrider.serve.steps import Steps
from outrider.serve.tools import AUTO
from outrider.serve.turns import Turn, new_id
from outrider.serve.usage import (
    exactness,
    in_force,
    metrics_of,
    timings,
    usage,
    with_prediction_ids,
)
from outrider.session.records import Session
from outrider.stream.erasure import Erasure
from outrider.stream.events import Committed, Event, RequestMetrics, Tail, TokenLogprob

NOTHING: Mapping[str, Any] = {}
router = APIRouter(tags=["chat"])


@router.post("/v1/chat/completions", response_model=None, responses=STREAMED)
async def chat_completions(
    body: ChatBody,
    here: Annotated[Server, Depends(server)],
    who: Annotated[str, Depends(tenant)],
    stream_header: Annotated[str, Header(alias=HEADER)] = "",
) -> Response:
    """The assistant's next message."""
    here.check_model(body.model)
    check(body)
    if body.outrider.session is not None:
        return await _in_session(here, body, who, stream_header)
    turn = turn_of(here, body, who, stream_header)
    if body.stream:
        return event_stream(_frames(here, body, turn))
    answers = await whole(here, turn.ask, turn.id)
    return JSONResponse(_completion(here, body, turn, answers))


def turn_of(
    here: Server,
    body: ChatBody,
    who: str,
    stream_header: str = "",
    settings: Mapping[str, Any] | None = None,
) -> Turn:
    """What a body asks of the engine.

    Args:
        settings: of the session that holds the conversation, and then the prompt; its
            `speculation` is in force where the body says nothing. None without a session.

    Raises:
        RequestError, PairError: it cannot be had.
    """
    tool_use = body.tool_use()
    template = template_of(here.needed_tokenizer())
    if tool_use.choice == AUTO:
        tool_use.parser(template)  # refuses formats that are not read
    sampling = body.params(tool_use)
    asked = body.wanted_speculation()
    if asked is None and settings and settings.get("speculation") is not None:
        asked = speculation_params(settings["speculation"])
    speculation = None if asked is None else with_prediction_ids(here, asked)
    resolved = in_force(here, speculation, sampling)
    options = stream_options(here, body.stream_options, stream_header if body.stream else "")
    ask = Ask(
        prompt=prompt_of(here, body) if settings is None else (),
        sampling=sampling,
        speculation=speculation,
        stream=shown(options, sampling, has_tools=tool_use.is_active),
        tenant=salted(who, body.cache_salt),
        priority=body.priority,
    )
    return Turn(
        id=new_id("chatcmpl-"),
        ask=ask,
        speculation=resolved,
        tool_use=tool_use,
        template=template,
    )


def prompt_of(here: Server, body: ChatBody) -> tuple[int, ...]:
    """Token ids of the conversation, up to where the answer begins. Raises as `prompt_ids`."""
    variables = body.chat_template_kwargs
    return prompt_ids(here.needed_tokenizer(), body.template_messages(), body.tool_use(), variables)


def salted(who: str, salt: str | None) -> str:
    """The tenant, narrowed by vLLM's `cache_salt`: who has another shares no cache."""
    return who if salt is None else f"{who}\x00{salt}"


def finish_reason(reason: str, num_calls: int) -> str:
    """OpenAI's: an answer that ends by itself and calls ends for the calls."""
    return "tool_calls" if reason == "stop" and num_calls else reason


async def _in_session(here: Server, body: ChatBody, who: str, stream_header: str) -> Response:
    """The same with messages that follow those of a session."""
    session = await here.sessions.find(who, body.outrider.session)
    turn = turn_of(here, body, who, stream_header, session.settings)
    if body.stream:
        return event_stream(_session_frames(here, session, body, turn))
    async with await ChatSession.open(here, session, body, turn) as talk:
        (answer,) = await whole(here, talk.turn.ask, turn.id)
        await talk.finish(answer)
        return JSONResponse(_completion(here, body, talk.turn, [answer], talk.report))


async def _session_frames(
    here: Server, session: Session, body: ChatBody, turn: Turn
) -> AsyncIterator[Frame]:
    async with await ChatSession.open(here, session, body, turn) as talk:
        frames = _told(Chunks(here, body, talk.turn, talk.report), body, talk.events())
        async with aclosing(frames):
            async for each in frames:
                yield each


def _frames(here: Server, body: ChatBody, turn: Turn) -> AsyncGenerator[Frame]:
    return _told(Chunks(here, body, turn), body, generate(here, turn.ask, turn.id))


async def _told(
    chunks: "Chunks", body: ChatBody, events: AsyncGenerator[Event]
) -> AsyncGenerator[Frame]:
    """The frames of these events, and what ends a stream."""
    async with aclosing(events):
        async for event in events:
            for chunk in chunks.take(event):
                yield frame(chunk, chunks.options)
    if body.wants_usage:
        yield frame(chunks.usage(), chunks.options)
    yield Frame(data=DONE)


class Chunks:
    """Turns the events of one response into chunks.

    Args:
        session: `outrider.session`, filled in by whoever makes the last event.
    """

    def __init__(
        self, here: Server, body: ChatBody, turn: Turn, session: Mapping[str, Any] = NOTHING
    ) -> None:
        self.options = turn.ask.stream
        self._turn = turn
        self._session = session
        self._head = {
            "id": turn.id,
            "object": "chat.completion.chunk",
            "created": here.now(),
            "model": here.model_name,
        }
        self._null_usage = {"usage": None} if body.wants_usage else {}
        self._choices = [_Choice(here, body, turn, i) for i in range(turn.ask.sampling.n)]
        self._has_begun = False
        self._finished: list[RequestMetrics] = []
        self._erasure = Erasure(time.monotonic)

    def take(self, event: Event) -> Iterator[dict[str, Any]]:
        self._erasure.observe(event)
        choice = self._choices[event.index]
        if not choice.has_begun:
            yield self._chunk(choice.begin(), self._echo())
        if isinstance(event, Tail):
            yield self._chunk(choice.wrap({}), {"outrider": {"tail": tail_of(event)}})
            return
        step = choice.step(event)
        for place, part in enumerate(choice.take(event)):
            is_first = step is not None and place == 0
            yield self._chunk(part, {"outrider": {"step": step}} if is_first else {})
        if event.finish_reason is not None:
            yield self._chunk(choice.end(event), self._ending(event.metrics or RequestMetrics()))

    def usage(self) -> dict[str, Any]:
        """The last chunk, which has no choices."""
        prediction = self._turn.speculation.prediction
        answers = [choice.token_ids for choice in self._choices]
        found = usage(self._finished, prediction=prediction, answers=answers)
        if self._turn.ask.stream.visibility != "verified":
            found["outrider"] = {"stream": self._erasure.summary()}
        return {**self._head, "choices": [], "usage": found}

    def _echo(self) -> dict[str, Any]:
        """With the first chunk of all: what is in force."""
        if self._has_begun:
            return {}
        self._has_begun = True
        made = exactness(self._turn.speculation)
        return {"outrider": {"stream": self._turn.ask.stream.as_dict(), "exactness": made}}

    def _ending(self, metrics: RequestMetrics) -> dict[str, Any]:
        """With the last choice to end: what the response cost."""
        self._finished.append(metrics)
        if len(self._finished) < len(self._choices):
            return {}
        return report(self._turn, self._finished, self._session)

    def _chunk(self, choice: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "choices": [choice], **self._null_usage, **more}


class _Choice:
    """One of a response's choices, commit by commit.

    Attributes:
        token_ids: so far, where there is a prediction to hold them against.
    """

    def __init__(self, here: Server, body: ChatBody, turn: Turn, index: int) -> None:
        self._index = index
        self._tokenizer = here.needed_tokenizer()
        self._pieces = turn.pieces()
        self._has_logprobs = body.logprobs
        wants_steps = turn.ask.stream.steps
        self._steps = Steps(self._tokenizer, turn.ask.prompt) if wants_steps else None
        self._is_predicted = bool(turn.speculation.prediction)
        self.token_ids: list[int] = []
        self.has_begun = False

    def begin(self) -> dict[str, Any]:
        self.has_begun = True
        return self.wrap({"role": "assistant", "content": ""})

    def take(self, event: Committed) -> list[dict[str, Any]]:
        if self._is_predicted:
            self.token_ids += event.token_ids
        deltas = [delta_of(piece) for piece in self._pieces.take(event)]
        needs_one = event.logprobs or (self._steps is not None and event.token_ids)
        if not deltas and needs_one:
            deltas = [{"content": ""}]
        logprobs = [event.logprobs, *[()] * len(deltas)]
        return [self.wrap(d, tokens) for d, tokens in zip(deltas, logprobs, strict=False)]

    def step(self, event: Committed) -> dict[str, Any] | None:
        return None if self._steps is None else self._steps.detail(event)

    def end(self, event: Committed) -> dict[str, Any]:
        reason = finish_reason(event.finish_reason or "", self._pieces.num_calls)
        return {**self.wrap({}), "finish_reason": reason, "stop_reason": event.stop_reason}

    def wrap(self, delta: dict[str, Any], tokens: tuple[TokenLogprob, ...] = ()) -> dict[str, Any]:
        logprobs = chat_logprobs(self._tokenizer, tokens) if tokens else None
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def tail_of(tail: Tail) -> dict[str, Any]:
    """A tail on the wire."""
    return {
        "committed_chars": tail.committed_chars,
        "text": tail.text,
        "n_tokens": len(tail.token_ids),
        "stability": tail.stability,
        "source": tail.source,
        "v": tail.version,
    }


def delta_of(piece: Piece) -> dict[str, Any]:
    """A piece as the `delta` of a chunk."""
    if isinstance(piece, Text):
        return {"content": piece.text}
    call: dict[str, Any] = {"index": piece.index}
    if isinstance(piece, CallStart):
        function = {"name": piece.name, "arguments": ""}
        return {
            "tool_calls": [
                {**call, "id": new_id("call_"), "type": "function", "function": function}
            ]
        }
    return {"tool_calls": [{**call, "function": {"arguments": piece.text}}]}


def report(
    turn: Turn, metrics: list[RequestMetrics], session: Mapping[str, Any] = NOTHING
) -> dict[str, Any]:
    """What every response says of how it was made, beside its usage."""
    made: dict[str, Any] = {"exactness": exactness(turn.speculation, metrics)}
    if session:
        made["session"] = dict(session)
    return {
        "metrics": metrics_of(metrics, turn.speculation),
        "timings": timings(metrics),
        "outrider": made,
    }


def _completion(
    here: Server,
    body: ChatBody,
    turn: Turn,
    answers: list[Answer],
    session: Mapping[str, Any] = NOTHING,
) -> dict[str, Any]:
    metrics = [answer.metrics for answer in answers]
    return {
        "id": turn.id,
        "object": "chat.completion",
        "created": here.now(),
        "model": here.model_name,
        "choices": [_whole_choice(here, body, turn, answer) for answer in answers],
        "usage": usage(
            metrics,
            prediction=turn.speculation.prediction,
            answers=[answer.token_ids for answer in answers],
        ),
        **report(turn, metrics, session),
    }


def _whole_choice(here: Server, body: ChatBody, turn: Turn, answer: Answer) -> dict[str, Any]:
    reply = turn.read(answer.text)
    tokenizer = here.needed_tokenizer()
    message: dict[str, Any] = {
        "role": "assistant",
        "content": reply.content if reply.content or not reply.calls else None,
        "refusal": None,
    }
    if reply.calls:
        message["tool_calls"] = [_call(call) for call in reply.calls]
    return {
        "index": answer.index,
        "message": message,
        "logprobs": chat_logprobs(tokenizer, answer.logprobs) if body.logprobs else None,
        "finish_reason": finish_reason(answer.finish_reason, len(reply.calls)),
        "stop_reason": answer.stop_reason,
    }


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": new_id("call_"), "type": "function", "function": function}
