"""Sessions: the calls of /v1/sessions; what they return is the server's JSON object."""

from collections.abc import Callable, Iterable, Mapping, Sequence as Items
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

from outrider.client.wire import Call, given
from outrider.errors import ConfigError

PATH = "/v1/sessions"
Result = TypeVar("Result")
Item = Mapping[str, Any]
OnConflict = Literal["error", "fork"]


class Sessions(Generic[Result]):
    """Conversations that the server keeps; `Result` is the object, or an awaitable of it.

    A place in a session is the id of a head, or a number of tokens. `if_head` makes a call fail
    with status 409 where the session is no longer at that head.

    Args:
        send: makes a call.
    """

    def __init__(self, send: Callable[[Call], Result]) -> None:
        self._send = send

    def create(
        self,
        *,
        instructions: str | None = None,
        token_ids: Iterable[int] | None = None,
        from_snapshot: str | None = None,
        ttl_s: float | None = None,
        detach: Literal["continue", "abort"] | None = None,
        conversation: str | None = None,
        speculation: Mapping[str, Any] | str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Result:
        """A new session: empty, with instructions or tokens, or as a snapshot has it.

        What is None is the server's default, or the snapshot's.
        """
        body = given(
            instructions=instructions,
            token_ids=_listed(token_ids),
            from_snapshot=from_snapshot,
            ttl_s=ttl_s,
            detach=detach,
            conversation=conversation,
            speculation=speculation,
            metadata=metadata,
        )
        return self._send(Call(method="POST", path=PATH, body=body))

    def list(self, *, limit: int | None = None, after: str | None = None) -> Result:
        """`data` has the newest sessions; `after` of one page asks for the next."""
        return self._send(Call(method="GET", path=PATH, query=given(limit=limit, after=after)))

    def get(self, session: str) -> Result:
        """Where it is, and how warm."""
        return self._send(Call(method="GET", path=_path(session)))

    def delete(self, session: str) -> Result:
        """Forgets it; a response that runs in it ends."""
        return self._send(Call(method="DELETE", path=_path(session)))

    def append(
        self,
        session: str,
        input: str | Iterable[Item] | None = None,
        *,
        token_ids: Iterable[int] | None = None,
        if_head: str | None = None,
        on_conflict: OnConflict = "error",
        prefill: Literal["lazy", "eager"] = "lazy",
    ) -> Result:
        """Input, or tokens, that nobody answers yet."""
        body = given(
            input=input if input is None or isinstance(input, str) else [*input],
            token_ids=_listed(token_ids),
            if_head=if_head,
            on_conflict=on_conflict,
            prefill=prefill,
        )
        return self._post(session, "append", body)

    def respond(
        self,
        session: str,
        input: str | Iterable[Item],
        *,
        if_head: str | None = None,
        on_conflict: OnConflict = "error",
        **body: Any,
    ) -> Result:
        """A whole answer; `stream_response(..., session=...)` shows it as it grows.

        Args:
            body: further fields of `POST /v1/responses`.
        """
        if body.get("stream"):
            raise ConfigError("stream=True: use stream_response(..., session=...)")
        asked = given(
            input=input if isinstance(input, str) else [*input],
            if_head=if_head,
            on_conflict=on_conflict,
        )
        return self._post(session, "responses", {**body, **asked})

    def fork(
        self,
        session: str,
        *,
        at: str | int | None = None,
        n: int = 1,
        if_head: str | None = None,
    ) -> Result:
        """`n` branches that share everything up to `at`; `data` lists them."""
        return self._post(session, "fork", given(at=at, n=n, if_head=if_head))

    def rewind(
        self, session: str, to: str | int, *, drop: bool = False, if_head: str | None = None
    ) -> Result:
        """Back to an earlier place; `drop` forgets what came after it."""
        return self._post(session, "rewind", given(to=to, drop=drop, if_head=if_head))

    def truncate(
        self,
        session: str,
        *,
        chars: int | None = None,
        tokens: int | None = None,
        response_id: str | None = None,
        if_head: str | None = None,
    ) -> Result:
        """An answer ends where its reader stopped: after so many characters, or tokens.

        Args:
            response_id: None is the answer that the session ends in.
        """
        body = given(chars=chars, tokens=tokens, response_id=response_id, if_head=if_head)
        return self._post(session, "truncate", body)

    def hint(
        self,
        session: str,
        event: Literal["tool_wait", "resume_soon", "superseded", "idle", "final"],
    ) -> Result:
        """What comes next; `effect` says what the server did about it."""
        return self._post(session, "hint", {"event": event})

    def snapshot(
        self,
        session: str,
        *,
        tier: Literal["host", "disk"] | None = None,
        include: Iterable[Literal["kv", "spec", "stats"]] | None = None,
    ) -> Result:
        """Keeps what is warm; `id` is what `create(from_snapshot=...)` takes."""
        return self._post(session, "snapshot", given(tier=tier, include=_listed(include)))

    def _post(self, session: str, verb: str, body: Mapping[str, Any]) -> Result:
        return self._send(Call(method="POST", path=f"{_path(session)}/{verb}", body=body))


def _path(session: str) -> str:
    return f"{PATH}/{quote(session, safe='')}"


def _listed(values: Iterable[Any] | None) -> Items[Any] | None:
    return None if values is None else [*values]
