"""ApiError and what every failure looks like on the wire: one JSON envelope, never a traceback."""

import logging
import re
import sqlite3
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from outrider.errors import (
    ConfigError,
    EngineError,
    OutriderError,
    QuotaExceeded,
    RequestError,
    SessionConflict,
    SessionError,
    SessionNotFound,
    SessionStorageError,
)
from outrider.stream.outbox import FellBehindError

INVALID = "invalid_request_error"
SERVER = "server_error"
ANTHROPIC_PATH = "/v1/messages"
_NAMED = re.compile(r"^(\w+)=")
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_KINDS |= {409: "conflict_error", 429: "rate_limit_error", 500: SERVER, 503: SERVER}
_KINDS |= {504: "timeout_error"}
_ANTHROPIC_KINDS = {413: "request_too_large", 500: "api_error", 503: "overloaded_error"}
_STATUSES = {
    400: "The request cannot be served as asked.",
    401: "The API key is missing or wrong.",
    403: "A quota or a policy forbids it.",
    404: "There is no such thing.",
    409: "Somebody else was there first: read the state anew.",
    410: "What was asked for is no longer kept.",
    413: "The body is too long.",
    429: "Too many requests: see Retry-After.",
    500: "The server failed at this request.",
    503: "The server is shutting down, cannot store it, or its engine failed.",
    504: "The request took too long.",
}
_MEMBERS = ("message", "type", "param", "code")
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {name: {"type": ["string", "null"]} for name in _MEMBERS},
        }
    },
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": _SCHEMA}}}
    for status, text in _STATUSES.items()
}
"""What any route may answer, for the OpenAPI page."""
logger = logging.getLogger(__name__)


class ApiError(Exception):
    """A failure with the status, the words and the headers that the client gets.

    Args:
        type: kind of failure; "" takes the usual one of the status.
        code: for programs, such as "model_not_found". param: the field at fault.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or _KINDS.get(status, INVALID)
        self.code = code
        self.param = param
        self.headers: Mapping[str, str] = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The envelope of OpenAI."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def anthropic_body(self) -> dict[str, Any]:
        """The envelope of Anthropic."""
        kind = _ANTHROPIC_KINDS.get(self.status, _KINDS.get(self.status, INVALID))
        return {"type": "error", "error": {"type": kind, "message": self.message}}


_SESSION_STATUSES = ((SessionNotFound, 404), (SessionConflict, 409), (QuotaExceeded, 403))


def as_api_error(error: Exception) -> ApiError:
    """What the client is told of any failure; what we did not foresee is logged, not shown."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid_body(error)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, RequestError | ConfigError):
        return ApiError(400, str(error), param=named_in(error))
    if isinstance(error, SessionStorageError):
        return _storage_failed(error)
    if isinstance(error, SessionError):
        status = next((code for kind, code in _SESSION_STATUSES if isinstance(error, kind)), 400)
        return ApiError(status, str(error))
    if isinstance(error, FellBehindError):
        message = "more of the answer is unread than is kept: read faster, or ask for less at once"
        return ApiError(408, message, code="fell_behind")
    if isinstance(error, EngineError):
        return ApiError(503, str(error), code="engine_failed", headers={"Retry-After": "5"})
    if isinstance(error, OutriderError):
        return ApiError(400, str(error))
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed at this request: see its log", code="internal_error")


def named_in(error: Exception) -> str | None:
    """The field that a message begins with, as in `n=0: ...`."""
    named = _NAMED.match(str(error))
    return named.group(1) if named else None


def error_response(error: Exception, scope: Scope) -> JSONResponse:
    """The response to a failed request, in the dialect of its path."""
    told = as_api_error(error)
    if isinstance(error, HTTPException) and error.detail == "Not Found":
        told.message = f"there is no {scope['method']} {scope['path']}: see /openapi.json"
    is_anthropic = scope["path"].startswith(ANTHROPIC_PATH)
    body = told.anthropic_body() if is_anthropic else told.body()
    return JSONResponse(body, status_code=told.status, headers=dict(told.headers))


def install(app: FastAPI) -> None:
    """Maps everything that handlers raise on purpose."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        return error_response(error, request.scope)

    for kind in (ApiError, OutriderError, FellBehindError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, handle)


def _storage_failed(error: SessionStorageError) -> ApiError:
    """The client is told sqlite's reason, such as a full disk; where the file lies, the log."""
    logger.error("%s", error)
    reason = f" ({error.__cause__})" if isinstance(error.__cause__, sqlite3.Error) else ""
    message = f"the server cannot store what this needs{reason}: nothing was kept; try again later"
    return ApiError(503, message, code="storage_failed", headers={"Retry-After": "5"})


def _invalid_body(error: RequestValidationError) -> ApiError:
    """The first thing wrong with the body; a field that is not known reads as OpenAI says it."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(place) or None
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is no JSON object: send one", code="invalid_json")
    if first["type"] == "extra_forbidden":
        message = f"Unrecognized request argument supplied: {param}"
        return ApiError(400, message, param=param, code="unknown_parameter")
    named = f"{param}: " if param else ""
    return ApiError(400, f"{named}{first['msg']}", param=param)
