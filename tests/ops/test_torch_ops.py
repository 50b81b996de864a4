"""The reference kernels keep every bit, whatever the chunks, the drafts and the company."""

import itertools

import pytest
import torch

from outrider.ops.base import LayerKV, Span
from outrider.ops.linear import CANDIDATES, PROBED_ROWS, chosen, invariant, is_invariant
from outrider.ops.torch import TorchOps

CPU = torch.device("cpu")
SHAPES = [(4, 4, 16), (6, 2, 64), (8, 1, 32), (9, 3, 8), (4, 2, 128), (2, 1, 256)]


class World:
    """Queries, keys and values of one sequence, and of junk drafts beside it."""

    def __init__(self, heads: int, groups: int, width: int, length: int, seed: int = 0) -> None:
        make = torch.Generator().manual_seed(seed)
        self.query = torch.randn(length, heads, width, generator=make)
        self.keys = torch.randn(length, groups, width, generator=make)
        self.values = torch.randn(length, groups, width, generator=make)
        self.junk = torch.randn(64, heads, width, generator=make)
        self.pool = LayerKV(torch.zeros(2048, groups, width), torch.zeros(2048, groups, width))
        self.slots = torch.randperm(2048, generator=make).tolist()
        self.scale = width**-0.5

    def run(self, ops: TorchOps, spans: list[tuple[int, int, tuple[int, ...], list[int]]]):
        """Runs spans (num_cached, num_chain, parents, position of each node or -1 for junk)."""
        built, queries, keys, values = [], [], [], []
        for num_cached, num_chain, parents, real in spans:
            chain = list(range(num_cached, num_cached + num_chain))
            self._fill(num_cached)
            slots = self.slots[: num_cached + num_chain + len(parents)]
            built.append(Span(slots, num_cached, num_chain, parents))
            for position in [*chain, *real]:
                source = self if position >= 0 else None
                queries.append(source.query[position] if source else self.junk[len(queries) % 64])
                groups = self.keys.shape[1]
                keys.append(source.keys[position] if source else self.junk[-1][:groups])
                values.append(source.values[position] if source else self.junk[-2][:groups])
        layout = ops.layout(built, CPU)
        ops.write_kv(self.pool, torch.stack(keys), torch.stack(values), layout)
        return ops.attend(torch.stack(queries), self.pool, layout, scale=self.scale)

    def _fill(self, num_cached: int) -> None:
        at = torch.tensor(self.slots[:num_cached], dtype=torch.long)
        self.pool.keys[at] = self.keys[:num_cached]
        self.pool.values[at] = self.values[:num_cached]

    def alone(self, ops: TorchOps, position: int) -> torch.Tensor:
        return self.run(ops, [(position, 1, (), [])])[0]


@pytest.mark.parametrize(("heads", "groups", "width"), SHAPES)
@pytest.mark.parametrize("length", [5, 64, 65, 150])
def test_attention_bits_do_not_depend_on_chunks_or_drafts(heads, groups, width, length):
    ops, world = TorchOps(), World(heads, groups, width, length + 8)
    alone = torch.stack([world.alone(ops, i) for i in range(length)])
    whole = world.run(ops, [(0, length, (), [])])
    assert torch.equal(whole, alone)
    for cut in {1, length // 2, length - 1} - {0}:
        parts = [world.run(ops, [(0, cut, (), [])]), world.run(ops, [(cut, length - cut, (), [])])]
        assert torch.equal(torch.cat(parts), alone)
    root = length - 4
    drafts = world.run(ops, [(root, 1, (-1, 0, 1), [root + 1, root + 2, root + 3])])
    assert torch.equal(drafts, alone[root:])
    # a tree in which the true path runs between junk siblings
    tree = world.run(
        ops, [(root, 1, (-1, -1, 1, 0, 2, 2), [-1, root + 1, root + 2, -1, -1, root + 3])]
    )
    assert torch.equal(tree[[0, 2, 3, 6]], alone[root:])


@pytest.mark.parametrize("num_threads", [1, 2, 16])
@pytest.mark.parametrize(("heads", "groups", "width"), SHAPES)
def test_attention_bits_do_not_depend_on_company(heads, groups, width, num_threads):
    torch.set_num_threads(num_threads)
    ops, world = TorchOps(), World(heads, groups, width, 210)
    layouts = [(0, 20, (), []), (150, 1, (-1, -1, 0), [151, -1, 152]), (70, 1, (), [])]
    rows = [world.run(ops, [span]) for span in layouts]
    for order in itertools.permutations(range(3)):
        for_all = _run_side_by_side(ops, world, [layouts[i] for i in order])
        assert torch.equal(for_all, torch.cat([rows[i] for i in order]))


def _run_side_by_side(ops, world, layouts):
    """Each span gets slots of its own, so that they do not overwrite one another."""
    spans, queries, keys, values, at = [], [], [], [], 0
    for num_cached, num_chain, parents, real in layouts:
        size = num_cached + num_chain + len(parents)
        slots = world.slots[at : at + size]
        at += size
        cached = torch.tensor(slots[:num_cached], dtype=torch.long)
        world.pool.keys[cached] = world.keys[:num_cached]
        world.pool.values[cached] = world.values[:num_cached]
        spans.append(Span(slots, num_cached, num_chain, parents))
        for node, position in enumerate([*range(num_cached, num_cached + num_chain), *real]):
            groups = world.keys.shape[1]
            queries.append(world.query[position] if position >= 0 else world.junk[node])
            keys.append(world.keys[position] if position >= 0 else world.junk[-1][:groups])
            values.append(world.values[position] if position >= 0 else world.junk[-2][:groups])
    layout = ops.layout(spans, CPU)
    ops.write_kv(world.pool, torch.stack(keys), torch.stack(values), layout)
    return ops.attend(torch.stack(queries), world.pool, layout, scale=world.scale)


def test_invariant_linear_passes_its_own_probe_for_odd_shapes():
    for shape in [(4, 64), (8, 64), (64, 64), (172, 64), (97, 33), (1152, 384), (384, 1024)]:
        weight, bias = torch.randn(shape), torch.randn(shape[0])
        x = torch.randn(max(PROBED_ROWS), shape[1])
        linear = invariant(weight, bias)
        torch.testing.assert_close(
            linear(x), torch.nn.functional.linear(x, weight, bias), rtol=1e-4, atol=1e-3
        )
        assert is_invariant(linear, x, torch.nn.functional.linear(x, weight, bias))
        assert chosen(*shape, True, torch.get_num_threads()) in CANDIDATES


@pytest.mark.parametrize("num_threads", [1, 2, 3, 16])
@pytest.mark.parametrize("shape", [(640, 384), (384, 384), (172, 64), (4096, 160)])
def test_rows_keep_their_bits_beyond_what_was_probed(num_threads, shape):
    """Row counts that the probe never saw, on as many threads as a machine may have."""
    assert not {65, 100, 255, 700} & set(PROBED_ROWS)
    torch.set_num_threads(num_threads)
    linear = invariant(torch.randn(shape))
    x = torch.randn(700, shape[1])
    alone = torch.cat([linear(x[i : i + 1]) for i in (0, 64, 99, 254, 699)])
    for count, at in ((65, 64), (100, 99), (255, 254), (700, 699)):
        assert torch.equal(linear(x[:count])[at], alone[[64, 99, 254, 699].index(at) + 1])
        assert torch.equal(linear(x[:count])[0], alone[0])


def test_long_and_short_sequences_are_not_padded_to_one_length():
    """Memory: keys gathered stay near the keys seen, whatever the longest sequence."""
    spans = [Span(list(range(4001)), 4000, 1), *(Span(list(range(21)), 20, 1) for _ in range(31))]
    layout = TorchOps().layout(spans, CPU)
    gathered = sum(group.slots_BL.numel() for group in layout.plan)
    assert gathered < 2 * (4032 + 31 * 64)


def test_the_promise_ends_where_the_kernels_do_not_keep_it():
    ops = TorchOps()
    ops.linear(torch.randn(8, 8))
    assert ops.is_batch_invariant
    ops.linear(torch.randn(8, 8).bfloat16())
    assert not ops.is_batch_invariant


def test_the_probe_catches_a_product_that_depends_on_the_row_count():
    weight = torch.randn(64, 64)

    def depends(x):
        y = torch.nn.functional.linear(x, weight)
        return y if x.shape[0] > 1 else y + 1e-6

    x = torch.randn(max(PROBED_ROWS), 64)
    assert not is_invariant(depends, x, torch.nn.functional.linear(x, weight))


def test_the_slow_twin_of_the_linear_layers_is_invariant():
    weight = torch.randn(160, 96)
    x = torch.randn(max(PROBED_ROWS), 96)
    assert is_invariant(CANDIDATES["tiled"](weight, None), x, torch.nn.functional.linear(x, weight))
