"""What a session looks like from outside: in a list, by itself, and after a call that moved it."""

from collections.abc import Mapping
from typing import Any

from outrider.engine.warmth import State
from outrider.serve.session_warmth import Warm, accept
from outrider.session.records import Head, Session


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


def created(head: Head) -> dict[str, Any]:
    """Where a session is after a call that moved it."""
    return {
        "id": head.session,
        "object": "session",
        "head": head.id,
        "n_tokens": head.num_tokens,
    }


def restored(head: Head, warm: Warm) -> dict[str, Any]:
    """How warm a session is that a snapshot has become."""
    return {
        "id": head.session,
        "head": head.id,
        "kv_hit_tokens": warm.kv_tokens,
        "spec": {
            name: {"class": ready.warmth, "ready_upto": ready.ready_upto}
            for name, ready in warm.drafters.items()
        },
        "restored_from": warm.restored_from,
        "restore_ms": round(warm.restore_ms, 3),
        "cold_reason": warm.cold_reason,
    }


def warmth_of(state: State, stats: Mapping[str, Any], holder: str | None) -> dict[str, Any]:
    """How warm a session is at this moment, and who writes to it."""
    spec = {
        name: {
            "class": ready.warmth,
            "ready_upto": ready.ready_upto,
            "accept_post": accept(stats.get(name)),
        }
        for name, ready in state.drafters.items()
    }
    warm = "warm" if any(state.tiers.values()) else "cold"
    return {
        "state": warm if holder is None else "live",
        "kv_tokens": state.kv_tokens,
        "tiers": dict(state.tiers),
        "spec": spec,
        "response_in_progress": holder,
    }
