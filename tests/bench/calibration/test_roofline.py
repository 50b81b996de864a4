"""The fit finds the numbers that made the timings, and the table never falls."""

from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from outrider.bench.calibration.roofline import Point, fit, monotone

SHAPES = [
    (sequences, rows, context)
    for context in (64, 256, 1024)
    for sequences in (1, 2, 4, 8, 16, 32, 64)
    for rows in (1, 4)
]


def points(seconds, shapes=SHAPES):
    made = [Point(*shape, 1.0) for shape in shapes]
    return [point._replace(seconds=seconds(point)) for point in made]


def roof(point, *, weights=4e-3, row=5e-4, byte=2e-6, work=3e-7, overhead=4e-4):
    """Ridge at weights / row rows."""
    reading = point.num_read * byte + point.num_visits * work
    return max(weights, point.num_rows * row) + reading + overhead


def test_a_point_counts_rows_bytes_and_work() -> None:
    point = Point(num_sequences=3, rows_each=4, context=100, seconds=1.0)
    assert (point.num_rows, point.num_read, point.num_visits) == (12, 300, 900)


def test_the_fit_finds_what_made_the_timings() -> None:
    found = fit(points(roof))
    assert found.ridge == pytest.approx(8.0, rel=0.1)
    assert found.row_s == pytest.approx(5e-4, rel=0.03)
    assert found.byte_s == pytest.approx(2e-6, rel=0.05)
    assert found.work_s == pytest.approx(3e-7, rel=0.05)
    assert found.error < 0.01


def test_a_ridge_beyond_what_was_timed_is_not_told() -> None:
    found = fit(points(lambda point: roof(point, weights=1.0)))
    assert found.ridge is None
    assert found.seconds(Point(1, 1, 64, 1.0)) == pytest.approx(1.0, rel=0.01)


def test_no_term_is_negative_however_odd_the_timings() -> None:
    found = fit(points(lambda point: 1.0 / point.num_rows))
    assert min(found.row_s, found.byte_s, found.work_s, found.overhead_s, found.weights_s) >= 0.0


def test_two_timings_are_too_few() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        fit(points(roof, SHAPES[:2]))


@given(st.lists(st.floats(1e-6, 10.0), min_size=1, max_size=20))
def test_the_table_rises_and_keeps_what_rises_already(seconds: list[float]) -> None:
    found = monotone(seconds)
    assert len(found) == len(seconds)
    assert all(a <= b * (1 + 1e-12) for a, b in pairwise(found))
    assert monotone(sorted(seconds)) == pytest.approx(sorted(seconds))


def test_a_dip_is_shared_by_its_neighbours() -> None:
    assert monotone([1.0, 4.0, 1.0, 8.0]) == pytest.approx([1.0, 2.0, 2.0, 8.0])
