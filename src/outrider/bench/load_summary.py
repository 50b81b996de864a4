"""Summary of a load: what users waited, and what the machine gave.

Figures carry the names of vLLM's `bench serve`, so that scripts read both.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence as Items
from typing import Any

import numpy as np

from outrider.bench.histogram import total
from outrider.bench.load import Measured
from outrider.bench.target import Arm, Reply
from outrider.errors import ConfigError

PERCENTILES = (50, 90, 95, 99)
SYNTHETIC = "synthetic"  # the verifier
MAX_TOLD_ERRORS = 8

# Limits of MLPerf Inference, milliseconds at the 99th percentile.
SLOS: Mapping[str, Mapping[str, float]] = {
    "llama2-70b": {"ttft": 2000, "tpot": 200},
    "llama2-70b-interactive": {"ttft": 450, "tpot": 40},
    "llama3.1-8b": {"ttft": 2000, "tpot": 100},
    "llama3.1-8b-interactive": {"ttft": 500, "tpot": 30},
    "llama3.1-405b": {"ttft": 6000, "tpot": 175},
    "deepseek-r1": {"ttft": 2000, "tpot": 80},
    "deepseek-r1-interactive": {"ttft": 1500, "tpot": 15},
}


def summary(measured: Measured, slo: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Figures of one level, times in milliseconds.

    Args:
        slo: most milliseconds of "ttft", "tpot" and "e2el" for a request that counts as good.
    """
    replies, level = measured.replies, measured.level
    good = [reply for reply in replies if not reply.error]
    duration = max((r.last_s or r.sent_s for r in replies), default=0.0)
    num_in, num_out = (
        sum(getattr(r, n) for r in good) for n in ("num_prompt_tokens", "num_tokens")
    )
    return {
        "name": level.name,
        "arm": measured.arm.name,
        "request_rate": level.rate,
        "offered_rate": offered(replies) if level.is_open else None,
        "concurrency": level.concurrency if level.habits is None else level.habits.num_users,
        "stopped": measured.stopped,
        "saturated": measured.is_saturated,
        "too_short": measured.is_short,
        "num_prompts": len(replies),
        "completed": len(good),
        "failed": len(replies) - len(good),
        "errors": errors(replies),
        "duration": duration,
        "total_input_tokens": num_in,
        "total_output_tokens": num_out,
        "total_cached_tokens": sum(r.num_cached_tokens for r in good),
        "request_throughput": _per_second(len(good), duration),
        "output_throughput": _per_second(num_out, duration),
        "total_token_throughput": _per_second(num_in + num_out, duration),
        "max_output_tokens_per_s": busiest_second(good),
        "max_concurrent_requests": most_in_flight(good),
        **_latencies(good),
        **_acceptance(measured, good),
        **(goodput(replies, slo, duration) if slo else {}),
    }


def offered(replies: Items[Reply]) -> float | None:
    """Requests per second as they came in an open loop: a few draws miss their mean."""
    last_s = max((reply.ask.at_s for reply in replies), default=0.0)
    return len(replies) / last_s if last_s > 0 and len(replies) > 1 else None


def goodput(replies: Items[Reply], slo: Mapping[str, float], duration: float) -> dict[str, Any]:
    """What was within the limits; an answer that failed is not.

    `slo_met` asks for the 99th percentile of each within its limit, and no failure.
    """
    good = [reply for reply in replies if not reply.error]
    within = [reply for reply in good if is_within(reply, slo)]
    values = _values(good)
    is_met = len(good) == len(replies) and all(
        values[name] and float(np.percentile(values[name], 99)) <= limit
        for name, limit in slo.items()
    )
    return {
        "slo": dict(slo),
        "slo_met": is_met,
        "slo_attainment": len(within) / len(replies) if replies else 0.0,
        "request_goodput": _per_second(len(within), duration),
        "output_goodput": _per_second(sum(reply.num_tokens for reply in within), duration),
    }


def is_within(reply: Reply, slo: Mapping[str, float]) -> bool:
    """Whether it kept each limit that it has a time for."""
    times = {"ttft": reply.ttft_s, "tpot": reply.tpot_s, "e2el": reply.e2e_s}
    return all(1e3 * (times[name] or 0.0) <= limit for name, limit in slo.items())


def read_slo(texts: Items[str]) -> dict[str, float]:
    """From "ttft:500" (milliseconds), "tpot:30", "e2el:20000", or a name in `SLOS`."""
    found: dict[str, float] = {}
    for text in texts:
        name, _, limit = text.partition(":")
        if not limit and name in SLOS:
            found |= SLOS[name]
        elif name in ("ttft", "tpot", "e2el") and _is_positive(limit):
            found[name] = float(limit)
        else:
            raise ConfigError(
                f"--slo {text!r}: give ttft:MS, tpot:MS, e2el:MS, or one of {', '.join(SLOS)}"
            )
    return found


def errors(replies: Items[Reply]) -> dict[str, int]:
    """How often each, the most frequent ones."""
    counts = Counter(reply.error for reply in replies if reply.error)
    return dict(counts.most_common(MAX_TOLD_ERRORS))


def busiest_second(replies: Items[Reply]) -> float:
    """Most tokens within one second of the clock; a chunk's tokens are taken to be equally many."""
    counts: dict[int, float] = {}
    for reply in replies:
        share = reply.num_tokens / max(1, len(reply.chunk_s))
        for at_s in reply.chunk_s:
            counts[int(at_s)] = counts.get(int(at_s), 0.0) + share
    return max(counts.values(), default=0.0)


def most_in_flight(replies: Items[Reply]) -> int:
    """Most requests that were sent and not yet answered."""
    changes = [(reply.sent_s, 1) for reply in replies]
    changes += [(reply.last_s or reply.sent_s, -1) for reply in replies]
    count = most = 0
    for _, change in sorted(changes):  # at one moment, who leaves leaves first
        count += change
        most = max(most, count)
    return most


def blocks(measured: Measured) -> list[dict[str, Any]]:
    """Every request, from which the figures can be computed again."""
    return [
        {
            "question": reply.ask.question.id,
            "domain": reply.ask.question.domain,
            "due_s": round(reply.due_s, 6),
            "sent_s": round(reply.sent_s, 6),
            "first_s": _rounded(reply.first_s),
            "last_s": _rounded(reply.last_s),
            "num_prompt_tokens": reply.num_prompt_tokens,
            "num_cached_tokens": reply.num_cached_tokens,
            "num_tokens": reply.num_tokens,
            "num_chunks": len(reply.chunk_s),
            "finish_reason": reply.finish_reason,
            "acceptance": reply.acceptance,
            **({"error": reply.error} if reply.error else {}),
        }
        for reply in measured.replies
    ]


def _values(replies: Items[Reply]) -> dict[str, list[float]]:
    """Milliseconds by latency; `lag` is how late the client sent, where requests had their time."""
    times: dict[str, Items[float | None]] = {
        "ttft": [reply.ttft_s for reply in replies],
        "tpot": [reply.tpot_s for reply in replies],
        "e2el": [reply.e2e_s for reply in replies],
        "itl": list(_gaps(replies)),
        "lag": [reply.sent_s - reply.due_s for reply in replies if reply.ask.at_s],
    }
    return {name: [1e3 * s for s in found if s is not None] for name, found in times.items()}


def _gaps(replies: Items[Reply]) -> Iterator[float]:
    """Between chunks, which hold one token or several."""
    for reply in replies:
        yield from np.diff(reply.chunk_s).tolist()


def _latencies(replies: Items[Reply]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, values in _values(replies).items():
        told = np.asarray(values, dtype=float)
        found[f"mean_{name}_ms"] = float(told.mean()) if values else None
        found[f"median_{name}_ms"] = float(np.median(told)) if values else None
        found[f"std_{name}_ms"] = float(told.std()) if values else None
        for percentile in PERCENTILES:
            value = float(np.percentile(told, percentile)) if values else None
            found[f"p{percentile}_{name}_ms"] = value
    num_chunks = sum(len(reply.chunk_s) for reply in replies)
    num_tokens = sum(reply.num_tokens for reply in replies)
    return {**found, "mean_tokens_per_chunk": num_tokens / num_chunks if num_chunks else None}


def _acceptance(measured: Measured, good: Items[Reply]) -> dict[str, Any]:
    """Of the requests themselves where they tell it, else of the target's counters."""
    if measured.level.is_filler and not _is_synthetic(measured.arm):
        return {"spec_decode_source": None, "spec_decode_withheld": "prompts are filler"}
    found, source = total(reply.acceptance for reply in good), "requests"
    if found is None:
        found, source = measured.counted, "counters"
    if found is None or not found.num_drafts:
        return {"spec_decode_source": source if found else None, "spec_decode_num_drafts": 0}
    drafted = found.num_draft_tokens
    beyond = [sum(found.histogram[i:]) for i in range(1, len(found.histogram))]
    return {
        "spec_decode_source": source,
        "spec_decode_acceptance_rate": 100 * found.num_accepted_tokens / drafted if drafted else 0,
        "spec_decode_acceptance_length": found.acceptance_length,
        "spec_decode_num_drafts": found.num_drafts,
        "spec_decode_draft_tokens": drafted,
        "spec_decode_accepted_tokens": found.num_accepted_tokens,
        "spec_decode_per_position_acceptance_rates": [count / found.num_drafts for count in beyond],
        "acceptance": found,
    }


def _is_synthetic(arm: Arm) -> bool:
    """Whether the acceptance is made up anyway."""
    return arm.speculation is not None and arm.speculation.verifier == SYNTHETIC


def _per_second(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _is_positive(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False
