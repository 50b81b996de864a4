"""Report: results as one HTML page, a Markdown summary, tables as CSV, and the JSON behind them."""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence as Items
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from outrider.bench import figures
from outrider.bench.drawings import Figure
from outrider.bench.findings import unique
from outrider.bench.result import Result, check_comparable, differences, write_text
from outrider.bench.sections import Section, background, compared, section
from outrider.bench.tables import Table

TITLE = "Outrider measurements"
MAX_OPEN_ROWS = 16  # a longer table is folded


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the pages say.

    Attributes:
        sections: one per result, comparisons of two results of a kind behind them.
        backgrounds: settings and provenance, by the name of their result.
    """

    results: tuple[tuple[str, Result], ...]
    sections: tuple[Section, ...]
    backgrounds: tuple[tuple[str, tuple[Table, ...]], ...]

    def write(self, folder: Path) -> list[Path]:
        """report.html, report.md, report.json, tables/*.csv and figures/*.svg; their paths."""
        texts = {
            "report.html": self.html(),
            "report.md": self.markdown(),
            "report.json": json.dumps(self.data(with_blocks=True), indent=1) + "\n",
            **{
                f"figures/{name}.svg": figures.standalone(f.svg)
                for name, f in self._figures().items()
            },
            **{f"tables/{name}.csv": _csv(table) for name, table in self._tables().items()},
        }
        for name, text in texts.items():
            write_text(folder / name, text)
        return [folder / name for name in texts]

    def data(self, *, with_blocks: bool) -> list[dict[str, Any]]:
        """The results as they were read; without blocks, what the page carries with it."""
        told = [{"file": name, **result.to_json()} for name, result in self.results]
        return told if with_blocks else [{**one, "blocks": []} for one in told]

    def markdown(self) -> str:
        names = {id(figure): name for name, figure in self._figures().items()}
        parts = [f"# {TITLE}", *(_markdown(one, names) for one in self.sections)]
        for name, told in self.backgrounds:
            parts.append(f"## How {name} was measured")
            parts += [_facts(table) for table in told]
        return "\n\n".join(part for part in parts if part) + "\n"

    def html(self) -> str:
        """One file that needs no other: styles, drawings and data are in it."""
        names = {id(figure): name for name, figure in self._figures().items()}
        data = json.dumps(self.data(with_blocks=False)).replace("</", "<\\/")
        body = "\n".join(
            (
                f"<h1>{TITLE}</h1>",
                *(_html(one, names) for one in self.sections),
                *(_html_background(name, told) for name, told in self.backgrounds),
            )
        )
        return PAGE.format(title=TITLE, style=_style(), body=body, data=data)

    def _figures(self) -> dict[str, Figure]:
        """By the name of their file, which names their parts on the page too."""
        found: dict[str, Figure] = {}
        for number, one in enumerate(self.sections, start=1):
            for figure in one.figures:
                found[unique(found, f"{number}-{_slug(figure.name)}")] = figure
        return found

    def _tables(self) -> dict[str, Table]:
        found: dict[str, Table] = {}
        for number, one in enumerate(self.sections, start=1):
            for table in one.tables:
                found[unique(found, f"{number}-{_slug(table.title)}")] = table
        return found


def make_report(results: Items[tuple[str, Result]]) -> Report:
    """A report of results by name; those of one kind are compared with the first of it.

    Raises:
        ConfigError: two of a kind differ in prompts, model or the meaning of their numbers.
    """
    sections = [section(name, result) for name, result in results]
    for name, first, other_name, other in _pairs(results):
        check_comparable(first, other)
        changed = differences(first, other)
        sections.append(compared(name, first, other_name, other, changed))
    return Report(
        results=tuple(results),
        sections=tuple(sections),
        backgrounds=tuple((name, background(result)) for name, result in results),
    )


def _pairs(results: Items[tuple[str, Result]]) -> Iterator[tuple[str, Result, str, Result]]:
    first: dict[str, tuple[str, Result]] = {}
    for name, result in results:
        if result.kind in first:
            yield (*first[result.kind], name, result)
        else:
            first[result.kind] = name, result


def _markdown(one: Section, names: dict[int, str]) -> str:
    parts = [f"## {one.title}", *one.sentences]
    parts += [f"![{f.caption}](figures/{names[id(f)]}.svg)" for f in one.figures]
    for table in one.tables:
        parts += [f"### {table.title}", _markdown_table(table)]
    return "\n\n".join(parts)


def _markdown_table(table: Table) -> str:
    lines = [table.columns, tuple("---" for _ in table.columns), *table.rows]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _facts(table: Table) -> str:
    lines = "\n".join(f"- {name}: {told}" for name, told in table.rows)
    return f"### {table.title}\n\n{lines}"


def _html(one: Section, names: dict[int, str]) -> str:
    parts = [f"<section><h2>{escape(one.title)}</h2>"]
    parts += [f'<p class="finding">{escape(told)}</p>' for told in one.sentences]
    parts += [_html_figure(figure, names[id(figure)]) for figure in one.figures]
    parts += [_html_table(table) for table in one.tables]
    return "\n".join([*parts, "</section>"])


def _html_figure(figure: Figure, name: str) -> str:
    label = f'<svg role="img" aria-label="{escape(figure.caption)}" '
    drawn = figures.with_names(figure.svg, f"{name}-").replace("<svg ", label, 1)
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>"
    return f'<figure><div class="scroll">{drawn}</div>{caption}</figure>'


def _html_table(table: Table) -> str:
    """Columns of numbers stand to the right, under a head that does."""
    columns = list(zip(*table.rows, strict=True)) or [()] * len(table.columns)
    marks = [NUMERIC if i and _is_numeric(texts) else "" for i, texts in enumerate(columns)]
    names = zip(table.columns, marks, strict=True)
    head = "".join(f'<th scope="col"{mark}>{escape(name)}</th>' for name, mark in names)
    top = f"<thead><tr>{head}</tr></thead>" if any(table.columns) else ""
    rows = "\n".join(_html_row(row, marks) for row in table.rows)
    inside = f'<div class="scroll"><table>{top}<tbody>{rows}</tbody></table></div>'
    title = escape(table.title)
    if len(table.rows) <= MAX_OPEN_ROWS:
        return f"<h3>{title}</h3>{inside}"
    return f"<details><summary>{title}, {len(table.rows)} rows</summary>{inside}</details>"


def _html_row(row: tuple[str, ...], marks: Items[str]) -> str:
    marks = [LONG if len(text) > LONG_TEXT else mark for text, mark in zip(row, marks, strict=True)]
    cells = [f"<td{mark}>{escape(text)}</td>" for text, mark in zip(row, marks, strict=True)]
    return f'<tr><th scope="row">{escape(row[0])}</th>{"".join(cells[1:])}</tr>'


NUMERIC, LONG = ' class="number"', ' class="long"'
LONG_TEXT = 40  # characters from which on a cell is kept wide
NUMBER = re.compile(r"-|[-+]?[\d.,]+(e[-+]?\d+)?( to [-+\d.e]+)?")


def _is_numeric(texts: Items[str]) -> bool:
    return all(NUMBER.fullmatch(text) for text in texts)


def _html_background(name: str, told: tuple[Table, ...]) -> str:
    inside = "\n".join(map(_html_table, told))
    return f"<details><summary>How {escape(name)} was measured</summary>{inside}</details>"


def _csv(table: Table) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    if any(table.columns):
        writer.writerow(table.columns)
    writer.writerows(table.rows)
    return out.getvalue()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "table"


def _style() -> str:
    light, dark = (figures.variables(is_dark=is_dark) for is_dark in (False, True))
    return (
        f":root {{ color-scheme: light dark; --page: #f4f5f7; {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ --page: #12151a; {dark} }} }}\n{STYLE}"
    )


STYLE = """\
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 56rem;
  background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
}
h1 { font-size: 1.5rem; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 0 0 0.5rem; overflow-wrap: anywhere; }
h3 { font-size: 0.95rem; margin: 1.5rem 0 0.3rem; color: var(--muted); font-weight: 600; }
section, details {
  background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  padding: 1.1rem 1.2rem; margin: 0 0 1.2rem;
}
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
.finding { margin: 0.3rem 0; font-size: 1.05rem; overflow-wrap: anywhere; }
figure { margin: 1.3rem 0; }
figcaption { color: var(--muted); font-size: 0.88rem; }
.scroll { overflow-x: auto; }
svg.figure { display: block; width: 100%; min-width: 21rem; max-width: 44rem; height: auto; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.9rem 0.25rem 0; text-align: left; vertical-align: top; }
thead th { color: var(--muted); font-weight: 600; border-bottom: 1px solid var(--line); }
tbody th { font-weight: 500; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
.number { text-align: right; }
.long { min-width: 20rem; }
td.number { white-space: nowrap; }
section details { border: 0; padding: 0; margin: 1.2rem 0 0; }
section summary { font-size: 0.95rem; color: var(--muted); }
@media (max-width: 36rem) { body { padding: 0.9rem 0.5rem; } section, details { padding: 0.8rem; } }
@media print { section, details { break-inside: avoid; } body { background: none; } }
"""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
<script type="application/json" id="results">{data}</script>
</body>
</html>
"""
