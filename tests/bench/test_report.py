"""Reports: every number of a result is on the page, plots where they belong, tables everywhere."""

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from outrider.bench.result import Result
from outrider.bench.tables import show, tables

pytest.importorskip("matplotlib", reason="plots need matplotlib")

from outrider.bench.drawings import draw
from outrider.bench.report import make_report
from outrider.errors import ConfigError

COMMON = {
    "settings": {"max_tokens": 96, "eps": 0.02},
    "data": {"name": "outrider", "hash": "d1"},
    "target": {"model": "demo"},
    "seeds": {"sampling": 7},
    "provenance": {"commit": "c1", "machine": {"cores": 2}},
}
AB = Result(
    kind="ab",
    findings={
        "pairs": [
            {
                "base": "off",
                "arm": "ngram <K=5>",
                "ratio": 1.42,
                "interval": [1.38, 1.46],
                "verdict": "faster",
                "null_interval": [0.985, 1.012],
            }
        ],
        "arms": [
            {"name": "off", "tokens_per_second": 101.2, "acceptance": None},
            {
                "name": "ngram <K=5>",
                "tokens_per_second": 141.9,
                "acceptance": {"num_drafts": 4, "histogram": [1, 2, 1]},
            },
        ],
    },
    blocks=[{"seconds": [0.5, 0.25]}],
    **COMMON,
)
CELLS = [
    {
        "method": "draft_model",
        "temperature": 0.0,
        "concurrency": c,
        "num_draft_tokens": k,
        "ratio": 1.7 - 0.1 * c * k,
        "interval": [1.6 - 0.1 * c * k, 1.8 - 0.1 * c * k],
        "predicted": 1.66 - 0.1 * c * k,
    }
    for c in (1, 2, 4)
    for k in (1, 2, 3)
]
SWEEP = Result(
    kind="sweep",
    findings={"cells": CELLS, "controller": [{"concurrency": 1, "num_draft_tokens": 3}]},
    **COMMON,
)
LATENCY = {"p50": 10.0, "p90": 20.0, "p95": 30.0, "p99": 40.0}
LOAD = Result(
    kind="load",
    findings={
        "levels": [
            {
                "concurrency": c,
                "output_throughput": 90.0 * c,
                "ttft_ms": LATENCY,
                "tpot_ms": LATENCY,
            }
            for c in (1, 4)
        ]
    },
    **COMMON,
)
VLLM = Result(
    kind="load",
    findings={"median_ttft_ms": 10.0, "p99_ttft_ms": 30.0, "output_throughput": 5.0},
    **COMMON,
)
COST = Result(
    kind="cost",
    findings={
        "idle_seconds": 3.0,
        "classes": [
            {"class": "decode", "tokens": 900, "seconds": 30.0, "dollars_per_million": 2.25},
            {"class": "cached prompt", "tokens": 0, "seconds": 0.0, "dollars_per_million": None},
        ],
    },
    **COMMON,
)
CALIBRATE = Result(
    kind="calibrate",
    findings={"points": [{"rows": m, "context": 64, "seconds": 0.01 * m} for m in (1, 2, 4)]},
    **COMMON,
)
STRANGE = Result(
    kind="strange",
    findings={"answer": "Nobody drew this.", "group": {"x": 1.25}, "list": [{"y": {"z": 7.5}}]},
    **COMMON,
)
ALL = {"ab": AB, "sweep": SWEEP, "load": LOAD, "cost": COST, "calibrate": CALIBRATE}


def report_of(**results: Result):
    return make_report(list(results.items()))


class Checker(HTMLParser):
    """Tags are closed in order; what is loaded from elsewhere is remembered."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.loaded += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v[0] != "#"]
        self.ids += [v for k, v in attrs if k == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_other_file():
    page = report_of(**ALL, strange=STRANGE).html()
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.loaded == []
    assert len(checker.ids) == len(set(checker.ids))
    assert "url(http" not in page
    assert "prefers-color-scheme: dark" in page


def test_names_of_arms_cannot_break_the_page():
    page = report_of(ab=AB).html()
    assert "ngram &lt;K=5&gt;" in page
    assert "ngram <K=5>" not in page.split('<script type="application/json"')[0]


def test_data_cannot_end_the_script():
    evil = replace(AB, settings={"x": "</script><b>"})
    page = report_of(ab=evil).html()
    data = re.search(r'id="results">(.*?)</script>', page, re.DOTALL)
    assert json.loads(data[1])[0]["settings"]["x"] == "</script><b>"


def test_the_page_carries_its_data_without_blocks():
    page = report_of(ab=AB).html()
    (held,) = json.loads(re.search(r'id="results">(.*?)</script>', page, re.DOTALL)[1])
    assert held["pairs"] == AB.findings["pairs"]
    assert held["blocks"] == []


def test_the_verdict_is_said_with_interval_and_noise():
    (told,) = report_of(ab=AB).sections[0].sentences
    assert told == (
        "ngram <K=5> against off: faster, 1.420 times as fast (95 % interval 1.380 to 1.460); "
        "noise 0.985 to 1.012."
    )


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("ab", ["arms", "acceptance"]),
        ("sweep", ["sweep draft_model, temperature 0", "predicted draft_model, temperature 0"]),
        ("load", ["latency ttft", "latency tpot", "trade"]),
        ("cost", ["cost", "seconds"]),
        ("calibrate", ["passes"]),
    ],
)
def test_each_kind_has_its_figures(kind, names):
    section = report_of(**{kind: ALL[kind]}).sections[0]
    assert [figure.name for figure in section.figures] == names
    for figure in section.figures:
        ElementTree.fromstring(figure.svg)


def test_the_null_arm_and_the_domains_are_drawn():
    domains = [{"domain": name, "ratio": 1.2, "interval": [1.1, 1.3]} for name in ("code", "math")]
    pairs = [{**AB.findings["pairs"][0], "domains": domains}]
    null = {"ratio": 1.001, "interval": [0.985, 1.012]}
    section = report_of(ab=replace(AB, findings={"pairs": pairs, "null": null})).sections[0]
    arms, by_domain = section.figures
    assert ">null arm<" in arms.svg
    assert ">1.001<" in arms.svg
    assert all(f">{name}<" in by_domain.svg for name in ("code", "math"))
    inner = next(table for table in section.tables if "domains" in table.title)
    assert inner.title == "pairs, ngram <K=5> off: domains"
    assert inner.rows[0] == ("code", "1.2", "1.100 to 1.300")


def test_loads_of_several_arms_are_told_apart():
    levels = [
        {
            "name": f"{c} at once",
            "arm": arm,
            "output_throughput": 9.0 * c,
            "p50_tpot_ms": 10.0,
            "p99_tpot_ms": 30.0,
        }
        for arm in ("off", "ngram")
        for c in (1, 4)
    ]
    latency, trade = report_of(l=replace(LOAD, findings={"levels": levels})).sections[0].figures
    assert latency.name == "latency tpot"
    for told in ("off", "ngram", "1 at once", "4 at once"):
        assert f">{told}<" in latency.svg
    assert "a line up to the 99th percentile" in latency.caption
    assert all(f">{arm}<" in trade.svg for arm in ("off", "ngram"))


def test_cost_is_told_by_class_and_arm_and_idle_time_by_arm():
    classes = [
        {"class": f"output ({arm})", "arm": arm, "seconds": 3.0, "dollars_per_million": 2.0}
        for arm in ("off", "ngram")
    ]
    arms = [{"name": "off", "idle_s": 1.0}, {"name": "ngram", "idle_s": 2.0}]
    found = replace(COST, findings={"classes": classes, "arms": arms, "idle_seconds": 3.0})
    cost, seconds = report_of(cost=found).sections[0].figures
    assert [cost.svg.count(f">{text}<") for text in ("output", "off", "ngram")] == [1, 1, 1]
    shown = [seconds.svg.count(f">{text}<") for text in ("output", "idle", "off", "wall time")]
    assert shown == [1, 1, 1, 0]


def test_advice_is_drawn_over_the_load():
    table = [
        {"drafter": "ngram", "concurrency": c, "num_draft_tokens": 3, "ratio": r, "predicted": 1.1}
        for c, r in ((1, 1.4), (8, None))
    ]
    advice = Result(kind="advise", findings={"answer": "Use ngram.", "table": table}, **COMMON)
    section = report_of(advise=advice).sections[0]
    (figure,) = section.figures
    assert ">ngram, predicted<" in figure.svg
    assert section.sentences == ("Use ngram.",)
    assert "Use ngram." not in str(section.tables)


def test_vllm_s_flat_keys_are_drawn_too():
    (figure,) = report_of(load=VLLM).sections[0].figures
    assert figure.name == "latency ttft"
    assert ">p50<" in figure.svg
    assert ">p90<" not in figure.svg


@pytest.mark.parametrize("kind", ["ab", "sweep", "load", "cost", "calibrate", "advise", "new"])
def test_findings_that_nothing_draws_still_have_their_tables(kind):
    odd = replace(STRANGE, kind=kind)
    report = report_of(odd=odd)
    section = report.sections[0]
    assert section.figures == ()
    assert section.sentences[0] == "Nobody drew this."
    for number in ("1.25", "7.5"):
        assert number in report.markdown()
        assert number in report.html()


def test_a_sweep_cell_without_its_numbers_leaves_only_itself_out():
    broken = replace(SWEEP, findings={"cells": [*CELLS, {"method": "draft_model", "ratio": None}]})
    assert report_of(sweep=broken).sections[0].figures


def test_the_folder_holds_page_summary_data_tables_and_figures(tmp_path):
    report = report_of(**ALL)
    paths = report.write(tmp_path / "out")
    assert all(path.stat().st_size for path in paths)
    assert [path.name for path in paths[:3]] == ["report.html", "report.md", "report.json"]
    held = json.loads((tmp_path / "out" / "report.json").read_text())
    assert held[0]["blocks"] == AB.blocks
    summary = (tmp_path / "out" / "report.md").read_text()
    linked = re.findall(r"\]\((figures/[^)]+)\)", summary)
    assert len(linked) == 10
    for name in linked:
        ElementTree.fromstring((tmp_path / "out" / name).read_text())
    with (tmp_path / "out" / "tables" / "1-pairs.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["ratio"] == "1.42"


def test_markdown_tables_keep_their_columns():
    piped = replace(STRANGE, findings={"list": [{"a": "x|y\nz", "b": 1}]})
    (line,) = (
        line for line in report_of(s=piped).markdown().splitlines() if "x" in line and "|" in line
    )
    assert line == "| x\\|y z | 1 |"  # fmt: skip


def test_two_of_a_kind_are_compared_with_the_first():
    pairs = [{**AB.findings["pairs"][0], "ratio": 1.491}]
    other = replace(AB, findings={**AB.findings, "pairs": pairs}, settings={"max_tokens": 48, "eps": 0.02})  # fmt: skip  # noqa: E501
    section = report_of(old=AB, new=other).sections[-1]
    assert section.title == "new beside old"
    both, changed = section.tables
    assert ("pairs ngram <K=5> off ratio", "1.42", "1.491", "1.050") in both.rows
    assert changed.rows == (("max_tokens", "96", "48"),)
    assert len(section.figures) == 1


def test_two_of_a_kind_with_other_prompts_are_refused():
    other = replace(AB, data={"name": "outrider", "hash": "d2"})
    with pytest.raises(ConfigError, match="data hash"):
        report_of(old=AB, new=other)


def test_how_it_was_measured_is_told():
    page = report_of(ab=AB).html()
    for fact in ("max tokens", "96", "d1", "c1", "cores 2", "sampling"):
        assert fact in page


def test_a_table_has_a_row_per_record_and_a_column_per_key():
    (table,) = tables({"rows": [{"a": 1, "in": {"x": 2.0, "a": 5}}, {"a": 3, "none": None}]})
    assert table.columns == ("a", "x", "in a")
    assert table.rows == (("1", "2", "5"), ("3", "-", "-"))


def test_a_table_wider_than_long_is_turned():
    (table,) = tables({"rows": [{"name": "a", **{f"x{i}": i for i in range(20)}}]})
    assert table.columns == ("name", "a")
    assert table.rows[3] == ("x3", "3")


def test_groups_that_look_alike_are_one_table():
    (table,) = tables({"domains": {"code": {"n": 1}, "math": {"n": 2}}})
    assert table.rows == (("code", "1"), ("math", "2"))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (True, "yes"),
        (3, "3"),
        (0.123456, "0.1235"),
        (12345.6, "12,346"),
        ([0.9, 1.1], "0.900 to 1.100"),
        ([1, 2, 3], "1 2 3"),
        (list(range(40)), "40 values"),
        ([[0.1, 0.2], [0.3, 0.4]], "0.100 to 0.200, 0.300 to 0.400"),
        ({"a_b": 1}, "a b 1"),
    ],
)
def test_values_are_shown_briefly(value, text):
    assert show(value) == text


def test_a_pair_with_another_base_says_so():
    pairs = [
        {"base": base, "arm": arm, "ratio": 1.2, "interval": [1.1, 1.3]}
        for base, arm in (("off", "a"), ("off", "b"), ("a", "b"))
    ]
    figure = report_of(ab=replace(AB, findings={"pairs": pairs})).sections[0].figures[0]
    assert ">b over a<" in figure.svg
    assert "b (2)" not in figure.svg


def test_the_only_verdict_of_an_answer_is_the_answer():
    advice = {"answer": "Yes: it pays.", "verdict": "faster"}
    told = report_of(x=Result(kind="advise", findings=advice)).sections[0].sentences
    assert told == ("Yes: it pays.",)


def test_whose_histogram_it_is_is_told_by_load_and_arm():
    levels = [
        {"name": "4 at once", "arm": arm, "acceptance_histogram": [1, 2]} for arm in ("a", "b")
    ]
    (drawn,) = draw(Result(kind="load", findings={"levels": levels}))
    assert ">4 at once, a<" in drawn.svg
    assert ">4 at once, b<" in drawn.svg


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (
            {"name": "x.jsonl", "path": "d/x.jsonl", "sha256": "ab" * 32, "num_questions": 3},
            "Asked: 3 prompts of d/x.jsonl, SHA-256 abababababababab.",
        ),
        (
            {"name": "outrider", "num_questions": 3, "num_in_file": 60, "origin": "shipped"},
            "Asked: 3 of 60 prompts of outrider, shipped.",
        ),
        ({}, None),
    ],
)
def test_which_prompts_were_asked_is_a_sentence(data, told):
    found = report_of(x=Result(kind="ab", findings={}, data=data)).sections[0].sentences
    assert found == (() if told is None else (told,))
