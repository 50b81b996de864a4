"""Call and ClientError: what goes to a server, and what comes back instead of an answer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from outrider.errors import OutriderError

TIMEOUT = httpx.Timeout(60.0, connect=10.0)  # the server sends a keep-alive every 15 seconds
MAX_SHOWN_CHARS = 200


class ClientError(OutriderError):
    """The server refused, failed, or could not be reached.

    Attributes:
        status: of HTTP; None if there was none, or if a stream failed that had begun.
        message: what the server said. code: the same for programs, None if it gave none.
    """

    def __init__(self, status: int | None, message: str, code: str | None = None) -> None:
        super().__init__(f"{status}: {message}" if status is not None else message)
        self.status = status
        self.message = message
        self.code = code


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request, before it is sent.

    Attributes:
        body: sent as JSON; None sends none.
    """

    method: str
    path: str
    body: Mapping[str, Any] | None = None
    query: Mapping[str, str | int] = field(default_factory=dict)

    def build(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        return http.build_request(self.method, self.path, json=self.body, params=dict(self.query))


def headers_of(api_key: str | None) -> dict[str, str]:
    """The key, if there is one."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def body_of(response: httpx.Response) -> dict[str, Any]:
    """The JSON object of a response that was read; ClientError for anything else."""
    if response.is_error:
        raise refusal(response)
    try:
        found = response.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ClientError(response.status_code, f"no JSON object: {_beginning(response)}")
    return found


def refusal(response: httpx.Response) -> ClientError:
    """What a response with an error status says; it must have been read."""
    try:
        told = response.json()["error"]
        return ClientError(response.status_code, str(told["message"]), told.get("code"))
    except (ValueError, LookupError, TypeError, AttributeError):
        return ClientError(response.status_code, _beginning(response))


def unreachable(error: httpx.RequestError) -> ClientError:
    """No answer came, or only half of one."""
    return ClientError(None, f"{type(error).__name__}: {error}; is the server running?")


def given(**values: Any) -> dict[str, Any]:
    """Those that are not None: the server's own defaults stand for the rest."""
    return {name: value for name, value in values.items() if value is not None}


def _beginning(response: httpx.Response) -> str:
    return response.text[:MAX_SHOWN_CHARS] or response.reason_phrase
