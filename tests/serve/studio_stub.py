"""A scripted server under the studio: chat, responses and sessions that say what tests expect."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from outrider import LLM, AsyncLLM
from outrider.serve import errors, studio
from outrider.serve.app import create_app


class Script(NamedTuple):
    """One step: its tokens, how many were drafted and stand, and the draft with its parents."""

    tokens: list[str]
    accepted: int
    draft: list[str]
    parents: list[int]
    path: list[int]

    @property
    def member(self) -> dict[str, Any]:
        step: dict[str, Any] = {
            "tokens": self.tokens,
            "accepted": self.accepted,
            "num_drafted": len(self.draft),
            "source": "draft_model" if self.draft else "",
        }
        if self.draft:
            step["tree"] = {"tokens": self.draft, "parents": self.parents, "accepted": self.path}
        return step

    @property
    def text(self) -> str:
        return "".join(self.tokens)


STEPS = [
    Script(["The"], 0, [], [], []),
    Script([" lighthouse", " keeper", " wrote"], 2,
           [" lighthouse", " keeper", " was", " said", " man"], [-1, 0, 1, 1, -1], [0, 1]),
    Script([" down", " every", " ship", " that", " passed"], 4,
           [" down", " every", " ship", " that"], [-1, 0, 1, 2], [0, 1, 2, 3]),
    Script([":"], 0, [" the", " by", " in"], [-1, 0, -1], []),
    Script([" its", " name", ",", " its"], 3, [" its", " name", ",", " the", " and", " colour"],
           [-1, 0, 1, 2, 1, 0], [0, 1, 2]),
    Script([" flag", " and", " the", " hour", ".\n"], 4, [" flag", " and", " the", " hour"],
           [-1, 0, 1, 2], [0, 1, 2, 3]),
    Script(["When"], 0, [], [], []),
    Script([" the", " fog", " came", " he"], 3, [" the", " fog", " came", ",", " lay"],
           [-1, 0, 1, 2, 1], [0, 1, 2]),
    Script([" wrote", " only", " sounds", "."], 3, [" wrote", " only", " sounds"], [-1, 0, 1],
           [0, 1, 2]),
]  # fmt: skip
TEXT = "".join(step.text for step in STEPS)
TURN = 40  # tokens that a turn adds to a session


def app_over(llm: LLM, *, has_sessions: bool = True, delay_s: float = 0.0) -> FastAPI:
    """The studio's own routes over a real engine's settings, the rest scripted."""
    app = FastAPI()
    app.state.server = create_app(AsyncLLM(llm)).state.server
    app.state.bodies, app.state.cancelled = [], []
    errors.install(app)
    app.include_router(studio.router)
    _add_chat(app, delay_s)
    _add_metrics(app)
    if has_sessions:
        _add_sessions(app, delay_s)
    return app


def _add_metrics(app: FastAPI) -> None:
    uses = itertools.cycle([0.12, 0.2, 0.31])

    @app.get("/metrics")
    def metrics() -> Response:
        name = 'model_name="stub"'
        lines = [
            f"vllm:kv_cache_usage_perc{{{name}}} {next(uses)}",
            f"vllm:prefix_cache_queries_total{{{name}}} 200.0",
            f"vllm:prefix_cache_hits_total{{{name}}} 150.0",
        ]
        return Response("\n".join(lines), media_type="text/plain")


def _add_chat(app: FastAPI, delay_s: float) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.json()
        app.state.bodies.append(body)
        is_plain = (body.get("speculation") or {}).get("method") == "off"
        return _sse(_chunks(is_plain, delay_s))


async def _chunks(is_plain: bool, delay_s: float) -> AsyncIterator[str]:
    def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return f"data: {json.dumps({'id': 'chatcmpl-1', 'choices': [choice], **more})}\n\n"

    yield chunk({"role": "assistant", "content": ""})
    for step in _plain() if is_plain else STEPS:
        await asyncio.sleep(delay_s)
        yield chunk({"content": step.text}, outrider={"step": step.member})
    exactness = {"mode": "exact", "method": None, "params": {}}
    yield chunk({}, "stop", outrider={"exactness": exactness})
    yield "data: [DONE]\n\n"


def _plain() -> Iterator[Script]:
    for step in STEPS:
        for token in step.tokens:
            yield Script([token], 0, [], [], [])


def _add_sessions(app: FastAPI, delay_s: float) -> None:
    heads: dict[str, list[str]] = {}
    ids = itertools.count(1)
    numbers = itertools.count(1)
    app.state.heads = heads
    app.state.running = None

    @app.post("/v1/sessions")
    async def create(request: Request) -> dict[str, Any]:
        app.state.bodies.append(await request.json())
        return _made(heads, next(ids), [f"h{next(numbers)}"])

    @app.get("/v1/sessions/{session}")
    async def look(session: str) -> Response:
        if session not in heads:
            return _error(404, f"no session {session!r}")
        made = _at(heads, session)
        spec = {
            "suffix": {"class": "R0", "ready_upto": made["n_tokens"]},
            "draft_model": {"class": "R1", "ready_upto": made["n_tokens"] // 2},
        }
        warmth = {
            "state": "warm" if made["n_tokens"] else "cold",
            "kv_tokens": max(0, made["n_tokens"] - 8),
            "spec": spec,
            "response_in_progress": app.state.running,
        }
        return JSONResponse({**made, **warmth})

    @app.delete("/v1/sessions/{session}")
    async def remove(session: str) -> dict[str, Any]:
        return {"id": session, "deleted": heads.pop(session, None) is not None}

    @app.post("/v1/sessions/{session}/fork")
    async def fork(session: str, request: Request) -> dict[str, Any]:
        at = (await request.json())["at"]
        return {"data": [_made(heads, next(ids), heads[session][: at // TURN + 1])]}

    @app.post("/v1/sessions/{session}/rewind")
    async def rewind(session: str, request: Request) -> dict[str, Any]:
        to = (await request.json())["to"]
        heads[session] = [*heads[session][: to // TURN], f"h{next(numbers)}"]
        return _at(heads, session)

    @app.post("/v1/responses/{response}/cancel")
    async def cancel(response: str) -> dict[str, Any]:
        app.state.cancelled.append(response)
        app.state.running = None
        return {"id": response, "status": "cancelled"}

    @app.post("/v1/responses")
    async def respond(request: Request) -> Response:
        body = await request.json()
        app.state.bodies.append(body)
        session = body["outrider"]["session"]
        if body["outrider"]["if_head"] != heads[session][-1]:
            assert body["outrider"]["on_conflict"] == "fork"
            kept = heads[session][: heads[session].index(body["outrider"]["if_head"]) + 1]
            session = _made(heads, next(ids), kept)["id"]
        if body["input"] == "fail":
            return _error(400, "method='nonsense': unknown method")
        app.state.running = "resp_1"
        asked = body.get("speculation") or {}
        policy = None if asked.get("method") == "off" else asked.get("policy", "fixed")
        return _sse(_events(session, heads, f"h{next(numbers)}", delay_s, policy))


def _made(heads: dict[str, list[str]], number: int, kept: list[str]) -> dict[str, Any]:
    session = f"sess_{number}"
    heads[session] = list(kept)
    return _at(heads, session)


def _at(heads: dict[str, list[str]], session: str) -> dict[str, Any]:
    kept = heads[session]
    return {"id": session, "head": kept[-1], "n_tokens": TURN * (len(kept) - 1)}


async def _events(
    session: str, heads: dict[str, list[str]], head: str, delay_s: float, policy: str | None
) -> AsyncIterator[str]:
    numbers = itertools.count()
    versions = itertools.count(1)
    last = -1

    def durable(kind: str, **more: Any) -> str:
        nonlocal last
        last = next(numbers)
        event = {"type": kind, "sequence_number": last, **more}
        return f"id: {last}\nevent: {kind}\ndata: {json.dumps(event)}\n\n"

    def tail(step: Script) -> str:
        event = {"type": "outrider:output_text.tail", "base": last, "v": next(versions),
                 "text": "".join(step.draft[:2]), "stability": 0.9}  # fmt: skip
        return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"

    yield durable("response.created", response={"id": "resp_1", "status": "in_progress"})
    for step in STEPS:
        yield tail(step)
        await asyncio.sleep(delay_s)
        text = step.text
        yield durable("response.output_text.delta", delta=text, outrider={"step": step.member})
    heads[session].append(head)
    about = {"exactness": {"mode": "exact"}, "session": {"id": session, "head": head,
             "kv_hit_tokens": 12}}  # fmt: skip
    response = {"id": "resp_1", "status": "completed", "outrider": about}
    response["metrics"] = {"speculative_decoding": {"policy": policy}}
    yield durable("response.completed", response=response)


def _sse(frames: AsyncIterator[str]) -> StreamingResponse:
    return StreamingResponse(frames, media_type="text/event-stream")


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message}}, status)
