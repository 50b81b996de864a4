"""Figures: SVG that is well formed, takes its colours from the page, and shows what it was told."""

import math
import re
import sys
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="plots need matplotlib")

from outrider.bench import figures
from outrider.bench.figures import Estimate, Line
from outrider.errors import ConfigError

SVG = "{http://www.w3.org/2000/svg}"
GRID = {(x, k): Estimate(1.6 - 0.1 * x * k, 1.5 - 0.1 * x * k, 1.7 - 0.1 * x * k)
        for x in (1, 2, 4) for k in (1, 3)}  # fmt: skip

DRAWN = {
    "intervals": lambda: figures.intervals(
        {"a": Estimate(1.4, 1.3, 1.5), "b": Estimate(0.9, 0.8, 0.95), "c": Estimate(1.0, 0.9, 1.1)},
        unit="times",
        null=Estimate(1.0, 0.98, 1.02),
    ),
    "heat_map": lambda: figures.heat_map(
        GRID,
        x_label="x",
        y_label="K",
        predicted={key: cell.value + 0.07 for key, cell in GRID.items()},
        path={1: 3, 2: 2.0, 4: 1},
    ),
    "agreement": lambda: figures.agreement({"K=1": [(1, 1.1)]}, x_label="p", y_label="m"),
    "lines": lambda: figures.lines(
        {"a": Line([1, 2, 4], [1.0, None, 3.0]), "b": Line([1, 4], [1, 2], is_dashed=True)},
        x_label="x",
        y_label="y",
        is_log_x=True,
        baseline=1.0,
    ),
    "bars": lambda: figures.bars(
        {"p50": {"a": Estimate(1, 0.5, 2), "b": Estimate(2)}, "p99": {"b": Estimate(3)}}, unit="ms"
    ),
    "stacked": lambda: figures.stacked({"time": {"decode": 3.0, "idle": 1.0}}, unit="s"),
    "histogram": lambda: figures.histogram(
        {"a": [1, 2, 1], "b": [3]}, x_label="accepted", unit="%"
    ),
}


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_is_well_formed_and_leaves_colours_to_the_page(name):
    svg = DRAWN[name]()
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert "width" not in root.attrib
    assert not re.search(r"(fill|stroke|color): ?#", svg)
    used = set(re.findall(r"var\(--([\w-]+)\)", svg))
    assert used
    assert used <= set(figures.COLOURS)


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_is_the_same_each_time(name):
    assert DRAWN[name]() == DRAWN[name]()


def names(svg: str) -> set[str]:
    return set(re.findall(r'\bid="([^"]+)"', svg))


def test_names_inside_can_be_kept_from_those_of_another_figure():
    svg = DRAWN["lines"]()
    one, other = (figures.with_names(svg, prefix) for prefix in ("a-", "b-"))
    assert len(names(one)) == len(names(svg)) > 0
    assert not names(one) & names(other)


@pytest.mark.parametrize("name", DRAWN)
def test_references_lead_to_something(name):
    svg = figures.with_names(DRAWN[name](), "x-")
    wanted = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    assert wanted
    assert wanted <= names(svg)


def test_intervals_show_values_and_the_side_they_lie_on():
    svg = DRAWN["intervals"]()
    assert {"1.400", "0.900", "a", "b", "c"} <= set(texts(svg))
    assert {"var(--good)", "var(--bad)", "var(--muted)"} <= set(re.findall(r"var\([^)]*\)", svg))


def test_a_heat_map_shows_measured_over_predicted():
    shown = texts(DRAWN["heat_map"]())
    assert {"1.50", "0.40", "1.57", "0.47"} <= set(shown)


def lines_across(svg: str) -> int:
    """Curves without a fill in the ink's colour: contours."""
    drawn = r'<path d="M[^"]+"[^>]*fill: none; stroke: var\(--ink\); stroke-width: 2'
    return len(re.findall(drawn, svg))


def test_break_even_is_drawn_only_where_there_is_one():
    labels = {"x_label": "x", "y_label": "K"}
    above = {key: Estimate(1.2) for key in GRID}
    assert lines_across(figures.heat_map(GRID, **labels)) == 1
    assert lines_across(DRAWN["heat_map"]()) == 1  # the predicted one is dashed, told below
    assert "stroke-dasharray" in DRAWN["heat_map"]()
    assert lines_across(figures.heat_map(above, **labels)) == 0


def test_a_cell_that_was_only_predicted_shows_no_measurement():
    cells = {**GRID, (8.0, 1.0): Estimate(math.nan)}
    svg = figures.heat_map(cells, x_label="x", y_label="K", predicted={(8.0, 1.0): 0.77})
    assert "0.77" in texts(svg)
    assert "nan" not in "".join(texts(svg))


def test_a_figure_alone_brings_its_colours_light_and_dark():
    svg = figures.standalone(DRAWN["bars"]())
    ElementTree.fromstring(svg)
    assert "prefers-color-scheme: dark" in svg
    for light, dark in figures.COLOURS.values():
        assert light in svg
        assert dark in svg


def test_matplotlib_s_settings_stay_as_they_were():
    import matplotlib

    before = dict(matplotlib.rcParams)
    DRAWN["bars"]()
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_the_remedy_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'outrider\[bench\]'"):
        DRAWN["bars"]()


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("is_dark", [False, True])
def test_marks_are_seen_on_their_paper(is_dark):
    paper = luminance(figures.COLOURS["paper"][is_dark])
    for name, pair in figures.COLOURS.items():
        if name in ("paper", "line"):
            continue
        bright, dim = sorted((paper, luminance(pair[is_dark])), reverse=True)
        needed = 4.5 if name in ("ink", "muted", "good", "bad") else 3.0  # WCAG 2: text, graphics
        assert (bright + 0.05) / (dim + 0.05) >= needed, name


LONG = "a name of an arm that is rather long, "


@pytest.mark.parametrize("count", [2, 5, 9, 40])
def test_long_names_and_many_of_them_leave_room_for_the_drawing(count):
    """A legend wider than the figure would leave no axes, which matplotlib only warns of."""
    names = [f"{LONG}number {i}" for i in range(count)]
    percentiles = ("p50", "p90", "p95", "p99")
    drawn = [
        figures.bars({p: {name: Estimate(1.0) for name in names} for p in percentiles}, unit="ms"),
        figures.bars({name: {"a": Estimate(1.0)} for name in names}, unit="ms"),
        figures.lines({name: Line([1, 2], [1, 2]) for name in names}, x_label="x", y_label="y"),
        figures.stacked({LONG: dict.fromkeys(names, 1.0), "b": {}}, unit="s"),
        figures.agreement({name: [(1, 1)] for name in names}, x_label="x", y_label="y"),
        figures.intervals({name: Estimate(1.0, 0.9, 1.1) for name in names}, unit="x"),
    ]
    for svg in drawn:
        ElementTree.fromstring(svg)
    for svg in (drawn[0], drawn[2]):
        assert all(any(text.endswith(f"number {i}") for text in texts(svg)) for i in range(count))


def test_a_value_without_an_interval_is_on_neither_side():
    svg = figures.intervals({"a": Estimate(1.4)}, unit="times")
    assert "var(--muted)" in svg
    assert "var(--good)" not in svg


def test_a_prediction_looks_like_what_it_predicts():
    svg = figures.lines(
        {
            "a": Line([1, 2], [1, 2]),
            "a, predicted": Line([1, 2], [1, 3], is_dashed=True),
            "b, predicted": Line([1, 2], [2, 2], is_dashed=True),
        },
        x_label="x",
        y_label="y",
    )
    used = set(re.findall(r"var\(--(series-\d)\)", svg))
    assert used == {"series-0", "series-1"}


def test_places_that_are_not_whole_get_the_usual_ticks():
    svg = figures.lines({"a": Line([579.66, 1270.52], [1, 2])}, x_label="x", y_label="y")
    assert "579.66" not in "".join(texts(svg))


def test_a_path_below_all_cells_has_a_row_of_its_own():
    """Who hardly drafts is not drawn as drafting the least that was measured."""
    labels = {"x_label": "x", "y_label": "K"}
    low, high = (
        texts(figures.heat_map(GRID, **labels, path={1: 1.5, 2: end, 4: end})) for end in (0.1, 1.0)
    )
    assert "0" in low
    assert "0" not in high
