"""Runs: responses while they are made, from what the engine is asked to the last word."""

import asyncio
import json
import logging
import time
from collections.abc import Coroutine, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from outrider.errors import EngineError, SessionError, SessionStorageError
from outrider.serve.base import Server
from outrider.serve.errors import ApiError, as_api_error
from outrider.serve.generation import generate, started
from outrider.serve.response_events import Put, ResponseWriter, Rewrite
from outrider.serve.response_plan import Plan
from outrider.serve.response_store import ResponseStore, Stored
from outrider.serve.ring import Numbered, Ring, Rings
from outrider.serve.session_service import Sessions, SessionTurn
from outrider.serve.usage import exactness
from outrider.session.records import Head
from outrider.stream.erasure import Erasure
from outrider.stream.events import Committed, RequestMetrics

MAX_TIMES = 3
T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Live:
    """A response while it is made.

    Attributes:
        body: the response object, which grows.
        turn: where its session will take it up; None is a stateless one.
        is_detached: it goes on when its client has left.
        accepted: done once the engine has taken it, or with what it was refused for.
        notes: what the next process is left; None if it is left nothing.
        rewrite: what is told of an answer that is made again; None for the others.
        num_clients: who waits for it or listens, the one that asked for it included.
        is_cancelled: a client has said that it shall end.
        error: what it failed of.
    """

    tenant: str
    plan: Plan
    prompt: tuple[int, ...]
    turn: SessionTurn | None
    ring: Ring
    notes: "Notes | None"
    body: dict[str, Any]
    items: list[dict[str, Any]]
    is_detached: bool
    token_ids: list[int] = field(default_factory=list)
    accepted: "asyncio.Future[None]"
    task: "asyncio.Task[None] | None" = None
    rewrite: Rewrite | None = None
    num_clients: int = 1
    is_cancelled: bool = False
    error: ApiError | None = None

    @property
    def id(self) -> str:
        return str(self.body["id"])


class Notes:
    """Writes down each event of a detached response before anybody hears of it.

    What is written is always all up to some event: after the first that cannot be written none
    is, and the response fails; only its last words are told without being written.
    """

    def __init__(self, store: ResponseStore, response_id: str) -> None:
        self._store = store
        self._response_id = response_id
        self._is_torn = False
        self.is_needed = True  # whether a response without them has failed

    def __call__(self, event: Numbered) -> None:
        """SessionStorageError once, if it cannot be written and is needed."""
        if self._is_torn:
            return
        try:
            self._store.add_event(self._response_id, event)
        except SessionStorageError as error:
            self._is_torn = True
            if self.is_needed:
                raise
            logger.warning("the end of %s is not written down: %s", self._response_id, error)


class Runs:
    """Makes responses, each in a task of its own; whatever happens to one, its turn ends with it.

    Attributes:
        rings: the events of each.
    """

    def __init__(self, here: Server, sessions: Sessions) -> None:
        self.rings = Rings()
        self._here = here
        self._sessions = sessions
        self._live: dict[str, Live] = {}
        self._is_closing = False

    def find(self, tenant: str, response_id: str) -> Live | None:
        """The response while it is made; those that are not stored are nobody's to ask for."""
        live = self._live.get(response_id)
        is_here = live is not None and live.tenant == tenant and live.plan.body.store
        return live if is_here else None

    def launch(
        self,
        tenant: str,
        plan: Plan,
        response_id: str,
        prompt: tuple[int, ...],
        turn: SessionTurn | None,
        items: list[dict[str, Any]],
        *,
        is_detached: bool = False,
    ) -> Live:
        """A response that begins to be made; raises where its beginning cannot be stored."""
        body = plan.response(self._here, response_id, plan.body.previous_response_id)
        live = self._live_from(tenant, plan, prompt, turn, body, items, is_detached=is_detached)
        live.task = asyncio.create_task(self._run(live))
        return live

    async def until_accepted(self, live: Live) -> None:
        """Waits until the engine has taken it; raises what it was refused for."""
        try:
            await asyncio.shield(live.accepted)
        except asyncio.CancelledError:
            await self.leave(live)
            raise

    async def leave(self, live: Live) -> None:
        """A client of it is gone; with the last one it ends, unless it is detached."""
        live.num_clients -= 1
        if not live.is_detached and not live.num_clients:
            await self.stop(live)

    async def take_up(self, stored: Stored, request: Mapping[str, Any]) -> None:
        """Makes an interrupted answer again; what was told before is not told twice."""
        tenant, response_id = stored.tenant, stored.id
        turn = await self._sessions.resume(tenant, response_id)
        try:
            session = await self._sessions.find(tenant, turn.session)
            plan = Plan.again(self._here, request, session.settings)
            past = self._sessions.responses.events(response_id)
            body = plan.response(self._here, response_id, stored.previous)
            body["outrider"]["taken_up"] = _taken_up(stored, past)
            live = self._live_from(
                tenant, plan, turn.prompt, turn, body, stored.items, is_detached=True, past=past
            )
        except BaseException:
            with suppress(SessionError):
                await self._sessions.abort(turn)
            raise
        live.rewrite = Rewrite([json.loads(event.data) for event in past], live.ring.put)
        live.task = asyncio.create_task(self._run(live))

    async def cancel(self, live: Live) -> None:
        """As `stop`, because a client says so: the next process does not take it up either."""
        live.is_cancelled = True
        await self.stop(live)

    async def drop_session(self, tenant: str, session: str) -> None:
        """Forgets one that was made for a response which came to nothing: it holds nothing yet."""
        with suppress(SessionError):  # of a disk that is full
            await self._sessions.call(self._sessions.log.delete, tenant, session)

    async def stop(self, live: Live) -> None:
        """Ends it, and waits until it has ended."""
        await asyncio.sleep(0)  # a task that never began would not undo what was begun for it
        if live.task is not None and not live.task.done():
            live.task.cancel()
            await asyncio.gather(live.task, return_exceptions=True)

    async def aclose(self) -> None:
        """Ends what still runs; detached responses are taken up again by the next process."""
        self._is_closing = True
        await asyncio.sleep(0)  # as in `stop`
        tasks = [live.task for live in self._live.values() if live.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

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
        response_id = str(body["id"])
        notes = Notes(self._sessions.responses, response_id) if is_detached else None
        if turn is not None and not turn.is_implicit:
            body["conversation"] = {"id": turn.session}

        live = Live(
            tenant=tenant,
            plan=plan,
            prompt=prompt,
            turn=turn,
            ring=self.rings.open(response_id, past=past or (), keep=notes),
            notes=notes,
            body=body,
            items=items,
            is_detached=is_detached,
            accepted=asyncio.get_running_loop().create_future(),
        )
        if is_detached:
            try:
                self._sessions.responses.put(self._row(live, is_final=False))
            except SessionStorageError:
                self.rings.drop(response_id)
                raise
        self._live[response_id] = live
        return live

    async def _run(self, live: Live) -> None:
        """The life of a response; whatever happens it ends, and so does its turn."""
        ask = live.plan.ask(live.prompt, live.tenant)
        put: Put = live.rewrite or live.ring.put
        writer = live.plan.writer(self._here, ask, live.body, put, live.ring.put_tail)
        try:
            await self._generate(live, writer)
        except asyncio.CancelledError:
            await _to_the_end(self._break_off(live, writer, "cancelled", None))
        except Exception as error:
            await _to_the_end(self._break_off(live, writer, "failed", error))
        finally:
            self._live.pop(live.id, None)
            if live.ring.closed_at is None:
                live.ring.close()
            if not live.plan.body.store:
                self.rings.drop(live.id)

    async def _generate(self, live: Live, writer: ResponseWriter) -> None:
        def accept() -> None:
            if not live.accepted.done():
                writer.open()
                live.accepted.set_result(None)

        if live.ring.last >= 0:
            accept()  # it was, before a restart
        ask = live.plan.ask(live.prompt, live.tenant)
        if live.turn is not None:
            past = live.turn.experience(ask.sampling.temperature)
            ask = replace(ask, experience=past)
        erasure = Erasure(time.monotonic)
        queued = accept if live.plan.body.background else None
        events = await started(generate(self._here, ask, live.id, queued=queued))
        async with aclosing(events):
            accept()
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
        made = exactness(live.plan.speculation, [metrics])
        changes["outrider"] = {**live.body["outrider"], "exactness": made}
        if live.plan.options.visibility != "verified":
            changes["usage"]["outrider"] = {"stream": erasure.summary()}
        if is_cut:
            changes["incomplete_details"] = {"reason": "max_output_tokens"}
        status = "incomplete" if is_cut else "completed"
        if not is_cut:
            changes["completed_at"] = self._here.now()
        writer.end(status)
        if live.rewrite is not None:
            live.rewrite.end()
        if live.turn is not None:
            head = await self._commit(live, live.turn, metrics, {"status": status, **changes})
            session = self._report(live.turn, head, metrics)
            changes["outrider"]["session"] = session
        writer.close(status, changes)
        self._keep(live)

    async def _commit(
        self, live: Live, turn: SessionTurn, metrics: RequestMetrics, changes: Mapping[str, Any]
    ) -> Head:
        """Makes the turn part of its session.

        How the response will have ended is written down first, so that it is known if the process
        is killed before it can say so. Once this has begun nothing stops it: a response whose
        tokens are in the session is not cancelled any more, and has not failed.
        """
        row = self._row(live, is_final=False)
        self._sessions.responses.put(row._replace(body={**live.body, **changes}))
        finishing = self._sessions.finish(
            turn,
            live.token_ids,
            metrics,
            live.plan.sampling.temperature,
        )
        try:
            head = await _to_the_end(finishing)
        except Exception as error:
            head = await _to_the_end(self._committed(turn, error))
            logger.exception("what follows the commit of %s failed", live.id)
        if live.notes is not None:
            live.notes.is_needed = False
        return head

    async def _committed(self, turn: SessionTurn, error: Exception) -> Head:
        """The head of a turn whose end failed; raises the error if it has none."""
        find = self._sessions.log.head_of_response
        try:
            return await self._sessions.call(find, turn.tenant, turn.response_id)
        except SessionError:
            raise error from error.__cause__  # which the client is told of

    def _report(self, turn: SessionTurn, head: Head, metrics: RequestMetrics) -> dict[str, Any]:
        """`outrider.session`; what cannot be said of it is no reason to fail."""
        try:
            return self._sessions.report(turn, head, metrics)
        except Exception:
            logger.exception("nothing is told of the session of %s", turn.response_id)
            return {"id": head.session, "head": head.id}

    async def _break_off(
        self, live: Live, writer: ResponseWriter, status: str, error: Exception | None
    ) -> None:
        """Undoes the turn, and tells how the response ended if it had begun."""
        if writer.is_closed:
            return  # it was complete already
        is_told = live.accepted.done()
        is_ending = self._is_closing or self._here.gate.is_draining
        if live.is_detached and is_told and is_ending and not live.is_cancelled:
            return  # the next process takes it up
        if live.turn is not None:
            with suppress(SessionError):
                await self._sessions.abort(live.turn)
        if live.notes is not None:
            live.notes.is_needed = False
        if is_told:
            self._tell_end(live, writer, status, error)
        else:
            self._forget(live)
        turn = live.turn
        if turn is not None and turn.is_implicit and not turn.base.num_tokens:
            await self.drop_session(live.tenant, turn.session)
        if not is_told:
            live.accepted.set_exception(error or _cancelled())
            live.accepted.exception()  # perhaps nobody is left who waits for it

    def _tell_end(
        self, live: Live, writer: ResponseWriter, status: str, error: Exception | None
    ) -> None:
        changes: dict[str, Any] = {}
        if error is not None:
            live.error = told = as_api_error(error)
            changes["error"] = error_of(told)
        writer.close(status, changes)
        is_known = live.plan.body.stream if error is not None else live.is_cancelled
        if live.is_detached or is_known:
            self._keep(live)
        else:
            self._forget(live)

    def _forget(self, live: Live) -> None:
        """As if it had never been asked for: nobody knows its id who might ask for it."""
        self.rings.drop(live.id)
        with suppress(SessionStorageError):
            self._sessions.responses.delete(live.tenant, live.id)

    def _keep(self, live: Live) -> None:
        if live.plan.body.store:
            self._sessions.responses.put_at_last(self._row(live, is_final=True))

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


async def _to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """What comes of work that must not stop half way; whoever cancels it waits for it."""
    task = asyncio.create_task(work)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([task])
    return task.result()


def error_of(told: ApiError) -> dict[str, str]:
    """`error` of a response that failed."""
    return {"code": told.code or "server_error", "message": told.message}


def _taken_up(stored: Stored, past: list[Numbered]) -> dict[str, int]:
    """How often it was taken up without a new event since, and at which event that was.

    EngineError where that was too often: what takes the process down must not do so at every start.
    """
    at = past[-1].number if past else -1
    before = stored.body["outrider"].get("taken_up", {"times": 0, "at": at})
    times = before["times"] + 1 if before["at"] == at else 1
    if times > MAX_TIMES:
        raise EngineError(f"{MAX_TIMES} processes have ended at it, without one new event")
    return {"times": times, "at": at}


def _cancelled() -> ApiError:
    return ApiError(409, "the response was cancelled before it began", code="cancelled")
