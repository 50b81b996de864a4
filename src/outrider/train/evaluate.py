"""Held-out loss and acceptance length of a trained pair, by domain.

Shape legend: B sequences, T positions.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from outrider.train.acceptance import (
    Proposer,
    continue_target,
    expected_steps,
    lookup_ngram,
    model_acceptance,
    repeat_last,
    unfold_model,
    unfold_proposer,
)
from outrider.train.corpus import Corpus, Document, Domain
from outrider.train.losses import CrossEntropy
from outrider.train.network import Decoder
from outrider.train.vocabulary import END, SPECIAL_TOKENS, token_id

BASELINES: dict[str, Proposer] = {"repeat last": repeat_last, "n-gram 3..1": lookup_ngram}
TEMPERATURES = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How much held-out text is used; lengths in tokens, counts per domain."""

    window: int = 512
    max_windows: int = 48
    num_prompts: int = 24
    prompt_length: int = 64
    num_generated: int = 64
    num_draft_tokens: int = 4
    seed: int = 0


class Loss(NamedTuple):
    """Mean over the scored tokens; special tokens cost nats but count no bytes."""

    nats_per_token: float
    bits_per_byte: float
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class DomainResult:
    """What one domain gave; `acceptance_length` by drafter name and temperature."""

    domain: str
    target_loss: Loss
    draft_loss: Loss
    num_prompts: int
    acceptance_length: dict[tuple[str, float], float]


def evaluate_pair(
    target: Decoder,
    draft: Decoder,
    tokenizer: Tokenizer,
    corpus: Corpus,
    config: EvaluationConfig | None = None,
) -> list[DomainResult]:
    """Score both models on the held-out documents of every domain."""
    config = EvaluationConfig() if config is None else config
    target, draft = target.cpu().eval(), draft.cpu().eval()
    return [_domain(target, draft, tokenizer, domain, config) for domain in corpus.domains]


def _domain(
    target: Decoder, draft: Decoder, tokenizer: Tokenizer, domain: Domain, config: EvaluationConfig
) -> DomainResult:
    windows = _spread(list(_windows(tokenizer, domain.held_out, config.window)), config.max_windows)
    prompts_BT = _prompts(tokenizer, domain.held_out, config)
    return DomainResult(
        domain=domain.name,
        target_loss=held_out_loss(target, tokenizer, windows),
        draft_loss=held_out_loss(draft, tokenizer, windows),
        num_prompts=len(prompts_BT),
        acceptance_length=_acceptance_lengths(target, draft, prompts_BT, config),
    )


@torch.no_grad()
def held_out_loss(model: Decoder, tokenizer: Tokenizer, windows: Sequence[list[int]]) -> Loss:
    """Loss of predicting every token of each window but its first."""
    special = {token_id(tokenizer, token) for token in SPECIAL_TOKENS}
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for window in windows:
        scored = window[1:]
        nats += float(CrossEntropy()(model, torch.tensor([window]))) * len(scored)
        num_tokens += len(scored)
        # The byte-level alphabet writes one character per byte.
        num_bytes += sum(len(tokenizer.id_to_token(i) or "") for i in scored if i not in special)
    return Loss(nats / num_tokens, nats / math.log(2.0) / num_bytes, num_tokens)


def _windows(
    tokenizer: Tokenizer, documents: Sequence[Document], length: int
) -> Iterator[list[int]]:
    """Windows of up to `length` + 1 tokens that share one, so each token is scored once."""
    end = token_id(tokenizer, END)
    for encoding in tokenizer.encode_batch([document.text for document in documents]):
        tokens = [end, *encoding.ids, end]
        for start in range(0, len(tokens) - 1, length):
            yield tokens[start : start + length + 1]


def _prompts(
    tokenizer: Tokenizer, documents: Sequence[Document], config: EvaluationConfig
) -> Tensor:
    """Held-out beginnings (B, T), an end token before each as in training.

    A long document gives several: its pieces of two prompt lengths count as documents, for
    otherwise four books would be four prompts.
    """
    pieces = _windows(tokenizer, documents, 2 * config.prompt_length)
    long_enough = [piece for piece in pieces if len(piece) >= config.prompt_length]
    chosen = _spread(long_enough, config.num_prompts)
    return torch.tensor([piece[: config.prompt_length] for piece in chosen])


def _acceptance_lengths(
    target: Decoder, draft: Decoder, prompts_BT: Tensor, config: EvaluationConfig
) -> dict[tuple[str, float], float]:
    lengths: dict[tuple[str, float], float] = {}
    for temperature in TEMPERATURES:
        tokens_BT = continue_target(
            target, prompts_BT, config.num_generated, temperature=temperature, seed=config.seed
        )
        accept_BN = model_acceptance(
            target, draft, tokens_BT, config.prompt_length, temperature=temperature
        )
        steps = [expected_steps(unfold_model(row, config.num_draft_tokens)) for row in accept_BN]
        lengths["draft model", temperature] = config.num_generated * len(steps) / sum(steps)
        for name, propose in BASELINES.items():
            lengths[name, temperature] = _baseline_length(propose, tokens_BT, config)
    return lengths


def _baseline_length(propose: Proposer, tokens_BT: Tensor, config: EvaluationConfig) -> float:
    rows: list[list[int]] = tokens_BT.tolist()
    steps = [
        expected_steps(unfold_proposer(propose, row, config.prompt_length, config.num_draft_tokens))
        for row in rows
    ]
    return config.num_generated * len(steps) / sum(steps)


def _spread(items: list[list[int]], count: int) -> list[list[int]]:
    """At most `count` items at even distances."""
    if len(items) <= count:
        return items
    return [items[index * len(items) // count] for index in range(count)]
