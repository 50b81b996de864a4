"""How often the first d tokens of a draft all stand, under the rule that requests have by default.

Greedy text takes the target's likeliest token. On sampled text, target and draft pick by the same
noise (coupled drafts): with exponential noise E a law picks the token of the least E_y / p_y, so
both pick x with probability 1 / sum_y max(p_y / p_x, q_y / q_x) (Daliri et al. 2024; algorithms
3.3).

Shape legend: K depths, G written tokens of a text, N rows of one depth, V vocabulary.
"""

from collections.abc import Sequence as Items
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from outrider.doctor.evidence import Evidence
from outrider.doctor.guessers import Guesser
from outrider.doctor.scores import Floats, rows_of_depth

MOST_VALUES = 2**24  # probabilities that are sorted at once


class Standing(NamedTuple):
    """Guesses along one text; entry [d, i] is of the guess at token P + i + 1 + d.

    What lies beyond the text is not a number.

    Attributes:
        expected_KG: how often the guess stands, whatever the target says there.
        told_KG: the same, given that the target says what the text goes on with.
    """

    expected_KG: Floats
    told_KG: Floats


def standing(guesser: Guesser, evidence: Evidence, num_depths: int) -> Standing:
    """A draft led along one text of the target's own."""
    text = evidence.text
    usable = min(num_depths, len(text.tokens) - 1)
    guesses = guesser.guess(text.tokens, evidence.states, usable)
    found = np.full((2, num_depths, text.num_written), np.nan)
    for depth, logits_NV in enumerate(guesses):
        p_NV, q_NV = rows_of_depth(evidence, logits_NV, depth)
        tokens = text.tokens[text.num_prompt + 1 + depth :]
        for kind, values_N in enumerate(_stood(p_NV, q_NV, tokens, text.is_sampled)):
            found[kind, depth, : len(values_N)] = values_N.double().cpu().numpy()
    return Standing(*found)


def joint_of(texts: Items[Standing]) -> tuple[float, ...]:
    """How often the first d drafted tokens all stand, on texts of one kind.

    The mean over texts that the target wrote of (what it said was drafted, d - 1 times) times (how
    often the next guess stands) is that probability.
    """
    rates, before = [], 1.0
    for depth in range(len(texts[0].expected_KG)):
        stood = np.concatenate(
            [one.told_KG[:depth].prod(axis=0) * one.expected_KG[depth] for one in texts]
        )
        known = stood[~np.isnan(stood)]
        before = min(before, float(known.mean())) if len(known) else 0.0
        rates.append(before)
    return tuple(rates)


def coupled(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """both_NV: how often two laws that see the same noise both pick a token.

    With tokens in the order of q / p, the sum in the denominator is that of p up to x over p_x and
    that of q behind x over q_x: one sort instead of V^2 maxima.
    """
    p_NV, q_NV = p_NV.double(), q_NV.double()
    order_NV = (q_NV / p_NV.clamp_min(1e-300)).argsort(dim=-1)
    p_NV, q_NV = p_NV.gather(-1, order_NV), q_NV.gather(-1, order_NV)
    behind_NV = (1.0 - q_NV.cumsum(-1)).clamp_min(0.0)
    either_NV = p_NV.cumsum(-1) * q_NV + behind_NV * p_NV
    both_NV = (p_NV * q_NV / either_NV).nan_to_num(0.0)
    return torch.zeros_like(both_NV).scatter(-1, order_NV, both_NV)


def _stood(
    p_NV: Tensor, q_NV: Tensor, tokens: Items[int], is_sampled: bool
) -> tuple[Tensor, Tensor]:
    """Expected, of all rows; told, of those that the text goes on behind."""
    if not is_sampled:
        match_N = p_NV.argmax(-1) == q_NV.argmax(-1)
        return match_N, match_N[: len(tokens)]
    expected, told = [], []
    rows_at_once = max(MOST_VALUES // p_NV.shape[1], 1)
    next_N = torch.tensor([*tokens, *[0] * (len(p_NV) - len(tokens))], device=p_NV.device)
    for start in range(0, len(p_NV), rows_at_once):
        rows = slice(start, start + rows_at_once)
        both_RV, next_R1 = coupled(p_NV[rows], q_NV[rows]), next_N[rows].unsqueeze(1)
        expected.append(both_RV.sum(-1))
        p_R = p_NV[rows].gather(1, next_R1).squeeze(1).double()
        told.append(both_RV.gather(1, next_R1).squeeze(1) / p_R.clamp_min(1e-300))
    if not expected:
        return torch.empty(0), torch.empty(0)
    return torch.cat(expected), torch.cat(told)[: len(tokens)].clamp_max(1.0)
