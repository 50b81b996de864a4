"""What the registered verifiers declare."""

import pytest

from outrider.registry import VERIFIERS
from outrider.step import Kind
from outrider.verify.base import Exactness, Verifier


@pytest.mark.parametrize("name", VERIFIERS.names())
def test_registered_verifiers_declare_themselves(name):
    verifier: Verifier = VERIFIERS.load(name)()
    assert verifier.name == name
    assert isinstance(verifier.exactness, Exactness)
    assert verifier.accepts
    assert verifier.accepts <= frozenset(Kind)
    assert verifier.keyed_by in ("position", "root")
    assert verifier.greedy_only == (verifier.exactness is Exactness.EXACT_GREEDY)


def test_only_position_keyed_rules_promise_branches_without_laws():
    assert VERIFIERS.load("sampled").accepts == frozenset(Kind)
    assert Kind.PICKED_TREE not in VERIFIERS.load("rejection").accepts


def test_exactness_reads_as_its_text():
    assert [f"{e}" for e in Exactness] == ["exact", "exact-greedy", "lossy", "synthetic"]
