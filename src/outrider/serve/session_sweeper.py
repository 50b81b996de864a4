"""Sweeper: forgets what has expired, and what could not be forgotten when it was to be."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from outrider.errors import EngineError, SessionNotFound, SessionStorageError
from outrider.serve.session_store import SessionStore
from outrider.serve.session_warmth import Warmer

SWEEP_S = 60.0
RESPONSE_TTL_S = 30 * 24 * 3600.0  # as OpenAI keeps them
EVENTS_TTL_S = 600.0
logger = logging.getLogger(__name__)


class Sweeper:
    """Looks once a minute; a failure is logged, and stops nothing but itself.

    Args:
        drop: called with each session that is gone.
    """

    def __init__(
        self,
        store: SessionStore,
        warmer: Warmer,
        clock: Callable[[], float],
        drop: Callable[[str], None],
    ) -> None:
        self._store = store
        self._warmer = warmer
        self._clock = clock
        self._drop = drop
        self._left_open: set[tuple[str, str]] = set()  # turns, by tenant and response
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._go_on())

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def abort(self, tenant: str, response_id: str) -> None:
        """Forgets a turn; one that a full disk keeps is forgotten later."""
        turn = (tenant, response_id)
        try:
            with suppress(SessionNotFound):
                await self._store.call(self._store.log.turns.abort, *turn)
        except SessionStorageError:
            self._left_open.add(turn)
            raise
        self._left_open.discard(turn)

    async def sweep(self) -> None:
        """Forgets what can be forgotten now."""
        for step in (self._abort_left_open, self._forget_sessions, self._forget_responses):
            await self._attempt(step)

    async def _go_on(self) -> None:
        while True:
            await self.sweep()
            await asyncio.sleep(SWEEP_S)

    async def _attempt(self, step: Callable[[], Awaitable[None]]) -> None:
        try:
            await step()
        except (SessionStorageError, EngineError) as error:
            logger.warning("what is old was not forgotten: %s", error)
        except Exception:
            logger.exception("what is old was not forgotten")

    async def _abort_left_open(self) -> None:
        for turn in list(self._left_open):
            await self.abort(*turn)

    async def _forget_sessions(self) -> None:
        """Their logs last: once these are gone nobody knows what else there was."""
        call, log, now = self._store.call, self._store.log, self._clock()
        for tenant, session in await call(log.expired, now):
            with suppress(EngineError):  # a broken engine is no reason to keep a text
                await self._warmer.forget(tenant, session)
            self._store.responses.delete_of_session(tenant, session)
        for session in await call(log.expire, now):
            self._drop(session)

    async def _forget_responses(self) -> None:
        now = self._clock()
        self._store.responses.expire(
            responses_before=now - RESPONSE_TTL_S, events_before=now - EVENTS_TTL_S
        )
