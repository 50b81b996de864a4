"""KVPool: sizes, finite garbage, and copies that read before they write."""

import pytest
import torch

from outrider.cache.pool import KVPool
from outrider.errors import ConfigError

SHAPES = [(2, 4, 3), (1, 8, 8)]


def make_pool(num_blocks: int = 3, block_size: int = 4) -> KVPool:
    return KVPool(SHAPES, num_blocks, block_size, torch.float32, torch.device("cpu"))


def number_slots(pool: KVPool) -> None:
    """Every element of a slot becomes the slot's number, so a copy shows where it came from."""
    for layer in pool.layers:
        for part in layer:
            part[:] = torch.arange(len(part), dtype=part.dtype)[:, None, None]


def contents(pool: KVPool) -> list[int]:
    """What each slot says; fails if layers, or keys and values, disagree."""
    parts = [part for layer in pool.layers for part in layer]
    for part in parts:
        assert (part == parts[0][:, :1, :1]).all()
    return [int(value) for value in parts[0][:, 0, 0]]


def test_layers_have_their_own_shapes_and_start_at_zero() -> None:
    pool = make_pool()
    assert [layer.keys.shape for layer in pool.layers] == [(12, 2, 4), (12, 1, 8)]
    assert [layer.values.shape for layer in pool.layers] == [(12, 2, 3), (12, 1, 8)]
    assert all((part == 0).all() for layer in pool.layers for part in layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_bytes_per_block_is_what_the_pool_really_takes(dtype: torch.dtype) -> None:
    pool = KVPool(SHAPES, 3, 4, dtype, torch.device("cpu"))
    assert pool.num_bytes == 3 * KVPool.bytes_per_block(SHAPES, 4, dtype)
    assert pool.num_bytes == 3 * 4 * (2 * 7 + 16) * dtype.itemsize


def test_copy_slots_in_all_layers() -> None:
    pool = make_pool()
    number_slots(pool)
    pool.copy_slots([7, 2], [0, 11])
    assert contents(pool) == [7, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 2]


@pytest.mark.parametrize(
    ("sources", "destinations"), [([1, 2, 3], [0, 1, 2]), ([0, 1, 2], [1, 2, 3]), ([0, 1], [1, 0])]
)
def test_overlapping_copies_read_before_they_write(
    sources: list[int], destinations: list[int]
) -> None:
    pool = make_pool()
    number_slots(pool)
    expected = list(range(12))
    for source, destination in zip(sources, destinations, strict=True):
        expected[destination] = source
    pool.copy_slots(sources, destinations)
    assert contents(pool) == expected


def test_copying_nothing_changes_nothing() -> None:
    pool = make_pool()
    number_slots(pool)
    pool.copy_slots([], [])
    assert contents(pool) == list(range(12))


def test_copy_block_moves_its_slots_and_no_others() -> None:
    pool = make_pool()
    number_slots(pool)
    pool.copy_block(2, 0)
    assert contents(pool) == [8, 9, 10, 11, 4, 5, 6, 7, 8, 9, 10, 11]


def test_a_pool_without_blocks_is_refused_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match=r"num_blocks=0.*more memory"):
        make_pool(num_blocks=0)
