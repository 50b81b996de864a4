"""Drawings: which figures tell the findings of each kind of result.

A finding that a figure wants and a result lacks leaves the figure out, never the report.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence as Items
from typing import Any, NamedTuple, TypeAlias

from outrider.bench import figures
from outrider.bench.figures import Estimate, Line
from outrider.bench.findings import (
    PREDICTIONS,
    RATIOS,
    Row,
    arm_of,
    base_of,
    cell_name,
    draft_length,
    ends,
    estimate,
    is_records,
    level_names,
    load_name,
    number,
    rows_of,
    unique,
)
from outrider.bench.result import Result

PERCENTILES = ("p50", "p90", "p95", "p99")
# Short name in vLLM's result keys -> how people say it.
LATENCIES = {
    "ttft": "Time to the first token",
    "tpot": "Time per token after the first",
    "itl": "Gap between chunks",
    "e2el": "Time to the whole answer",
}
ALSO_CALLED = {"itl": ("chunk_gap",), "e2el": ("e2e",)}


class Figure(NamedTuple):
    """A drawing; `name` is that of its file."""

    name: str
    caption: str
    svg: str


Draw: TypeAlias = Callable[[Result], Iterator[Figure]]


def draw(result: Result) -> list[Figure]:
    """All figures of a result; a kind without figures of its own has its histograms, if any."""
    return [figure for drawn in FIGURES.get(result.kind, (histograms,)) for figure in drawn(result)]


def arms(result: Result) -> Iterator[Figure]:
    """Arms against their base, the null arm among them and its noise behind."""
    rows = _ratios(result)
    if not rows:
        return
    null = result.findings.get("null")
    if isinstance(null, Mapping) and (found := estimate(null, "ratio")) is not None:
        rows[unique(rows, "null arm")] = found
    noise = [ends(pair.get("null_interval")) for pair in rows_of(result, "pairs")]
    band = next((Estimate(1.0, *one) for one in noise if one is not None), None)
    told = "Speed of each arm against the base arm, with 95 % intervals."
    if band is not None:
        told += " The grey band is the null arm: the base against itself."
    yield Figure("arms", told, figures.intervals(rows, unit="times as fast", null=band))


def arms_of_two(first: tuple[str, Result], other: tuple[str, Result]) -> Iterator[Figure]:
    """Arms of two runs by name, each against the base of its own run."""
    rows: dict[str, Estimate] = {}
    for name, result in (first, other):
        rows |= {f"{arm} ({name})": found for arm, found in _ratios(result).items()}
    if rows:
        told = "Speed of each arm against the base arm of its own run, with 95 % intervals."
        yield Figure("arms", told, figures.intervals(rows, unit="times as fast"))


def by_domain(result: Result) -> Iterator[Figure]:
    """Each arm's ratio in every domain, where prompts had some."""
    for pair in rows_of(result, "pairs"):
        rows: dict[str, Estimate] = {}
        for one in pair.get("domains") or ():
            if (found := estimate(one, "ratio")) is not None:
                rows[str(one.get("domain") or "none")] = found
        if len(rows) > 1:
            drawn = figures.intervals(rows, unit="times as fast")
            caption = f"{arm_of(pair)} against {base_of(pair)}, by domain of the prompts."
            yield Figure(f"domains {arm_of(pair)}", caption, drawn)


def histograms(result: Result) -> Iterator[Figure]:
    """Accepted tokens per drafted step, wherever the findings hold such a histogram."""
    found: dict[str, Items[int]] = {}
    for name, counts in _find_histograms(result.findings, ""):
        if sum(counts) and len(found) < figures.NUM_SERIES:
            found[unique(found, name)] = counts
    if found:
        unit = "% of steps with a draft"
        drawn = figures.histogram(found, x_label="accepted tokens", unit=unit)
        yield Figure("acceptance", "How many drafted tokens a step accepted.", drawn)


def sweep(result: Result) -> Iterator[Figure]:
    """Per method and temperature: the map of ratios, then the prediction against measurement."""
    groups: dict[str, list[Row]] = {}
    for cell in rows_of(result, "cells"):
        groups.setdefault(cell_name(cell), []).append(cell)
    for name, cells in groups.items():
        yield from _map(name, cells, _controller_path(result, name))
        yield from _agreement(name, cells)


def advice(result: Result) -> Iterator[Figure]:
    """The best of each drafter over the load: measured, and dashed what was predicted."""
    series: dict[str, dict[float, tuple[float | None, float | None]]] = {}
    for row in rows_of(result, "table"):
        parts = (row.get("drafter") or row.get("method"), row.get("draft_model"))
        found, x = estimate(row, *RATIOS), number(row, "concurrency")
        if x is not None:
            name = " of ".join(str(part) for part in parts if part) or "speculation"
            values = (found and found.value, number(row, *PREDICTIONS))
            series.setdefault(name, {})[x] = values
    curves: dict[str, Line] = {}
    for name, points in series.items():
        x_values = sorted(points)
        for told, i in ((name, 0), (f"{name}, predicted", 1)):
            y_values = [points[x][i] for x in x_values]
            if any(value is not None for value in y_values):
                curves[told] = Line(x_values, y_values, is_dashed=bool(i))
    if curves and len({x for points in series.values() for x in points}) > 1:
        labels = {"x_label": "concurrent requests", "y_label": "times plain decoding"}
        drawn = figures.lines(curves, **labels, is_log_x=True, baseline=1.0)
        yield Figure("advice", "Each drafter at its best K, by load; above 1 it pays.", drawn)


def load(result: Result) -> Iterator[Figure]:
    """Each latency by load, then latency against throughput over the loads."""
    levels = rows_of(result, "levels", "loads", "runs", "arms") or [result.findings]
    several = len({level.get("arm") for level in levels}) > 1
    yield from (_latencies_by_arm if several else _percentiles)(levels)
    yield from _trade(levels)


def _latencies_by_arm(levels: Items[Row]) -> Iterator[Figure]:
    """Arms beside each other at every load."""
    for short, told in LATENCIES.items():
        groups: dict[str, dict[str, Estimate]] = {}
        for position, level in enumerate(levels, start=1):
            middle, high = (_percentile(level, short, each) for each in ("p50", "p99"))
            if middle is not None:
                group = groups.setdefault(load_name(level) or f"load {position}", {})
                group[unique(group, str(level.get("arm") or "no arm"))] = Estimate(
                    middle, middle if high is not None else None, high
                )
        if groups:
            drawn = figures.bars(groups, unit="milliseconds")
            caption = f"{told}: median of each arm, and a line up to the 99th percentile."
            yield Figure(f"latency {short}", caption, drawn)


def _percentiles(levels: Items[Row]) -> Iterator[Figure]:
    """Of one arm, the loads beside each other at every percentile."""
    named = dict(zip(level_names(levels), levels, strict=True))
    for short, told in LATENCIES.items():
        groups = {each: _at_percentile(named, short, each) for each in PERCENTILES}
        if groups := {each: bars for each, bars in groups.items() if bars}:
            drawn = figures.bars(groups, unit="milliseconds")
            yield Figure(f"latency {short}", f"{told}: percentiles.", drawn)


def cost(result: Result) -> Iterator[Figure]:
    """Price per million by class and arm, and where the wall time of each arm went."""
    rows = rows_of(result, "classes")
    has_price = any(number(row, "dollars_per_million") is not None for row in rows)
    unit = "dollars" if has_price else "seconds"
    prices: dict[str, dict[str, Estimate]] = {}
    spent: dict[str, dict[str, float]] = {}
    for row in rows:
        arm = str(row.get("arm") or "wall time")
        name = str(row.get("class") or row.get("name")).removesuffix(f" ({arm})")
        price, seconds = number(row, f"{unit}_per_million"), number(row, "seconds")
        if price is not None:
            prices.setdefault(name, {})[arm] = Estimate(price)
        if seconds is not None:
            spent.setdefault(arm, {})[name] = seconds
    if prices:
        drawn = figures.bars(prices, unit=f"{unit} per million tokens")
        yield Figure("cost", "What a million tokens of each class costs.", drawn)
    for arm, idle in _idle(result).items():
        spent.get(arm, {})["idle"] = idle
    if spent:
        drawn = figures.stacked(spent, unit="seconds")
        yield Figure("seconds", "Where the wall time went.", drawn)


def _idle(result: Result) -> dict[str, float]:
    """Seconds that no class of tokens took, by arm."""
    of_all = number(result.findings, "idle_seconds")
    found = {} if of_all is None else {"wall time": of_all}
    for row in rows_of(result, "arms"):
        if (seconds := number(row, "idle_s", "idle_seconds")) is not None:
            found[arm_of(row)] = seconds
    return found


def replays(result: Result) -> Iterator[Figure]:
    """Tokens per call of each drafter, a figure per workload."""
    by_workload: dict[str, dict[str, Estimate]] = {}
    for row in rows_of(result, "results"):
        if (found := estimate(row, "tokens_per_call")) is not None:
            rows = by_workload.setdefault(str(row.get("workload") or "answers"), {})
            rows[unique(rows, str(row.get("name") or row.get("drafter")))] = found
    for workload, rows in by_workload.items():
        name = workload.replace("\\", "/").rpartition("/")[2]
        drawn = figures.intervals(rows, unit="tokens per call")
        caption = f"{name}: tokens per call of the target, with 95 % intervals over sessions."
        yield Figure(f"replay {name}", caption, drawn)


def passes(result: Result) -> Iterator[Figure]:
    """Milliseconds of a pass by its rows, a line per context, with the fit dashed."""
    by_context: dict[str, list[tuple[float, float, float | None]]] = {}
    for point in rows_of(result, "points", "timings"):
        rows, seconds = number(point, "rows", "num_rows", "num_tokens"), number(point, "seconds")
        if rows is not None and seconds is not None:
            name = f"context {point['context']}" if "context" in point else "pass"
            by_context.setdefault(name, []).append((rows, seconds, number(point, "fit", "fitted")))
    series: dict[str, Line] = {}
    for name, points in by_context.items():
        x, y, fit = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        series[name] = Line(x, [1e3 * seconds for seconds in y])
        if None not in fit:
            series[f"{name}, fit"] = Line(x, [1e3 * seconds for seconds in fit], is_dashed=True)
    if series:
        drawn = figures.lines(
            series, x_label="rows in the pass", y_label="milliseconds", is_log_x=True
        )
        yield Figure("passes", "What a pass costs by its number of rows.", drawn)


FIGURES: dict[str, tuple[Draw, ...]] = {
    "ab": (arms, by_domain, histograms),
    "sweep": (sweep, histograms),
    "load": (load, histograms),
    "cost": (cost, histograms),
    "calibrate": (passes,),
    "replay": (replays,),
    "advise": (advice, arms, sweep, histograms),
}


def _ratios(result: Result) -> dict[str, Estimate]:
    """By arm; "arms" hold them where there are no pairs."""
    rows: dict[str, Estimate] = {}
    held = rows_of(result, "pairs", "arms")
    for pair in held:
        if (found := estimate(pair, "ratio")) is not None:
            is_usual = base_of(pair) == base_of(held[0])
            name = arm_of(pair) if is_usual else f"{arm_of(pair)} over {base_of(pair)}"
            rows[unique(rows, name)] = found
    return rows


def _find_histograms(value: Any, name: str) -> Iterator[tuple[str, Items[int]]]:
    """Down the findings; a record's own name tells whose histogram it is."""
    if isinstance(value, Mapping):
        told = (value.get("name"), value.get("arm") if name == "levels" else None)
        own = ", ".join(str(part) for part in told if part)
        own = own or str(value.get("arm") or value.get("domain") or name)
        for key, inner in value.items():
            if "histogram" in key and _is_counts(inner):
                yield own or "all", inner
            else:
                yield from _find_histograms(inner, own if key in ABOUT else str(key))
    elif is_records(value):
        for position, one in enumerate(value):
            alone = "name" in one or not name
            yield from _find_histograms(one, name if alone else f"{name} {position + 1}")


# Keys that say what is inside, not whose it is.
ABOUT = ("acceptance", "metrics", "speculation", "speculative_decoding")


def _is_counts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(count, int) for count in value)


def _map(name: str, cells: list[Row], path: Mapping[float, float]) -> Iterator[Figure]:
    measured, predicted = {}, {}
    for cell in cells:
        x, k = number(cell, "concurrency"), draft_length(cell)
        found, guess = estimate(cell, *RATIOS), number(cell, *PREDICTIONS)
        if x is not None and k is not None and (found is not None or guess is not None):
            measured[x, k] = found or Estimate(float("nan"))
            if guess is not None:
                predicted[x, k] = guess
    if measured:
        labels = {"x_label": "concurrent requests", "y_label": "drafted tokens K"}
        drawn = figures.heat_map(measured, **labels, predicted=predicted, path=path)
        told = [f"{name}: times as fast as plain decoding, measured (pale where 1 lies inside its"]
        told += ["interval) over predicted; the lines are break-even, measured solid and predicted"]
        told += ["dashed" + ("; blue is what the controller chose." if path else ".")]
        yield Figure(f"sweep {name}", " ".join(told), drawn)


def _agreement(name: str, cells: list[Row]) -> Iterator[Figure]:
    """Measured against predicted, cell by cell, by draft length."""
    points: dict[float, list[tuple[float, float]]] = {}
    for cell in cells:
        k, guess, found = draft_length(cell), number(cell, *PREDICTIONS), estimate(cell, *RATIOS)
        if k is not None and guess is not None and found is not None:
            points.setdefault(k, []).append((guess, found.value))
    if points:
        series = {f"K={k:g}": points[k] for k in sorted(points)}
        drawn = figures.agreement(series, x_label="predicted", y_label="measured")
        caption = f"{name}: each cell measured against its prediction; the band is 15 % off."
        yield Figure(f"predicted {name}", caption, drawn)


def _controller_path(result: Result, name: str) -> dict[float, float]:
    """Mean draft length that the controller chose, by concurrency."""
    path = {}
    for point in rows_of(result, "controller", "path"):
        x, k = number(point, "concurrency"), draft_length(point)
        if x is not None and k is not None and cell_name(point) in (name, "all"):
            path[x] = k
    return path


def _at_percentile(levels: Mapping[str, Row], short: str, percentile: str) -> dict[str, Estimate]:
    found = {name: _percentile(level, short, percentile) for name, level in levels.items()}
    return {name: Estimate(value) for name, value in found.items() if value is not None}


def _percentile(level: Row, short: str, percentile: str) -> float | None:
    """From {"ttft_ms": {"p50": ...}} or from vLLM's flat keys (median_ttft_ms, p99_ttft_ms)."""
    names = ["median", percentile] if percentile == "p50" else [percentile]
    for called in (short, *ALSO_CALLED.get(short, ())):
        held = level.get(f"{called}_ms", level.get(called))
        flat = number(level, *(f"{name}_{called}_ms" for name in names))
        found = number(held, *names) if isinstance(held, Mapping) else flat
        if found is not None:
            return found
    return None


def _trade(levels: Items[Row]) -> Iterator[Figure]:
    """What one user gets against what the machine gives: a line per arm, a point per load."""
    points: dict[str, list[tuple[float, float]]] = {}
    for level in levels:
        x = number(level, "output_throughput", "tokens_per_second")
        y = _percentile(level, "tpot", "p50")
        if x is not None and y:
            points.setdefault(str(level.get("arm") or "measured"), []).append((x, 1e3 / y))
    series = {
        name: Line([x for x, _ in sorted(own)], [y for _, y in sorted(own)])
        for name, own in points.items()
        if len(own) > 1
    }
    if series:
        x_label, y_label = (
            f"tokens per second, {whose}" for whose in ("all requests", "one of them")
        )
        drawn = figures.lines(series, x_label=x_label, y_label=y_label)
        yield Figure("trade", "What one user gets against what the machine gives.", drawn)
