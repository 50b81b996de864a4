"""What the session log hands out: sessions, heads, turns, pages of a list, and limits."""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Head(NamedTuple):
    """A place in a session's text that can be returned to.

    Attributes:
        id: opaque; nobody can guess it.
        session: whose head it is.
        num_tokens: tokens up to here.
        seq: rises within a session; the highest is where the session is.
        response_id: the response that ends here.
    """

    id: str
    session: str
    num_tokens: int
    seq: int
    response_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Session:
    """A session as it stands.

    Attributes:
        id: opaque; nobody can guess it.
        root: the session that this one descends from by forks, or itself.
        conversation: the client's own name for it, one per tenant.
        fingerprint: of the model whose tokens these are.
        created, expires_at: seconds of the log's clock; None: kept until deleted.
        settings: what the owner stored with it.
        head: where it is.
    """

    id: str
    tenant: str
    root: str
    conversation: str | None
    fingerprint: str
    created: float
    ttl_s: float | None
    expires_at: float | None
    settings: Mapping[str, Any]
    head: Head


class Page(NamedTuple):
    """Part of a list; `after` asks for the next part, None where this was the last."""

    sessions: tuple[Session, ...]
    after: str | None


class Turn(NamedTuple):
    """A response in the making.

    Attributes:
        session: where it will be committed.
        head: id of the session's head when it began.
        request: what the owner stored to take it up again after a crash.
        tokens: all tokens of it so far, the new input first.
    """

    tenant: str
    response_id: str
    session: str
    head: str
    request: Mapping[str, Any]
    tokens: "array[int]"


class Quota(NamedTuple):
    """Most that one tenant may store; None is no limit.

    Attributes:
        tokens: each stored token once, however many forks share it.
        sessions: forks included.
        heads: of all sessions together; each append, fork and rewind adds one.
    """

    tokens: int | None = None
    sessions: int | None = None
    heads: int | None = None


class Usage(NamedTuple):
    """What one tenant stores, in the terms of Quota."""

    tokens: int = 0
    sessions: int = 0
    heads: int = 0
