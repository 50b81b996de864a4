"""Results: the file round trip, what is refused, and when two may stand side by side."""

import json
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

import numpy as np
import pytest

from outrider.bench.result import (
    METRIC_VERSION,
    Result,
    check_comparable,
    content_hash,
    differences,
    load,
    plain,
    write_text,
)
from outrider.errors import ConfigError


class Colour(Enum):
    RED = "red"


class Pair(NamedTuple):
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Record:
    name: str
    pair: Pair


RESULT = Result(
    kind="ab",
    findings={"pairs": [{"ratio": 1.5, "interval": (1.4, 1.6)}]},
    blocks=[{"seconds": [1.0, 2.0]}],
    settings={"eps": 0.02},
    data={"name": "outrider", "hash": "d1"},
    target={"model": "demo", "model_hash": "m1"},
    seeds={"sampling": 7},
    provenance={"commit": "c1", "versions": {"torch": "2"}},
)


def test_a_result_comes_back_as_it_was(tmp_path):
    RESULT.write(tmp_path / "new" / "ab.json")
    again = load(tmp_path / "new" / "ab.json")
    assert again.to_json() == RESULT.to_json()
    assert again.metric_version == METRIC_VERSION


def test_findings_stand_beside_the_envelope_s_keys(tmp_path):
    RESULT.write(tmp_path / "ab.json")
    held = json.loads((tmp_path / "ab.json").read_text())
    assert held["pairs"][0]["ratio"] == 1.5
    assert list(held)[-1] == "blocks"  # the long part last


def test_findings_cannot_take_an_envelope_s_name():
    with pytest.raises(AssertionError, match="blocks"):
        Result(kind="ab", findings={"blocks": []})


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "ab.json"
    RESULT.write(path)
    before = path.read_text()
    monkeypatch.setattr("os.fsync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_text(path, "half")
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["ab.json"]


def test_records_numbers_and_arrays_become_plain():
    held = {
        "record": Record(name="x", pair=Pair(1.0, float("inf"))),
        "colour": Colour.RED,
        "array": np.arange(3),
        "scalar": np.float32(0.5),
        3: {1},
        "nan": float("nan"),
    }
    assert plain(held) == {
        "record": {"name": "x", "pair": {"low": 1.0, "high": None}},
        "colour": "red",
        "array": [0, 1, 2],
        "scalar": 0.5,
        "3": [1],
        "nan": None,
    }
    json.dumps(plain(held), allow_nan=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no result file"),
        ("[1]", "no result file"),
        ('{"kind": "ab"}', "no result file"),
        ('{"kind": "ab", "schema_version": 99}', "schema version 99"),
    ],
)
def test_what_is_no_result_is_refused_with_a_remedy(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--json FILE"):
        load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"name": "outrider", "hash": "d2"}}, "data hash is 'd1' in one and 'd2'"),
        ({"target": {"model": "demo", "model_hash": "m2"}}, "model hash"),
        ({"target": {"model": "other"}}, "model is 'demo'"),
        ({"metric_version": METRIC_VERSION + 1}, "metric version"),
        ({"kind": "load"}, "kind"),
    ],
)
def test_what_measures_something_else_is_not_compared(change, message):
    with pytest.raises(ConfigError, match=message):
        check_comparable(RESULT, replace(RESULT, **change))


def test_without_a_hash_on_one_side_the_model_s_name_counts():
    check_comparable(RESULT, replace(RESULT, target={"model": "demo"}))


def test_differences_name_settings_versions_and_commit():
    other = replace(
        RESULT, settings={"eps": 0.05}, provenance={"commit": "c1", "versions": {"torch": "3"}}
    )
    assert differences(RESULT, other) == [("eps", "0.02", "0.05"), ("torch", "2", "3")]
    assert differences(RESULT, RESULT) == []


def test_the_hash_of_content_does_not_see_order_of_keys():
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})
    assert content_hash("ä") == content_hash("ä")
