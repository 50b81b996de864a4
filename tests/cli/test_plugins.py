"""`outrider plugins`: what is there, for people and for programs."""

import json
from importlib.metadata import EntryPoint

import pytest

from outrider import registry
from outrider.registry import DRAFTERS, POLICIES, VERIFIERS


def test_json_has_exactly_these_keys(call):
    found = json.loads(call("plugins", "--json").stdout)
    assert set(found) == {"drafters", "verifiers", "policies"}
    for part in found["drafters"]:
        assert set(part) == {"name", "needs", "warmth", "source"}
        assert isinstance(part["needs"], list)
        assert part["warmth"] in ("R0", "R1", "R2")
    for part in found["verifiers"]:
        assert set(part) == {"name", "exactness", "source"}
        assert part["exactness"] in ("exact", "exact-greedy", "lossy", "synthetic")
    assert [part["name"] for part in found["drafters"]] == DRAFTERS.names()
    assert [part["name"] for part in found["verifiers"]] == VERIFIERS.names()
    assert found["policies"] == [{"name": n, "source": "outrider"} for n in POLICIES.names()]
    assert "adaptive" in POLICIES.names()
    assert {"name": "ngram", "needs": [], "warmth": "R0", "source": "outrider"} in found["drafters"]
    assert {"name": "greedy", "exactness": "exact-greedy", "source": "outrider"} in found[
        "verifiers"
    ]


def test_the_list_names_all_of_them(call):
    lines = call("plugins").stdout.splitlines()
    names = [line.split()[0] for line in lines]
    drafters, verifiers, policies = DRAFTERS.names(), VERIFIERS.names(), POLICIES.names()
    assert names == ["drafters", *drafters, "verifiers", *verifiers, "policies", *policies]


def test_a_strangers_part_is_listed_with_its_source(call, monkeypatch):
    part = "outrider.draft.ngram:NgramDrafter"
    monkeypatch.setitem(DRAFTERS._builtins, "theirs", part)
    assert "theirs" in [p["name"] for p in json.loads(call("plugins", "--json").stdout)["drafters"]]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("theirs", "cannot be loaded from 'no_such_module:X'"), ("ngram", "takes the name of the")],
)
@pytest.mark.parametrize("args", [(), ("--json",)])
def test_a_broken_plug_in_is_told_with_its_reason(call, monkeypatch, args, name, reason):
    expected = call("plugins", *args).stdout
    point = EntryPoint(name=name, value="no_such_module:X", group=DRAFTERS.group)
    monkeypatch.setattr(
        registry, "entry_points", lambda *, group: [point] if group == point.group else []
    )
    result = call("plugins", *args)
    assert result.stdout == expected
    (line,) = result.stderr.splitlines()
    assert line.startswith("broken: ")
    assert reason in line
