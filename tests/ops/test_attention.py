"""Attention of every implementation: what the definition says, and the same bits in any pass."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings, strategies as st

from outrider.ops.base import Ops, Window
from tests.ops.world import CPU, JUNK, Part, World
from tests.twins.naive_ops import NaiveOps

# query heads, key/value heads, key width, value width
SHAPES = [
    (4, 4, 16, 16),
    (6, 2, 64, 64),
    (8, 1, 32, 32),
    (9, 3, 8, 8),
    (4, 2, 128, 128),
    (2, 1, 256, 256),
    (5, 1, 24, 24),
    (2, 2, 40, 40),
    (14, 2, 80, 80),
    (4, 2, 40, 24),
    (3, 1, 7, 33),
]
OPTIONS = {
    "plain": {},
    "sliding": {"window": Window(sliding=9)},
    "only itself": {"window": Window(sliding=1)},
    "chunk": {"window": Window(chunk=16)},
    "sliding in chunks": {"window": Window(sliding=5, chunk=64)},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks_H": True},
    "all": {"window": Window(sliding=70, chunk=100), "softcap": 2.0, "sinks_H": True},
}
FORK = Part(133, 3, (-1, 0, 0, -1, 3, 1), (136, 137, 138, 139, 140, 141))
MIXED = (Part(0, 5), Part(61, 6, (-1, -1, 1), (67, 68, 69)), FORK, Part(127, 1))


def made(options: dict, heads: int) -> dict:
    """With sinks where they are asked for: some above all scores, some far below."""
    sinks_H = torch.linspace(-8, 8, heads)
    return {key: sinks_H if key == "sinks_H" else value for key, value in options.items()}


@pytest.mark.parametrize("block_size", [1, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_heads_of_any_number_and_width_are_as_the_twin_says(ops: Ops, shape, block_size):
    heads, groups, width, value_width = shape
    world = World(heads, groups, width, 145, value_width=value_width, block_size=block_size)
    parts = (Part(0, 5), Part(62, 3, (-1, -1, 1), (67, 68, 69)), Part(127, 2))
    expected = world.run(NaiveOps(), *parts)
    torch.testing.assert_close(world.run(ops, *parts), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_windows_caps_and_sinks_are_as_the_twin_says(ops: Ops, name):
    world = World(6, 2, 24, 145, block_size=4)
    options = made(OPTIONS[name], 6)
    expected = world.run(NaiveOps(), *MIXED, **options)
    torch.testing.assert_close(world.run(ops, *MIXED, **options), expected, rtol=1e-4, atol=1e-5)
    if name != "plain":
        assert not torch.allclose(expected, world.run(ops, *MIXED), atol=1e-2)


def test_scores_too_large_for_an_exponential_are_weighed_all_the_same(ops: Ops):
    world = World(2, 1, 16, 145)
    for scale in (1e-30, 50.0, 1e4):
        expected = world.run(NaiveOps(), FORK, scale=scale)
        ours = world.run(ops, FORK, scale=scale)
        torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-3)


@st.composite
def parts_of_passes(draw):
    """Up to three sequences with trees of any shape; no two nodes hold the same row."""
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        cached, chain = (
            draw(st.sampled_from([0, 1, 50, 63, 120, 127, 130])),
            draw(st.sampled_from([1, 2, 5, 18])),
        )
        count = draw(st.integers(0, 14))
        parents = tuple(draw(st.integers(-1, node - 1)) for node in range(count))
        first = cached + chain
        parts.append(Part(cached, chain, parents, tuple(range(first, first + count))))
    return parts


@settings(max_examples=15)
@given(parts=parts_of_passes(), block_size=st.sampled_from([1, 2, 5, 16]))
def test_random_trees_are_as_the_twin_says(ops: Ops, parts, block_size):
    world = World(3, 1, 8, 170, block_size=block_size)
    expected = world.run(NaiveOps(), *parts)
    torch.testing.assert_close(world.run(ops, *parts), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=40)
@given(parts=parts_of_passes(), block_size=st.sampled_from([1, 2, 5, 16]))
def test_positions_and_slots_are_as_the_twin_says(ops: Ops, parts, block_size):
    spans = World(1, 1, 4, 170, block_size=block_size).spans(parts)
    ours, expected = ops.layout(spans, CPU), NaiveOps().layout(spans, CPU)
    assert ours.positions_N.tolist() == expected.positions_N.tolist()
    assert ours.slots_N.tolist() == expected.slots_N.tolist()
    assert ours.spans == spans


@pytest.mark.parametrize("block_size", [1, 16])
def test_the_last_row_of_a_long_context_is_as_the_twin_says(ops: Ops, block_size):
    world = World(2, 1, 24, 1400, block_size=block_size)
    part = Part(1298, 1, (-1, -1), (1299, 1300))
    for options in ({}, {"window": Window(sliding=700)}, {"window": Window(chunk=520)}):
        expected = world.run(NaiveOps(), part, **options)
        torch.testing.assert_close(world.run(ops, part, **options), expected, rtol=1e-4, atol=1e-5)


def test_key_value_rows_land_in_their_slots_and_nowhere_else(ops: Ops):
    world = World(4, 2, 24, 60, value_width=40, block_size=4)
    twin = World(4, 2, 24, 60, value_width=40, block_size=4)
    parts = (Part(5, 3, (-1, -1, 1), (20, 21, 22)), Part(0, 2))
    world.run(ops, *parts)
    twin.run(NaiveOps(), *parts)
    assert torch.equal(world.kv.keys, twin.kv.keys)
    assert torch.equal(world.kv.values, twin.kv.values)


def test_heads_may_be_views_of_one_fused_projection(ops: Ops):
    world = World(4, 2, 24, 40)
    spans = world.spans((Part(0, 30, (-1,), (30,)),))
    layout = ops.layout(spans, CPU)
    fused_NXD = torch.randn(31, 8, 24)
    query, keys, values = fused_NXD.split((4, 2, 2), dim=1)
    assert not query.is_contiguous()
    ops.write_kv(world.kv, keys, values, layout)
    seen = ops.attend(query, world.kv, layout, scale=0.2)
    assert torch.equal(world.kv.keys[layout.slots_N], keys)
    assert torch.equal(world.kv.values[layout.slots_N], values)
    expected = ops.attend(query.contiguous(), world.kv, layout, scale=0.2)
    assert torch.equal(seen, expected)
    transposed = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(ops.attend(transposed, world.kv, layout, scale=0.2), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [5, 64, 65, 150])
def test_bits_do_not_depend_on_chunks_or_drafts(ops: Ops, shape, length):
    heads, groups, width, value_width = shape
    world = World(heads, groups, width, length + 8, value_width=value_width, block_size=3)
    alone = torch.stack([world.alone(ops, i) for i in range(length)])
    assert torch.equal(world.run(ops, Part(0, length)), alone)
    for cut in {1, length // 2, length - 1}:
        parts = [world.run(ops, Part(0, cut)), world.run(ops, Part(cut, length - cut))]
        assert torch.equal(torch.cat(parts), alone)
    root = length - 4
    drafts = Part(root, 1, (-1, 0, 1), (root + 1, root + 2, root + 3))
    assert torch.equal(world.run(ops, drafts), alone[root:])
    # a tree in which the true path runs between junk siblings
    nodes = (JUNK, root + 1, root + 2, JUNK, JUNK, root + 3)
    tree = world.run(ops, Part(root, 1, (-1, -1, 1, 0, 2, 2), nodes))
    assert torch.equal(tree[[0, 2, 3, 6]], alone[root:])


@pytest.mark.parametrize("name", OPTIONS)
def test_windows_caps_and_sinks_keep_their_bits(ops: Ops, name):
    world, options = World(6, 2, 24, 150, block_size=4), made(OPTIONS[name], 6)
    alone = torch.stack([world.alone(ops, i, **options) for i in range(142)])
    parts = [world.run(ops, Part(at, 71), **options) for at in (0, 71)]
    assert torch.equal(torch.cat(parts), alone)
    nodes = (JUNK, 137, 138, JUNK, JUNK, 139)
    tree = world.run(ops, Part(136, 1, (-1, -1, 1, 0, 2, 2), nodes), **options)
    assert torch.equal(tree[[0, 2, 3, 6]], alone[136:140])


@pytest.mark.parametrize("num_threads", [1, 2, 16])
@pytest.mark.parametrize("shape", SHAPES[::3])
def test_bits_do_not_depend_on_company(ops: Ops, shape, num_threads):
    torch.set_num_threads(num_threads)
    heads, groups, width, value_width = shape
    world = World(heads, groups, width, 210, value_width=value_width)
    parts = [Part(0, 20), Part(150, 1, (-1, -1, 0), (151, JUNK, 152)), Part(70, 1)]
    rows = [world.run(ops, part) for part in parts]
    for order in itertools.permutations(range(3)):
        together = world.run(ops, *(parts[i] for i in order))
        assert torch.equal(together, torch.cat([rows[i] for i in order]))


@pytest.mark.parametrize("options", [{}, {"window": Window(sliding=600)}])
def test_bits_of_a_long_context_do_not_depend_on_chunks(ops: Ops, options):
    world = World(4, 2, 40, 1300, block_size=16)
    whole = world.run(ops, Part(0, 1300), **options)
    cuts = [0, 500, 511, 512, 513, 1023, 1026, 1299, 1300]
    parts = [world.run(ops, Part(a, b - a), **options) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(parts), whole)
    rng = random.Random(0)
    for root in [rng.randrange(1290) for _ in range(5)] + [510, 511, 1022, 1023]:
        tree = Part(root, 1, (-1, 0, -1, 2), (JUNK, JUNK, root + 1, root + 2))
        assert torch.equal(world.run(ops, tree, **options)[[0, 3, 4]], whole[root : root + 3])


def test_argmax_takes_the_lowest_id_of_equals(ops: Ops):
    for width in (1, 5, 16, 31, 97, 256):
        logits_RV = torch.randint(-3, 1, (40, width)).float() - 1e30
        expected = [row.index(max(row)) for row in logits_RV.tolist()]
        assert ops.argmax(logits_RV) == expected


def test_argmax_of_random_rows_is_the_index_of_the_largest(ops: Ops):
    for width in (1, 3, 16, 17, 1000):
        logits_RV = torch.randn(20, width)
        tokens = ops.argmax(logits_RV)
        assert tokens == NaiveOps().argmax(logits_RV)
        assert all(type(token) is int for token in tokens)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_argmax_of_no_number_is_minus_one_wherever_it_stands(ops: Ops, bad):
    logits_VV = torch.randn(37, 37).fill_diagonal_(bad)
    assert ops.argmax(logits_VV) == [-1] * 37
    logits_VV[::2] = -5.0
    assert ops.argmax(logits_VV) == [0, -1] * 18 + [0]


def test_argmax_of_hidden_tokens(ops: Ops):
    logits_RV = torch.full((3, 20), -torch.inf)
    logits_RV[1, 18] = -1e38
    logits_RV[2, 3] = 0.5
    assert ops.argmax(logits_RV) == [-1, 18, 3]
    assert ops.argmax(torch.empty(0, 20)) == []


def test_argmax_of_rows_that_are_not_in_one_piece(ops: Ops):
    logits_RV = torch.randn(6, 50)
    assert ops.argmax(logits_RV[:, 10:40]) == NaiveOps().argmax(logits_RV[:, 10:40])
    assert ops.argmax(logits_RV[::2]) == NaiveOps().argmax(logits_RV[::2])
    assert ops.argmax(logits_RV.t()) == NaiveOps().argmax(logits_RV.t())
