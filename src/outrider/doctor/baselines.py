"""What anybody could guess: the last token again, or what followed the same words before.

A head that does not beat these has not learned the target, however high its figures look.
"""

from collections.abc import Callable, Mapping, Sequence as Items

import torch
from torch import Tensor

from outrider.doctor.evidence import Evidence
from outrider.doctor.scores import Along, along

LONGEST_MATCH = 3
Copies = Callable[[Items[int], int, int], list[list[int]]]


def last_token(tokens: Items[int], first: int, num_depths: int) -> list[list[int]]:
    """Behind every position from `first` on, its token again and again."""
    return [[token] * num_depths for token in tokens[first:]]


def same_words(tokens: Items[int], first: int, num_depths: int) -> list[list[int]]:
    """Behind every position from `first` on, what followed its words the last time before.

    Prompt lookup: of the last 3, 2 and 1 tokens, the most that stood there before; nothing where
    even one did not.
    """
    seen: dict[tuple[int, ...], int] = {}  # words, and where the last of them stood
    found = []
    for at in range(len(tokens)):
        stop = at + 1
        lengths = range(1, min(LONGEST_MATCH, stop) + 1)
        ends = [tuple(tokens[stop - length : stop]) for length in lengths]
        before = next((seen[end] for end in reversed(ends) if end in seen), None)
        if at >= first:
            copied = [] if before is None else list(tokens[before + 1 : stop][:num_depths])
            found.append(copied)
        seen.update(dict.fromkeys(ends, at))
    return found


BASELINES: Mapping[str, Copies] = {
    "the last token again": last_token,
    "n-gram of the text": same_words,
}


def score_copies(evidence: Evidence, copies: Copies, num_depths: int) -> Along:
    """Of guesses that are sure of one token; where there is none, nothing is shared."""
    text = evidence.text
    rows = copies(text.tokens, text.num_prompt, num_depths)
    parts = []
    for depth in range(num_depths):
        told = [row[depth] if depth < len(row) else -1 for row in rows[: len(rows) - depth]]
        parts.append(_held(evidence.laws_GV[depth:], told))
    return along(parts, num_depths, text.num_written)


def _held(laws_NV: Tensor, told: list[int]) -> tuple[Tensor, Tensor]:
    told_N = torch.tensor(told, dtype=torch.long, device=laws_NV.device)
    p_N = laws_NV.float().gather(1, told_N.clamp_min(0).unsqueeze(1)).squeeze(1)
    overlap_N = torch.where(told_N >= 0, p_N, 0.0)
    return overlap_N, (laws_NV.argmax(-1) == told_N).float()
