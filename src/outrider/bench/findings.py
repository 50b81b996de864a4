"""Findings: how the readers of a result find a ratio, its interval and its names in any kind.

Commands write what is natural to them; here is the one place that knows in which spellings.
"""

from collections.abc import Mapping, Sequence as Items
from typing import Any, TypeAlias

from outrider.bench.figures import Estimate
from outrider.bench.result import Result

Row: TypeAlias = Mapping[str, Any]

RATIOS = ("ratio", "speedup", "measured")
PREDICTIONS = ("predicted", "predicted_speedup", "predicted_ratio", "prediction")
DRAFT_LENGTHS = ("num_draft_tokens", "k", "K", "mean_draft_tokens")
# What tells records of a list apart.
IDENTITY = (
    *("name", "arm", "arms", "base", "class", "level", "drafter", "method", "domain"),
    *("temperature", "context", "concurrency", "request_rate", "num_draft_tokens", "k"),
)


def rows_of(result: Result, *names: str) -> list[Row]:
    """The first of these findings that is a list of records."""
    for name in names:
        held = result.findings.get(name)
        if is_records(held):
            return list(held)  # type: ignore[arg-type]
    return []


def is_records(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping)


def number(row: Row, *names: str) -> float | None:
    """The first of these that is a number."""
    for name in names:
        value = row.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None


def estimate(row: Row, *names: str) -> Estimate | None:
    """A value and its interval: beside it as [low, high], as `low` and `high`, or inside it."""
    for name in names:
        held = row.get(name)
        if isinstance(held, Mapping):
            return estimate(held, "ratio", "value")
        if (value := number(row, name)) is not None:
            return Estimate(value, *(ends(row.get("interval")) or _low_and_high(row)))
    return None


def ends(held: Any) -> tuple[float, float] | None:
    """Of an interval [low, high]."""
    if isinstance(held, list | tuple) and len(held) == 2 and None not in held:
        return float(held[0]), float(held[1])
    return None


def arm_of(pair: Row) -> str:
    return _of_pair(pair, "arm", 1) or str(pair.get("name") or "the arm")


def base_of(pair: Row) -> str:
    return _of_pair(pair, "base", 0) or "the base arm"


def draft_length(row: Row) -> float | None:
    """K of a cell, whether it stands there or in the settings of its arm."""
    found = number(row, *DRAFT_LENGTHS)
    inside = row.get("speculation")
    if found is None and isinstance(inside, Mapping):
        return number(inside, "num_draft_tokens", "num_speculative_tokens")
    return found


def cell_name(cell: Row) -> str:
    """Whatever tells cells apart besides concurrency and draft length."""
    told = [str(cell[key]) for key in ("drafter", "method", "domain") if cell.get(key)]
    numbers = {key: number(cell, key) for key in ("temperature", "context")}
    told += [f"{key} {value:g}" for key, value in numbers.items() if value is not None]
    return ", ".join(told) or "all"


def level_names(levels: Items[Row]) -> list[str]:
    """What the loads of one arm are called, each differently."""
    found: dict[str, None] = {}
    for position, level in enumerate(levels, start=1):
        found[unique(found, load_name(level) or f"load {position}")] = None
    return list(found)


def unique(taken: Mapping[str, Any], name: str) -> str:
    """The name, numbered if it is taken."""
    count, found = 1, name
    while found in taken:
        count += 1
        found = f"{name} ({count})"
    return found


def load_name(level: Row) -> str:
    """Of a load, whoever answered it; "" where nothing tells."""
    if level.get("name"):
        return str(level["name"])
    for key, told in (("concurrency", "concurrency "), ("request_rate", "requests/s ")):
        if (value := number(level, key)) is not None:
            return f"{told}{value:g}"
    return ""


def _low_and_high(row: Row) -> tuple[float | None, float | None]:
    return number(row, "low"), number(row, "high")


def _of_pair(pair: Row, key: str, position: int) -> str:
    arms = pair.get("arms")
    held = arms[position] if isinstance(arms, list | tuple) else pair.get(key, "")
    return str(held.get("name", "") if isinstance(held, Mapping) else held)
