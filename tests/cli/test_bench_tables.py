"""Tables of `outrider bench`: no figure is cut or broken, whatever the width."""

import io
import re

import pytest
from rich.console import Console
from rich.text import Text

from outrider.bench.result import Result
from outrider.cli import bench_ab, bench_advise
from outrider.cli.bench_tables import Grid

WIDTHS = (60, 80, 120)
FIGURES = ("16", "8", "1.234", "0.98 to 1.02", "undecided", "14.61", "1.22")
NAME = "draft_model (some/draft-model-with-a-long-name)"


def shown(table, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    return console.file.getvalue()


def lines_of(table, width: int) -> list[str]:
    found = shown(table, width).splitlines()
    assert max(map(len, found)) <= width
    return found


def advice() -> Grid:
    grid = Grid("drafter", *bench_advise.COLUMNS)
    grid.add_row(NAME, *FIGURES)
    grid.add_row("ngram", *FIGURES)
    return grid


@pytest.mark.parametrize("width", WIDTHS)
def test_figures_stand_in_one_piece(width):
    found = lines_of(advice(), width)
    for figure in FIGURES:
        whole = re.compile(rf"(?<![\d.]){re.escape(figure)}(?![\d.])")
        assert sum(bool(whole.search(line)) for line in found) >= 2, figure
    assert "…" not in "".join(found)


def test_a_row_is_told_in_lines_where_there_is_no_room():
    narrow, wide = (lines_of(advice(), width) for width in (60, 120))
    assert "  times as fast: 1.234" in [line.rstrip() for line in narrow]
    assert "  predicted: 14.61" in [line.rstrip() for line in narrow]
    assert any("ngram" in line and "14.61" in line for line in wide)


def test_a_cell_of_two_lines_stays_together_and_empty_ones_are_left_out():
    grid = Grid("K", *(f"{load} at once\nneed / got" for load in (1, 4, 16)), title="ngram")
    grid.add_row("2", "1.23* (1.10 to 1.30)\n1.20 / 2.10", "", Text("~0.90"))
    narrow = [line.rstrip() for line in lines_of(grid, 40)]
    assert narrow[:2] == ["ngram", "K 2"]
    at = narrow.index("  1 at once need / got:")
    assert narrow[at + 1 : at + 3] == ["    1.23* (1.10 to 1.30)", "    1.20 / 2.10"]
    assert "  16 at once need / got: ~0.90" in narrow
    assert not any(line.startswith("  4 at once") for line in narrow)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_table_of_ab(width):
    pair = {
        "base": "off",
        "ratio": 1.234,
        "interval": (1.201, 1.267),
        "verdict": "undecided",
        "num_identical": 60,
        "num_prompts": 60,
    }
    arms = [
        {"name": "off", "tokens_per_second": 1234.5},
        {
            "name": "draft_model num_draft_tokens=4",
            "tokens_per_second": 1523.4,
            "acceptance": {"acceptance_length": 2.34},
        },
    ]
    null = {"ratio": 1.0, "interval": None, "interval_note": "unknown: one prompt only"}

    findings = {"arms": arms, "pairs": [pair], "null": {**null, "verdict": "undecided"}}
    text = shown(bench_ab.table(Result(kind="ab", findings=findings)), width)
    for figure in ("1234.5", "1523.4", "1.234 (1.201 to 1.267)", "60/60", "2.34"):
        assert figure in text
    assert "1.000 (unknown)" in text
