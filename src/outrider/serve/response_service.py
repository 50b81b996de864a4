"""Responses: makes, keeps, replays, cancels and forgets the answers of the Responses API."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

from outrider.errors import SessionError, SessionNotFound, SessionStorageError
from outrider.serve.base import Server
from outrider.serve.errors import ApiError, as_api_error
from outrider.serve.response_origin import Origins, kept_response
from outrider.serve.response_plan import Plan
from outrider.serve.response_run import Live, Runs, error_of
from outrider.serve.response_store import Stored
from outrider.serve.ring import GoneError, Numbered, Ring
from outrider.serve.schemas_responses import CreateResponse, messages_of
from outrider.serve.session_prompts import Preamble
from outrider.serve.session_service import Sessions
from outrider.serve.sse import Frame, dumps
from outrider.serve.turns import new_id
from outrider.session.records import Head, Turn
from outrider.stream.outbox import Outbox
from outrider.stream.pad import pad

DETACHED = "continue"
TERMINAL = ("response.completed", "response.incomplete", "response.failed")
logger = logging.getLogger(__name__)


class Responses:
    """The Responses API over the sessions of one server.

    Attributes:
        runs: the responses that are being made, and the events of these and of late ones.
    """

    def __init__(self, here: Server, sessions: Sessions) -> None:
        self._here = here
        self._sessions = sessions
        self.runs = Runs(here, sessions)
        self._origins = Origins(sessions, self.runs)

    async def start(self) -> None:
        """Takes up the detached responses that a crash has interrupted; the others are undone."""
        log = self._sessions.log
        reasons: dict[str, Exception] = {}
        for left in await self._sessions.call(log.turns.unfinished):
            try:
                if await self._take_up(left):
                    continue
            except Exception as error:  # whatever it is, the server starts all the same
                logger.exception("response %s cannot be taken up again", left.response_id)
                reasons[left.response_id] = error
            await self._put_away(left)
        await self._settle(reasons)

    async def _take_up(self, left: Turn) -> bool:
        """Whether an interrupted response is made again; raises why one cannot be."""
        kept = self._sessions.responses.get(left.tenant, left.response_id)
        if kept is None or kept.is_final or not left.request:
            return False
        await self.runs.take_up(kept, left.request)
        return True

    async def _put_away(self, left: Turn) -> None:
        try:
            with suppress(SessionNotFound):
                await self._sessions.call(
                    self._sessions.log.turns.abort, left.tenant, left.response_id
                )
        except SessionStorageError as error:
            logger.warning("the turn of %s stays open: %s", left.response_id, error)

    async def aclose(self) -> None:
        """Ends what still runs; detached responses are taken up again by the next process."""
        await self.runs.aclose()

    async def create(
        self, tenant: str, body: CreateResponse, headers: Mapping[str, str], stream_header: str = ""
    ) -> Live:
        """A response that the engine has taken (a background one: that is queued).

        Raises:
            RequestError, ApiError, SessionError: refused; then nothing was changed.
        """
        launching = asyncio.create_task(self._launch(tenant, body, headers, stream_header))
        try:
            live = await asyncio.shield(launching)
        except asyncio.CancelledError:
            # The client is gone. What has begun is brought to where it can be undone whole.
            with suppress(Exception):
                await self.runs.leave(await launching)
            raise
        await self.runs.until_accepted(live)
        return live

    async def _launch(
        self, tenant: str, body: CreateResponse, headers: Mapping[str, str], stream_header: str
    ) -> Live:
        """A response that begins to be made."""
        session, is_owned = await self._origins.named_session(tenant, body, headers), False
        plan = Plan.of(self._here, body, stream_header, session.settings if session else {})
        preamble = Preamble(body.instructions, plan.tool_use)
        items, base = body.items, body.outrider.if_head
        messages = messages_of(items)
        response_id = new_id("resp_")
        if body.previous_response_id is not None:
            session, base, messages = await self._origins.follow_on(
                tenant, body, preamble, messages
            )
        if not body.store:
            at = None if base is None else await self._origins.head(tenant, base)
            prompt = await self._sessions.prompt(tenant, session, at, messages, preamble)
            return self.runs.launch(tenant, plan, response_id, prompt, None, items)
        if session is None:
            session, is_owned = await self._origins.new_session(tenant), True
        is_detached = body.background or session.settings.get("detach") == DETACHED
        turn = None
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
            if body.background:  # others wait for what the engine says of them
                await plan.check(self._here, turn.prompt, tenant)
            return self.runs.launch(
                tenant, plan, response_id, turn.prompt, turn, items, is_detached=is_detached
            )
        except BaseException:
            with suppress(SessionError):
                if turn is not None:
                    await self._sessions.abort(turn)
            if is_owned:
                await self.runs.drop_session(tenant, session.id)
            raise

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

    def message(self, tenant: str, response_id: str, item_id: str | None) -> dict[str, Any]:
        """An output message as it is now, the last one if none is named. ApiError 404."""
        output = self.body(tenant, response_id)["output"]
        messages = [item for item in output if item["type"] == "message"]
        for item in reversed(messages):
            if item_id in (None, item["id"]):
                return dict(item)
        wanted = f"message {item_id!r}" if item_id is not None else "message"
        raise ApiError(404, f"response {response_id!r} has no {wanted} yet", param="item_id")

    def ring(self, tenant: str, response_id: str) -> Ring | None:
        """The events of a response; None if they are no longer held. ApiError 404."""
        self.body(tenant, response_id)
        ring = self.runs.rings.find(response_id)
        past = self._sessions.responses.events(response_id) if ring is None else []
        if past and past[-1].type in TERMINAL:
            ring = self.runs.rings.open(response_id, past=past)
            ring.close()
        return ring

    async def frames(
        self, live: Live | None, ring: Ring, *, after: int = -1, is_guest: bool = False
    ) -> AsyncIterator[Frame]:
        """The events above `after` for one connection, as they come.

        A response that is not detached ends when its last client leaves; whoever asked for it is
        one, as a stream or not.

        Args:
            is_guest: the connection is another one than that which asked for the response.

        Raises:
            ApiError: 410, some of the events are no longer held.
        """
        options = live.plan.options if live is not None else None
        rate = options.max_updates_per_s if options else 1.0
        is_padded = options.pad if options else not self._here.config.is_loopback
        outbox: Outbox[Numbered] = Outbox(rate, time.monotonic, unread=self._here.unread)
        try:
            ring.join(outbox, after=after)
        except GoneError as error:
            raise ApiError(410, str(error), code="events_gone") from None
        if live is not None and is_guest:
            live.num_clients += 1
        try:
            async for item in outbox:
                yield _frame(item, is_padded)
        finally:
            ring.leave(outbox)
            outbox.abandon()
            if live is not None and ring.closed_at is None:
                await self.runs.leave(live)

    async def whole(self, live: Live) -> dict[str, Any]:
        """The final object; leaving early ends a response that is not detached.

        Raises:
            ApiError: what it failed of.
        """
        assert live.task is not None
        try:
            await asyncio.shield(live.task)
        except asyncio.CancelledError:
            await self.runs.leave(live)
            raise
        if live.error is not None:
            raise live.error
        return live.body

    async def cancel(self, tenant: str, response_id: str) -> dict[str, Any]:
        """Ends a response that runs; its session stays at its last head. ApiError 404."""
        live = self.live_of(tenant, response_id)
        if live is None:
            return self._stored(tenant, response_id).body
        await self.runs.cancel(live)
        return live.body

    async def delete(self, tenant: str, response_id: str) -> None:
        """Forgets a response; its tokens go too where no session of the client's holds them."""
        live = self.live_of(tenant, response_id)
        if live is not None:
            await self.runs.cancel(live)
            with suppress(ApiError):
                await self._delete_stored(self._stored(tenant, response_id))
        else:
            await self._delete_stored(self._stored(tenant, response_id))
        self.runs.rings.drop(response_id)

    def live_of(self, tenant: str, response_id: str) -> Live | None:
        """The response while it is made; those that are not stored are nobody's to ask for."""
        return self.runs.find(tenant, response_id)

    async def _settle(self, reasons: Mapping[str, Exception]) -> None:
        """Responses that no process will finish get an end: their own, if the log has it.

        Args:
            reasons: why some could not be taken up, by id.
        """
        for stored in self._sessions.responses.unfinished():
            if self.runs.find(stored.tenant, stored.id) is not None:
                continue
            try:
                await self._settle_one(stored, reasons.get(stored.id))
            except SessionStorageError as error:
                logger.warning("the end of %s is not written down: %s", stored.id, error)

    async def _settle_one(self, stored: Stored, reason: Exception | None) -> None:
        store, past = self._sessions.responses, self._sessions.responses.events(stored.id)
        try:
            head = await self._sessions.call(
                self._sessions.log.head_of_response, stored.tenant, stored.id
            )
        except SessionNotFound:
            if past:
                self._end(_broken_off(stored, reason), past)
            else:
                store.delete(stored.tenant, stored.id)  # nobody was told of it
        else:
            is_told = bool(past) and past[-1].type in TERMINAL
            if stored.body["status"] == "in_progress" and not is_told:
                stored = _broken_off(stored, None)  # a power failure took the row, not the turn
            self._end(_complete(stored, head), past)

    def _end(self, ended: Stored, past: list[Numbered]) -> None:
        """Keeps the response, and its last event if that was not told yet."""
        store = self._sessions.responses
        if past and past[-1].type in TERMINAL:
            ended = ended._replace(body=json.loads(past[-1].data)["response"])
        elif past:
            number, kind = past[-1].number + 1, f"response.{ended.body['status']}"
            event = {"type": kind, "sequence_number": number, "response": ended.body}
            store.add_event(ended.id, Numbered(number, kind, dumps(event)))
        store.put(ended)

    async def _delete_stored(self, stored: Stored) -> None:
        store = self._sessions.responses
        store.delete(stored.tenant, stored.id)
        if stored.session is None or store.of_sessions(stored.tenant, [stored.session]):
            return
        with suppress(SessionError):
            session = await self._sessions.find(stored.tenant, stored.session)
            if session.settings.get("is_implicit"):
                await self._sessions.delete(stored.tenant, session.id)

    def _stored(self, tenant: str, response_id: str) -> Stored:
        return kept_response(self._sessions, tenant, response_id)


def _broken_off(stored: Stored, reason: Exception | None) -> Stored:
    told = ApiError(503, "ask again") if reason is None else as_api_error(reason)
    error = error_of(told) | {"message": f"the server stopped in its midst: {told.message}"}
    body = {**stored.body, "status": "failed", "error": error}
    return stored._replace(body=body, is_final=True)


def _complete(stored: Stored, head: Head) -> Stored:
    """The response whose tokens are in the log already, as it was to be told."""
    session = {"id": head.session, "head": head.id}
    body = {**stored.body, "outrider": {**stored.body["outrider"], "session": session}}
    return stored._replace(body=body, session=head.session, is_final=True)


def _frame(item: Numbered, is_padded: bool) -> Frame:
    name = str(item.number) if item.number >= 0 else None
    data = item.data
    if is_padded:
        lines = f"event: {item.type}\n" + (f"id: {name}\n" if name is not None else "")
        data = pad(data, num_other=len(lines))
    return Frame(data=data, event=item.type, id=name)
