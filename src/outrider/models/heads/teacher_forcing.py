"""Whole texts through a head that reads rows: its logits at every position and drafted depth.

Shape legend: T tokens of the text, N rows, A boundaries of the target, H its hidden width,
D width of what a row is fed with, V vocabulary of the target.
"""

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from outrider.cache.pool import KVPool
from outrider.models.heads.network import HeadOutput, RowNetwork
from outrider.models.runner import upload
from outrider.ops.base import Span


@torch.inference_mode()
def teacher_forced(
    network: RowNetwork, tokens: Items[int], tapped_ATH: Tensor, num_depths: int
) -> list[Tensor]:
    """What the head would say at every position if all it drafted were the text itself.

    Args:
        tapped_ATH: states of the target at `network.boundaries`, of all tokens.
        num_depths: how many drafted tokens deep.

    Returns:
        By depth d from 0, logits_NV of T - 1 - d rows: row t is the law of tokens[t + 2 + d] as it
        is drafted once position t has its feature and token t + 1 is committed.
    """
    num_rows = len(tokens) - 1
    kv = _pool(network, num_rows * num_depths)
    spans = [Span(range(num_rows), 0, num_rows, (), 1)]
    inputs_ND = network.read(tapped_ATH[:, :num_rows])
    output = _run(network, tokens[1:], inputs_ND, spans, kv)
    logits = [output.logits_RV]
    for depth in range(1, num_depths):
        # A row of depth d sees the rows of true features up to its own, and its own drafted ones,
        # whose KV lies in slots of their own.
        count = num_rows - depth
        spans = [
            Span([*range(t + 1), *_own_slots(num_rows, t, depth)], t + depth, 1, (), 1)
            for t in range(count)
        ]
        inputs_ND = output.feedback_ND[:count]
        output = _run(network, tokens[1 + depth :], inputs_ND, spans, kv)
        logits.append(output.logits_RV)
    return logits


@torch.inference_mode()
def teacher_forced_in_parallel(
    network: RowNetwork,
    tokens: Items[int],
    tapped_ATH: Tensor,
    num_depths: int,
    *,
    mask_token_id: int,
    mask_input_1D: Tensor,
) -> list[Tensor]:
    """As `teacher_forced`, for a head that drafts all depths in one pass (P-EAGLE)."""
    num_rows = len(tokens) - 1
    kv = _pool(network, num_rows * num_depths)
    spans = [Span(range(num_rows), 0, num_rows, (), 1)]
    first = _run(network, tokens[1:], network.read(tapped_ATH[:, :num_rows]), spans, kv)
    num_masks = num_depths - 1
    if not num_masks:
        return [first.logits_RV]
    spans = [
        Span([*range(t + 1), *_own_slots(num_rows, t, num_masks)], t + 1, num_masks, (), 1)
        for t in range(num_rows)
    ]
    masks = [mask_token_id] * (num_rows * num_masks)
    output = _run(network, masks, mask_input_1D.expand(len(masks), -1), spans, kv)
    logits_NKV = output.logits_RV.view(num_rows, num_masks, -1)
    later = [logits_NKV[: num_rows - depth, depth - 1] for depth in range(1, num_depths)]
    return [first.logits_RV, *later]


def _own_slots(num_rows: int, t: int, depth: int) -> list[int]:
    """Slots of the first `depth` drafted rows behind row t."""
    return [num_rows * (1 + index) + t for index in range(depth)]


def _pool(network: RowNetwork, num_slots: int) -> KVPool:
    spec = network.spec
    return KVPool(spec.kv_shapes, num_slots, 1, spec.dtype, spec.device)


def _run(
    network: RowNetwork, tokens: Items[int], inputs_ND: Tensor, spans: list[Span], pool: KVPool
) -> HeadOutput:
    device = network.spec.device
    num_rows = sum(span.num_rows for span in spans)
    assert num_rows == len(tokens) == len(inputs_ND)
    layout = network.ops.layout(spans, device)
    wanted_N = torch.arange(num_rows, device=device)
    return network.forward(upload(list(tokens), device), inputs_ND, layout, pool.layers, wanted_N)
