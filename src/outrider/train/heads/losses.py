"""Losses between the target's law p and the draft's law q, both over the draft vocabulary.

Shape legend: R rows, D tokens of the draft vocabulary.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from outrider.errors import ConfigError, unknown

LEAST_OVERLAP = 1e-5
SHARPNESS = 3.0  # of the turn from kl to tv in `lk_hybrid`
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def kl(log_p_RD: Tensor, log_q_RD: Tensor) -> Tensor:
    """KL(p || q): soft cross-entropy up to a constant."""
    return (log_p_RD.exp() * (log_p_RD - log_q_RD)).sum(-1)


def ce(log_p_RD: Tensor, log_q_RD: Tensor) -> Tensor:
    """Cross-entropy of the target's likeliest token."""
    return -log_q_RD.gather(1, log_p_RD.argmax(-1, keepdim=True)).squeeze(1)


def tv(log_p_RD: Tensor, log_q_RD: Tensor) -> Tensor:
    """Total variation: exactly 1 - acceptance; its gradient dies where the laws hardly meet."""
    return 1.0 - overlap(log_p_RD, log_q_RD)


def nla(log_p_RD: Tensor, log_q_RD: Tensor) -> Tensor:
    """Minus the logarithm of acceptance."""
    return -overlap(log_p_RD, log_q_RD).clamp_min(LEAST_OVERLAP).log()


def lk_hybrid(log_p_RD: Tensor, log_q_RD: Tensor) -> Tensor:
    """kl while the laws are apart, tv once they meet (arXiv 2602.23881)."""
    share_R = (-SHARPNESS * overlap(log_p_RD, log_q_RD).detach()).exp()
    return share_R * kl(log_p_RD, log_q_RD) + (1.0 - share_R) * tv(log_p_RD, log_q_RD)


def overlap(log_p_RD: Tensor, log_q_RD: Tensor) -> Tensor:
    """Sum of min(p, q): the chance that rejection sampling keeps a token drawn from q."""
    return torch.minimum(log_p_RD, log_q_RD).exp().sum(-1)


LOSSES: dict[str, Loss] = {"kl": kl, "ce": ce, "tv": tv, "nla": nla, "lk_hybrid": lk_hybrid}


def find_loss(name: str) -> Loss:
    if name not in LOSSES:
        raise ConfigError(unknown("loss", name, list(LOSSES)))
    return LOSSES[name]
