"""Where a curve crosses 1, and how a prediction of it is told."""

import pytest

from outrider.bench.calibration.prediction import Predicted, Residual
from outrider.bench.pairs import Pair
from outrider.bench.statistics import Ratio
from outrider.bench.sweep.findings import break_even, crossing, summary, sweet_spots
from outrider.bench.sweep.grid import BASE, Cell, Place, Variant


def test_the_crossing_lies_between_the_loads() -> None:
    assert crossing([(1, 2.0), (4, 1.25), (16, 0.8)]) == pytest.approx(8.0)


def test_a_load_that_gains_nothing_is_the_crossing() -> None:
    assert crossing([(1, 2.0), (8, 1.0), (16, 0.5)]) == pytest.approx(8.0)


@pytest.mark.parametrize("curve", [[], [(1, 2.0)], [(1, 2.0), (8, 1.1)], [(1, 0.9), (8, 0.5)]])
def test_a_curve_on_one_side_of_1_has_none(curve: list[tuple[int, float]]) -> None:
    assert crossing(curve) is None


def test_a_curve_that_rises_has_none_until_it_falls() -> None:
    assert crossing([(1, 0.8), (4, 1.25), (16, 0.8)]) == pytest.approx(8.0)


def cell(concurrency: int, predicted: float, measured: float | None = None) -> Cell:
    """K=4 of one method at one load."""
    pair = residual = None
    if measured is not None:
        ratio = Ratio(
            ratio=measured,
            low=0.95 * measured,
            high=1.05 * measured,
            num_clusters=20,
            num_blocks=20,
        )
        pair = Pair(
            base=BASE,
            arm=BASE,
            ratio=ratio,
            null=ratio,
            verdict="undecided",
            sign_test=1.0,
            num_prompts=20,
            num_identical=20,
        )
        residual = Residual(measured / predicted - 1.0, "draft", {})
    return Cell(
        place=Place(0.0, None, concurrency),
        variant=Variant("draft_model", 4, BASE),
        predicted=Predicted(predicted, 1.0, 1.0, (0.0, 0.0, 0.0, 0.0), 1.0),
        pair=pair,
        residual=residual,
    )


def told(cells: list[Cell]) -> str:
    return " ".join(summary(cells, sweet_spots(cells), break_even(cells), []))


def test_a_prediction_has_a_range_of_what_predictions_were_off_by() -> None:
    cells = [cell(1, 2.0, 1.6), cell(4, 1.25, 1.0), cell(16, 0.8), cell(64, 0.4)]
    (row,) = break_even(cells)
    assert row["measured"] == pytest.approx(4.0)
    assert row["predicted"] == pytest.approx(8.0)
    assert row["error"] == pytest.approx(0.25)
    assert row["error_term"] == "draft"
    assert (row["predicted_from"], row["predicted_to"]) == pytest.approx((4.0, 16.0))
    assert (
        "breaks even at about 4 requests; 8 was predicted (from 4 up to 16, as predictions were "
        "25 % off here, mostly by draft)" in told(cells)
    )


def test_a_prediction_that_nothing_was_measured_of_says_so() -> None:
    cells = [cell(1, 2.0), cell(4, 1.25), cell(16, 0.8)]
    (row,) = break_even(cells)
    assert row["measured"] is row["error_term"] is None
    assert row["error"] == 0.15
    assert row["predicted_from"] < 8 < row["predicted_to"]
    assert "should break even at about 8 requests" in told(cells)
    assert "as predictions may be 15 % off); that was not measured" in told(cells)


def test_an_end_beyond_the_loads_is_left_open() -> None:
    cells = [cell(1, 1.3, 1.0), cell(4, 1.1), cell(16, 0.9)]
    (row,) = break_even(cells)
    assert row["predicted_to"] is None
