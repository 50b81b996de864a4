"""Places: where a session stands in its tree of tokens, and the ways to move it."""

from array import array
from collections.abc import Sequence as Items
from typing import Literal

from outrider.errors import RequestError, SessionConflict, SessionNotFound
from outrider.serve.session_claims import Claims
from outrider.serve.session_prompts import Added, Message, Preamble, Prompts
from outrider.serve.session_store import SessionStore
from outrider.serve.session_warmth import Warmer
from outrider.session.records import Head, Session

OnConflict = Literal["error", "fork"]


class Places:
    """Append, fork, rewind, truncate. Raises as `Sessions`."""

    def __init__(
        self, store: SessionStore, prompts: Prompts, warmer: Warmer, claims: Claims
    ) -> None:
        self._store = store
        self._log = store.log
        self._prompts = prompts
        self._warmer = warmer
        self._claims = claims

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
        found = await self._store.find(tenant, session)
        self._store.maker.check(found)
        with self._claims.during(found.id, "append"):
            found, base = await self.place(tenant, found, if_head, on_conflict)
            log = await self._store.call(self._log.tokens, tenant, base)
            tokens, note = await self._added(tenant, found, base, log, messages, token_ids)
            head = await self._store.call(
                self._log.append, tenant, found.id, tokens, if_head=base.id, note=note
            )
        if is_eager:
            await self._warmer.prefill(tenant, (*log, *tokens))
        return head

    async def fork(
        self,
        tenant: str,
        session: str,
        at: str | int | None = None,
        n: int = 1,
        if_head: str | None = None,
    ) -> tuple[Head, ...]:
        """Sessions that share this one's tokens; what runs in it goes on undisturbed."""
        found = await self._store.find(tenant, session)
        changes = {"is_implicit": None}  # a fork is the client's own
        return await self._store.call(
            self._log.fork, tenant, found.id, at, n, if_head=if_head, changes=changes
        )

    async def rewind(
        self,
        tenant: str,
        session: str,
        to: str | int,
        drop: bool = False,
        if_head: str | None = None,
    ) -> Head:
        """Back to an earlier place; with `drop` what came after it is forgotten."""
        found = await self._store.find(tenant, session)
        with self._claims.during(found.id, "rewind"):
            await self.place(tenant, found, if_head, "error")
            if drop:
                await self._warmer.forget(tenant, found.id, keep=to)
            head = await self._store.call(
                self._log.rewind, tenant, found.id, to, drop, if_head=if_head
            )
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
        if_head: str | None = None,
    ) -> Head:
        """Keeps of an answer what its reader has taken in, in whole tokens, and nothing after."""
        if (chars is None) == (tokens is None):
            raise RequestError(f"chars={chars}, tokens={tokens}: give one of them")
        found = await self._store.find(tenant, session)
        await self.place(tenant, found, if_head, "error")
        self._store.maker.check(found)
        answer = await self._prompts.answer(tenant, found, response_id)
        log = await self._store.call(self._log.tokens, tenant, found.head)
        given = list(log[answer.num_prompt : answer.num_tokens])
        num_kept = (
            self._prompts.num_within(given, chars) if tokens is None else min(tokens, len(given))
        )
        to = answer.num_prompt + num_kept
        return await self.rewind(tenant, found.id, to, if_head=found.head.id)

    async def place(
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
        (head,) = await self._store.call(self._log.fork, tenant, session.id, if_head)
        return await self._store.call(self._log.get, tenant, head.session), head

    async def _added(
        self,
        tenant: str,
        session: Session,
        base: Head,
        log: "array[int]",
        messages: Items[Message],
        token_ids: Items[int],
    ) -> Added:
        """Token ids as they were given, or those of the messages."""
        added = Added(list(token_ids), {})
        if messages:
            added = await self._prompts.template(
                tenant, session, base, log, messages, Preamble(), False
            )
        self._prompts.check(added.tokens)
        return added

    async def _forget_responses(self, tenant: str, session: str) -> None:
        responses = self._store.responses
        for stored in responses.of_sessions(tenant, [session]):
            try:
                await self._store.call(self._log.head_of_response, tenant, stored.id)
            except SessionNotFound:
                responses.delete(tenant, stored.id)
