"""Responses: makes, keeps, replays, cancels and forgets the answers of the Responses API."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

from outrider.errors import (
    SessionConflict,
    SessionError,
    SessionNotFound,
    SessionStorageError,
)
from outrider.serve.base import Server
from outrider.serve.errors import ApiError, as_api_error
from outrider.serve.generation import generate, started
from outrider.serve.response_events import Put, ResponseWriter, Rewrite
from outrider.serve.response_plan import Plan
from outrider.serve.response_store import Stored
from outrider.serve.ring import GoneError, Numbered, Ring, Rings
from outrider.serve.schemas_responses import CreateResponse, messages_of
from outrider.serve.session_prompts import Preamble
from outrider.serve.session_service import RESPONSE_TTL_S, Sessions, SessionTurn
from outrider.serve.sse import Frame
from outrider.serve.turns import new_id
from outrider.session.records import Head, Session
from outrider.stream.erasure import Erasure
from outrider.stream.events import Committed, RequestMetrics
from outrider.stream.outbox import Outbox
from outrider.stream.pad import pad

DETACHED = "continue"
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Live:
    """A response while it is made.

    Attributes:
        body: the response object, which grows.
        turn: where its session will take it up; None is a stateless one.
        is_detached: it goes on when its client has left.
        is_owned: the session was made for it, and goes with it if it fails.
        accepted: done once the engine has taken it, or with what it was refused for.
    """

    tenant: str
    plan: Plan
    prompt: tuple[int, ...]
    turn: SessionTurn | None
    ring: Ring
    body: dict[str, Any]
    items: list[dict[str, Any]]
    is_detached: bool
    is_owned: bool = False
    token_ids: list[int] = field(default_factory=list)
    accepted: "asyncio.Future[None]"
    task: "asyncio.Task[None] | None" = None

    @property
    def id(self) -> str:
        return str(self.body["id"])


class Responses:
    """The Responses API over the sessions of one server."""

    def __init__(self, here: Server, sessions: Sessions) -> None:
        self.rings = Rings()
        self._here = here
        self._sessions = sessions
        self._live: dict[str, Live] = {}
        self._is_closing = False

    async def start(self) -> None:
        """Takes up the detached responses that a crash has interrupted; the others are undone."""
        log = self._sessions.log
        for left in await self._sessions.call(log.turns.unfinished):
            if self._sessions.responses.get(left.tenant, left.response_id) is None:
                with suppress(SessionNotFound):
                    await self._sessions.call(log.turns.abort, left.tenant, left.response_id)
            else:
                await self._take_up(left.tenant, left.response_id, left.request)
        await self._settle()

    async def aclose(self) -> None:
        """Ends what still runs; detached responses are taken up again by the next process."""
        self._is_closing = True
        tasks = [live.task for live in self._live.values() if live.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def create(
        self, tenant: str, body: CreateResponse, headers: Mapping[str, str], stream_header: str = ""
    ) -> Live:
        """A response that the engine has taken (a background one: that is queued).

        Raises:
            RequestError, ApiError, SessionError: refused; then nothing was changed.
        """
        session, is_owned = await self._named_session(tenant, body, headers), False
        plan = Plan.of(self._here, body, stream_header, session.settings if session else {})
        preamble = Preamble(body.instructions, plan.tool_use)
        items, base = body.items, body.outrider.if_head
        messages = messages_of(items)
        response_id = new_id("resp_")
        if body.previous_response_id is not None:
            session, base, messages = await self._follow_on(tenant, body, preamble, messages)
        if not body.store:
            at = None if base is None else await self._head(tenant, base)
            prompt = await self._sessions.prompt(tenant, session, at, messages, preamble)
            return await self._launch(tenant, plan, response_id, prompt, None, items)
        if session is None:
            session, is_owned = await self._new_session(tenant), True
        is_detached = body.background or session.settings.get("detach") == DETACHED
        try:
            turn = await self._sessions.begin(
                tenant,
                session.id,
                messages,
                response_id=response_id,
                preamble=preamble,
                request=plan.as_request(tenant, body.previous_response_id) if is_detached else {},
                if_head=base,
                on_conflict="fork" if body.previous_response_id else body.outrider.on_conflict,
            )
        except BaseException:
            if is_owned:
                await self._sessions.delete(tenant, session.id)
            raise
        return await self._launch(
            tenant,
            plan,
            response_id,
            turn.prompt,
            turn,
            items,
            is_detached=is_detached,
            is_owned=is_owned,
        )

    def body(self, tenant: str, response_id: str) -> dict[str, Any]:
        """The response object as it is now. ApiError 404."""
        live = self.live_of(tenant, response_id)
        return live.body if live is not None else self._stored(tenant, response_id).body

    def items(self, tenant: str, response_id: str) -> list[dict[str, Any]]:
        """The input items that came with a response, each with an id. ApiError 404."""
        live = self.live_of(tenant, response_id)
        found = live.items if live is not None else self._stored(tenant, response_id).items
        stem = response_id.partition("_")[2]
        return [{"id": f"item_{stem}_{index}", **item} for index, item in enumerate(found)]

    def ring(self, tenant: str, response_id: str) -> Ring | None:
        """The events of a response; None if they are no longer held. ApiError 404."""
        self.body(tenant, response_id)
        ring = self.rings.find(response_id)
        if ring is None and (past := self._sessions.responses.events(response_id)):
            ring = self.rings.open(response_id, past=past)
            ring.close()
        return ring

    async def frames(
        self, live: Live | None, ring: Ring, *, after: int = -1
    ) -> AsyncIterator[Frame]:
        """The events above `after` for one connection, as they come.

        A response that is not detached ends when the last connection leaves. Raises GoneError.
        """
        options = live.plan.options if live is not None else None
        rate = options.max_updates_per_s if options else 1.0
        pace_s = options.pace_s if options else 0.0
        is_padded = options.pad if options else not self._here.config.is_loopback
        outbox: Outbox[Numbered] = Outbox(rate, time.monotonic, pace_s=pace_s)
        try:
            ring.join(outbox, after=after)
        except GoneError as error:
            raise ApiError(410, str(error), code="events_gone") from None
        try:
            async for item in outbox:
                yield _frame(item, is_padded)
        finally:
            ring.leave(outbox)
            is_left = ring.closed_at is None and not ring.num_listeners
            if live is not None and is_left and not live.is_detached:
                await self._stop(live)

    async def whole(self, live: Live) -> dict[str, Any]:
        """The final object; leaving early ends a response that is not detached."""
        assert live.task is not None
        try:
            await asyncio.shield(live.task)
        except asyncio.CancelledError:
            if not live.is_detached:
                await self._stop(live)
            raise
        return live.body

    async def cancel(self, tenant: str, response_id: str) -> dict[str, Any]:
        """Ends a response that runs; its session stays at its last head. ApiError 404."""
        live = self.live_of(tenant, response_id)
        if live is None:
            return self._stored(tenant, response_id).body
        await self._stop(live)
        return live.body

    async def delete(self, tenant: str, response_id: str) -> None:
        """Forgets a response; its tokens go too where no session of the client's holds them."""
        live = self.live_of(tenant, response_id)
        if live is not None:
            await self._stop(live)
            with suppress(ApiError):
                await self._delete_stored(self._stored(tenant, response_id))
        else:
            await self._delete_stored(self._stored(tenant, response_id))
        self.rings.drop(response_id)

    def live_of(self, tenant: str, response_id: str) -> Live | None:
        """The response while it is made; those that are not stored are nobody's to ask for."""
        live = self._live.get(response_id)
        is_here = live is not None and live.tenant == tenant and live.plan.body.store
        return live if is_here else None

    # Where a response goes on from.

    async def _named_session(
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

    async def _new_session(self, tenant: str) -> Session:
        """For a response that names none: kept as long as the response is."""
        settings = {"is_implicit": True}
        head = await self._sessions.create(tenant, settings=settings, ttl_s=RESPONSE_TTL_S)
        return await self._sessions.find(tenant, head.session)

    async def _follow_on(
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
        if self.live_of(tenant, name) is not None:
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

    def _chain(self, tenant: str, name: str) -> list[Stored]:
        """The responses up to this one, the oldest that is kept first."""
        chain = [self._stored(tenant, name, "previous_response_id")]
        while chain[0].previous is not None:
            before = self._sessions.responses.get(tenant, chain[0].previous)
            if before is None:
                break
            chain.insert(0, before)
        return chain

    async def _head(self, tenant: str, head: str) -> Head:
        return await self._sessions.call(self._sessions.log.head, tenant, head)

    # Making one.

    async def _launch(
        self,
        tenant: str,
        plan: Plan,
        response_id: str,
        prompt: tuple[int, ...],
        turn: SessionTurn | None,
        items: list[dict[str, Any]],
        *,
        is_detached: bool = False,
        is_owned: bool = False,
    ) -> Live:
        body = plan.response(self._here, response_id, plan.body.previous_response_id)
        live = self._live_from(tenant, plan, prompt, turn, body, items, is_detached=is_detached)
        live.is_owned = is_owned
        live.task = asyncio.create_task(self._run(live, live.ring.put))
        try:
            await asyncio.shield(live.accepted)
        except asyncio.CancelledError:
            await self._stop(live)
            raise
        return live

    def _live_from(
        self,
        tenant: str,
        plan: Plan,
        prompt: tuple[int, ...],
        turn: SessionTurn | None,
        body: dict[str, Any],
        items: list[dict[str, Any]],
        *,
        is_detached: bool,
        past: list[Numbered] | None = None,
    ) -> Live:
        store, response_id = self._sessions.responses, str(body["id"])
        if turn is not None and not turn.is_implicit:
            body["conversation"] = {"id": turn.session}

        def keep(event: Numbered) -> None:
            try:
                store.add_event(response_id, event)
            except SessionStorageError as error:
                # The client goes on; whether the turn can be kept is decided at its end.
                logger.warning("an event of %s was not written down: %s", response_id, error)

        live = Live(
            tenant=tenant,
            plan=plan,
            prompt=prompt,
            turn=turn,
            ring=self.rings.open(response_id, past=past or (), keep=keep if is_detached else None),
            body=body,
            items=items,
            is_detached=is_detached,
            accepted=asyncio.get_running_loop().create_future(),
        )
        if is_detached:
            store.put(self._row(live, is_final=False))
        self._live[response_id] = live
        return live

    async def _take_up(self, tenant: str, response_id: str, request: Mapping[str, Any]) -> None:
        """Makes an interrupted answer again; what was told before is not told twice."""
        stored = self._stored(tenant, response_id)
        turn = await self._sessions.resume(tenant, response_id)
        session = await self._sessions.find(tenant, turn.session)
        plan = Plan.again(self._here, request, session.settings)
        past = self._sessions.responses.events(response_id)
        body = plan.response(self._here, response_id, stored.previous)
        live = self._live_from(
            tenant, plan, turn.prompt, turn, body, stored.items, is_detached=True, past=past
        )
        put = Rewrite([json.loads(event.data) for event in past], live.ring.put)
        live.task = asyncio.create_task(self._run(live, put))

    async def _run(self, live: Live, put: Put) -> None:
        """The life of a response; whatever happens it ends, and so does its turn."""
        ask = live.plan.ask(live.prompt, live.tenant)
        writer = live.plan.writer(self._here, ask, live.body, put, live.ring.put_tail)
        try:
            await self._generate(live, writer)
        except asyncio.CancelledError:
            await self._break_off(live, writer, "cancelled", None)
        except Exception as error:
            await self._break_off(live, writer, "failed", error)
        finally:
            self._live.pop(live.id, None)
            if live.ring.closed_at is None:
                live.ring.close()
            if not live.plan.body.store:
                self.rings.drop(live.id)

    async def _generate(self, live: Live, writer: ResponseWriter) -> None:
        is_waited_for = not live.plan.body.background and not live.ring.last >= 0
        if not is_waited_for:
            live.accepted.set_result(None)
            writer.open()
        ask = live.plan.ask(live.prompt, live.tenant)
        erasure = Erasure(time.monotonic)
        events = await started(generate(self._here, ask, live.id))
        async with aclosing(events):
            if is_waited_for:
                writer.open()
                live.accepted.set_result(None)
            async for event in events:
                if not isinstance(event, Committed):
                    if writer.take_tail(event):
                        erasure.observe(event)
                    continue
                erasure.observe(event)
                live.token_ids += event.token_ids
                writer.take(event)
                if event.finish_reason == "abort":
                    await self._break_off(live, writer, "cancelled", None)
                elif event.finish_reason is not None:
                    await self._finish(live, writer, event, erasure)

    async def _finish(
        self, live: Live, writer: ResponseWriter, event: Committed, erasure: Erasure
    ) -> None:
        """The turn is durable before anybody hears that the response is complete."""
        metrics = event.metrics or RequestMetrics()
        is_cut = event.finish_reason == "length"
        changes = live.plan.report(metrics)
        if live.plan.options.visibility != "verified":
            changes["usage"]["outrider"] = {"stream": erasure.summary()}
        if is_cut:
            changes["incomplete_details"] = {"reason": "max_output_tokens"}
        if live.turn is not None:
            head = await self._sessions.finish(
                live.turn,
                live.token_ids,
                metrics,
                live.plan.sampling.temperature,
                live.plan.speculation.num_draft_tokens,
            )
            session = self._sessions.report(live.turn, head, metrics)
            changes["outrider"] = {**live.body["outrider"], "session": session}
        if not is_cut:
            changes["completed_at"] = self._here.now()
        writer.close("incomplete" if is_cut else "completed", changes)
        self._keep(live)

    async def _break_off(
        self, live: Live, writer: ResponseWriter, status: str, error: Exception | None
    ) -> None:
        """Undoes the turn, and tells how the response ended if it had begun."""
        if live.is_detached and (self._is_closing or self._here.gate.is_draining):
            return  # the next process takes it up
        if live.turn is not None:
            with suppress(SessionError):
                await self._sessions.abort(live.turn)
        if not live.accepted.done():
            await self._undo(live, error)
            return
        changes: dict[str, Any] = {}
        if error is not None:
            told = as_api_error(error)
            changes["error"] = {"code": told.code or "server_error", "message": told.message}
        writer.close(status, changes)
        self._keep(live)

    async def _undo(self, live: Live, error: Exception | None) -> None:
        """As if it had never been asked for."""
        self.rings.drop(live.id)
        if live.is_owned and live.turn is not None:
            with suppress(SessionError):
                await self._sessions.delete(live.tenant, live.turn.session)
        self._sessions.responses.delete(live.tenant, live.id)
        if error is None:
            live.accepted.cancel()
        else:
            live.accepted.set_exception(error)

    async def _stop(self, live: Live) -> None:
        if live.task is not None and not live.task.done():
            live.task.cancel()
            await asyncio.gather(live.task, return_exceptions=True)

    # What is kept.

    def _keep(self, live: Live) -> None:
        if live.plan.body.store:
            self._sessions.responses.put(self._row(live, is_final=True))

    def _row(self, live: Live, *, is_final: bool) -> Stored:
        session: str | None = live.body["outrider"].get("session", {}).get("id")
        if not is_final and live.turn is not None:
            session = live.turn.session
        num_prompt = len(live.prompt)
        return Stored(
            id=live.id,
            tenant=live.tenant,
            session=session,
            previous=live.body["previous_response_id"],
            updated=self._here.clock(),
            num_prompt=num_prompt,
            num_tokens=num_prompt + len(live.token_ids),
            is_final=is_final,
            body=live.body,
            items=live.items,
        )

    async def _settle(self) -> None:
        """Responses that no process will finish have failed."""
        for stored in self._sessions.responses.unfinished():
            if stored.id not in self._live:
                error = {"code": "server_error", "message": "the server stopped: ask again"}
                body = {**stored.body, "status": "failed", "error": error}
                self._sessions.responses.put(stored._replace(body=body, is_final=True))

    async def _delete_stored(self, stored: Stored) -> None:
        store = self._sessions.responses
        store.delete(stored.tenant, stored.id)
        if stored.session is None or store.of_sessions(stored.tenant, [stored.session]):
            return
        with suppress(SessionError):
            session = await self._sessions.find(stored.tenant, stored.session)
            if session.settings.get("is_implicit"):
                await self._sessions.delete(stored.tenant, session.id)

    def _stored(self, tenant: str, response_id: str, param: str | None = None) -> Stored:
        found = self._sessions.responses.get(tenant, response_id)
        if found is None:
            raise ApiError(
                404,
                f"no response {response_id!r}: it was not stored, was deleted, or never was",
                type="invalid_request_error",
                code="response_not_found",
                param=param,
            )
        return found


def _frame(item: Numbered, is_padded: bool) -> Frame:
    name = str(item.number) if item.number >= 0 else None
    data = item.data
    if is_padded:
        lines = f"event: {item.type}\n" + (f"id: {name}\n" if name is not None else "")
        data = pad(data, num_other=len(lines))
    return Frame(data=data, event=item.type, id=name)


def _preamble(body: Mapping[str, Any]) -> tuple[str | None, Any]:
    return body.get("instructions"), body.get("tools") or []
