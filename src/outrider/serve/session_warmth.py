"""Warmer: brings back what a session had computed, keeps it, and says how warm it is."""

import time
from collections.abc import Mapping, Sequence as Items
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from outrider.engine.warm_parts import Readiness
from outrider.engine.warmth import Report
from outrider.errors import SessionNotFound
from outrider.request import SamplingParams, SpeculationParams
from outrider.serve.base import Server
from outrider.serve.session_store import SessionStore
from outrider.session.records import Session
from outrider.session.snapshot import Manifest
from outrider.session.statistics import of_turn
from outrider.stream.events import DrafterMetrics

KEPT_WARM = 16  # sessions whose state is written out when the server stops
MAX_USED = 4096  # sessions remembered as used by this process
EVERYTHING = ("kv", "spec", "stats")


@dataclass(frozen=True, kw_only=True)
class Warm:
    """How warm a session was when a turn began.

    Attributes:
        kv_tokens: tokens whose KV was there or was loaded.
        drafters: by name, how far each is ready.
        restored_from: "disk" or "host" where state was loaded, None where nothing was.
        restore_ms: how long that took.
        cold_reason: why stored state could not be used.
    """

    kv_tokens: int = 0
    drafters: Mapping[str, Readiness] = field(default_factory=dict)
    restored_from: str | None = None
    restore_ms: float = 0.0
    cold_reason: str | None = None


class Kept(NamedTuple):
    """A snapshot: its manifest, and the size of all that it names, written for it or before."""

    manifest: Manifest
    num_bytes: int


class Warmer:
    """The warm state of sessions: a cache of their logs, never more."""

    def __init__(self, server: Server, store: SessionStore) -> None:
        self._server = server
        self._store = store
        self._used: dict[str, str] = {}  # session -> tenant, the last used at the end

    async def keep(self, tenant: str, session: Session, include: Items[str] = EVERYTHING) -> Kept:
        """Writes out what is warm of a session's present log."""
        tokens = await self._store.call(self._store.log.tokens, tenant, session.head)
        stats = await self._store.call(self._store.log.stats.get, tenant, session.id)

        def write() -> Kept:
            warmth = self._store.warmth
            manifest = warmth.snapshot(tokens, tenant, include, statistics=stats)
            return Kept(manifest, warmth.bundles.num_bytes_of(manifest.bundles))

        return await self._server.engine.call(write)

    async def keep_all(self) -> None:
        """That of the sessions used last, where it outlives the process; before the engine ends."""
        if self._server.config.state_dir is None:
            return
        for session, tenant in list(self._used.items())[-KEPT_WARM:]:
            with suppress(SessionNotFound):
                found = await self._store.call(self._store.log.get, tenant, session)
                await self.keep(tenant, found)

    async def warm_up(self, tenant: str, session: Session, tokens: Items[int]) -> Warm:
        """Loads what is kept of a session and is not, or no longer, in the engine."""
        is_known = self._used.get(session.id) == tenant
        self.touch(tenant, session.id)
        if not tokens:
            return Warm()
        state = await self._server.engine.call(self._store.warmth.state, tokens, tenant)
        if is_known and not state.has_more:
            return Warm(kv_tokens=state.kv_tokens, drafters=state.drafters)
        warm = await self._restore(tenant, session.id, tokens)
        difference = self._store.maker.difference(session)
        if difference and not warm.kv_tokens:
            warm = replace(warm, cold_reason=difference)
        return warm

    async def _restore(self, tenant: str, session: str, tokens: Items[int]) -> Warm:
        """Loads what is kept of a log and is not in the engine."""
        answers = [
            (stored.num_prompt, stored.num_tokens)
            for stored in self._store.responses.of_sessions(tenant, [session])
            if stored.num_tokens <= len(tokens)
        ]

        def bring_back() -> Report:
            return self._store.warmth.restore(tokens, tenant, answers)

        start = time.perf_counter()
        report = await self._server.engine.call(bring_back)
        is_restored = bool(report.restored_from)
        return Warm(
            kv_tokens=report.kv_tokens,
            drafters=report.drafters,
            restored_from=report.restored_from or None,
            restore_ms=(time.perf_counter() - start) * 1000 if is_restored else 0.0,
            cold_reason=report.cold_reason or None,
        )

    async def _rebuild(self, tenant: str, tokens: tuple[int, ...], owner: str) -> int:
        call, warmth = self._server.engine.call, self._store.warmth
        num_wrong, done = await call(warmth.distrust, owner, tokens, tenant), 0
        while done < num_wrong:
            upto = await call(warmth.rebuild, owner, tokens, tenant, done)
            if upto == done:
                break
            done = upto
        return done

    async def rebuild(self, tenant: str, tokens: tuple[int, ...], drafter: str) -> int:
        """Forgets what is kept of a drafter's KV, and computes anew what is in the engine.

        Returns how many tokens that were. Requests go on between its passes.
        """
        warmth = self._store.warmth
        return sum([await self._rebuild(tenant, tokens, name) for name in warmth.owners(drafter)])

    async def prefill(self, tenant: str, tokens: tuple[int, ...]) -> None:
        """Computes the KV of a log by asking for one token that nobody reads."""
        sampling, plain = SamplingParams(max_tokens=1), SpeculationParams(method="off")
        async with self._server.gate.seat():
            generated = self._server.engine.generate(tokens, sampling, plain, tenant=tenant)
            async for _ in generated:
                pass

    def kind(self, drafter: str) -> str | None:
        """The class of a drafter's state: from what it can be rebuilt."""
        drafters = self._server.llm.engine.drafters
        return drafters[drafter].warmth.value if drafter in drafters else None

    def ready_upto(self, warm: Warm, drafter: str, num_tokens: int) -> int:
        """R0 is ready for all tokens; who composes others is as ready as the least of them."""
        if self.kind(drafter) == "R0":
            return num_tokens
        drafters = warm.drafters
        found = [drafters[drafter]] if drafter in drafters else drafters.values()
        return min((ready.ready_upto for ready in found), default=0)

    async def forget(self, tenant: str, session: str, keep: str | int | None = None) -> None:
        """What is kept of its logs, but for what another session's log begins with.

        Args:
            keep: a place in it whose log is to stay as well.
        """
        call, warmth = self._server.engine.call, self._store.warmth
        for tokens, num_shared in await self._store.call(
            self._store.log.ways, tenant, session, keep
        ):
            await call(warmth.forget, tokens, tenant, num_shared)

    def touch(self, tenant: str, session: str) -> None:
        """The session was used by this process: its answers are known to the drafters."""
        self._used.pop(session, None)
        self._used[session] = tenant
        if len(self._used) > MAX_USED:
            del self._used[next(iter(self._used))]

    def drop(self, session: str) -> None:
        """The session is gone."""
        self._used.pop(session, None)


def counts_of(by_drafter: Mapping[str, DrafterMetrics], method: str) -> dict[str, dict[str, Any]]:
    """What a turn adds to class S, by drafter.

    Args:
        method: the request's drafter. Where it drafts by others, it has their sum beside theirs.
    """
    found = dict(by_drafter)
    if by_drafter and method not in by_drafter:
        found[method] = sum(by_drafter.values(), DrafterMetrics())
    return {
        drafter: of_turn(each.num_drafts, each.tried, each.stood) for drafter, each in found.items()
    }


def accept(stats: Mapping[str, Any] | None) -> float | None:
    """Share of tried draft tokens that stood, over all temperatures; None if none is known."""
    tries = [bucket["tries"] for bucket in (stats or {}).values()]
    accepted = sum(each["accepted"] for each in tries)
    total = accepted + sum(each["rejected"] for each in tries)
    return accepted / total if total else None
