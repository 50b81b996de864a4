"""What the registered verifiers declare."""

import pytest

from outrider.registry import VERIFIERS
from outrider.verify.base import Accepts, Exactness, Verifier


@pytest.mark.parametrize("name", ["greedy", "sampled", "rejection"])
def test_registered_verifiers_declare_themselves(name):
    verifier: Verifier = VERIFIERS.load(name)()
    assert verifier.name == name
    assert isinstance(verifier.exactness, Exactness)
    assert isinstance(verifier.accepts, Accepts)
    assert verifier.keyed_by in ("position", "root")
    assert verifier.greedy_only == (verifier.exactness is Exactness.EXACT_GREEDY)


def test_only_position_keyed_rules_promise_branches_without_laws():
    assert VERIFIERS.load("sampled").accepts.branches
    assert not VERIFIERS.load("rejection").accepts.branches


def test_exactness_reads_as_its_text():
    assert [f"{e}" for e in Exactness] == ["exact", "exact-greedy", "lossy"]
