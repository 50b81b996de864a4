"""Names to classes: built-ins and plug-ins through the same door."""

from importlib.metadata import EntryPoint

import pytest

from outrider import registry
from outrider.draft.ngram import NgramDrafter
from outrider.errors import ConfigError
from outrider.registry import DRAFTERS, VERIFIERS, Registered, Registry

GROUP = "outrider.tests"
BUILTINS = {"ours": "outrider.draft.ngram:NgramDrafter"}


def plugged(monkeypatch, *points):
    """A registry beside which these (name, target) plug-ins are installed."""
    installed = [EntryPoint(name=name, value=target, group=GROUP) for name, target in points]
    installed.append(EntryPoint(name="stray", value="nowhere:Stray", group="another.group"))
    monkeypatch.setattr(
        registry, "entry_points", lambda *, group: [p for p in installed if p.group == group]
    )
    return Registry("drafter", GROUP, BUILTINS)


@pytest.mark.parametrize("parts", [DRAFTERS, VERIFIERS], ids=["drafters", "verifiers"])
def test_every_built_in_can_be_loaded_and_bears_its_name(parts):
    builtins = [part for part in parts if part.source == "outrider"]
    assert builtins
    for part in builtins:
        assert parts.load(part.name).name == part.name


def test_a_plug_in_is_listed_and_loaded_like_a_built_in(monkeypatch):
    parts = plugged(monkeypatch, ("theirs", "outrider.testing.drafters:ScriptedDrafter"))
    assert parts.names() == ["ours", "theirs"]
    assert list(parts)[1] == Registered("theirs", "outrider.testing.drafters:ScriptedDrafter", "?")
    assert parts.load("theirs").__name__ == "ScriptedDrafter"
    assert parts.load("ours") is NgramDrafter


def test_a_plug_in_is_imported_only_when_it_is_used(monkeypatch):
    parts = plugged(monkeypatch, ("broken", "no_such_module:Thing"))
    assert parts.names() == ["ours", "broken"]
    assert parts.load("ours") is NgramDrafter
    with pytest.raises(ConfigError, match=r"no_such_module.* repair or uninstall"):
        parts.load("broken")


def test_a_plug_in_may_not_take_the_name_of_a_built_in(monkeypatch):
    parts = plugged(monkeypatch, ("ours", "their.module:Thing"))
    with pytest.raises(ConfigError, match=r"'their\.module:Thing' takes .*built-in drafter 'ours'"):
        parts.names()
    assert parts.load("ours") is NgramDrafter, "nobody gets the other by mistake"


def test_two_plug_ins_may_not_share_a_name(monkeypatch):
    parts = plugged(monkeypatch, ("x", "one:Thing"), ("y", "y:Y"), ("x", "two:Thing"))
    with pytest.raises(ConfigError, match=r"'two:Thing' .*another drafter 'x' \(one:Thing\)"):
        parts.names()


def test_an_unknown_name_is_an_error_with_the_nearest(monkeypatch):
    parts = plugged(monkeypatch, ("theirs", "a:B"))
    with pytest.raises(ConfigError, match="unknown drafter 'their'; did you mean 'theirs'"):
        parts.load("their")
