"""Grouped bars with intervals as an SVG: what a figure of the docs is drawn with."""

from collections.abc import Iterable, Mapping
from html import escape
from typing import NamedTuple

# Told apart by eyes of all kinds (Okabe and Ito 2008), dark enough on white.
COLOURS = (
    *("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7"),
    *("#8a8a00", "#555555", "#003a5c", "#8c5200", "#7fcfb9", "#b0b0b0"),
)
BAR, GAP, LEFT, TOP, HEIGHT, LINE = 12, 18, 52, 56, 220, 16


class Bar(NamedTuple):
    """A height and its interval; `low` and `high` may be missing."""

    value: float
    low: float | None = None
    high: float | None = None


def grouped_bars(
    title: str, groups: Mapping[str, Mapping[str, Bar]], *, unit: str, baseline: float = 1.0
) -> str:
    """An SVG; `groups` maps a group on the x axis to bars by series name.

    Args:
        baseline: value at which a line is drawn across.
    """
    series = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    colour_of = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(series)}
    tops = [bar.high or bar.value for bars in groups.values() for bar in bars.values()]
    scale = HEIGHT / (1.05 * max([baseline, *tops]))
    body, x = [], float(LEFT + GAP)
    for group, bars in groups.items():
        room = max(BAR * len(bars), 7 * len(group))
        left = x + (room - BAR * len(bars)) / 2
        body += [_bar(left + BAR * i, bars[n], colour_of[n], scale) for i, n in enumerate(bars)]
        body.append(_text(x + room / 2, TOP + HEIGHT + LINE, group, "middle"))
        x += room + GAP
    width = max(x, LEFT + 6.9 * len(title))
    legend, bottom = _legend(colour_of, width)
    frame = _axis(scale, width, unit, baseline, max(tops, default=baseline))
    head = _text(LEFT, 20, title, "start", weight="bold")
    return _svg(width + GAP, bottom, [head, *frame, *body, *legend])


def _bar(x: float, bar: Bar, colour: str, scale: float) -> str:
    height, base = bar.value * scale, TOP + HEIGHT
    drawn = (
        f'<rect x="{x:.1f}" y="{base - height:.1f}" width="{BAR - 2}" height="{height:.1f}" '
        f'fill="{colour}"/>'
    )
    if bar.low is None or bar.high is None:
        return drawn
    middle = x + BAR / 2 - 1
    low, high = base - bar.low * scale, base - bar.high * scale
    return drawn + _line(middle, low, middle, high, "#222")


def _axis(scale: float, width: float, unit: str, baseline: float, top: float) -> list[str]:
    step = next(s for s in (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 1e9) if top / s <= 8)
    ticks = [i * step for i in range(int(top / step) + 1)]
    drawn = [_text(LEFT, 40, unit, "start")]
    for tick in ticks:
        y = TOP + HEIGHT - tick * scale
        drawn += [_line(LEFT, y, width, y, "#ddd"), _text(LEFT - 6, y + 4, f"{tick:g}", "end")]
    y = TOP + HEIGHT - baseline * scale
    return [*drawn, _line(LEFT, y, width, y, "#222")]


def _legend(colour_of: Mapping[str, str], width: float) -> tuple[list[str], float]:
    x, y, drawn = float(LEFT), TOP + HEIGHT + 3.0 * LINE, []
    for name, colour in colour_of.items():
        needed = 22 + 7.0 * len(name)
        if x > LEFT and x + needed > width:
            x, y = float(LEFT), y + LINE
        drawn.append(f'<rect x="{x:.1f}" y="{y - 9:.1f}" width="10" height="10" fill="{colour}"/>')
        drawn.append(_text(x + 14, y, name, "start"))
        x += needed
    return drawn, y + LINE


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str, weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(text)}</text>"
    )


def _svg(width: float, height: float, parts: Iterable[str]) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    style = 'font-family="sans-serif" font-size="12" fill="#222"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', *parts, "</svg>"]
    background = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([lines[0], background, *lines[1:]]) + "\n"
