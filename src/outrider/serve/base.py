"""Server and the dependencies that every route shares."""

import hmac
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from fastapi import Request
from pydantic import BaseModel, ConfigDict, model_validator

from outrider.engine.async_llm import AsyncLLM
from outrider.engine.llm import LLM
from outrider.errors import RequestError
from outrider.serve.config import ServeConfig as ServeConfig
from outrider.serve.errors import ApiError
from outrider.serve.gate import Gate
from outrider.serve.metrics import Metrics
from outrider.stream.outbox import Unread
from outrider.tokenizer import Tokenizer


@dataclass(kw_only=True)
class Server:
    """What the routes share: `app.state.server`.

    Attributes:
        model_name: what clients call the model.
        tokenizer: None serves token ids only.
        started: seconds since the epoch when the server began.
        open_requests: ids of those in the engine.
        unread: how much of what is made clients may leave unread.
        sessions: filled in by the sessions module; None without it.
        clock: seconds since the epoch, for time stamps.
    """

    engine: AsyncLLM
    llm: LLM
    config: ServeConfig
    gate: Gate
    metrics: Metrics
    model_name: str
    tokenizer: Tokenizer | None
    started: int
    open_requests: set[str] = field(default_factory=set)
    unread: Unread = field(default_factory=Unread)
    sessions: Any = None
    clock: Callable[[], float] = time.time

    def now(self) -> int:
        """Whole seconds since the epoch, as `created` fields want them."""
        return int(self.clock())

    def needed_tokenizer(self) -> Tokenizer:
        """RequestError where the model was loaded without one."""
        if self.tokenizer is None:
            raise RequestError("this model was loaded without a tokenizer: send token ids")
        return self.tokenizer

    def check_model(self, name: str | None) -> None:
        """ApiError 404 for a model that is not served here; None means the one that is."""
        if name is not None and name != self.model_name:
            raise ApiError(
                404,
                f"model {name!r} is not served here: ask for {self.model_name!r}",
                type="invalid_request_error",
                code="model_not_found",
                param="model",
            )


class Body(BaseModel):
    """Body of a request; a field that we do not know is refused, as OpenAI does."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_half_characters(cls, values: Any) -> Any:
        """Half a surrogate pair is text in JSON, but no tokenizer or database could read it."""
        left: list[Any] = [values] if isinstance(values, Mapping) else []
        while left:
            value = left.pop()
            if isinstance(value, Mapping):
                left += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                left += value
            elif isinstance(value, str) and not _is_text(value):
                raise ApiError(400, "the body holds half a surrogate pair: send whole characters")
        return values


def server(request: Request) -> Server:
    """Dependency: the server."""
    return cast(Server, request.app.state.server)


def tenant(request: Request) -> str:
    """Dependency: whose key came with the request; ApiError 401 for a wrong key or none."""
    keys = server(request).config.api_keys
    if not keys:
        return ""
    given = _given_key(request).encode()
    found: str | None = None
    for key, owner in keys.items():  # all of them, so that time tells nothing
        if hmac.compare_digest(key.encode(), given):
            found = owner
    if found is None:
        raise ApiError(
            401,
            "the API key is missing or wrong: send it as Authorization: Bearer KEY",
            type="invalid_request_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return found


def request_id(request: Request) -> str:
    """Dependency: the client's X-Request-Id, or the one that it was given."""
    return str(request.scope["state"]["request_id"])


def _given_key(request: Request) -> str:
    """From the header of OpenAI's clients, or of Anthropic's."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    return request.headers.get("x-api-key", "")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
