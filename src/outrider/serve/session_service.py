"""Sessions: turns of a conversation over its durable token log, warmed where that is possible."""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence as Items
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from outrider.errors import RequestError, SessionConflict, SessionNotFound
from outrider.serve.base import Server
from outrider.serve.session_prompts import Message, Preamble, Prompts
from outrider.serve.session_store import SessionStore
from outrider.serve.session_warmth import EVERYTHING, Warm, Warmer, accept, counts_of
from outrider.session.canary import Tries, judge
from outrider.session.records import Head, Page, Session
from outrider.session.snapshot import Manifest
from outrider.session.statistics import bucket_of
from outrider.stream.events import RequestMetrics

SWEEP_S = 60.0
RESPONSE_TTL_S = 30 * 24 * 3600.0  # as OpenAI keeps them
EVENTS_TTL_S = 600.0
NOTHING: Mapping[str, Any] = {}
T = TypeVar("T")
OnConflict = Literal["error", "fork"]


@dataclass(frozen=True, kw_only=True)
class SessionTurn:
    """A response in the making.

    Attributes:
        base: the head that it follows. prompt: the whole log with the new input behind it.
        stats: class S before the turn.
        is_implicit: the session was made for responses that name none.
    """

    tenant: str
    response_id: str
    session: str
    base: Head
    prompt: tuple[int, ...]
    warm: Warm
    stats: Mapping[str, Any]
    is_implicit: bool = False


@dataclass
class Counters:
    """What sessions of this server have been through.

    Attributes:
        half_warm_hits: turns whose KV was there and whose drafter was not ready.
        regressions: restored turns with worse acceptance than the session's own history.
    """

    turns: int = 0
    aborted_turns: int = 0
    restores: int = 0
    cold_starts: int = 0
    half_warm_hits: int = 0
    regressions: int = 0


class Sessions:
    """All sessions of a server; one response at a time per session.

    The log is the truth. Every call names the tenant first, and what belongs to another one is not
    there. Errors are those of the log: SessionNotFound, SessionConflict, QuotaExceeded,
    SessionStorageError, and RequestError for what cannot be honoured.
    """

    def __init__(self, server: Server) -> None:
        self._store = SessionStore(server)
        self.log, self.responses = self._store.log, self._store.responses
        self.warmth = self._store.warmth
        self.warmer = Warmer(server, self._store)
        self.prompts = Prompts(server, self._store)
        self.counters = Counters()
        self.service: object = None  # the Responses over these sessions
        self._server = server
        self._busy: dict[str, str] = {}  # session -> response
        self._sweeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to forget what has expired, now and then."""
        self._sweeper = asyncio.create_task(self._sweep())

    async def aclose(self) -> None:
        """Closes the files; nothing is lost by it."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        self._store.close()

    async def call(self, function: Callable[..., T], *args: Any, **named: Any) -> T:
        """A call of the log, in its thread."""
        return await self._store.call(function, *args, **named)

    def response_in(self, session: str) -> str | None:
        """The response that is being made in a session."""
        return self._busy.get(session)

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
            self.warmth.fingerprint,
            tokens,
            settings,
            ttl_s,
            conversation=conversation,
        )

    async def from_snapshot(self, tenant: str, snapshot: str) -> tuple[Head, Warm]:
        """A session that goes on where a snapshot was taken, as warm as the snapshot was."""
        taken = await self.call(self.log.head, tenant, snapshot)
        (head,) = await self.call(self.log.fork, tenant, taken.session, at=taken.id)
        tokens = await self.call(self.log.tokens, tenant, head)
        return head, await self.warmer.warm_up(tenant, head.session, tokens)

    async def find(self, tenant: str, name: str) -> Session:
        """A session by its id, or by the client's own name for it."""
        try:
            return await self.call(self.log.get, tenant, name)
        except SessionNotFound:
            with suppress(SessionNotFound):
                return await self.call(self.log.of_conversation, tenant, name)
            raise

    async def append(
        self,
        tenant: str,
        session: str,
        messages: Items[Message],
        token_ids: Items[int] = (),
        *,
        if_head: str | None = None,
        on_conflict: OnConflict = "error",
        is_eager: bool = False,
    ) -> Head:
        """Messages, or token ids as they are, behind the head; with no answer to them yet.

        Args:
            is_eager: compute their KV now.
        """
        found = await self.find(tenant, session)
        with self._claim(found.id, "append"):
            found, base = await self._place(tenant, found, if_head, on_conflict)
            log = await self.call(self.log.tokens, tenant, base)
            tokens = list(token_ids)
            if messages:
                tokens += await self.prompts.template(
                    tenant, found, log, messages, Preamble(), False
                )
            self.prompts.check(tokens)
            head = await self.call(self.log.append, tenant, found.id, tokens, if_head=base.id)
        if is_eager:
            await self.warmer.prefill(tenant, (*log, *tokens))
        return head

    async def fork(
        self, tenant: str, session: str, at: str | int | None = None, n: int = 1
    ) -> tuple[Head, ...]:
        """Sessions that share this one's tokens; what runs in it goes on undisturbed."""
        found = await self.find(tenant, session)
        return await self.call(self.log.fork, tenant, found.id, at, n)

    async def rewind(
        self,
        tenant: str,
        session: str,
        to: str | int,
        drop: bool = False,
        if_head: str | None = None,
    ) -> Head:
        """Back to an earlier place; with `drop` what came after it is forgotten."""
        found = await self.find(tenant, session)
        with self._claim(found.id, "rewind"):
            head = await self.call(self.log.rewind, tenant, found.id, to, drop, if_head=if_head)
        if drop:
            await self._forget_responses(tenant, found.id)
        return head

    async def truncate(
        self,
        tenant: str,
        session: str,
        response_id: str | None,
        *,
        chars: int | None = None,
        tokens: int | None = None,
    ) -> Head:
        """Keeps of an answer what its reader has taken in, in whole tokens, and nothing after."""
        if (chars is None) == (tokens is None):
            raise RequestError("truncate: give chars or tokens, one of them")
        found = await self.find(tenant, session)
        answer = await self.prompts.answer(tenant, found, response_id)
        log = await self.call(self.log.tokens, tenant, found.head)
        given = list(log[answer.num_prompt : answer.num_tokens])
        num_kept = (
            self.prompts.num_within(given, chars) if tokens is None else min(tokens, len(given))
        )
        to = answer.num_prompt + num_kept
        return await self.rewind(tenant, found.id, to, if_head=found.head.id)

    async def hint(self, tenant: str, session: str, event: str) -> str:
        """What the client knows of its next turn; returns what was done: "none" if nothing."""
        found = await self.find(tenant, session)
        tokens = await self.call(self.log.tokens, tenant, found.head)
        if event in ("tool_wait", "idle"):
            await self.snapshot(tenant, found.id)
            return "snapshot"
        if event == "resume_soon":
            warm = await self.warmer.restore(tenant, found.id, tokens)
            return "restored" if warm.restored_from else "none"
        return "none"

    async def snapshot(
        self, tenant: str, session: str, include: Items[str] = EVERYTHING
    ) -> tuple[Head, Manifest]:
        """Writes the warm state out; returns the head it belongs to and the manifest."""
        found = await self.find(tenant, session)
        return found.head, await self.warmer.keep(tenant, found, include)

    async def page(self, tenant: str, limit: int, after: str | None) -> Page:
        return await self.call(self.log.list, tenant, limit, after)

    async def delete(self, tenant: str, session: str) -> str:
        """The session, its responses, and what no other branch uses; returns its id."""
        found = await self.find(tenant, session)
        with self._claim(found.id, "delete"):
            await self.warmer.forget(tenant, found)
            await self.call(self.log.delete, tenant, found.id)
        self.responses.delete_of_session(tenant, found.id)
        self.warmer.drop(found.id)
        return found.id

    async def describe(self, tenant: str, session: str) -> dict[str, Any]:
        """All there is to know of a session, its warmth at this moment too."""
        found = await self.find(tenant, session)
        tokens = await self.call(self.log.tokens, tenant, found.head)
        warm = await self.warmer.resident(tenant, tokens)
        stats = await self.call(self.log.stats.get, tenant, found.id)
        spec = {
            name: {
                "class": ready.warmth,
                "ready_upto": ready.ready_upto,
                "accept_post": accept(stats.get(name)),
            }
            for name, ready in warm.drafters.items()
        }
        tiers = (await self._server.engine.call(self.warmth.state, tokens, tenant)).tiers
        return {
            **summary(found),
            "state": self._state(found.id, warm),
            "kv_tokens": warm.kv_tokens,
            "tiers": dict(tiers),
            "branches": list(await self.call(self.log.branches, tenant, found.id)),
            "spec": spec,
            "response_in_progress": self._busy.get(found.id),
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
        if found.id in self._busy and on_conflict == "fork":
            (head,) = await self.call(self.log.fork, tenant, found.id, if_head)
            found, if_head = await self.call(self.log.get, tenant, head.session), None
        held = self._hold(found.id, response_id)
        try:
            target, base = await self._place(tenant, found, if_head, on_conflict)
            if target.id != held:
                self._busy.pop(held)
                held = self._hold(target.id, response_id)
            return await self._open(tenant, target, base, messages, preamble, response_id, request)
        except BaseException:
            self._busy.pop(held, None)
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
        log = await self.call(self.log.tokens, tenant, at)
        return (*log, *await self.prompts.template(tenant, session, log, messages, preamble, True))

    async def resume(self, tenant: str, response_id: str) -> SessionTurn:
        """A turn that was left open by a crash, as it began."""
        left = await self.call(self.log.turns.get, tenant, response_id)
        self._hold(left.session, response_id)
        try:
            base = await self.call(self.log.head, tenant, left.head)
            log = await self.call(self.log.tokens, tenant, base)
            session = await self.call(self.log.get, tenant, left.session)
            return SessionTurn(
                tenant=tenant,
                response_id=response_id,
                session=left.session,
                base=base,
                prompt=(*log, *left.tokens),
                warm=await self.warmer.warm_up(tenant, left.session, log),
                stats=await self.call(self.log.stats.get, tenant, left.session),
                is_implicit=bool(session.settings.get("is_implicit")),
            )
        except BaseException:
            self._busy.pop(left.session, None)
            raise

    async def finish(
        self,
        turn: SessionTurn,
        answer: Items[int],
        metrics: RequestMetrics,
        temperature: float,
        num_draft_tokens: int,
    ) -> Head:
        """The turn becomes part of the session: its input, and the answer as it was generated."""
        try:
            head = await self.call(
                self.log.turns.commit, turn.tenant, turn.response_id, answer, on_conflict="fork"
            )
            counts = counts_of(metrics, num_draft_tokens)
            self._count(turn, metrics, counts, bucket_of(temperature))
            if metrics.num_drafts:
                by_heat = {bucket_of(temperature): counts}
                drafter = metrics.drafter
                await self.call(self.log.stats.add, turn.tenant, head.session, drafter, by_heat)
        finally:
            self._busy.pop(turn.session, None)
        self.warmer.touch(turn.tenant, head.session)
        return head

    async def abort(self, turn: SessionTurn) -> None:
        """The session stays at its last head, as if nothing had been asked."""
        self.counters.aborted_turns += 1
        try:
            with suppress(SessionNotFound):
                await self.call(self.log.turns.abort, turn.tenant, turn.response_id)
        finally:
            self._busy.pop(turn.session, None)

    def report(self, turn: SessionTurn, head: Head, metrics: RequestMetrics) -> dict[str, Any]:
        """`outrider.session` of a response: how warm it was, and where the session is now."""
        name = metrics.drafter
        spec = {
            "drafter": name or None,
            "class": self.warmer.kind(name),
            "ready_upto": self.warmer.ready_upto(turn.warm, name, turn.base.num_tokens),
            "accept_prior": accept(turn.stats.get(name)),
        }
        return {
            "id": head.session,
            "head": head.id,
            "kv_hit_tokens": metrics.num_cached_tokens,
            "spec": spec,
            "restored_from": turn.warm.restored_from,
            "restore_ms": round(turn.warm.restore_ms, 3),
            **({"cold_reason": turn.warm.cold_reason} if turn.warm.cold_reason else {}),
        }

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
        log = await self.call(self.log.tokens, tenant, base)
        added = await self.prompts.template(tenant, session, log, messages, preamble, True)
        self.prompts.check(added)
        await self.call(
            self.log.turns.begin,
            tenant,
            session.id,
            added,
            response_id=response_id,
            request=request,
            if_head=base.id,
        )
        try:
            await self.prompts.note(tenant, session, preamble)
            return SessionTurn(
                tenant=tenant,
                response_id=response_id,
                session=session.id,
                base=base,
                prompt=(*log, *added),
                warm=await self.warmer.warm_up(tenant, session.id, log),
                stats=await self.call(self.log.stats.get, tenant, session.id),
                is_implicit=bool(session.settings.get("is_implicit")),
            )
        except BaseException:
            with suppress(SessionNotFound):
                await self.call(self.log.turns.abort, tenant, response_id)
            raise

    async def _place(
        self, tenant: str, session: Session, if_head: str | None, on_conflict: str
    ) -> tuple[Session, Head]:
        """Where to go on: the session's head, or a fork of it if that is stale and may fork."""
        if if_head in (None, session.head.id):
            return session, session.head
        if on_conflict != "fork":
            raise SessionConflict(
                f"session {session.id!r} is at head {session.head.id!r}, not {if_head!r}: "
                "read it and send again, or fork on conflict",
                head=session.head.id,
            )
        (head,) = await self.call(self.log.fork, tenant, session.id, if_head)
        return await self.call(self.log.get, tenant, head.session), head

    def _state(self, session: str, warm: Warm) -> str:
        if session in self._busy:
            return "live"
        return "warm" if warm.kv_tokens else "cold"

    def _count(
        self, turn: SessionTurn, metrics: RequestMetrics, counts: Mapping[str, Any], heat: str
    ) -> None:
        counters, name = self.counters, metrics.drafter
        counters.turns += 1
        counters.restores += turn.warm.restored_from is not None
        counters.cold_starts += bool(turn.base.num_tokens) and not metrics.num_cached_tokens
        is_ready = not name or self.warmer.ready_upto(turn.warm, name, turn.base.num_tokens) > 0
        counters.half_warm_hits += bool(metrics.num_cached_tokens) and not is_ready
        if turn.warm.restored_from is not None and name:
            history = turn.stats.get(name, {}).get(heat, {}).get("tries")
            known = [Tries(**history)] if history else []
            counters.regressions += judge(known, Tries(**counts["tries"])).is_worse

    @contextmanager
    def _claim(self, session: str, name: str) -> Iterator[None]:
        """One writer per session, for the time of a block."""
        self._hold(session, name)
        try:
            yield
        finally:
            self._busy.pop(session, None)

    def _hold(self, session: str, name: str) -> str:
        if session in self._busy:
            raise SessionConflict(
                f"session {session!r} is busy with {self._busy[session]!r}: wait for it, cancel "
                "it, or fork"
            )
        self._busy[session] = name
        return session

    async def _forget_responses(self, tenant: str, session: str) -> None:
        for stored in self.responses.of_sessions(tenant, [session]):
            try:
                await self.call(self.log.head_of_response, tenant, stored.id)
            except SessionNotFound:
                self.responses.delete(tenant, stored.id)

    async def _sweep(self) -> None:
        while True:
            now = self._server.clock()
            for session in await self.call(self.log.expire, now):
                self.warmer.drop(session)
            self.responses.expire(
                responses_before=now - RESPONSE_TTL_S, events_before=now - EVENTS_TTL_S
            )
            await asyncio.sleep(SWEEP_S)


def summary(session: Session) -> dict[str, Any]:
    """A session as the list shows it."""
    return {
        "id": session.id,
        "object": "session",
        "created_at": int(session.created),
        "expires_at": session.expires_at,
        "conversation": session.conversation,
        "head": session.head.id,
        "n_tokens": session.head.num_tokens,
        "settings": {k: v for k, v in session.settings.items() if k != "preamble"},
    }
