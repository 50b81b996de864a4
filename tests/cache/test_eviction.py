"""EvictionOrder: least recently let go of first."""

import pytest

from outrider.cache.eviction import EvictionOrder


def test_pops_in_the_order_of_letting_go() -> None:
    order = EvictionOrder()
    for block in (3, 1, 2):
        order.add(block)
    assert list(order) == [3, 1, 2]
    assert [order.pop(), order.pop(), order.pop()] == [3, 1, 2]
    assert len(order) == 0


def test_a_block_in_use_again_goes_to_the_back_when_let_go() -> None:
    order = EvictionOrder()
    order.add(1)
    order.add(2)
    order.remove(1)
    assert 1 not in order
    order.add(1)
    assert [order.pop(), order.pop()] == [2, 1]


def test_letting_go_twice_is_a_bug() -> None:
    order = EvictionOrder()
    order.add(1)
    with pytest.raises(AssertionError, match="block 1 was let go twice"):
        order.add(1)
