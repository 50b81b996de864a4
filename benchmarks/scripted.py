"""Networks that know their text by heart: a pass costs nothing, so a step is the loop alone."""

from typing import Any

import torch
from torch import Tensor

from outrider.engine.llm import LLM
from outrider.models.base import ModelSpec
from outrider.ops.base import LayerKV, Layout, Span

FIRST_TOKEN, NUM_TOKENS = 300, 32
PEAK = 10.0  # above logits of deviation 1: at T=0.8 a probability of 0.97 among 4,096 tokens


class ScriptedOps:
    """No index tables, and an argmax that is known beforehand."""

    name = "scripted"
    is_batch_invariant = True
    argmax_R: list[int]

    def layout(self, spans: list[Span], device: torch.device) -> Layout:
        return Layout(spans=spans, positions_N=_NOTHING, slots_N=_NOTHING)

    def argmax(self, logits_RV: Tensor) -> list[int]:
        return self.argmax_R


class ScriptedNetwork:
    """A text over few tokens that repeats itself, but not always.

    Each token has a usual successor and, at one position in `every`, another one. Networks of
    other `every` agree at most positions: one drafts for the other.
    """

    def __init__(self, spec: ModelSpec, every: int) -> None:
        self.spec = spec
        self.ops: Any = ScriptedOps()
        self._every = every
        generator = torch.Generator().manual_seed(0)
        self._logits_TV = torch.randn(NUM_TOKENS, spec.vocab_size, generator=generator)
        self._logits_TV[range(NUM_TOKENS), range(FIRST_TOKEN, FIRST_TOKEN + NUM_TOKENS)] += PEAK

    def forward(
        self, tokens_N: Tensor, layout: Layout, kv: list[LayerKV], wanted_R: Tensor
    ) -> Tensor:
        positions = [position for span in layout.spans for position in _positions(span)]
        tokens = tokens_N.tolist()
        next_R = [self._next(tokens[row], positions[row]) for row in wanted_R.tolist()]
        self.ops.argmax_R = [FIRST_TOKEN + token for token in next_R]
        return self._logits_TV[next_R]

    def _next(self, token: int, position: int) -> int:
        is_unusual = (token * 7 + position * 11) % self._every == 0
        return (token * 5 + (17 if is_unusual else 3)) % NUM_TOKENS


def script(llm: LLM) -> None:
    """Replaces the networks of target and draft model, for good."""
    llm.engine.runner.network = ScriptedNetwork(llm.engine.spec, every=7)
    drafter: Any = llm.engine.drafters["draft_model"]
    drafter.runner.network = ScriptedNetwork(drafter.runner.network.spec, every=5)


def _positions(span: Span) -> list[int]:
    positions = list(range(span.num_cached, span.num_cached + span.num_chain))
    root = positions[-1]
    for parent in span.parents:
        positions.append((positions[span.num_chain + parent] if parent >= 0 else root) + 1)
    return positions


_NOTHING = torch.empty(0, dtype=torch.long)
