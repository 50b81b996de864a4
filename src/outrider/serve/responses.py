"""/v1/responses: OpenAI's Responses API over sessions, with streams that can be resumed."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import JSONResponse, Response

from outrider.serve.delivery import HEADER
from outrider.serve.errors import ApiError
from outrider.serve.schemas_generation import STREAMED
from outrider.serve.schemas_responses import Accept, CreateResponse
from outrider.serve.sessions import Made, SessionRoute, Who, answer
from outrider.serve.sse import event_stream

router = APIRouter(tags=["responses"], prefix="/v1/responses", route_class=SessionRoute)
MAX_ITEMS = 100


@router.post("", response_model=None, responses=STREAMED)
async def create_response(
    body: CreateResponse,
    request: Request,
    who: Who,
    made: Made,
    stream_header: Annotated[str, Header(alias=HEADER)] = "",
) -> Response:
    """An answer to the input, and to what came before it."""
    return await answer(made, who, body, request.headers, stream_header)


@router.get("/{response_id}", response_model=None, responses=STREAMED)
async def get_response(
    response_id: str,
    who: Who,
    made: Made,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=-1)] = None,
    last_event_id: Annotated[str | None, Header()] = None,
    include: Annotated[list[str] | None, Query()] = None,
    include_obfuscation: bool | None = None,
) -> Response:
    """The response as it is now; with `stream` its events after a number, then those that come."""
    if include_obfuscation is not None:
        raise ApiError(
            400,
            f"include_obfuscation={include_obfuscation}: a stream is padded or not from its start; "
            "say so when the response is created (stream_options)",
            param="include_obfuscation",
        )
    body = made.body(who, response_id)
    if not stream:
        return JSONResponse(body)
    after = starting_after if starting_after is not None else _number(last_event_id)
    ring = made.ring(who, response_id)
    if ring is None or after + 1 < ring.first:
        return _gone(body, after)
    live = made.live_of(who, response_id)
    return event_stream(made.frames(live, ring, after=after, is_guest=True))


@router.post("/{response_id}/accept", response_model=None)
async def accept(response_id: str, body: Accept, who: Who, made: Made) -> Response:
    """Says whether the first characters of a text are committed; 409 tells the text that is.

    Without `item_id` it is about the last message. What was accepted never changes.
    """
    item = made.message(who, response_id, body.item_id)
    text: str = item["content"][0]["text"]
    found = {"id": response_id, "object": "response.accept", "item_id": item["id"]}
    if body.chars <= len(text):
        return JSONResponse({**found, "chars": body.chars, "text": text[: body.chars]})
    message = f"chars={body.chars}: {len(text)} are committed so far; accept no more than these"
    told = ApiError(409, message, code="not_committed", param="chars").body()
    return JSONResponse({**told, **found, "chars": len(text), "text": text}, status_code=409)


@router.post("/{response_id}/cancel", response_model=None)
async def cancel_response(response_id: str, who: Who, made: Made) -> dict[str, Any]:
    """Ends a response that is being made; one that is complete stays as it is."""
    return await made.cancel(who, response_id)


@router.delete("/{response_id}", response_model=None)
async def delete_response(response_id: str, who: Who, made: Made) -> dict[str, Any]:
    """Forgets a response."""
    await made.delete(who, response_id)
    return {"id": response_id, "object": "response", "deleted": True}


@router.get("/{response_id}/input_items", response_model=None)
async def input_items(
    response_id: str,
    who: Who,
    made: Made,
    limit: Annotated[int, Query(ge=1, le=MAX_ITEMS)] = 20,
    order: Annotated[str, Query(pattern="^(asc|desc)$")] = "desc",
    after: str | None = None,
) -> dict[str, Any]:
    """What the response was an answer to, the items of this turn."""
    items = made.items(who, response_id)
    if order == "desc":
        items.reverse()
    names = [item["id"] for item in items]
    if after is not None and after not in names:
        raise ApiError(400, f"after={after!r}: no such item", param="after")
    start = names.index(after) + 1 if after is not None else 0
    page = items[start : start + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + limit < len(items),
    }


def _number(last_event_id: str | None) -> int:
    """A browser's `Last-Event-ID`; without one the stream begins at its beginning."""
    if last_event_id is None:
        return -1
    if not last_event_id.isascii() or not last_event_id.isdigit():
        raise ApiError(400, f"Last-Event-ID={last_event_id!r}: must be a sequence number")
    return int(last_event_id)


def _gone(body: dict[str, Any], after: int) -> JSONResponse:
    """The events are no longer held; the response is, if it is done."""
    message = f"events after {after} are no longer held: read the response instead"
    told = ApiError(410, message, code="events_gone").body()
    is_done = body["status"] not in ("in_progress", "queued")
    return JSONResponse({**told, **({"response": body} if is_done else {})}, status_code=410)
