"""MedusaNetwork: heads that each guess one of the tokens to come from the target's last state.

Cai et al. 2024, "Medusa". With f_t the state of position t, head i (from 0) guesses x_{t+2+i}: the
target's own head gives x_{t+1}.

Shape legend: R rows, K heads, D hidden width of the target, V vocabulary of the target, d that of
the heads.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.models.base import ModelSpec
from outrider.models.decoder import silu_anywhere
from outrider.models.heads.network import ShownTarget
from outrider.models.heads.spec import Head
from outrider.ops.base import Linear, Ops


class MedusaNetwork:
    """All heads: per head, blocks x + silu(W x + b), and an lm_head, its own or the target's.

    Args:
        head: as loaded; its tensors are turned into the target's dtype.
        target: a network that hands out its states.
        ops: kernels for the heads' own products.

    Attributes:
        spec: of the target.
        num_heads: the deepest draft.
        boundaries: the state before the target's final norm is all that is read.
    """

    def __init__(self, head: Head, target: ShownTarget, ops: Ops) -> None:
        assert head.spec.medusa is not None
        assert head.spec.widths.target_hidden == target.spec.hidden_size
        self.spec: ModelSpec = target.spec
        self.ops = ops
        self.num_heads = head.spec.medusa.num_heads
        self.boundaries: tuple[int, ...] = (target.spec.num_layers,)
        self._target = target
        self._is_normed = head.spec.conventions.input_state == "normed"
        self._num_blocks = head.spec.medusa.num_blocks
        self._tensors = {name: self._placed(tensor) for name, tensor in head.tensors.items()}
        is_reference = self.spec.device.type == "cpu" and self.spec.dtype == torch.float32
        self._silu: Callable[[Tensor], Tensor] = silu_anywhere if is_reference else F.silu
        self._ids_d = self._tensors.get("target_ids")
        self._first = self._stacked_first()
        self._later = [
            [self._linear(f"heads.{i}.blocks.{j}") for i in range(self.num_heads)]
            for j in range(1, self._num_blocks)
        ]
        self._lm_heads: list[Linear] = []
        if head.spec.conventions.lm_head == "own":
            self._lm_heads = [self._linear(f"heads.{i}.lm_head") for i in range(self.num_heads)]
        self._tensors.clear()  # the kernels keep what they need

    @torch.inference_mode()
    def forward(self, states_RD: Tensor, num_heads: int) -> Tensor:
        """float32 logits_RKV of the first `num_heads` heads; -inf for tokens they do not know.

        Args:
            states_RD: of the target before its final norm.
        """
        x_RD = self._target.final_norm(states_RD) if self._is_normed else states_RD
        # The first blocks read the same rows, so they are one product. It is not cut to the heads
        # that are wanted: beside an lm_head a block costs next to nothing.
        all_RKD = self._first(x_RD).view(len(x_RD), self.num_heads, -1)
        x_RKD = x_RD.unsqueeze(1) + self._silu(all_RKD[:, :num_heads])
        for blocks in self._later:
            x_RKD = x_RKD + self._silu(_each(blocks, x_RKD))
        return self._scattered(self._logits(x_RKD))

    def _logits(self, x_RKD: Tensor) -> Tensor:
        if self._lm_heads:
            return _each(self._lm_heads, x_RKD).float()
        flat_RKD = x_RKD.flatten(0, 1)
        logits_RKV = self._target.head(flat_RKD).view(*x_RKD.shape[:2], -1)
        return logits_RKV if self._ids_d is None else logits_RKV[..., self._ids_d]

    def _scattered(self, logits_RKd: Tensor) -> Tensor:
        if self._ids_d is None:
            return logits_RKd
        shape = (*logits_RKd.shape[:2], self.spec.vocab_size)
        logits_RKV = logits_RKd.new_full(shape, float("-inf"))
        return logits_RKV.index_copy_(2, self._ids_d, logits_RKd)

    def _stacked_first(self) -> Linear:
        names = [f"heads.{i}.blocks.0" for i in range(self.num_heads)]
        weight = torch.cat([self._tensors[f"{name}.weight"] for name in names])
        if f"{names[0]}.bias" not in self._tensors:
            return self.ops.linear(weight)
        return self.ops.linear(weight, torch.cat([self._tensors[f"{name}.bias"] for name in names]))

    def _linear(self, name: str) -> Linear:
        return self.ops.linear(self._tensors[f"{name}.weight"], self._tensors.get(f"{name}.bias"))

    def _placed(self, tensor: Tensor) -> Tensor:
        dtype = self.spec.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(self.spec.device, dtype)


def _each(linears: list[Linear], x_RKD: Tensor) -> Tensor:
    """Each head's own product with its own rows."""
    wanted = zip(linears, x_RKD.unbind(1), strict=False)  # of as many heads as there are rows of
    return torch.stack([linear(x_RD) for linear, x_RD in wanted], dim=1)
