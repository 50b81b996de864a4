"""Figures: data into SVG whose colours the page chooses, so that one drawing is light and dark.

matplotlib draws with stand-ins, one odd colour per part; in the text of the SVG each becomes a CSS
variable. What a figure shows is told by its arguments: none of them knows a kind of result.
"""

import io
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence as Items
from types import TracebackType
from typing import Any, NamedTuple

from outrider.errors import ConfigError

# CSS variable -> its value on light and on dark paper. The series are told apart by eyes of all
# kinds (after Okabe and Ito 2008).
COLOURS: dict[str, tuple[str, str]] = {
    "ink": ("#1a1f26", "#e7eaee"),
    "muted": ("#55606d", "#a6b0bc"),
    "line": ("#d5dae1", "#323a45"),
    "paper": ("#ffffff", "#1a1f26"),
    "good": ("#00694f", "#58d6ad"),
    "bad": ("#b3400a", "#ffaa70"),
    "series-0": ("#0b5cad", "#86b9ff"),
    "series-1": ("#c4660c", "#ffb066"),
    "series-2": ("#00795b", "#58d6ad"),
    "series-3": ("#8a3c86", "#e3a3df"),
    "series-4": ("#8a7a00", "#e0d060"),
    "series-5": ("#55606d", "#a6b0bc"),
}
NUM_SERIES = 6
STAND_INS = {name: f"#0{i:x}0b0{i:x}" for i, name in enumerate(COLOURS)}
WIDTH = 6.4  # inches of 72 points; the page scales it
MARKERS = "osD^vP"
LEGEND_MARK, LEGEND_CHARACTER, LEGEND_ROW = 0.6, 0.075, 0.21  # inches
LEGEND_SHARE = 0.9  # of the width
LONGEST_LABEL = 34  # characters of a row's name before it is cut


class Estimate(NamedTuple):
    """A value and its interval; ends are None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None


class Line(NamedTuple):
    """Points of one series, from left to right; a None is a gap. A dashed one is a prediction."""

    x: Items[float]
    y: Items[float | None]
    is_dashed: bool = False


def intervals(
    rows: Mapping[str, Estimate], *, unit: str, null: Estimate | None = None, baseline: float = 1.0
) -> str:
    """A row each, with its interval; behind them, as a band, what noise alone gives."""
    with (canvas := _Canvas(0.9 + 0.46 * len(rows))) as axes:
        if null is not None and null.low is not None and null.high is not None:
            axes.axvspan(null.low, null.high, color=_colour("muted"), alpha=0.22, lw=0)
        axes.axvline(baseline, color=_colour("ink"), lw=1)
        for at, row in enumerate(rows.values()):
            _interval(axes, at, row, _colour(_direction(row, baseline)))
        axes.set_yticks(range(len(rows)), [_cut(name) for name in rows])
        axes.set_ylim(len(rows) - 0.5, -0.8)
        axes.set_xlabel(unit)
        axes.grid(axis="x")
    return canvas.svg


def heat_map(
    cells: Mapping[tuple[float, float], Estimate],
    *,
    x_label: str,
    y_label: str,
    predicted: Mapping[tuple[float, float], float] | None = None,
    path: Mapping[float, float] | None = None,
) -> str:
    """Ratios over (x, y): one colour above 1, another below, the contour where the ratio is 1.

    A number is pale where its interval holds 1. What was predicted stands small below it (a cell
    of value nan has nothing else), and its contour is dashed. `path` is a y for every x; where it
    goes below all cells there is a row 0 for it.
    """
    xs, rows = (sorted({key[i] for key in cells}) for i in (0, 1))
    ys = [0.0, *rows] if path and min(path.values()) < rows[0] else rows
    guesses = predicted or {}
    with (canvas := _Canvas(1.1 + 0.5 * len(ys))) as axes:
        logs = [abs(_log(cell.value)) for cell in cells.values() if cell.value > 0]
        for (x, y), cell in cells.items():
            spread = max(logs, default=0.0) or 1.0
            _cell(axes, xs.index(x), ys.index(y), cell, guesses.get((x, y)), spread)
        first = len(ys) - len(rows)
        found = {key: cell.value for key, cell in cells.items()}
        _contour(axes, found, xs, rows, "solid", first)
        if predicted:
            _contour(axes, predicted, xs, rows, "dashed", first)
        if path:
            at = [(xs.index(x), _between(ys, y)) for x, y in sorted(path.items()) if x in xs]
            axes.plot(*zip(*at, strict=True), color=_colour("series-0"), lw=2, marker="o", ms=5)
        axes.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
        axes.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
        axes.set_xlim(-0.5, len(xs) - 0.5)
        axes.set_ylim(-0.5, len(ys) - 0.5)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
    return canvas.svg


def lines(
    series: Mapping[str, Line],
    *,
    x_label: str,
    y_label: str,
    is_log_x: bool = False,
    baseline: float | None = None,
) -> str:
    """Curves over a common axis; ticks stand where there are points if these are few and whole.

    A dashed curve "NAME, ..." looks like the curve NAME, if there is one.
    """
    with (canvas := _Canvas(3.1)) as axes:
        if baseline is not None:
            axes.axhline(baseline, color=_colour("ink"), lw=1)
        looks = {name: i for i, name in enumerate(_without_guesses(series))}
        for name, line in series.items():
            own = name.rpartition(", ")[0] if line.is_dashed else name
            _line(axes, looks.get(own, looks.get(name, 0)), name, line)
        if is_log_x:
            axes.set_xscale("log", base=2)
            axes.minorticks_off()
        places = sorted({x for line in series.values() for x in line.x})
        if len(places) <= 10 and all(float(x).is_integer() for x in places):
            axes.set_xticks(places, [f"{x:g}" for x in places])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(axis="y")
        _legend(axes, list(series))
    return canvas.svg


def agreement(
    series: Mapping[str, Items[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    tolerance: float = 0.15,
) -> str:
    """Points (x, y) that should lie on the diagonal, and a band of so much off it."""
    values = [value for points in series.values() for point in points for value in point]
    low, high = 0.95 * min(values), 1.05 * max(values)
    with (canvas := _Canvas(3.6)) as axes:
        edges = [[share * end for end in (low, high)] for share in (1 - tolerance, 1 + tolerance)]
        axes.fill_between([low, high], *edges, color=_colour("muted"), alpha=0.15, lw=0)
        axes.plot([low, high], [low, high], color=_colour("ink"), lw=1)
        for i, (name, points) in enumerate(series.items()):
            look = {"color": _series(i), "marker": MARKERS[i % len(MARKERS)], "ms": 5.5, "ls": ""}
            axes.plot(*zip(*points, strict=True), label=_cut(name), **look)
        axes.set_xlim(low, high)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid()
        _legend(axes, list(series))
    return canvas.svg


def bars(groups: Mapping[str, Mapping[str, Estimate]], *, unit: str, x_label: str = "") -> str:
    """Bars by group and series, with their intervals."""
    series = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / max(1, len(series))
    with (canvas := _Canvas(2.7)) as axes:
        for i, name in enumerate(series):
            at = [(j, group[name]) for j, group in enumerate(groups.values()) if name in group]
            places = [j + (i - (len(series) - 1) / 2) * width for j, _ in at]
            heights = [bar.value for _, bar in at]
            axes.bar(places, heights, 0.92 * width, color=_series(i), label=_cut(name))
            for place, (_, bar) in zip(places, at, strict=True):
                if bar.low is not None and bar.high is not None:
                    axes.plot([place] * 2, [bar.low, bar.high], color=_colour("ink"), lw=1.2)
        turned = sum(map(len, groups)) > 70
        axes.set_xticks(range(len(groups)), list(groups), rotation=30 if turned else 0)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(unit)
        axes.set_xlabel(x_label)
        axes.grid(axis="y")
        if len(series) > 1:
            _legend(axes, list(series))
    return canvas.svg


def stacked(groups: Mapping[str, Mapping[str, float]], *, unit: str) -> str:
    """One lying bar per group, cut into its parts."""
    parts = list(dict.fromkeys(name for group in groups.values() for name in group))
    with (canvas := _Canvas(1.2 + 0.45 * len(groups))) as axes:
        left = [0.0] * len(groups)
        for i, part in enumerate(parts):
            sizes = [group.get(part, 0.0) for group in groups.values()]
            axes.barh(
                range(len(groups)), sizes, 0.62, left=left, color=_series(i), label=_cut(part)
            )
            left = [start + size for start, size in zip(left, sizes, strict=True)]
        axes.set_yticks(range(len(groups)), [_cut(name) for name in groups])
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.set_xlabel(unit)
        axes.grid(axis="x")
        _legend(axes, parts)
    return canvas.svg


def histogram(counts: Mapping[str, Items[int]], *, x_label: str, unit: str) -> str:
    """Shares in percent by whole number from 0, the series side by side."""
    groups: dict[str, dict[str, Estimate]] = {}
    for j in range(max(map(len, counts.values()))):
        groups[str(j)] = {
            name: Estimate(100 * numbers[j] / (sum(numbers) or 1))
            for name, numbers in counts.items()
            if j < len(numbers)
        }
    return bars(groups, unit=unit, x_label=x_label)


def variables(*, is_dark: bool) -> str:
    """CSS declarations of all colours."""
    return " ".join(f"--{name}: {pair[is_dark]};" for name, pair in COLOURS.items())


def with_names(svg: str, prefix: str) -> str:
    """With this before every name inside, so that figures on one page do not share any."""
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", svg)


def standalone(svg: str) -> str:
    """A figure as a file of its own, with the colours that it takes from a page otherwise."""
    style = (
        f"<style>svg {{ {variables(is_dark=False)} background: var(--paper); }} "
        f"@media (prefers-color-scheme: dark) {{ svg {{ {variables(is_dark=True)} }} }}</style>"
    )
    head, rest = svg.split(">", 1)
    return f"{head}>{style}{rest}\n"


class _Canvas:
    """Axes to draw on, and what was drawn, once it is closed; matplotlib's globals stay as is."""

    def __init__(self, height: float) -> None:
        try:
            from matplotlib import rc_context
            from matplotlib.figure import Figure
        except ImportError:
            raise ConfigError(
                "plots need matplotlib, which is not installed: pip install 'outrider[bench]'"
            ) from None
        self.svg = ""
        self._settings = rc_context(SETTINGS)
        self._figure, self._height = Figure, height

    def __enter__(self) -> Any:
        self._settings.__enter__()
        self._drawn = self._figure(figsize=(WIDTH, self._height), layout="constrained")
        axes = self._drawn.add_subplot()
        axes.set_axisbelow(True)
        return axes

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                out = io.StringIO()
                nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
                self._drawn.savefig(out, format="svg", metadata=nothing)
                self.svg = _for_a_page(out.getvalue())
        finally:
            self._settings.__exit__(kind, error, trace)


def _for_a_page(svg: str) -> str:
    """An element: no fixed size, variables for colours, text in its font."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    for name, colour in STAND_INS.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace("<svg ", '<svg class="figure" stroke-linejoin="round" ', 1)
    return re.sub(r"'?DejaVu Sans'?(, [^;\"]*)?", "system-ui, sans-serif", svg)


def _interval(axes: Any, at: int, row: Estimate, colour: str) -> None:
    if row.low is not None and row.high is not None:
        axes.plot([row.low, row.high], [at, at], color=colour, lw=2.5, solid_capstyle="butt")
    axes.plot([row.value], [at], "o", color=colour, ms=7)
    where = {"textcoords": "offset points", "ha": "center", "color": _colour("ink"), "fontsize": 9}
    axes.annotate(f"{row.value:.3f}", (row.value, at), (0, 7), **where)


def _cell(
    axes: Any, x: int, y: int, cell: Estimate, predicted: float | None, spread: float
) -> None:
    """The measured ratio in the upper half, which lines through the middle leave free."""
    from matplotlib.patches import Rectangle

    style: dict[str, Any] = {"ha": "center", "va": "center"}
    if not math.isnan(cell.value):
        strength = 0.08 + 0.6 * min(1.0, abs(_log(cell.value)) / spread)
        colour = _colour("good" if cell.value >= 1 else "bad")
        box = Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, facecolor=colour, alpha=strength, lw=0)
        axes.add_patch(box)
        ink = _colour("muted" if _direction(cell, 1.0) == "muted" else "ink")
        axes.text(x, y + 0.24, f"{cell.value:.2f}", color=ink, fontsize=9, **style)
    if predicted is not None:
        style |= {"color": _colour("ink"), "alpha": 0.8, "fontsize": 7.5}
        axes.text(x, y - 0.27, f"{predicted:.2f}", **style)


def _contour(
    axes: Any,
    values: Mapping[tuple[float, float], float],
    xs: Items[float],
    ys: Items[float],
    style: str,
    first: int,
) -> None:
    """Where the logarithm is zero; nothing if the grid has a single row, or all lies on a side.

    Args:
        first: place of the first row.
    """
    logs = [[_log(values.get((x, y), math.nan)) for x in xs] for y in ys]
    known = [value for row in logs for value in row if not math.isnan(value)]
    if len(xs) < 2 or len(ys) < 2 or not known or not min(known) < 0 < max(known):
        return
    places = (range(len(xs)), range(first, first + len(ys)))
    axes.contour(*places, logs, levels=[0.0], colors=_colour("ink"), linewidths=2, linestyles=style)


def _line(axes: Any, i: int, name: str, line: Line) -> None:
    axes.plot(
        line.x,
        [math.nan if value is None else value for value in line.y],
        label=_cut(name),
        color=_series(i),
        lw=1.8,
        ls="--" if line.is_dashed else "-",
        marker=MARKERS[i % len(MARKERS)],
        ms=4.5,
        mfc="none" if line.is_dashed else _series(i),
    )


def _without_guesses(series: Mapping[str, Line]) -> Iterator[str]:
    """Names of curves that have a look of their own."""
    for name, line in series.items():
        if not (line.is_dashed and name.rpartition(", ")[0] in series):
            yield name


def _legend(axes: Any, names: Items[str]) -> None:
    """Above the axes, where it hides nothing; the figure grows by its rows."""
    longest = max(len(_cut(name)) for name in names)
    fitting = int(WIDTH * LEGEND_SHARE / (LEGEND_MARK + LEGEND_CHARACTER * longest))
    num_columns = max(1, min(len(names), fitting, 4))
    num_rows = -(-len(names) // num_columns)
    drawn = axes.figure
    drawn.set_figheight(drawn.get_figheight() + LEGEND_ROW * (num_rows - 1))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=num_columns, borderpad=0)


def _direction(row: Estimate, baseline: float) -> str:
    """Colour by the side of the baseline that the whole interval lies on, where there is one."""
    if row.low is None or row.high is None or row.low <= baseline <= row.high:
        return "muted"
    return "good" if row.low > baseline else "bad"


def _between(places: Items[float], value: float) -> float:
    """Where a value lies on an axis that gives every place the same room."""
    for i, (low, high) in enumerate(itertools.pairwise(places)):
        if low <= value <= high:
            return i + (value - low) / (high - low)
    return 0.0 if value < places[0] else len(places) - 1.0


def _log(value: float) -> float:
    return math.log(value) if value > 0 else math.nan


def _cut(name: str) -> str:
    """Without its middle: names that are long differ at their ends."""
    if len(name) <= LONGEST_LABEL:
        return name
    tail = LONGEST_LABEL // 3
    return f"{name[: LONGEST_LABEL - 3 - tail]}...{name[-tail:]}"


def _colour(name: str) -> str:
    return STAND_INS[name]


def _series(i: int) -> str:
    return _colour(f"series-{i % NUM_SERIES}")


SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "outrider",
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": _colour("ink"),
    "axes.labelcolor": _colour("muted"),
    "axes.edgecolor": _colour("line"),
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _colour("line"),
    "ytick.color": _colour("line"),
    "xtick.labelcolor": _colour("ink"),
    "ytick.labelcolor": _colour("ink"),
    "grid.color": _colour("line"),
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
