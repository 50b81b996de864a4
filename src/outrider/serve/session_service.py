"""Sessions: turns of a conversation over its durable token log, warmed where that is possible."""

import logging
from collections.abc import Callable, Mapping, Sequence as Items
from contextlib import suppress
from typing import Any, TypeVar

from outrider.errors import SessionStorageError
from outrider.serve.base import Server
from outrider.serve.session_canary import SessionCanary
from outrider.serve.session_claims import Claims
from outrider.serve.session_counters import Counters
from outrider.serve.session_places import OnConflict, Places
from outrider.serve.session_prompts import Message, Preamble, Prompts
from outrider.serve.session_store import SessionStore
from outrider.serve.session_sweeper import RESPONSE_TTL_S as RESPONSE_TTL_S, Sweeper
from outrider.serve.session_turn import SessionTurn as SessionTurn
from outrider.serve.session_view import summary, warmth_of
from outrider.serve.session_warmth import EVERYTHING, Kept, Warm, Warmer, counts_of
from outrider.session.canary import Tries
from outrider.session.records import Head, Page, Session
from outrider.session.statistics import bucket_of
from outrider.stream.events import RequestMetrics

NOTE = "note"  # beside a turn's request: what the model is told with it
NOTHING: Mapping[str, Any] = {}
logger = logging.getLogger(__name__)
T = TypeVar("T")


class Sessions:
    """All sessions of a server; one response at a time per session.

    The log is the truth. Every call names the tenant first, and what belongs to another one is not
    there. Errors are those of the log: SessionNotFound, SessionConflict, QuotaExceeded,
    SessionStorageError, and RequestError for what cannot be honoured.

    Attributes:
        places: append, fork, rewind, truncate.
        service: the Responses over these sessions.
        sweeper: forgets what has expired.
    """

    def __init__(self, server: Server) -> None:
        self._store = SessionStore(server)
        self.log, self.responses = self._store.log, self._store.responses
        self.warmth = self._store.warmth
        self.warmer = Warmer(server, self._store)
        self.prompts = Prompts(server, self._store)
        self.counters = Counters()
        self.service: object = None
        self._server = server
        self._claims = Claims()
        self._canary = SessionCanary(self.warmer, self.counters)
        self.places = Places(self._store, self.prompts, self.warmer, self._claims)
        self.sweeper = Sweeper(self._store, self.warmer, lambda: float(server.clock()), self._drop)

    def start(self) -> None:
        """Begins to forget what has expired, now and then."""
        self.sweeper.start()

    async def aclose(self) -> None:
        """Closes the files; nothing is lost by it."""
        await self.sweeper.aclose()
        self._store.close()

    async def call(self, function: Callable[..., T], *args: Any, **named: Any) -> T:
        """A call of the log, in its thread."""
        return await self._store.call(function, *args, **named)

    def response_in(self, session: str) -> str | None:
        """The response that is being made in a session."""
        return self._claims.holder(session)

    async def create(
        self,
        tenant: str,
        tokens: Items[int] = (),
        settings: Mapping[str, Any] = NOTHING,
        ttl_s: float | None = None,
        conversation: str | None = None,
    ) -> Head:
        """A new session; `settings["instructions"]` are told with its first message."""
        self.prompts.check(tokens)
        return await self.call(
            self.log.create,
            tenant,
            self._store.maker.as_text(),
            tokens,
            settings,
            ttl_s,
            conversation=conversation,
        )

    async def from_snapshot(
        self,
        tenant: str,
        snapshot: str,
        settings: Mapping[str, Any] = NOTHING,
        ttl_s: float | None = None,
        conversation: str | None = None,
    ) -> tuple[Head, Warm]:
        """A session that goes on where a snapshot was taken, as warm as the snapshot was.

        Args:
            settings: in place of those of the session that it was taken of; None takes one away.
            ttl_s: None is that of the same.
        """
        taken = await self.call(self.log.head, tenant, snapshot, "from_snapshot")
        (head,) = await self.call(
            self.log.fork,
            tenant,
            taken.session,
            taken.id,
            changes={**settings, "is_implicit": None},
            ttl_s=ttl_s,
            conversation=conversation,
        )
        session = await self.call(self.log.get, tenant, head.session)
        tokens = await self.call(self.log.tokens, tenant, head)
        return head, await self._warm_up(tenant, session, tokens)

    def speaks(self, session: Session) -> bool:
        """Whether a session's tokens mean to this model what they meant to the one that made it."""
        return self._store.maker.speaks(session)

    async def find(self, tenant: str, name: str) -> Session:
        """A session by its id, or by the client's own name for it."""
        return await self._store.find(tenant, name)

    async def hint(self, tenant: str, session: str, event: str) -> str:
        """What the client knows of its next turn; returns what was done: "none" if nothing."""
        found = await self.find(tenant, session)
        tokens = await self.call(self.log.tokens, tenant, found.head)
        if event in ("tool_wait", "idle"):
            await self.snapshot(tenant, found.id)
            return "snapshot"
        if event == "resume_soon":
            warm = await self._warm_up(tenant, found, tokens)
            return "restored" if warm.restored_from else "none"
        return "none"

    async def snapshot(
        self, tenant: str, session: str, include: Items[str] = EVERYTHING
    ) -> tuple[Head, Kept]:
        """Writes the warm state out; returns the head it belongs to and what is kept of it."""
        found = await self.find(tenant, session)
        return found.head, await self.warmer.keep(tenant, found, include)

    async def page(self, tenant: str, limit: int, after: str | None) -> Page:
        """Those that clients have made; a response that named none has one which is not shown."""
        return await self.call(self.log.list, tenant, limit, after, without="is_implicit")

    async def delete(self, tenant: str, session: str) -> str:
        """The session, its responses, and what no other branch uses; returns its id."""
        found = await self.find(tenant, session)
        with self._claims.during(found.id, "delete"):
            await self.warmer.forget(tenant, found.id)
            self.responses.delete_of_session(tenant, found.id)
            await self.call(self.log.delete, tenant, found.id)
        self._drop(found.id)
        return found.id

    async def describe(self, tenant: str, session: str) -> dict[str, Any]:
        """All there is to know of a session, its warmth at this moment too."""
        found = await self.find(tenant, session)
        tokens = await self.call(self.log.tokens, tenant, found.head)
        state = await self._server.engine.call(self.warmth.state, tokens, tenant)
        stats = await self.call(self.log.stats.get, tenant, found.id)
        return {
            **summary(found),
            **warmth_of(state, stats, self.response_in(found.id)),
            "branches": list(await self.call(self.log.branches, tenant, found.id)),
        }

    async def begin(
        self,
        tenant: str,
        session: str,
        messages: Items[Message],
        *,
        response_id: str,
        preamble: Preamble = Preamble(),
        request: Mapping[str, Any] = NOTHING,
        if_head: str | None = None,
        on_conflict: OnConflict = "error",
    ) -> SessionTurn:
        """Opens a turn: nothing of it is part of the session until `finish`.

        Args:
            request: JSON by which it can be taken up again after a crash.
        """
        found = await self.find(tenant, session)
        if self.response_in(found.id) is not None and on_conflict == "fork":
            (head,) = await self.call(self.log.fork, tenant, found.id, if_head)
            found, if_head = await self.call(self.log.get, tenant, head.session), None
        held = self._claims.hold(found.id, response_id)
        try:
            target, base = await self.places.place(tenant, found, if_head, on_conflict)
            if target.id != held:
                self._claims.release(held)
                held = self._claims.hold(target.id, response_id)
            return await self._open(tenant, target, base, messages, preamble, response_id, request)
        except BaseException:
            self._claims.release(held)
            raise

    async def prompt(
        self,
        tenant: str,
        session: Session | None,
        at: Head | None,
        messages: Items[Message],
        preamble: Preamble,
    ) -> tuple[int, ...]:
        """What `begin` would ask of the engine; nothing is written, nor need there be a session."""
        if session is None or at is None:
            return tuple(self.prompts.opening(messages, preamble, True))
        self._store.maker.check(session)
        log = await self.call(self.log.tokens, tenant, at)
        added = await self.prompts.template(tenant, session, at, log, messages, preamble, True)
        return (*log, *added.tokens)

    async def resume(self, tenant: str, response_id: str) -> SessionTurn:
        """A turn that was left open by a crash, as it began."""
        left = await self.call(self.log.turns.get, tenant, response_id)
        self._claims.hold(left.session, response_id)
        try:
            base = await self.call(self.log.head, tenant, left.head)
            log = await self.call(self.log.tokens, tenant, base)
            session = await self.call(self.log.get, tenant, left.session)
            self._store.maker.check(session)
            note = left.request.get(NOTE, {})
            return await self._turn(tenant, session, base, (*log, *left.tokens), response_id, note)
        except BaseException:
            self._claims.release(left.session)
            raise

    async def finish(
        self,
        turn: SessionTurn,
        answer: Items[int],
        metrics: RequestMetrics,
        temperature: float,
    ) -> Head:
        """The turn becomes part of the session: its input, and the answer as it was generated."""
        try:
            head = await self.call(
                self.log.turns.commit,
                turn.tenant,
                turn.response_id,
                answer,
                on_conflict="fork",
                note=turn.note,
            )
            self._count(turn, metrics)
            try:
                await self._sign(turn, head)
                if metrics.num_drafts:
                    await self._learn(turn, head, metrics, bucket_of(temperature))
            except SessionStorageError as error:
                logger.warning("nothing was learnt of a turn: %s", error)  # it is committed
        finally:
            self._claims.release(turn.session)
        self.warmer.touch(turn.tenant, head.session)
        return head

    async def abort(self, turn: SessionTurn) -> None:
        """The session stays at its last head, as if nothing had been asked."""
        self.counters.aborted_turns += 1
        try:
            await self.sweeper.abort(turn.tenant, turn.response_id)
        finally:
            self._claims.release(turn.session)

    def report(self, turn: SessionTurn, head: Head, metrics: RequestMetrics) -> dict[str, Any]:
        """`outrider.session` of a response: how warm it was, and where the session is now."""
        return turn.report(self.warmer, head, metrics)

    async def _open(
        self,
        tenant: str,
        session: Session,
        base: Head,
        messages: Items[Message],
        preamble: Preamble,
        response_id: str,
        request: Mapping[str, Any],
    ) -> SessionTurn:
        self._store.maker.check(session)
        log = await self.call(self.log.tokens, tenant, base)
        added, note = await self.prompts.template(
            tenant, session, base, log, messages, preamble, True
        )
        self.prompts.check(added)
        await self.call(
            self.log.turns.begin,
            tenant,
            session.id,
            added,
            response_id=response_id,
            request={**request, NOTE: note} if request else request,
            if_head=base.id,
        )
        try:
            return await self._turn(tenant, session, base, (*log, *added), response_id, note)
        except BaseException:
            with suppress(SessionStorageError):
                await self.sweeper.abort(tenant, response_id)
            raise

    async def _turn(
        self,
        tenant: str,
        session: Session,
        base: Head,
        prompt: tuple[int, ...],
        response_id: str,
        note: Mapping[str, Any],
    ) -> SessionTurn:
        """A turn whose session is as warm as it can be made."""
        return SessionTurn(
            tenant=tenant,
            response_id=response_id,
            session=session.id,
            base=base,
            prompt=prompt,
            note=note,
            warm=await self._warm_up(tenant, session, prompt[: base.num_tokens]),
            stats=await self.call(self.log.stats.get, tenant, session.id),
            maker=session.fingerprint,
            is_implicit=bool(session.settings.get("is_implicit")),
        )

    async def _warm_up(self, tenant: str, session: Session, tokens: Items[int]) -> Warm:
        """Loads what is kept of a session and not in the engine; what was loaded is watched."""
        warm = await self.warmer.warm_up(tenant, session, tokens)
        self._canary.heed(session.id, warm)
        return warm

    async def _sign(self, turn: SessionTurn, head: Head) -> None:
        """A session's maker is whoever made its last turn."""
        maker = self._store.maker.as_text()
        if turn.maker != maker:
            await self.call(self.log.update, turn.tenant, head.session, fingerprint=maker)

    def _count(self, turn: SessionTurn, metrics: RequestMetrics) -> None:
        counters, name = self.counters, metrics.drafter
        counters.turns += 1
        counters.restores += turn.warm.restored_from is not None
        counters.cold_starts += bool(turn.base.num_tokens) and not metrics.num_cached_tokens
        is_ready = not name or turn.ready_upto(self.warmer, name) > 0
        counters.half_warm_hits += bool(metrics.num_cached_tokens) and not is_ready

    async def _learn(
        self, turn: SessionTurn, head: Head, metrics: RequestMetrics, heat: str
    ) -> None:
        """Adds to class S, but for drafters of which the canary finds that they had been restored
        wrongly."""
        sound = dict(metrics.by_drafter)
        for drafter, fared in metrics.by_drafter.items():
            tries = Tries.of_positions(fared.tried, fared.stood)
            worse = self._canary.look(turn.session, drafter, heat, turn.stats, tries)
            if worse is not None:
                del sound[drafter]
                tokens = tuple(await self.call(self.log.tokens, turn.tenant, head))
                turn.alarm = await self._canary.act(turn.tenant, tokens, drafter, worse)
        counts = counts_of(sound, metrics.drafter)
        by_heat = {drafter: {heat: each} for drafter, each in counts.items()}
        await self.call(self.log.stats.add_all, turn.tenant, head.session, by_heat)

    def _drop(self, session: str) -> None:
        """The session is gone."""
        self.warmer.drop(session)
        self._canary.drop(session)
