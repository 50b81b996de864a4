"""What the target says along its texts: laws of all positions, and states that heads may read.

Shape legend: T tokens of a text, P of its prompt, G = T - P written, V vocabulary, H hidden width.
"""

from collections.abc import Callable, Mapping, Sequence as Items
from typing import NamedTuple

import torch
from torch import Tensor

from outrider.cache.pool import KVPool
from outrider.doctor.texts import Text
from outrider.models.base import Network, ShowsStates
from outrider.models.runner import upload
from outrider.ops.base import LayerKV, Span

MOST_BYTES = 2**30  # of laws in float32; more are kept in half of that


class Evidence(NamedTuple):
    """One text as the target sees it.

    Attributes:
        laws_GV: at temperature 1; row i is of the token behind position P + i.
        states: by boundary, of all positions, [T, H].
    """

    text: Text
    laws_GV: Tensor
    states: Mapping[int, Tensor]


def look(
    network: Network,
    texts: Items[Text],
    boundaries: Items[int] = (),
    *,
    tick: Callable[[int], None] = lambda done: None,
) -> list[Evidence]:
    """One pass of the target over each text.

    Args:
        boundaries: of the states to keep; only of a network that `ShowsStates`.
    """
    num_positions = sum(text.num_written for text in texts)
    is_much = 4 * num_positions * network.spec.vocab_size > MOST_BYTES
    dtype = torch.float16 if is_much else torch.float32
    found = []
    for number, text in enumerate(texts, start=1):
        found.append(_look(network, text, sorted(set(boundaries)), dtype))
        tick(number)
    return found


@torch.inference_mode()
def run_through(
    network: Network,
    tokens: Items[int],
    wanted: Items[int],
    kv: list[LayerKV],
    boundaries: Items[int] = (),
) -> tuple[Tensor, Tensor]:
    """float32 logits_RV of the wanted positions and tapped_ATH, of one pass over a text.

    Args:
        kv: of a pool of single slots, which position t takes slot t of.
    """
    device = network.spec.device
    layout = network.ops.layout([Span(range(len(tokens)), 0, len(tokens))], device)
    tokens_T, wanted_R = upload(list(tokens), device), upload(list(wanted), device)
    if not boundaries:
        return network.forward(tokens_T, layout, kv, wanted_R), torch.empty(0)
    assert isinstance(network, ShowsStates)
    passed = network.forward_tapped(tokens_T, layout, kv, wanted_R, boundaries)
    return passed.logits_RV, passed.tapped_AND


def slots_for(network: Network, num_slots: int) -> KVPool:
    """A pool of single slots."""
    spec = network.spec
    return KVPool(spec.kv_shapes, num_slots, 1, spec.dtype, spec.device)


def _look(network: Network, text: Text, boundaries: Items[int], dtype: torch.dtype) -> Evidence:
    tokens = text.tokens
    logits_GV, tapped_ATH = run_through(
        network,
        tokens,
        range(text.num_prompt, len(tokens)),
        slots_for(network, len(tokens)).layers,
        boundaries,
    )
    states = dict(zip(boundaries, tapped_ATH, strict=True)) if boundaries else {}
    return Evidence(text, logits_GV.softmax(-1).to(dtype), states)
