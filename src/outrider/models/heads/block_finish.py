"""DSpark's finish: how the token before a slot corrects its logits, and how sure the head is of it.

Shape legend: R slots, U vocabulary of the head, V of the target, D width of the head, M rank.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.models.heads.spec import MarkovShape
from outrider.ops.base import Linear, Ops


class Finished(NamedTuple):
    """What a finish says of slots.

    Attributes:
        logits_RU: float32, to be added to those of the body.
        memory_RM: what slots after these are told; empty where nothing is remembered.
        sure_R: estimated probability that the token drafted here stands; None without an estimate.
    """

    logits_RU: Tensor
    memory_RM: Tensor
    sure_R: Tensor | None


class Finish:
    """One head's: "vanilla", "gated" or "rnn" (checkpoints 5.5).

    Attributes:
        memory_width: M where slots are told of those before them, else 0.
        has_estimate: whether it says how sure it is.

    Args:
        tensors: `markov.*` and `confidence.*`.
    """

    def __init__(self, shape: MarkovShape, tensors: Mapping[str, Tensor], ops: Ops) -> None:
        self.memory_width = shape.rank if shape.kind == "rnn" else 0
        self.has_estimate = shape.confidence != "none"
        self._shape = shape
        self._embedding_VM = tensors["markov.w1"]
        self._output = ops.linear(tensors["markov.w2"])
        self._gate = _optional(tensors, "markov.gate", ops)
        self._joint = _optional(tensors, "markov.joint", ops)
        self._confidence = tensors.get("confidence.weight")
        self._confidence_bias = tensors.get("confidence.bias")

    def __call__(self, states_RD: Tensor, previous_R: Tensor, memory_RM: Tensor) -> Finished:
        """Args: normed states of the slots, and the tokens before them."""
        word_RM = F.embedding(previous_R, self._embedding_VM)
        told_RM = word_RM
        if self._gate is not None:
            told_RM = self._gate(torch.cat((states_RD, word_RM), dim=1)).sigmoid() * word_RM
        if self._joint is not None:
            joint = self._joint(torch.cat((memory_RM, word_RM, states_RD), dim=1))
            gate_RM, candidate_RM, output_RM = joint.chunk(3, dim=1)
            kept_RM = gate_RM.sigmoid()
            memory_RM = kept_RM * memory_RM + (1.0 - kept_RM) * candidate_RM.tanh()
            told_RM = output_RM.tanh()
        sure_R = self._sure(states_RD, word_RM)
        return Finished(self._output(told_RM.contiguous()).float(), memory_RM, sure_R)

    def _sure(self, states_RD: Tensor, word_RM: Tensor) -> Tensor | None:
        if self._confidence is None:
            return None
        read = states_RD
        if self._shape.confidence == "state-and-token":
            read = torch.cat((states_RD, word_RM), dim=1)
        return F.linear(read, self._confidence, self._confidence_bias).float().sigmoid().squeeze(1)


def _optional(tensors: Mapping[str, Tensor], name: str, ops: Ops) -> Linear | None:
    weight = tensors.get(f"{name}.weight")
    return None if weight is None else ops.linear(weight, tensors.get(f"{name}.bias"))
