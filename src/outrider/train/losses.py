"""Losses of the target and of the drafter that imitates it.

Shape legend: B sequences, T positions, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.train.network import Decoder


class CrossEntropy:
    """Mean negative log-likelihood of the next token, in nats."""

    def __call__(self, model: torch.nn.Module, tokens_BT: Tensor) -> Tensor:
        logits_BTV = model(tokens_BT[:, :-1])
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), tokens_BT[:, 1:].flatten())


class Distillation:
    """`weight` parts of KL(target || draft) at temperature 1, the rest cross-entropy on the text.

    Pinsker bounds the total variation, and so 1 - acceptance, by the KL (Zhou et al. 2024,
    DistillSpec, measures which divergence serves acceptance).
    """

    def __init__(self, target: Decoder, *, weight: float = 0.9) -> None:
        if not 0.0 <= weight <= 1.0:
            raise ValueError(f"weight {weight} is no share; choose a value in [0, 1]")
        self._target = target.eval().requires_grad_(False)
        self._weight = weight

    def __call__(self, model: torch.nn.Module, tokens_BT: Tensor) -> Tensor:
        with torch.no_grad():
            p_NV = self._target(tokens_BT[:, :-1]).flatten(0, 1).float().softmax(-1)
        log_q_NV = model(tokens_BT[:, :-1]).flatten(0, 1).float().log_softmax(-1)
        likelihood = F.nll_loss(log_q_NV, tokens_BT[:, 1:].flatten())
        divergence = F.kl_div(log_q_NV, p_NV, reduction="batchmean")
        return self._weight * divergence + (1.0 - self._weight) * likelihood
