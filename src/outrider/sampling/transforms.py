"""What sampling settings do to one row of logits: pure functions, in the order they are applied.

bias, minimum length, bad words, repetition, frequency and presence penalty, temperature, min-p,
top-k, top-p: the order of vLLM's sampler. (transformers applies min-p last, where its threshold
is the same, but top-p then sees a different remainder.) Each function returns a new row, or the
row it was given when its setting is off; a forbidden token has the logit -inf. A row's result
depends on that row alone, and equally likely tokens are kept by lower id.

Shape legend: V vocabulary, C candidates.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

NEVER = -math.inf


def add_bias(logits_V: Tensor, bias: Mapping[int, float]) -> Tensor:
    """Adds to the logits of single tokens; -inf forbids a token."""
    if not bias:
        return logits_V
    ids = torch.tensor(list(bias), device=logits_V.device)
    values = torch.tensor(list(bias.values()), dtype=logits_V.dtype, device=logits_V.device)
    return logits_V.index_add(0, ids, values)


def forbid(logits_V: Tensor, tokens: Sequence[int]) -> Tensor:
    """Forbids single tokens."""
    if not tokens:
        return logits_V
    return logits_V.index_fill(0, torch.tensor(tokens, device=logits_V.device), NEVER)


def forbidden_by_bad_words(
    bad_words_ids: Sequence[Sequence[int]], output: Sequence[int]
) -> list[int]:
    """Tokens that would complete a bad word; only what was generated counts as its beginning."""
    return [word[-1] for word in bad_words_ids if _ends_with(output, word[:-1])]


def penalize_repetition(logits_V: Tensor, seen_V: Tensor, penalty: float) -> Tensor:
    """Divides positive and multiplies negative logits of seen tokens (CTRL, Keskar et al. 2019)."""
    if penalty == 1.0:
        return logits_V
    penalized_V = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
    return torch.where(seen_V, penalized_V, logits_V)


def penalize_count(
    logits_V: Tensor, counts_V: Tensor, *, frequency: float, presence: float
) -> Tensor:
    """Subtracts `frequency` per occurrence in the output, and `presence` once if there is any."""
    if frequency == 0.0 and presence == 0.0:
        return logits_V
    return logits_V - frequency * counts_V - presence * (counts_V > 0)


def scale(logits_V: Tensor, temperature: float) -> Tensor:
    """Divides by the temperature; at 0 only the argmax is left, the lowest id of equals."""
    if temperature == 1.0:
        return logits_V
    if temperature == 0.0:
        return _keep_only(logits_V, logits_V.argmax(dim=0, keepdim=True))
    return (logits_V - logits_V.max()) / temperature  # no overflow, however low the temperature


def keep_min_p(logits_V: Tensor, min_p: float) -> Tensor:
    """Drops tokens whose probability is below `min_p` times that of the most likely one."""
    if min_p == 0.0:
        return logits_V
    return logits_V.masked_fill(logits_V < logits_V.max() + math.log(min_p), NEVER)


def keep_top_k(logits_V: Tensor, k: int) -> Tensor:
    """Keeps the k most likely tokens."""
    if k == 0 or k >= len(logits_V):
        return logits_V
    threshold = logits_V.topk(k).values[-1]
    above = (logits_V > threshold).nonzero().squeeze(1)
    equal = (logits_V == threshold).nonzero().squeeze(1)
    return _keep_only(logits_V, torch.cat([above, equal[: k - len(above)]]))


def keep_top_p(logits_V: Tensor, top_p: float) -> Tensor:
    """Keeps the smallest set of most likely tokens whose mass reaches `top_p`."""
    if top_p == 1.0:
        return logits_V
    law_V = logits_V.double().softmax(dim=0)
    # Tokens below (1 - top_p) / V weigh less than 1 - top_p together: only the others are sorted.
    floor = min((1.0 - top_p) / len(law_V), float(law_V.max()))
    candidates_C = (law_V >= floor).nonzero().squeeze(1)
    order_C = logits_V[candidates_C].sort(descending=True, stable=True).indices
    ranked_C = candidates_C[order_C]
    num_kept = int((law_V[ranked_C].cumsum(dim=0)[:-1] < top_p).sum()) + 1
    return _keep_only(logits_V, ranked_C[:num_kept])


def _ends_with(tokens: Sequence[int], end: Sequence[int]) -> bool:
    start = len(tokens) - len(end)
    return start >= 0 and tuple(tokens[start:]) == tuple(end)


def _keep_only(logits_V: Tensor, tokens: Tensor) -> Tensor:
    kept_V = torch.full_like(logits_V, NEVER)
    kept_V[tokens] = logits_V[tokens]
    return kept_V
