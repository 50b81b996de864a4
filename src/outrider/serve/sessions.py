"""/v1/sessions: conversations that the server keeps, with their places, branches and warmth."""

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.routing import APIRoute
from starlette.responses import JSONResponse, Response

from outrider.engine.build import speculation_params
from outrider.errors import (
    EngineError,
    QuotaExceeded,
    RequestError,
    SessionConflict,
    SessionError,
    SessionNotFound,
)
from outrider.request import SamplingParams
from outrider.serve.base import Server, server, tenant
from outrider.serve.delivery import HEADER
from outrider.serve.errors import ApiError, as_api_error, named_in
from outrider.serve.response_service import Responses
from outrider.serve.schemas_generation import STREAMED
from outrider.serve.schemas_responses import CreateResponse, messages_of
from outrider.serve.schemas_sessions import (
    Append,
    CreateSession,
    Fork,
    Hint,
    Rewind,
    SessionResponse,
    Snapshot,
    Truncate,
)
from outrider.serve.session_counters import SessionMetrics
from outrider.serve.session_service import Sessions
from outrider.serve.session_view import created, restored, summary
from outrider.serve.session_warmth import EVERYTHING
from outrider.serve.sse import event_stream
from outrider.serve.usage import in_force

Here = Annotated[Server, Depends(server)]
Who = Annotated[str, Depends(tenant)]


class SessionRoute(APIRoute):
    """Says what went wrong with a session in the statuses of HTTP."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except SessionError as error:
                raise told(error) from error

        return handle


def told(error: SessionError) -> ApiError:
    """The failure as HTTP has it."""
    if isinstance(error, SessionNotFound):
        kind, param = "invalid_request_error", named_in(error)
        return ApiError(404, str(error), type=kind, code="not_found", param=param)
    if isinstance(error, SessionConflict):
        return ApiError(409, str(error), code="conflict", param=error.head and "if_head")
    if isinstance(error, QuotaExceeded):
        return ApiError(403, str(error), code="quota_exceeded")
    return as_api_error(error)


def sessions(here: Here) -> Sessions:
    """Dependency: the sessions of the server."""
    assert isinstance(here.sessions, Sessions), "the lifespan of this module made them"
    return here.sessions


def responses(kept: Annotated[Sessions, Depends(sessions)]) -> Responses:
    """Dependency: the responses of the server."""
    assert isinstance(kept.service, Responses), "the lifespan of this module made them"
    return kept.service


Kept = Annotated[Sessions, Depends(sessions)]
Made = Annotated[Responses, Depends(responses)]
router = APIRouter(tags=["sessions"], prefix="/v1/sessions", route_class=SessionRoute)


@asynccontextmanager
async def lifespan(here: Server) -> AsyncIterator[None]:
    """Opens the log, and takes up what a crash has interrupted."""
    kept = here.sessions = Sessions(here)
    kept.service = made = Responses(here, kept)
    here.metrics.registry.register(SessionMetrics(kept.counters, here.model_name))
    try:
        kept.start()
        await made.start()
        yield
    finally:
        await made.aclose()
        with suppress(EngineError):  # a broken engine has nothing warm
            await kept.warmer.keep_all()
        await kept.aclose()


@router.post("", response_model=None)
async def create_session(body: CreateSession, here: Here, who: Who, kept: Kept) -> dict[str, Any]:
    """A new session, empty, with tokens, or where a snapshot was taken."""
    body.check()
    here.check_model(body.model)
    settings = body.settings()
    if settings.get("speculation") is not None:
        in_force(here, speculation_params(settings["speculation"]), SamplingParams())
    if body.from_snapshot is not None:
        head, warm = await kept.from_snapshot(
            who, body.from_snapshot, settings, body.ttl_s, body.conversation
        )
        return {**created(head), "outrider": {"session": restored(head, warm)}}
    given = {name: value for name, value in settings.items() if value is not None}
    tokens = body.token_ids or ()
    return created(await kept.create(who, tokens, given, body.ttl_s, body.conversation))


@router.get("", response_model=None)
async def list_sessions(
    who: Who,
    kept: Kept,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
) -> dict[str, Any]:
    """The tenant's sessions, newest first; `after` of the last page leads to the next."""
    page = await kept.page(who, limit, after)
    data = [summary(session) for session in page.sessions]
    for each in data:
        each["response_in_progress"] = kept.response_in(each["id"])
    return {"object": "list", "data": data, "has_more": page.after is not None, "after": page.after}


@router.get("/{session_id}", response_model=None)
async def get_session(session_id: str, who: Who, kept: Kept) -> dict[str, Any]:
    """Where a session is, and how warm."""
    return await kept.describe(who, session_id)


@router.delete("/{session_id}", response_model=None)
async def delete_session(session_id: str, who: Who, kept: Kept, made: Made) -> dict[str, Any]:
    """Forgets a session; a response that runs in it ends."""
    found = await kept.find(who, session_id)
    running = kept.response_in(found.id)
    if running is not None and made.live_of(who, running) is not None:
        await made.delete(who, running)
    await kept.delete(who, found.id)
    return {"id": found.id, "object": "session", "deleted": True}


@router.post("/{session_id}/append", response_model=None)
async def append(session_id: str, body: Append, who: Who, kept: Kept) -> dict[str, Any]:
    """Input that is not answered yet."""
    body.check()
    items = CreateResponse(input=body.input).items if body.input is not None else []
    head = await kept.places.append(
        who,
        session_id,
        messages_of(items),
        body.token_ids or (),
        if_head=body.if_head,
        on_conflict=body.on_conflict,
        is_eager=body.prefill == "eager",
    )
    return created(head)


@router.post("/{session_id}/responses", response_model=None, responses=STREAMED)
async def respond(
    session_id: str,
    body: SessionResponse,
    who: Who,
    made: Made,
    stream_header: Annotated[str, Header(alias=HEADER)] = "",
) -> Response:
    """A response in this session; the body is that of /v1/responses, with `if_head`."""
    return await answer(made, who, body.asked(session_id), {}, stream_header)


@router.post("/{session_id}/fork", response_model=None)
async def fork(session_id: str, body: Fork, who: Who, kept: Kept) -> dict[str, Any]:
    """Branches that share the log up to a place."""
    heads = await kept.places.fork(who, session_id, body.at, body.n, body.if_head)
    return {"object": "list", "data": [created(head) for head in heads]}


@router.post("/{session_id}/rewind", response_model=None)
async def rewind(session_id: str, body: Rewind, who: Who, kept: Kept) -> dict[str, Any]:
    """Back to an earlier place."""
    return created(await kept.places.rewind(who, session_id, body.to, body.drop, body.if_head))


@router.post("/{session_id}/truncate", response_model=None)
async def truncate(session_id: str, body: Truncate, who: Who, kept: Kept) -> dict[str, Any]:
    """An answer ends where its reader stopped to listen."""
    head = await kept.places.truncate(
        who,
        session_id,
        body.response_id,
        chars=body.chars,
        tokens=body.tokens,
        if_head=body.if_head,
    )
    return created(head)


@router.post("/{session_id}/hint", response_model=None)
async def hint(session_id: str, body: Hint, who: Who, kept: Kept) -> dict[str, Any]:
    """What the client knows of the session's future, and what the server did about it."""
    effect = await kept.hint(who, session_id, body.event)
    return {"id": session_id, "event": body.event, "effect": effect}


@router.post("/{session_id}/snapshot", response_model=None)
async def snapshot(session_id: str, body: Snapshot, who: Who, kept: Kept) -> dict[str, Any]:
    """Keeps what is warm; the id is that of the head, for `from_snapshot`."""
    if body.tier not in (None, kept.warmth.tier):
        raise RequestError(
            f"tier={body.tier!r}: this server keeps snapshots on {kept.warmth.tier!r}; "
            "start it with --state-dir for 'disk', without for 'host'"
        )
    head, (manifest, num_bytes) = await kept.snapshot(who, session_id, body.include or EVERYTHING)
    parts = manifest.parts
    return {
        "id": head.id,
        "object": "session.snapshot",
        "session": head.session,
        "head": head.id,
        "n_tokens": head.num_tokens,
        "tier": kept.warmth.tier,
        "kv_tokens": parts["target"].num_tokens if "target" in parts else 0,
        "bytes": num_bytes,
        "bytes_written": manifest.num_bytes,
        "ready_upto": dict(manifest.watermarks),
    }


async def answer(
    made: Responses, who: str, body: CreateResponse, headers: Any, stream_header: str
) -> Response:
    """Makes a response and tells it as the body asks: as a stream, at once, or when it is there."""
    live = await made.create(who, body, headers, stream_header)
    if body.stream:
        return event_stream(made.frames(live, live.ring))
    if body.background:
        return JSONResponse({**live.body, "status": "queued"})
    return JSONResponse(await made.whole(live))
