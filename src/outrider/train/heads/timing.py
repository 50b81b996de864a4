"""Passes as the engine runs them, on garbage, for timing.

Shape legend: N rows of a pass, D width of what a row of a head is fed with.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from outrider.cache.pool import KVPool
from outrider.models.base import ModelSpec, Network
from outrider.models.heads.kv_network import KVNetwork
from outrider.models.heads.network import RowNetwork
from outrider.ops.base import Span

CONTEXT = 256  # tokens that each sequence has in its cache
BLOCK = 16
WARM, REPEATS = 2, 12


def target_pass(network: Network, num_sequences: int, num_nodes: int = 0) -> Callable[[], object]:
    """A row for each sequence, and a chain of draft nodes below it."""
    spec = network.spec
    spans, pool = _places(spec, num_sequences, num_nodes)
    num_rows = num_sequences * (1 + num_nodes)
    tokens_N = torch.zeros(num_rows, dtype=torch.long, device=spec.device)
    wanted_N = torch.arange(num_rows, device=spec.device)

    def run() -> object:
        layout = network.ops.layout(spans, spec.device)
        return network.forward(tokens_N, layout, pool.layers, wanted_N)

    return run


def row_pass(network: RowNetwork, num_sequences: int, width: int) -> Callable[[], object]:
    """A row of a head for each sequence, fed with `width` values."""

    def layout(spans: list[Span]) -> object:
        return network.ops.layout(spans, network.spec.device)

    return _head_pass(network, layout, num_sequences, width)


def kv_pass(network: KVNetwork, num_sequences: int) -> Callable[[], object]:
    """A row for each sequence of a head that reads the target's own KV."""

    def rows(spans: list[Span]) -> object:
        return network.rows(spans, [span.num_cached for span in spans])

    return _head_pass(network, rows, num_sequences, network.spec.hidden_size)


def _head_pass(
    network: RowNetwork | KVNetwork,
    place: Callable[[list[Span]], Any],
    num_sequences: int,
    width: int,
) -> Callable[[], object]:
    """What `place` makes of the rows is made anew for every pass, as in an engine."""
    spec = network.spec
    spans, pool = _places(spec, num_sequences, 0)
    tokens_N = torch.zeros(num_sequences, dtype=torch.long, device=spec.device)
    wanted_N = torch.arange(num_sequences, device=spec.device)
    inputs_ND = torch.ones(num_sequences, width, dtype=spec.dtype, device=spec.device)
    return lambda: network.forward(tokens_N, inputs_ND, place(spans), pool.layers, wanted_N)


@torch.no_grad()
def seconds_of(runs: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """The least of some runs each, taken in turns: what disturbs a machine only ever adds."""
    synchronise = getattr(torch, device.type).synchronize
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(WARM + REPEATS):
        for run, own in zip(runs, times, strict=True):
            started = time.perf_counter()
            run()
            synchronise()
            own.append(time.perf_counter() - started)
    return [min(own[WARM:]) for own in times]


def _places(spec: ModelSpec, num_sequences: int, num_nodes: int) -> tuple[list[Span], KVPool]:
    context = min(CONTEXT, spec.max_positions - num_nodes - 1)
    per_sequence = -(-(context + 1 + num_nodes) // BLOCK)
    num_blocks = num_sequences * per_sequence
    pool = KVPool(spec.kv_shapes, num_blocks, BLOCK, spec.dtype, spec.device)
    chain = tuple(range(-1, num_nodes - 1))
    spans = [
        Span(list(range(first, first + per_sequence)), context, 1, chain, BLOCK)
        for first in range(0, num_blocks, per_sequence)
    ]
    return spans, pool
