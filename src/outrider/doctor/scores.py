"""How well guesses fit the target, by depth, and how sure the difference between two ways is.

Everything is paired: two ways are compared on the same positions, and prompts are resampled.

Shape legend: K depths, P prompts, G written tokens of a text, N rows of one depth, V vocabulary,
R resamples.
"""

from collections.abc import Sequence as Items
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outrider.doctor.evidence import Evidence

Floats: TypeAlias = NDArray[np.float64]

NUM_RESAMPLES = 4000
INTERVAL = 0.95
LEAST_GAIN = 0.01  # of shared probability: less is no reason to change anything
LEAST_PROMPTS = 6  # of fewer nothing is said to be clear


class Along(NamedTuple):
    """Guesses along one text; entry [d, i] is of the guess at token P + i + 1 + d.

    What lies beyond the text is not a number.

    Attributes:
        overlap_KG: sum over tokens of min(p, q): how often sampling accepts the guess.
        match_KG: whether both have the same likeliest token: how often greedy decoding does.
    """

    overlap_KG: Floats
    match_KG: Floats


class Score(NamedTuple):
    """Guesses along all texts.

    Attributes:
        overlap_PK, match_PK: sums by prompt and depth; count_PK: of so many rows.
    """

    overlap_PK: Floats
    match_PK: Floats
    count_PK: Floats

    @property
    def by_depth(self) -> list[float]:
        """Mean overlap."""
        return [float(value) for value in self.overlap_PK.sum(0) / self.count_PK.sum(0)]

    @property
    def matches(self) -> list[float]:
        """Share of rows with the same likeliest token, by depth."""
        return [float(value) for value in self.match_PK.sum(0) / self.count_PK.sum(0)]

    @property
    def value(self) -> float:
        """Mean overlap of all depths alike: what ways are compared by."""
        return float(np.mean(self.by_depth))


class Difference(NamedTuple):
    """How much better one way is than another, in overlap.

    Attributes:
        low, high: ends of the 95 % interval. surely: lower end where so many ways are tried that
            one of them would reach the usual one by chance.
    """

    value: float
    low: float
    high: float
    surely: float

    @property
    def is_clear(self) -> bool:
        """Better, by enough to care, and not by chance."""
        return self.surely > 0.0 and self.value >= LEAST_GAIN


def score_text(evidence: Evidence, guesses: Items[Tensor], num_depths: int) -> Along:
    """Guesses of all rows, held against what the target says.

    Args:
        guesses: per depth d logits_NV of rows 0 to T - 2 - d.
    """
    parts = [
        _held(*rows_of_depth(evidence, logits_NV, depth)) for depth, logits_NV in enumerate(guesses)
    ]
    return along(parts, num_depths, evidence.text.num_written)


def rows_of_depth(evidence: Evidence, logits_NV: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """p_NV of the target and q_NV of a guess at this depth, of rows that an engine drafts at."""
    text = evidence.text
    first = text.num_prompt - 1
    count = max(text.num_written - depth, 0)
    return evidence.laws_GV[depth:].float(), logits_NV[first : first + count].softmax(-1)


def along(parts: Items[tuple[Tensor, Tensor]], num_depths: int, num_written: int) -> Along:
    """From overlap and match of each depth that there is, of the rows that it has."""
    found = np.full((2, num_depths, num_written), np.nan)
    for depth, part in enumerate(parts):
        for kind, values_N in enumerate(part):
            found[kind, depth, : len(values_N)] = values_N.double().cpu().numpy()
    return Along(*found)


def total(texts: Items[tuple[int, Along]]) -> Score:
    """Sums by prompt; prompts in rising order."""
    prompts = sorted({prompt for prompt, _ in texts})
    place = {prompt: index for index, prompt in enumerate(prompts)}
    depths = len(texts[0][1].overlap_KG)
    sums = np.zeros((3, len(prompts), depths))
    for prompt, one in texts:
        sums[0, place[prompt]] += np.nansum(one.overlap_KG, axis=1)
        sums[1, place[prompt]] += np.nansum(one.match_KG, axis=1)
        sums[2, place[prompt]] += (~np.isnan(one.overlap_KG)).sum(axis=1)
    return Score(*sums)


def difference(one: Score, other: Score, *, num_tried: int = 1, seed: int = 0) -> Difference:
    """How much better `one` is, on the same rows as `other`.

    Args:
        num_tried: ways that are looked at to find one that is better (Bonferroni's correction).
    """
    assert np.array_equal(one.count_PK, other.count_PK), "scores of different rows"
    num_prompts = len(one.count_PK)
    drawn = np.random.default_rng(seed).multinomial(
        num_prompts, np.full(num_prompts, 1 / num_prompts), size=NUM_RESAMPLES
    )
    weights_RP = np.vstack([np.ones(num_prompts), drawn])
    gain_RK = weights_RP @ (one.overlap_PK - other.overlap_PK)
    # A resample may hold no row of a depth that few texts are long enough for.
    count_RK = np.maximum(weights_RP @ one.count_PK, 1.0)
    gain_R = (gain_RK / count_RK).mean(axis=1)
    tail = (1 - INTERVAL) / 2
    low, high, surely = np.quantile(gain_R[1:], [tail, 1 - tail, tail / num_tried])
    if num_prompts < LEAST_PROMPTS:
        surely = -np.inf
    return Difference(float(gain_R[0]), float(low), float(high), float(surely))


def _held(p_NV: Tensor, q_NV: Tensor) -> tuple[Tensor, Tensor]:
    overlap_N = torch.minimum(p_NV, q_NV).sum(-1)
    return overlap_N, (p_NV.argmax(-1) == q_NV.argmax(-1)).float()
