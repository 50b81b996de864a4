"""Grid: a table for the terminal whose figures are never cut, however narrow it is."""

from collections.abc import Sequence as Items

from rich.box import SIMPLE
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

PADDING = 1  # beside the box's own space between columns, where there is room for it
MIN_NAME = 16  # places that a folded name keeps
LEFT = "  "  # before each line of a row that is told line by line


class Grid:
    """Rows of figures behind a name.

    The first column is a name and may fold; so may those named in `folds`. All others stand to the
    right and in one piece. Where they do not fit beside each other, each row is told line by line.

    Args:
        columns: heads; a line break in one makes it narrower.
        folds: heads of further columns that may fold.
    """

    def __init__(self, *columns: str, title: str = "", folds: Items[str] = ()) -> None:
        self.columns = columns
        self.rows: list[tuple[Text, ...]] = []
        self._title = title
        self._folds = {columns[0], *folds}

    def add_row(self, *cells: str | Text) -> None:
        """Fewer cells than columns leave the last ones empty."""
        texts = [cell if isinstance(cell, Text) else Text(cell) for cell in cells]
        self.rows.append((*texts, *(Text() for _ in self.columns[len(texts) :])))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for padding in (PADDING, 0):
            if self._least_width(padding) <= options.max_width:
                yield self._table(padding)
                return
        yield self._lines(options.max_width)

    def _least_width(self, padding: int) -> int:
        """That all figures need, with folded names as narrow as may be."""
        columns = zip(self.columns, self._longest(), strict=True)
        least = [min(MIN_NAME, long) if name in self._folds else long for name, long in columns]
        return sum(least) + (padding + 1) * len(least) + 1

    def _longest(self) -> list[int]:
        """Of each column the longest line, its head among them."""
        return [
            max(_width(head), *(_width(row[at].plain) for row in self.rows), 0)
            for at, head in enumerate(self.columns)
        ]

    def _table(self, padding: int) -> Table:
        shown = Table(box=SIMPLE, padding=(0, padding, 0, 0), title=self._title or None)
        shown.title_justify = "left"
        for name, long in zip(self.columns, self._longest(), strict=True):
            if name in self._folds:
                shown.add_column(name, overflow="fold", min_width=min(MIN_NAME, long))
            else:
                shown.add_column(name, justify="right", no_wrap=True, min_width=long)
        for row in self.rows:
            shown.add_row(*row)
        return shown

    def _lines(self, width: int) -> Text:
        """The name alone, then "head: figure" for each that there is."""
        lines = [Text(self._title, "bold")] if self._title else []
        for name, *cells in self.rows:
            lines.append(Text(self.columns[0]).append(" ").append(name) if name else Text())
            for head, cell in zip(self.columns[1:], cells, strict=True):
                lines += _told(_flat(head), cell, width) if cell else []
        return Text("\n", overflow="fold").join([*lines, Text()])


def _width(text: str) -> int:
    return max((cell_len(line) for line in text.splitlines()), default=0)


def _flat(head: str) -> str:
    """A head in one line; "pre-" and "dicted" are one word."""
    return " ".join(head.split()).replace("- ", "")


def _told(head: str, cell: Text, width: int) -> list[Text]:
    """In one line if that is wide enough, else each of the cell's lines below the head."""
    parts = [part for part in cell.split("\n") if part.plain]
    whole = Text(f"{LEFT}{head}: ").append(Text(", ").join(parts))
    if cell_len(whole.plain) <= width:
        return [whole]
    return [Text(f"{LEFT}{head}:"), *(Text(2 * LEFT).append(part) for part in parts)]
