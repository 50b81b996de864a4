"""PassTime against machines whose prices are known."""

import itertools
import random

import pytest

from outrider.control.pass_time import NODES, PassTime


def seconds(num_rows):
    """Flat to 12 rows, then linear: a ridge, as processors have."""
    return 0.004 * max(1.0, num_rows / 12)


def learn(table, rows, num_timings=300, *, noise=0.05, factor=1.0, seed=0):
    rng = random.Random(seed)
    for _ in range(num_timings):
        num_rows = rng.choice(rows)
        taken = factor * seconds(num_rows) * max(rng.gauss(1, noise), 0.3)
        table.observe(num_rows, 0, 0, taken)


@pytest.mark.parametrize("num_rows", [1, 5, 12, 20, 40, 64])
def test_what_was_timed_is_predicted(num_rows):
    table = PassTime()
    learn(table, [1, 2, 4, 5, 8, 12, 16, 20, 24, 32, 40, 48, 64])
    assert table.predict(num_rows) == pytest.approx(seconds(num_rows), rel=0.1)


def test_between_two_timings_it_interpolates():
    table = PassTime()
    learn(table, [24, 96], noise=0.0)
    assert seconds(24) < table.predict(48) < seconds(96)


def test_a_curve_never_falls_whatever_was_timed():
    table = PassTime()
    for _ in range(50):
        table.observe(8, 0, 0, 0.02)
        table.observe(16, 0, 0, 0.01)
    curve = table.curve(32)
    assert all(low <= high for low, high in itertools.pairwise(curve))
    assert curve[0] == 0.0


def test_a_slower_machine_is_told_from_one_dear_batch_size():
    """Twice as slow at the sizes that still run: the others are expected to be so too."""
    table = PassTime()
    learn(table, [1, 4, 16, 64])
    learn(table, [4, 16], 60, factor=2.0, seed=1)
    assert table.predict(1) == pytest.approx(2 * seconds(1), rel=0.3)
    only_one = PassTime()
    learn(only_one, [1, 4, 16], 200)
    learn(only_one, [64], 30, factor=2.0, seed=2)  # a size nobody had timed
    assert only_one.predict(1) == pytest.approx(seconds(1), rel=0.15)
    assert only_one.predict(64) == pytest.approx(2 * seconds(64), rel=0.15)


def test_one_hiccup_changes_little():
    table = PassTime()
    learn(table, [1, 2, 4])
    before = table.predict(2)
    table.observe(2, 0, 0, 100 * before)
    assert table.predict(2) < 1.5 * before


def test_long_contexts_cost_what_they_were_timed_to():
    table, rng = PassTime(context_price=1e-5), random.Random(0)
    for _ in range(600):
        num_rows, context = rng.choice([1, 2, 8]), rng.choice([0, 1000, 16000])
        visits = (num_rows - 1) * context
        taken = 0.004 + 4e-7 * context + 1e-7 * visits
        table.observe(num_rows, context, visits, taken * rng.gauss(1, 0.03))
    assert table.predict(1, 16000) == pytest.approx(0.0104, rel=0.12)
    assert table.predict(8, 16000, 7 * 16000) == pytest.approx(0.0216, rel=0.15)
    assert table.visit_s == pytest.approx(1e-7, rel=0.4)


def test_doubt_falls_with_timings_and_hope_is_never_dearer():
    table = PassTime()
    learn(table, [1, 2], 20)
    assert table.uncertainty(2) < 0.3 * table.uncertainty(256)
    for hopeful, usual in zip(table.curve(64, hopeful=True), table.curve(64), strict=True):
        assert hopeful <= usual


def test_saved_and_loaded_it_predicts_the_same():
    table, other = PassTime(), PassTime()
    learn(table, [1, 4, 16])
    other.load(table.to_json())
    for num_rows in (1, 3, 16, 100):
        assert other.predict(num_rows, 500) == pytest.approx(table.predict(num_rows, 500))


@pytest.mark.parametrize(
    "broken", [{"rows": [1, 2]}, {"seconds": [0.0] * len(NODES)}, {"seconds": [1.0]}]
)
def test_a_table_of_another_form_is_refused(broken):
    table = PassTime()
    with pytest.raises((ValueError, IndexError)):
        table.load({**PassTime().to_json(), **broken})


def test_rows_beyond_the_table_are_no_error():
    assert PassTime().predict(10 * NODES[-1]) >= PassTime().predict(NODES[-1])
    assert len(PassTime().curve(3 * NODES[-1])) > 3 * NODES[-1]
