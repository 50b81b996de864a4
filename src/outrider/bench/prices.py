"""Prices: seconds and dollars per million prompt, cached and output tokens, from a bill."""

from collections.abc import Iterator, Sequence as Items
from typing import Any

from outrider.bench.cost import Bill, Plan
from outrider.bench.meter import CACHED, CLASSES, OUTPUT, PROMPT

HOUR_S = 3600.0
MILLION = 1e6


def findings(bills: Items[Bill], plan: Plan) -> dict[str, Any]:
    """For `Result.findings`."""
    idle = [bill.idle_s for bill in bills if bill.idle_s is not None]
    return {
        "summary": summary(bills, plan),
        "dollars_per_hour": plan.dollars_per_hour,
        "classes": [
            record for bill in bills for record in prices(bill, plan, is_only=len(bills) == 1)
        ],
        "idle_seconds": sum(idle) if idle else None,
        "arms": [totals(bill, plan) for bill in bills],
    }


def prices(bill: Bill, plan: Plan, *, is_only: bool = True) -> Iterator[dict[str, Any]]:
    """One record per class: what a million of its tokens costs.

    Three prices: of the seconds it took; with the idle time of this run laid on top in proportion;
    and that again over the tokens within the latency limits only, where there are any. Without a
    price of the machine they are None, but for the last, which is in seconds then.

    Args:
        is_only: no other arm stands beside it, so the class alone is name enough.
    """
    price = plan.dollars_per_hour
    per_s = 1.0 if price is None else price / HOUR_S
    busy_s = sum(bill.seconds.values())
    laid_on = bill.wall_s / busy_s if busy_s else 1.0
    for name in CLASSES:
        seconds, tokens = bill.seconds[name], bill.tokens[name]
        spent = seconds * per_s
        yield {
            "class": name if is_only else f"{name} ({bill.arm})",
            "arm": bill.arm,
            "tokens": tokens,
            "seconds": seconds,
            "seconds_per_million": _per_million(seconds, tokens),
            "seconds_with_idle": _per_million(seconds * laid_on, tokens),
            "dollars_per_million": None if price is None else _per_million(spent, tokens),
            "with_idle": None if price is None else _per_million(spent * laid_on, tokens),
            "within_slo": _per_million(spent * laid_on, bill.tokens_in_slo[name])
            if plan.slo.is_set
            else None,
        }


def totals(bill: Bill, plan: Plan) -> dict[str, Any]:
    """An arm in one record: the blended price with its ratio of input to output, energy."""
    price = plan.dollars_per_hour
    dollars = None if price is None else bill.wall_s * price / HOUR_S
    num_in = bill.tokens[PROMPT] + bill.tokens[CACHED]
    num_out, joules = bill.tokens[OUTPUT], bill.joules
    return {
        "name": bill.arm,
        "method": bill.method,
        "wall_s": bill.wall_s,
        "idle_s": bill.idle_s,
        "utilisation": bill.utilisation,
        "dollars": dollars,
        "blended_seconds_per_million": _per_million(bill.wall_s, num_in + num_out),
        "blended_dollars_per_million": None
        if dollars is None
        else _per_million(dollars, num_in + num_out),
        "input_to_output": num_in / num_out if num_out else None,
        "cached_share_of_input": bill.tokens[CACHED] / num_in if num_in else None,
        "output_tokens_per_second": num_out / bill.wall_s if bill.wall_s else None,
        "acceptance_length": bill.acceptance_length,
        "num_answers": bill.num_answers,
        "num_in_slo": bill.num_in_slo if plan.slo.is_set else None,
        "num_failed": bill.num_failed,
        "first_error": bill.first_error,
        "power_valid": bill.power_valid,
        "power_why_not": bill.power_why_not,
        "joules": joules,
        "joules_per_query": _each(joules, bill.num_answers),
        "joules_per_input_token": _each(joules, num_in),
        "joules_per_output_token": _each(joules, num_out),
        "joules_per_token": _each(joules, num_in + num_out),
        "fit": None if bill.fit is None else bill.fit._asdict(),
    }


def summary(bills: Items[Bill], plan: Plan) -> str:
    """The price of output by arm, and how busy the machine was meanwhile."""
    told, is_priced = [], plan.dollars_per_hour is not None
    key, unit = ("with_idle", "$") if is_priced else ("seconds_with_idle", "seconds")
    for bill in bills:
        (output,) = (one for one in prices(bill, plan) if one["class"] == OUTPUT)
        price, busy = output[key], bill.utilisation
        told.append(
            f"{bill.arm}: "
            + ("no output" if price is None else f"{price:.4g} {unit} per million output tokens")
            + (
                " (idle time not to be seen)"
                if busy is None
                else f" (utilisation {100 * busy:.0f} %)"
            )
        )
    if not is_priced:
        return f"{'; '.join(told)}. Dollars are told by --dollars-per-hour."
    return f"At {plan.dollars_per_hour:g} $ an hour: {'; '.join(told)}."


def _per_million(dollars: float, tokens: int) -> float | None:
    return dollars / tokens * MILLION if tokens else None


def _each(joules: float | None, count: int) -> float | None:
    return joules / count if joules is not None and count else None
