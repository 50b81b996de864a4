"""Sections: what a report says of one result, and of two of one kind side by side."""

from collections.abc import Iterator, Sequence as Items
from typing import Any, NamedTuple

from outrider.bench.drawings import Figure, arms_of_two, draw
from outrider.bench.figures import Estimate
from outrider.bench.findings import Row, arm_of, base_of, estimate, rows_of
from outrider.bench.provenance import as_text
from outrider.bench.result import Result
from outrider.bench.tables import Table, show, side_by_side, tables, words

TWO_RUNS = (
    "Two runs are two days of a machine: ratios that each took inside its own run compare; seconds "
    "and tokens per second only roughly."
)


SENTENCES = ("answer", "summary")  # findings that are told in words


class Section(NamedTuple):
    """Sentences first, then figures, then every number in tables."""

    title: str
    sentences: tuple[str, ...]
    figures: tuple[Figure, ...]
    tables: tuple[Table, ...]


def section(name: str, result: Result) -> Section:
    return Section(
        title=result.title() if name == result.kind else f"{name}: {result.title()}",
        sentences=tuple(sentences(result)),
        figures=tuple(draw(result)),
        tables=tuple(tables({k: v for k, v in result.findings.items() if k not in SENTENCES})),
    )


def compared(
    name: str, first: Result, other_name: str, other: Result, changed: Items[tuple[str, str, str]]
) -> Section:
    """Two results of one kind: the numbers that both have, and what else was different."""
    both = tuple(side_by_side(first.findings, other.findings))
    told = [Table("numbers of both", ("", name, other_name, "second / first"), both)]
    if changed:
        told.append(Table("what else was different", ("", name, other_name), tuple(changed)))
    return Section(
        title=f"{other_name} beside {name}",
        sentences=(TWO_RUNS,),
        figures=tuple(arms_of_two((name, first), (other_name, other))),
        tables=tuple(told),
    )


def background(result: Result) -> tuple[Table, ...]:
    """What was asked, of whom, on what: settings, prompts, target, provenance."""
    told = {
        "settings": result.settings,
        "prompts": result.data,
        "target": result.target,
        "seeds": result.seeds,
        "provenance": result.provenance,
    }
    return tuple(
        Table(title, ("", ""), tuple((words(name), text) for name, text in as_text(facts)))
        for title, facts in told.items()
        if facts
    )


def sentences(result: Result) -> Iterator[str]:
    """The findings that a reader came for."""
    for key in SENTENCES:
        told = result.findings.get(key)
        if isinstance(told, str) and told:
            yield told
    if asked := _prompts(result.data):
        yield asked
    yield from filter(None, map(_of_pair, rows_of(result, "pairs")))
    verdict = result.findings.get("verdict")
    if isinstance(verdict, str) and "answer" not in result.findings:
        yield f"Verdict: {verdict}."


def _prompts(data: Row) -> str:
    """Which prompts, so that somebody else can tell whether theirs are the same."""
    if not data.get("num_questions"):
        return ""
    count, of = data["num_questions"], data.get("num_in_file") or 0
    counted = f"{count} of {of} prompts" if of > count else f"{count} prompts"
    origin = f", {data['origin']}" if data.get("origin") else ""
    sha = f", SHA-256 {data['sha256'][:16]}" if data.get("sha256") else ""
    return f"Asked: {counted} of {data.get('path') or data.get('name')}{origin}{sha}."


def _of_pair(pair: Any) -> str:
    ratio, noise = estimate(pair, "ratio"), pair.get("null_interval")
    if ratio is None:
        return ""
    told = f"{arm_of(pair)} against {base_of(pair)}: {pair.get('verdict', '-')}, "
    told += _times(ratio, pair.get("interval_note"))
    return f"{told}; noise {show(noise)}." if noise else f"{told}."


def _times(ratio: Estimate, note: str | None) -> str:
    told = f"{ratio.value:.3f} times as fast"
    if ratio.low is None or ratio.high is None:
        return f"{told} (95 % interval {note})" if note else told
    return f"{told} (95 % interval {ratio.low:.3f} to {ratio.high:.3f})"
