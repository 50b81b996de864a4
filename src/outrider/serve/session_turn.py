"""SessionTurn: one response of a session, from its claim to what is told of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from outrider.request import PastDrafts
from outrider.serve.session_canary import Alarm
from outrider.serve.session_warmth import Warm, Warmer, accept
from outrider.session.records import Head
from outrider.session.statistics import bucket_of
from outrider.stream.events import RequestMetrics


@dataclass(kw_only=True, eq=False)
class SessionTurn:
    """A response in the making.

    Attributes:
        base: the head that it follows. prompt: the whole log with the new input behind it.
        note: what the model knows of instructions and tools once it has read the prompt.
        stats: class S before the turn.
        maker: of the session before the turn.
        is_implicit: the session was made for responses that name none.
        alarm: what the canary found, filled in when the turn is finished.
    """

    tenant: str
    response_id: str
    session: str
    base: Head
    prompt: tuple[int, ...]
    note: Mapping[str, Any]
    warm: Warm
    stats: Mapping[str, Any]
    maker: str
    is_implicit: bool = False
    alarm: Alarm | None = None

    def ready_upto(self, warmer: Warmer, drafter: str) -> int:
        """Tokens of the log that a drafter had nothing to compute for when the turn began."""
        return warmer.ready_upto(self.warm, drafter, self.base.num_tokens)

    def experience(self, temperature: float) -> PastDrafts:
        """How drafts fared in the session so far, at about this temperature."""
        heat = bucket_of(temperature)
        found = {drafter: by_heat.get(heat) for drafter, by_heat in self.stats.items()}
        return {
            drafter: {"drafted": counts["drafted"], "accepted": counts["accepted"]}
            for drafter, counts in found.items()
            if counts
        }

    def report(self, warmer: Warmer, head: Head, metrics: RequestMetrics) -> dict[str, Any]:
        """`outrider.session` of the response: how warm it was, and where the session is now."""
        name, warm = metrics.drafter, self.warm
        spec = {
            "drafter": name or None,
            "class": warmer.kind(name),
            "ready_upto": self.ready_upto(warmer, name),
            "accept_prior": accept(self.stats.get(name)),
            **({"regression": self.alarm.as_dict()} if self.alarm is not None else {}),
        }
        return {
            "id": head.session,
            "head": head.id,
            "kv_hit_tokens": metrics.num_cached_tokens,
            "spec": spec,
            "restored_from": warm.restored_from,
            "restore_ms": round(warm.restore_ms, 3),
            **({"cold_reason": warm.cold_reason} if warm.cold_reason else {}),
        }
