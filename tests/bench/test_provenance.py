"""Provenance: it says where and under what conditions, in words that leave the machine."""

import json
import re
import sys
import types
from collections.abc import Iterator

import pytest
import torch

import outrider
from outrider.bench import provenance


@pytest.fixture
def facts() -> dict:
    return provenance.Watch().facts()


def test_it_names_versions_machine_commit_and_conditions(facts):
    assert facts["versions"]["outrider"] == outrider.__version__
    assert {"torch", "transformers", "Python"} <= set(facts["versions"])
    assert facts["machine"]["cores"] >= 1
    assert facts["commit"]
    assert facts["conditions"]["threads"] >= 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", facts["conditions"]["started_at"])


def test_it_is_json_and_holds_nothing_unknown(facts):
    assert json.loads(json.dumps(facts)) == facts

    def values(held: object) -> Iterator[object]:
        for value in held.values() if isinstance(held, dict) else [held]:
            yield from values(value) if isinstance(value, dict) else [value]

    assert None not in list(values(facts))


def test_a_module_that_runs_is_told_as_one_types_it(monkeypatch):
    main = types.SimpleNamespace(__spec__=types.SimpleNamespace(name="benchmarks.speedup"))
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["/some/where/benchmarks/speedup.py", "--k", "a b"])
    assert provenance.command() == "python -m benchmarks.speedup --k 'a b'"
    main.__spec__.name = "benchmarks.peers.__main__"
    assert provenance.command().startswith("python -m benchmarks.peers --k")


def test_a_script_is_told_without_its_folder(monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", types.SimpleNamespace(__spec__=None))
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/outrider", "bench", "ab"])
    assert provenance.command() == "outrider bench ab"


def test_the_time_of_other_processes_is_a_share_of_all_cores():
    start = provenance._Busy(busy=10.0, total=100.0, own=1.0)
    end = provenance._Busy(busy=16.0, total=120.0, own=3.0)
    assert provenance._share_of_others(start, end) == pytest.approx((6 - 2) / 20)
    assert provenance._share_of_others(start, start) is None  # no time has passed
    assert provenance._share_of_others(None, end) is None


def test_the_machine_s_fingerprint_is_stable_and_sees_threads(monkeypatch):
    first = provenance.machine_fingerprint()
    assert provenance.machine_fingerprint() == first
    monkeypatch.setattr(provenance.torch, "get_num_threads", lambda: 997)
    assert provenance.machine_fingerprint() != first


def test_the_machine_s_fingerprint_is_of_the_process_as_it_stands():
    """Its threads now: whoever changes them has another machine until they are changed back."""
    first, before = provenance.machine_fingerprint(), torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert provenance.machine_fingerprint() != first
    finally:
        torch.set_num_threads(before)
    assert provenance.machine_fingerprint() == first


def test_what_cannot_be_read_is_left_out(monkeypatch):
    monkeypatch.setattr(provenance, "_text", lambda path: None)
    monkeypatch.setattr(provenance, "_output", lambda command: "")
    facts = provenance.provenance()
    assert "governor" not in facts["conditions"]
    assert "other_cpu_share" not in facts["conditions"]
    assert facts["machine"]["processor"] is not None


def test_markdown_has_a_line_for_each_fact():
    text = provenance.as_markdown({"commit": "abc", "load_average": [1.5, 2.0], "m": {"a_b": 2}})
    assert text == "- commit: abc\n- load average: 1.5 2.0\n- m: a b 2"
