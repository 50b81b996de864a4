"""The frozen target inside the training process: features and laws of packed text, nothing stored.

Shape legend: N tokens of a batch, R rows, V vocabulary, H hidden width, A boundaries.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from outrider.cache.pool import KVPool
from outrider.errors import ConfigError
from outrider.models.base import ModelSpec, Network, ShowsStates
from outrider.models.checkpoint import read_config
from outrider.models.heads.network import ShownTarget
from outrider.models.heads.spec import TargetSpec
from outrider.models.hub import resolve
from outrider.models.network import load_network
from outrider.ops.base import LayerKV, Span
from outrider.ops.choose import choose
from outrider.train.heads.pieces import Packed

BLOCK = 16
HEAD_ROWS = 512  # rows whose logits over the whole vocabulary are held at a time


class Taught(NamedTuple):
    """One pass of the target over a batch.

    Attributes:
        tapped: by boundary, the residual stream of all rows, [N, H].
        final_NH: the state after the final norm.
        kv: keys and values by layer; row n lies in slot `slots_N[n]`, until the next pass.
    """

    tapped: dict[int, Tensor]
    final_NH: Tensor
    kv: list[LayerKV]
    slots_N: Tensor

    def feature(self, boundaries: Sequence[int]) -> Tensor:
        """States at the boundaries, one after the other: [N, A * H]."""
        return torch.cat([self.tapped[boundary] for boundary in boundaries], dim=-1)


class Teacher:
    """A target that answers for whole texts at once. It never learns.

    Attributes:
        values: its `config.json`. target: what heads are checked against.
        network, shown: the target itself.

    Raises:
        ConfigError: the network hands out no hidden states.
    """

    def __init__(
        self, network: Network, values: Mapping[str, Any], *, name: str, folder: Path | None = None
    ) -> None:
        if not isinstance(network, ShowsStates) or not network.spec.hidden_size:
            raise ConfigError(
                f"target {name!r} runs in a network that hands out no hidden states, so nothing "
                "can be trained on it: use one of the families of the lean decoder"
            )
        self.values = values
        self.target = TargetSpec.from_config(values, name=name, folder=folder)
        self.network: Network = network
        self.shown = cast(ShownTarget, network)  # it is both, as was just seen
        self._pool: KVPool | None = None

    @classmethod
    def load(cls, name: str, *, device: str = "cpu", dtype: str = "auto") -> "Teacher":
        """The target of a hub id, a folder, or "demo"."""
        folder = resolve(name)
        # Whole texts, not steps: nobody compares these passes bit by bit with others.
        ops = choose(device=device, dtype=dtype, batch_invariant=False)
        network = load_network(name, ops=ops, device=device, dtype=dtype)
        return cls(network, read_config(folder), name=name, folder=folder)

    @property
    def spec(self) -> ModelSpec:
        return self.network.spec

    @torch.no_grad()
    def teach(self, batch: Packed, boundaries: Sequence[int]) -> Taught:
        """Runs the pieces side by side, each from its own beginning."""
        spans, blocks = _spans(batch.lengths)
        device = self.spec.device
        layout = self.network.ops.layout(spans, device)
        last = self.spec.num_layers
        taps = sorted({*boundaries, last})
        kv = self._kv(blocks)
        none_R = torch.empty(0, dtype=torch.long, device=device)
        passed = self.shown.forward_tapped(batch.tokens_N.to(device), layout, kv, none_R, taps)
        tapped = dict(zip(taps, map(_ordinary, passed.tapped_AND), strict=True))
        final_NH = _ordinary(self.shown.final_norm(tapped[last]))
        return Taught(tapped, final_NH, kv, layout.slots_N)

    @torch.no_grad()
    def logits(self, final_RH: Tensor) -> Tensor:
        """float32 logits_RV of states after the final norm."""
        return _ordinary(self.shown.head(final_RH.to(self.spec.dtype).contiguous()))

    @torch.no_grad()
    def laws_on(self, final_NH: Tensor, ids_D: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits of the tokens `ids_D` alone, and the likeliest token of the whole vocabulary.

        The whole vocabulary is never held for all rows at once.
        """
        kept, likeliest = [], []
        for rows_RH in final_NH.split(HEAD_ROWS):
            logits_RV = self.logits(rows_RH)
            likeliest.append(logits_RV.argmax(-1))
            kept.append(logits_RV if ids_D is None else logits_RV[:, ids_D])
        return torch.cat(kept), torch.cat(likeliest)

    @torch.no_grad()
    def embed(self, tokens_N: Tensor) -> Tensor:
        """Embeddings as the first layer gets them."""
        return _ordinary(self.shown.embed(tokens_N))

    @torch.no_grad()
    def head_weight(self, ids_D: Tensor | None = None) -> Tensor:
        """float32 rows of the LM head, [V, H] or those of some tokens."""
        weight_HV = self.logits(torch.eye(self.spec.hidden_size, device=self.spec.device))
        weight_VH = weight_HV.T if ids_D is None else weight_HV.T[ids_D.to(weight_HV.device)]
        return weight_VH.contiguous()

    @torch.no_grad()
    def final_gain(self) -> Tensor:
        """float32 gain_H of the final norm: what it makes of ones, whose root mean square is 1."""
        ones_1H = torch.ones(
            1, self.spec.hidden_size, dtype=self.spec.dtype, device=self.spec.device
        )
        return _ordinary(self.shown.final_norm(ones_1H))[0].float()

    def _kv(self, num_blocks: int) -> list[LayerKV]:
        """A pool that grows to the largest pass."""
        if self._pool is None or self._pool.num_blocks < num_blocks:
            spec = self.spec
            self._pool = KVPool(spec.kv_shapes, num_blocks, BLOCK, spec.dtype, spec.device)
        return self._pool.layers


def _spans(lengths: Sequence[int]) -> tuple[list[Span], int]:
    """A span for every piece, in blocks of its own, and how many blocks that takes."""
    spans: list[Span] = []
    at = 0
    for length in lengths:
        stop = at + -(-length // BLOCK)
        spans.append(Span(list(range(at, stop)), 0, length, (), BLOCK))
        at = stop
    return spans, at


def _ordinary(values: Tensor) -> Tensor:
    """What autograd may keep: the adapter computes in inference mode."""
    return values.clone() if values.is_inference() else values
