"""Tables: whatever a result concludes, in rows of text, without knowing its kind."""

from collections.abc import Iterator, Mapping, Sequence as Items
from typing import Any, NamedTuple

from outrider.bench.findings import IDENTITY, Row, is_records

MAX_COLUMNS = 14  # of a table with fewer rows than columns, before it is turned
MAX_VALUES = 12  # a longer list of numbers is told by its length


class Table(NamedTuple):
    """Rows of texts; columns without a name have no head."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(findings: Row, title: str = "") -> Iterator[Table]:
    """Single values together, then each list of records and each group."""
    single = {key: value for key, value in findings.items() if _is_single(value)}
    if single:
        rows = tuple((words(key), show(value)) for key, value in single.items())
        yield Table(title or "in short", ("", ""), rows)
    for key, value in findings.items():
        name = f"{title}, {words(key)}" if title else words(key)
        if isinstance(value, Mapping) and value:
            yield from _group(value, name)
        elif is_records(value):
            yield from _table(name, value)


def side_by_side(first: Row, other: Row) -> Iterator[tuple[str, ...]]:
    """Values that two findings have at the same place, and the second over the first."""
    ours, theirs = dict(_leaves(first)), dict(_leaves(other))
    for path, value in ours.items():
        if path not in theirs:
            continue
        second = theirs[path]
        is_ratio = isinstance(value, float) and isinstance(second, float) and value != 0
        yield path, show(value), show(second), f"{second / value:.3f}" if is_ratio else ""


def words(key: str) -> str:
    return key.replace("_", " ")


def show(value: Any) -> str:
    """A value in a cell: four digits, an interval as its ends, a long list by its length."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{words(str(key))} {show(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return _show_list(value)
    return str(value)


def _show_list(values: Items[Any]) -> str:
    if len(values) == 2 and all(isinstance(end, float) for end in values):
        return f"{values[0]:.3f} to {values[1]:.3f}"
    if len(values) > MAX_VALUES:
        return f"{len(values)} values"
    return (", " if any(isinstance(v, list | tuple) for v in values) else " ").join(
        map(show, values)
    )


def _group(value: Row, name: str) -> Iterator[Table]:
    """Groups that look alike are the rows of one table, else each is one."""
    inner = list(value.values())
    if len(inner) > 1 and all(_is_like(one, inner[0]) for one in inner):
        yield from _table(name, [{"": key, **one} for key, one in value.items()])
    else:
        yield from tables(value, name)


def _is_like(one: Any, other: Any) -> bool:
    return isinstance(one, Mapping) and isinstance(other, Mapping) and set(one) == set(other)


def _table(title: str, records: Items[Row]) -> Iterator[Table]:
    """A column for every key that any record has a value for; lists inside are tables behind it."""
    flat = [dict(_flat(record)) for record in records]
    paths = dict.fromkeys(path for record in flat for path in record)
    filled = [path for path in paths if any(one.get(path) is not None for one in flat)]
    heads = _heads(filled)
    rows = tuple(tuple(show(record.get(path)) for path in filled) for record in flat)
    whole = Table(title, tuple(words(head) for head in heads), rows)
    yield _turned(whole) if len(filled) > MAX_COLUMNS and len(rows) < len(filled) else whole
    for position, record in enumerate(records):
        for key, inner in record.items():
            if is_records(inner):
                whose = _identity(record) or str(position + 1)
                yield from _table(f"{title}, {whose}: {words(key)}", inner)


def _turned(table: Table) -> Table:
    """Columns as rows: its first column becomes the head."""
    names, *rows = zip(table.columns, *table.rows, strict=True)
    return Table(table.title, names, tuple(rows))


def _flat(record: Row, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A record's values by their path, through the records inside it."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, (*before, key))
        elif not is_records(value):
            yield (*before, key), value


def _heads(paths: Items[tuple[str, ...]]) -> list[str]:
    """The last word of each path, with the words before it where it is not alone."""
    last = [path[-1] for path in paths]
    return [path[-1] if last.count(path[-1]) == 1 else " ".join(path) for path in paths]


def _identity(record: Row) -> str:
    """What tells a record from its neighbours."""
    return " ".join(show(record[key]) for key in IDENTITY if record.get(key) is not None)


def _is_single(value: Any) -> bool:
    return not isinstance(value, Mapping) and not is_records(value) and value not in ("", [], ())


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers, verdicts and intervals by where they stand; records by what tells them apart."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if path == "" or key not in IDENTITY:
                yield from _leaves(inner, f"{path} {words(key)}".strip())
    elif is_records(value):
        for position, record in enumerate(value):
            yield from _leaves(record, f"{path} {_identity(record) or position}".strip())
    elif value is not None and (not isinstance(value, str) or path.endswith("verdict")):
        yield path, value
