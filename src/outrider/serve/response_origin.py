"""Origins: where a response goes on from: a session, or a response before it."""

from collections.abc import Mapping
from typing import Any

from outrider.errors import SessionConflict, SessionNotFound
from outrider.serve.errors import ApiError
from outrider.serve.response_run import Runs
from outrider.serve.response_store import Stored
from outrider.serve.schemas_responses import CreateResponse, messages_of
from outrider.serve.session_prompts import Preamble
from outrider.serve.session_service import RESPONSE_TTL_S, Sessions
from outrider.session.records import Head, Session


class Origins:
    """Finds the sessions of responses to be made, and makes those that are not there."""

    def __init__(self, sessions: Sessions, runs: Runs) -> None:
        self._sessions = sessions
        self._runs = runs

    async def named_session(
        self, tenant: str, body: CreateResponse, headers: Mapping[str, str]
    ) -> Session | None:
        """The session that the request names; one that only a header names is made."""
        name = body.session_id(headers)
        if name is None or not body.store:
            return None
        try:
            return await self._sessions.find(tenant, name)
        except SessionNotFound:
            if body.conversation is not None or body.outrider.session is not None:
                raise
        head = await self._sessions.create(tenant, conversation=name, ttl_s=RESPONSE_TTL_S)
        return await self._sessions.find(tenant, head.session)

    async def new_session(self, tenant: str) -> Session:
        """For a response that names none: kept as long as the response is."""
        settings = {"is_implicit": True}
        head = await self._sessions.create(tenant, settings=settings, ttl_s=RESPONSE_TTL_S)
        return await self._sessions.find(tenant, head.session)

    async def follow_on(
        self,
        tenant: str,
        body: CreateResponse,
        preamble: Preamble,
        messages: list[dict[str, Any]],
    ) -> tuple[Session | None, str | None, list[dict[str, Any]]]:
        """(session, head, messages) for `previous_response_id`.

        Instructions and tools do not carry over: where they differ from those before, the
        conversation is told anew from its items, in a session of its own.
        """
        name = body.previous_response_id or ""
        if self._runs.find(tenant, name) is not None:
            raise SessionConflict(f"response {name!r} is still being made: wait for it")
        chain = self._chain(tenant, name)
        told = [_preamble(stored.body) for stored in chain]
        if told[-1] == _preamble({"instructions": body.instructions, "tools": body.tools}):
            head = await self._sessions.call(self._sessions.log.head_of_response, tenant, name)
            return await self._sessions.find(tenant, head.session), head.id, messages
        if chain[0].previous is not None or chain[0].session is None:
            raise ApiError(
                400,
                f"previous_response_id={name!r}: what came before it is not all kept, so its "
                "instructions cannot be changed; send the same ones, or all of the input",
                param="previous_response_id",
            )
        items = [item for stored in chain for item in (*stored.items, *stored.body["output"])]
        return None, None, messages_of([*items, *body.items])

    async def head(self, tenant: str, head: str) -> Head:
        return await self._sessions.call(self._sessions.log.head, tenant, head)

    def _chain(self, tenant: str, name: str) -> list[Stored]:
        """The responses up to this one, the oldest that is kept first."""
        chain = [kept_response(self._sessions, tenant, name, "previous_response_id")]
        while chain[0].previous is not None:
            before = self._sessions.responses.get(tenant, chain[0].previous)
            if before is None:
                break
            chain.insert(0, before)
        return chain


def kept_response(
    sessions: Sessions, tenant: str, response_id: str, param: str | None = None
) -> Stored:
    """A response that is kept. ApiError 404."""
    found = sessions.responses.get(tenant, response_id)
    if found is None:
        raise ApiError(
            404,
            f"no response {response_id!r}: it was not stored, was deleted, or never was",
            type="invalid_request_error",
            code="response_not_found",
            param=param,
        )
    return found


def _preamble(body: Mapping[str, Any]) -> tuple[str | None, Any]:
    return body.get("instructions"), body.get("tools") or []
