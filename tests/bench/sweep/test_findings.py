"""Where a curve crosses 1."""

import pytest

from outrider.bench.sweep.findings import crossing


def test_the_crossing_lies_between_the_loads() -> None:
    assert crossing([(1, 2.0), (4, 1.25), (16, 0.8)]) == pytest.approx(8.0)


def test_a_load_that_gains_nothing_is_the_crossing() -> None:
    assert crossing([(1, 2.0), (8, 1.0), (16, 0.5)]) == pytest.approx(8.0)


@pytest.mark.parametrize("curve", [[], [(1, 2.0)], [(1, 2.0), (8, 1.1)], [(1, 0.9), (8, 0.5)]])
def test_a_curve_on_one_side_of_1_has_none(curve: list[tuple[int, float]]) -> None:
    assert crossing(curve) is None


def test_a_curve_that_rises_has_none_until_it_falls() -> None:
    assert crossing([(1, 0.8), (4, 1.25), (16, 0.8)]) == pytest.approx(8.0)
