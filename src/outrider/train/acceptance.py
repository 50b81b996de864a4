"""How many tokens one speculative step commits, computed on the target's own continuation.

For a sequence drawn from the target, position i's draft was accepted with probability
min(1, q(x_i) / p(x_i)) given the token x_i that came out: rejection sampling (Leviathan et al.
2023, algorithm 1) outputs x with probability p(x) and accepts it with min(p(x), q(x)). So the
expected number of steps over a given continuation is exact, not simulated. At temperature 0 both
laws are one-hot and the same rule counts matches.

Shape legend: B sequences, T positions, N continuation positions, K draft length, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from outrider.train.network import Decoder

Proposer = Callable[[Sequence[int], int], list[int]]


@torch.no_grad()
def continue_target(
    target: Decoder, prompts_BT: Tensor, num_tokens: int, *, temperature: float, seed: int
) -> Tensor:
    """Prompts and `num_tokens` more tokens of the target, (B, T + num_tokens); no end is heeded."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = prompts_BT
    for _ in range(num_tokens):
        law_BV = _law(target(tokens_BT)[:, -1], temperature)
        next_B1 = torch.multinomial(law_BV, 1, generator=generator)
        tokens_BT = torch.cat((tokens_BT, next_B1), dim=1)
    return tokens_BT


@torch.no_grad()
def model_acceptance(
    target: Decoder, draft: Decoder, tokens_BT: Tensor, prompt_length: int, *, temperature: float
) -> Tensor:
    """Probability (B, N) that the draft model's guess at each continuation position stands.

    The draft model's context at any accepted depth is the text itself, so one pass serves all
    starting positions.
    """
    context = slice(prompt_length - 1, -1)
    token_BN1 = tokens_BT[:, prompt_length:, None]
    p_BN = _law(target(tokens_BT)[:, context], temperature).gather(2, token_BN1)[..., 0]
    q_BN = _law(draft(tokens_BT)[:, context], temperature).gather(2, token_BN1)[..., 0]
    return (q_BN / p_BN).clamp(max=1.0)


def expected_steps(accept_NK: Tensor) -> float:
    """Expected number of steps to commit N tokens.

    Args:
        accept_NK: for a step that starts at position n, the probability that its draft number k
            stands when all before it stood.
    """
    num_positions, num_draft_tokens = accept_NK.shape
    steps = [0.0] * (num_positions + num_draft_tokens + 1)
    for start in reversed(range(num_positions)):
        reached, expected = 1.0, 1.0
        for depth in range(num_draft_tokens):
            accepted = float(accept_NK[start, depth])
            # A rejected guess is replaced by the target's token: depth + 1 tokens in all.
            expected += reached * (1.0 - accepted) * steps[start + depth + 1]
            reached *= accepted
        steps[start] = expected + reached * steps[start + num_draft_tokens + 1]
    return steps[0]


def unfold_model(accept_N: Tensor, num_draft_tokens: int) -> Tensor:
    """Acceptance (N, K) of steps that start at each position, when it depends on position only."""
    padded = torch.cat((accept_N, torch.zeros(num_draft_tokens - 1)))
    return padded.unfold(0, num_draft_tokens, 1)


def unfold_proposer(
    propose: Proposer, tokens: Sequence[int], prompt_length: int, num_draft_tokens: int
) -> Tensor:
    """Acceptance (N, K) of deterministic guesses: one where they meet the text, else zero."""
    rows: list[list[float]] = []
    for start in range(prompt_length, len(tokens)):
        guesses = propose(tokens[:start], num_draft_tokens)
        truth = tokens[start : start + num_draft_tokens]
        row = [float(guess == true) for guess, true in zip(guesses, truth, strict=False)]
        rows.append(row + [0.0] * (num_draft_tokens - len(row)))
    return torch.tensor(rows)


def repeat_last(context: Sequence[int], num_draft_tokens: int) -> list[int]:
    """Baseline: the last token again and again."""
    return [context[-1]] * num_draft_tokens


def lookup_ngram(context: Sequence[int], num_draft_tokens: int) -> list[int]:
    """Baseline: what followed the latest earlier occurrence of the last 3, 2 or 1 tokens."""
    for size in (3, 2, 1):
        suffix = context[-size:]
        for start in range(len(context) - size - 1, -1, -1):
            if context[start : start + size] == suffix:
                return list(context[start + size : start + size + num_draft_tokens])
    return []


def _law(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities at `temperature`; one-hot on the best token at zero."""
    if temperature == 0.0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return (logits.float() / temperature).softmax(-1)
