"""allocate against every choice there is."""

import itertools
import random

import numpy as np
import pytest

from outrider.control.acceptance import Forecast
from outrider.control.allocation import DraftPrice, Ladder, alike, allocate, evaluate


class Price:
    """Passes are flat up to a ridge, drafting by call, depth, row and node."""

    def __init__(self, draft, ridge=8, num_rows=4):
        self._draft, self._ridge, self._num_rows = draft, ridge, num_rows

    def step(self, nodes_U):
        return 1.0 * np.maximum(1.0, (self._num_rows + nodes_U) / self._ridge)

    def at(self, num_nodes):
        return float(self.step(np.array([num_nodes]))[0])

    def draft(self, drafter):
        return self._draft[drafter]


def ladder(acceptance, depth=4, coverage=1.0, drafter="m", weight=1.0, entry=0.0, num_nodes=1.0):
    return Ladder(
        Forecast([coverage] * depth, [coverage * acceptance**i for i in range(1, depth + 1)]),
        num_nodes,
        weight,
        drafter,
        entry,
    )


def best_of_all(ladders, num_tokens, price):
    deep = [range(len(one.forecast.stands) + 1) for one in ladders]
    every = (evaluate(ladders, depths, num_tokens, price) for depths in itertools.product(*deep))
    return max(every, key=lambda chosen: chosen.goodput)


DRAFTERS = {
    "m": DraftPrice(0.05, 0.08, 0.01, 0.002),
    "lookup": DraftPrice(0.0, 0.0, 0.001, 0.0),
}


def some_rows(rng):
    return [
        ladder(
            rng.random(),
            rng.randint(1, 4),
            rng.choice([0.3, 1.0]),
            rng.choice(list(DRAFTERS)),
            rng.choice([1.0, 0.5]),
            rng.choice([0.0, 0.02]),
        )
        for _ in range(4)
    ]


def test_it_is_nearly_as_good_as_the_best_of_all_choices():
    """Not exactly: prefixes in order of yield are searched, not every set."""
    shares = []
    for seed in range(40):
        rng = random.Random(seed)
        ladders, price = some_rows(rng), Price(DRAFTERS, ridge=rng.choice([2, 6, 12, 100]))
        chosen = allocate(ladders, 4.0, price)
        again = evaluate(ladders, chosen.depths, 4.0, price)
        assert again.goodput == pytest.approx(chosen.goodput)
        shares.append(chosen.goodput / best_of_all(ladders, 4.0, price).goodput)
    assert max(shares) <= 1.0 + 1e-9
    assert min(shares) >= 0.94
    assert sum(shares) / len(shares) >= 0.995


def test_of_one_row_the_best_depth_is_found():
    for seed in range(40):
        rng = random.Random(seed)
        [row, *_], price = some_rows(rng), Price(DRAFTERS, ridge=rng.choice([1, 2, 4]), num_rows=1)
        chosen = allocate([row], 1.0, price)
        best = best_of_all([row], 1.0, price)
        assert (chosen.depths, chosen.goodput) == (best.depths, pytest.approx(best.goodput))


def test_rows_alike_are_priced_as_each_of_them():
    row, price = ladder(0.7, coverage=0.6, weight=0.5, entry=0.02, num_nodes=2.0), Price(DRAFTERS)
    found = list(alike(row, 3, 3.0, price))
    assert [chosen.depths for chosen in found] == [[depth] * 3 for depth in (1, 2, 3, 4)]
    for chosen in found:
        again = evaluate([row] * 3, chosen.depths, 3.0, price)
        assert (chosen.tokens, chosen.seconds) == pytest.approx((again.tokens, again.seconds))


def test_where_a_pass_is_flat_all_drafts_are_taken():
    free = {"m": DraftPrice(0.0, 0.0, 0.0, 0.0)}
    chosen = allocate([ladder(0.5)] * 3, 3.0, Price(free, ridge=1000))
    assert chosen.depths == [4, 4, 4]


def test_where_every_row_costs_its_share_none_is_taken():
    chosen = allocate([ladder(0.9)] * 4, 4.0, Price(DRAFTERS, ridge=1))
    assert chosen.depths == [0, 0, 0, 0]
    assert chosen.goodput == pytest.approx(1.0)


def test_the_likelier_draft_goes_deeper():
    lookup = {"lookup": DraftPrice(0.0, 0.0, 0.0, 0.0)}
    rows = [ladder(0.9, 8, drafter="lookup"), ladder(0.3, 8, drafter="lookup")]
    chosen = allocate(rows, 2.0, Price(lookup, ridge=6, num_rows=2))
    assert chosen.depths[0] > chosen.depths[1]


def test_one_good_row_does_not_make_all_pay_for_depth():
    """A pass of the draft model per depth serves one row alone behind depth 1."""
    rows = [ladder(0.95, 8), *[ladder(0.6, 1)] * 7]
    price = Price({"m": DraftPrice(0.0, 0.5, 0.0, 0.0)}, ridge=1000, num_rows=8)
    chosen = allocate(rows, 8.0, price)
    assert chosen.depths[1:] == [1] * 7
    assert chosen.goodput == pytest.approx(best_of_all(rows, 8.0, price).goodput)


def test_latency_targets_are_kept_by_taking_less():
    rows = [ladder(0.9, 8)] * 2
    price = Price({"m": DraftPrice(0.0, 0.2, 0.0, 0.0)}, ridge=1000, num_rows=2)
    free = allocate(rows, 2.0, price)
    bound = allocate(rows, 2.0, price, lambda chosen: max(1.0, chosen.seconds / 1.5))
    assert free.seconds > 1.5
    assert 0 < max(bound.depths) < max(free.depths)
    assert bound.seconds <= 1.5
    nothing = allocate(rows, 2.0, price, lambda chosen: 1.0 + chosen.seconds)
    assert nothing.depths == [0, 0]  # the shortest step misses least


@pytest.mark.parametrize("num_rows", [1, 3])
def test_latency_targets_are_kept_by_drafting_at_a_loss(num_rows):
    """Drafts for one row are dear for all others, and its time per token asks for them."""
    rows = [ladder(0.9, 6), *[ladder(0.1, 6)] * (num_rows - 1)]
    price = Price({"m": DraftPrice(0.3, 0.1, 0.0, 0.0)}, ridge=1000, num_rows=8)

    def misses(chosen):
        expected = 1.0 + sum(rows[0].forecast.stands[: chosen.depths[0]])
        return max(1.0, chosen.seconds / (0.6 * expected))

    free, bound = allocate(rows, 8.0, price), allocate(rows, 8.0, price, misses)
    assert not any(free.depths)
    assert misses(free) > 1.5
    assert misses(bound) == 1.0
    assert bound.depths[0] > 0
    assert bound.goodput < free.goodput


def test_nothing_to_take_is_plain_decoding():
    assert allocate([], 3.0, Price(DRAFTERS)).depths == []
    empty = Ladder(Forecast([0.0], [0.0]), 1.0, 1.0, "m")
    assert allocate([empty], 1.0, Price(DRAFTERS)).depths == [0]
