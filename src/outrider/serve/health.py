"""/health, /ready, /version and /metrics: for those who watch the server; no key is asked for."""

from fastapi import APIRouter, Depends, Response
from fastapi.responses import PlainTextResponse

from outrider import __version__
from outrider.serve.base import Server, server
from outrider.serve.errors import ApiError
from outrider.serve.metrics import CONTENT_TYPE

router = APIRouter(tags=["health"])


@router.get("/health", response_class=Response)
async def health(server: Server = Depends(server)) -> Response:
    """200 while the engine lives."""
    reason = server.engine.refusal
    if reason:
        raise ApiError(503, reason, code="engine_failed")
    return Response()


@router.get("/ready", response_class=Response)
async def ready(server: Server = Depends(server)) -> Response:
    """200 while requests are let in; 503 once the server drains."""
    if server.gate.is_draining:
        raise ApiError(503, "the server is shutting down", code="draining")
    return await health(server)


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(server: Server = Depends(server)) -> Response:
    """Prometheus text."""
    return Response(server.metrics.text(), media_type=CONTENT_TYPE)
