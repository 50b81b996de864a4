"""Which other ways to run a head are tried."""

from dataclasses import replace
from pathlib import Path

import pytest

from outrider.doctor.switches import changes, switches_of
from outrider.models.heads.spec import HeadSpec
from tests.models.heads.heads_for_tests import eagle3
from tests.models.heads.layouts import L


def tried(spec: HeadSpec) -> set[str]:
    """Names of the conventions that some switch turns."""
    turned = (switch.turn(spec.conventions) for switch in switches_of(spec, L))
    return {name for way in turned if way for name in changes(way, spec.conventions)}


@pytest.mark.parametrize("num_features", [0, 3])
def test_a_head_over_the_last_state_alone_may_read_it_before_the_norm(
    tmp_path: Path, num_features: int
) -> None:
    """One that fuses several layers reads none of them normed, so there is nothing to try."""
    spec = eagle3(tmp_path).spec
    layers = spec.conventions.feature_layers[:num_features]
    spec = replace(
        spec,
        widths=replace(spec.widths, num_features=num_features),
        conventions=replace(spec.conventions, feature_layers=layers),
    )
    assert ("input_state" in tried(spec)) == (num_features == 0)
    assert ("feature_layers" in tried(spec)) == (num_features == 3)
    assert "feedback" in tried(spec)
