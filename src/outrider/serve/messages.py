"""/v1/messages: Anthropic's dialect, whole and streamed; tails come as `outrider_tail` events."""

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header
from starlette.responses import JSONResponse, Response

from outrider.serve.base import Server, server, tenant
from outrider.serve.calls import CallArguments, CallStart, Piece, Text
from outrider.serve.chat import tail_of
from outrider.serve.chat_template import prompt_ids, template_of
from outrider.serve.delivery import HEADER, frame, shown, stream_options
from outrider.serve.generation import Answer, Ask, generate, whole
from outrider.serve.schemas_chat import loaded
from outrider.serve.schemas_generation import STREAMED
from outrider.serve.schemas_messages import CountBody, MessagesBody
from outrider.serve.sse import Frame, anthropic_error, event_stream
from outrider.serve.steps import Steps
from outrider.serve.tools import AUTO
from outrider.serve.turns import Turn, new_id
from outrider.serve.usage import exactness, in_force, metrics_of, with_prediction_ids
from outrider.stream.erasure import Erasure
from outrider.stream.events import Committed, Event, RequestMetrics, Tail

REASONS = {"length": "max_tokens", "stop": "end_turn"}
router = APIRouter(tags=["messages"])


@router.post("/v1/messages", response_model=None, responses=STREAMED)
async def messages(
    body: MessagesBody,
    here: Annotated[Server, Depends(server)],
    who: Annotated[str, Depends(tenant)],
    stream_header: Annotated[str, Header(alias=HEADER)] = "",
) -> Response:
    """The assistant's next message."""
    here.check_model(body.model)
    turn = turn_of(here, body, who, stream_header)
    if body.stream:
        return event_stream(_frames(here, turn), on_error=anthropic_error)
    (answer,) = await whole(here, turn.ask, turn.id)
    return JSONResponse(_message(here, turn, answer))


@router.post("/v1/messages/count_tokens", response_model=None)
async def count_tokens(
    body: CountBody,
    here: Annotated[Server, Depends(server)],
    who: Annotated[str, Depends(tenant)],
) -> Response:
    """How many tokens the prompt of such a message has."""
    here.check_model(body.model)
    return JSONResponse({"input_tokens": len(_prompt(here, body))})


def turn_of(here: Server, body: MessagesBody, who: str, stream_header: str = "") -> Turn:
    """What a body asks of the engine. RequestError, PairError: it cannot be had."""
    tool_use = body.tool_use()
    template = template_of(here.needed_tokenizer())
    if tool_use.choice == AUTO:
        tool_use.parser(template)  # refuses formats that are not read
    sampling = body.params(tool_use)
    asked = body.asked_speculation()
    speculation = None if asked is None else with_prediction_ids(here, asked)
    options = stream_options(here, None, stream_header if body.stream else "")
    ask = Ask(
        prompt=_prompt(here, body),
        sampling=sampling,
        speculation=speculation,
        stream=shown(options, sampling, has_tools=tool_use.is_active),
        tenant=who,
    )
    return Turn(
        id=new_id("msg_"),
        ask=ask,
        speculation=in_force(here, speculation, sampling),
        tool_use=tool_use,
        template=template,
    )


def _prompt(here: Server, body: CountBody) -> tuple[int, ...]:
    return prompt_ids(here.needed_tokenizer(), body.template_messages(), body.tool_use())


async def _frames(here: Server, turn: Turn) -> AsyncIterator[Frame]:
    options = turn.ask.stream
    writer = Writer(here, turn)
    events = generate(here, turn.ask, turn.id)
    async with aclosing(events):
        async for event in events:
            for data in writer.take(event):
                yield frame(data, options, event=data["type"])


class Writer:
    """Turns the events of one message into Anthropic's: blocks open, grow and close in order."""

    def __init__(self, here: Server, turn: Turn) -> None:
        self._model_name = here.model_name
        self._turn = turn
        self._pieces = turn.pieces()
        self._index = -1  # of the block last opened
        self._kind = ""  # what is open: "", "text" or "tool_use"
        self._has_begun = False
        wants_steps = turn.ask.stream.steps
        self._steps = Steps(here.tokenizer, turn.ask.prompt) if wants_steps else None
        self._untold: list[dict[str, Any]] = []  # steps that no delta has told yet
        self._erasure = Erasure(time.monotonic)

    def take(self, event: Event) -> Iterator[dict[str, Any]]:
        if not self._has_begun:
            self._has_begun = True
            yield self._start()
        if isinstance(event, Tail):
            if self._kind == "text":  # a block that was opened for it might stay empty
                self._erasure.observe(event)
                yield {"type": "outrider_tail", "index": self._index, **tail_of(event)}
            return
        self._erasure.observe(event)
        if self._steps is not None:
            self._untold.append(self._steps.detail(event))
        for piece in self._pieces.take(event):
            yield from self._write(piece)
        if self._untold and self._kind:
            yield from self._grow("")
        if event.finish_reason is not None:
            yield from self._end(event)

    def _write(self, piece: Piece) -> Iterator[dict[str, Any]]:
        if isinstance(piece, Text):
            yield from self._open_text()
            yield from self._grow(piece.text)
        elif isinstance(piece, CallStart):
            yield from self._open("tool_use", _tool_use(piece.name))
        else:
            yield from self._grow(piece.text)

    def _open_text(self) -> Iterator[dict[str, Any]]:
        if self._kind != "text":
            yield from self._open("text", {"type": "text", "text": ""})

    def _open(self, kind: str, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._close()
        self._index, self._kind = self._index + 1, kind
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _close(self) -> Iterator[dict[str, Any]]:
        if self._kind:
            self._kind = ""
            yield {"type": "content_block_stop", "index": self._index}

    def _grow(self, text: str) -> Iterator[dict[str, Any]]:
        """More of the open block; of the steps that wait, all but the last had no text."""
        steps, self._untold = self._untold, []
        for step in steps[:-1]:
            yield self._delta("", step)
        yield self._delta(text, steps[-1] if steps else None)

    def _delta(self, text: str, step: dict[str, Any] | None) -> dict[str, Any]:
        delta = {"type": "text_delta", "text": text}
        if self._kind == "tool_use":
            delta = {"type": "input_json_delta", "partial_json": text}
        made = {} if step is None else {"outrider": {"step": step}}
        return {"type": "content_block_delta", "index": self._index, "delta": delta, **made}

    def _start(self) -> dict[str, Any]:
        num_prompt = len(self._turn.ask.prompt)
        made = exactness(self._turn.speculation)
        message = {
            **_head(self._model_name, self._turn),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage(RequestMetrics(num_prompt_tokens=num_prompt)),
            "outrider": {"stream": self._turn.ask.stream.as_dict(), "exactness": made},
        }
        return {"type": "message_start", "message": message}

    def _end(self, event: Committed) -> Iterator[dict[str, Any]]:
        yield from self._close()
        metrics = event.metrics or RequestMetrics()
        spent: dict[str, Any] = usage(metrics)
        if self._turn.ask.stream.visibility != "verified":
            spent["outrider"] = {"stream": self._erasure.summary()}
        reason = stop_reason(event.finish_reason, event.stop_reason, self._pieces.num_calls)
        made = _report(self._turn, metrics)
        if self._untold:
            made["outrider"]["steps"] = self._untold
        yield {"type": "message_delta", "delta": reason, "usage": spent, **made}
        yield {"type": "message_stop"}


def stop_reason(
    reason: str | None, stop: str | int | None, num_calls: int
) -> dict[str, str | None]:
    """Why a message ended, in Anthropic's words."""
    if reason == "stop" and isinstance(stop, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    if reason == "stop" and num_calls:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    return {"stop_reason": REASONS.get(reason or "", reason), "stop_sequence": None}


def usage(metrics: RequestMetrics) -> dict[str, Any]:
    """Anthropic's `usage`: what was read from the cache is not among the input tokens."""
    return {
        "input_tokens": metrics.num_prompt_tokens - metrics.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": metrics.num_cached_tokens,
        "output_tokens": metrics.num_generated_tokens,
    }


def _message(here: Server, turn: Turn, answer: Answer) -> dict[str, Any]:
    pieces = turn.pieces()
    end = Committed(turn.id, text=answer.text, finish_reason=answer.finish_reason)
    content = blocks(pieces.take(end))
    return {
        **_head(here.model_name, turn),
        "content": content,
        **stop_reason(answer.finish_reason, answer.stop_reason, pieces.num_calls),
        "usage": usage(answer.metrics),
        **_report(turn, answer.metrics),
    }


def _head(model_name: str, turn: Turn) -> dict[str, Any]:
    return {"id": turn.id, "type": "message", "role": "assistant", "model": model_name}


def blocks(pieces: list[Piece]) -> list[dict[str, Any]]:
    """Content blocks, in the order in which they were said.

    Arguments that were cut off are no object: then the input is empty.
    """
    found: list[dict[str, Any]] = []
    arguments = ""
    for piece in pieces:
        if isinstance(piece, CallArguments):
            arguments += piece.text
            given = loaded(arguments)
            found[-1]["input"] = given if isinstance(given, dict) else {}
        elif isinstance(piece, CallStart):
            arguments = ""
            found.append(_tool_use(piece.name))
        elif found and found[-1]["type"] == "text":
            found[-1]["text"] += piece.text
        else:
            found.append({"type": "text", "text": piece.text})
    return found


def _tool_use(name: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": new_id("toolu_"), "name": name, "input": {}}


def _report(turn: Turn, metrics: RequestMetrics) -> dict[str, Any]:
    return {
        "metrics": metrics_of([metrics], turn.speculation),
        "outrider": {"exactness": exactness(turn.speculation, [metrics])},
    }
