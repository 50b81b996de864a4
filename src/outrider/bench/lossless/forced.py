"""Forced: the target's logits along a text that is given, in passes of a chosen width.

Shape legend: N positions, V vocabulary.
"""

import itertools
import math
from collections.abc import Iterator, Sequence as Items
from typing import Any, NamedTuple

import torch
from torch import Tensor

from outrider.engine.engine import Engine
from outrider.errors import ConfigError
from outrider.models.runner import Piece
from outrider.step import EMPTY_TREE, DraftTree

_runs = itertools.count()


class Margin(NamedTuple):
    """By how much the target prefers one token to another at one position.

    Attributes:
        nats: difference of their logits. ulp: in steps of the model's number format there.
    """

    nats: float
    ulp: float


def rows(engine: Engine, tokens: Items[int], start: int, width: int) -> Iterator[Tensor]:
    """Logits [V] that follow tokens[:start], tokens[:start + 1] .. and all of `tokens`.

    The text before `start` runs as a prompt, without anybody's prefix cache; then `width` rows at
    a time, one of them being plain decoding, more being what verifying drafts of width - 1 is.

    Raises:
        ConfigError: the KV pool has no room for the text.
    """
    assert 0 < start <= len(tokens), "logits follow at least one token"
    assert width >= 1, "a pass has rows"
    assert not engine.has_work(), "others would share the passes"
    manager = engine.manager
    table, _ = manager.open(tokens[:1], f"forced {next(_runs)}")
    try:
        if not manager.reserve(table, len(tokens)):
            raise ConfigError(
                f"{len(tokens)} tokens do not fit the KV cache of {manager.num_blocks} blocks: "
                "give the engine more kv_cache_memory_bytes, or ask for shorter answers"
            )
        _prefill(engine, table, tokens[: start - 1])
        for at in range(start - 1, len(tokens), width):
            chain = DraftTree.chain(tokens[at + 1 : at + width], "forced")
            piece = Piece(table, at, tokens[at : at + 1], chain, True)
            yield from engine.runner.run([piece]).logits_NV
    finally:
        manager.free(table)


def margin(logits_V: Tensor, ours: int, theirs: int, dtype: torch.dtype) -> Margin:
    """Of `ours` over `theirs`; `dtype` is what the model computes in."""
    pair = logits_V[[ours, theirs]].double().tolist()
    nats = pair[0] - pair[1]
    largest = max(abs(pair[0]), abs(pair[1]))
    step = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest else 0.0
    return Margin(nats, abs(nats) / step if step else math.inf)


def margin_changes(engine: Engine, tokens: Items[int], start: int, width: int) -> list[float]:
    """Nats by which the lead of the best over the second best token changes with the width.

    One number per position from `start` on: |margin in passes of one row - of `width` rows|.
    """
    singles = [row_V.clone() for row_V in rows(engine, tokens, start, 1)]
    changes = []
    for single_V, wide_V in zip(singles, rows(engine, tokens, start, width), strict=True):
        best = single_V.topk(2).indices
        gaps = [
            float(row_V[best[0]].double() - row_V[best[1]].double()) for row_V in (single_V, wide_V)
        ]
        changes.append(abs(gaps[0] - gaps[1]))
    return changes


def _prefill(engine: Engine, table: Any, tokens: Items[int]) -> None:
    size = engine.config.max_num_batched_tokens
    for at in range(0, len(tokens), size):
        engine.runner.run([Piece(table, at, tokens[at : at + size], EMPTY_TREE, False)])
