"""Shaper: from a row of raw logits to the target's law p, as one request asked for it.

Shape legend: R rows of a step, V vocabulary.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from outrider.errors import RequestError
from outrider.request import SamplingParams
from outrider.sampling import transforms

DEAD_END = "no token is allowed"  # how that error begins: it is the request's, not the model's


class TokenCounts:
    """Which tokens a prompt holds and how often each was generated.

    A cache of the committed log, which only grows: each call counts the tokens that are new.
    """

    def __init__(self, vocab_size: int, num_prompt: int) -> None:
        self.in_prompt_V = torch.zeros(vocab_size, dtype=torch.bool)
        self.output_V = torch.zeros(vocab_size, dtype=torch.float64)
        self._num_prompt = num_prompt
        self._num_counted = 0

    def follow(self, tokens: Sequence[int]) -> None:
        """Counts what was committed since the last call."""
        assert len(tokens) >= max(self._num_counted, self._num_prompt), "the log only grows"
        if self._num_counted == 0:
            self.in_prompt_V[torch.tensor(tokens[: self._num_prompt])] = True
            self._num_counted = self._num_prompt
        if self._num_counted < len(tokens):
            _count(self.output_V, tokens[self._num_counted :])
            self._num_counted = len(tokens)

    def along(self, path: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """(seen_V, output counts_V) after the committed tokens and these draft tokens."""
        counts_V = _count(self.output_V.clone(), path) if path else self.output_V
        return (self.in_prompt_V | (counts_V > 0)).to(device), counts_V.to(device)


class Shaper:
    """The sampling settings of one completion, checked against the model and ready to be applied.

    Made once per completion, not shared between them: it counts their tokens for the penalties.
    A law depends on (logits row, committed tokens, path, mask) alone, never on other rows.

    Attributes:
        is_greedy: every law is a point mass, so that no random number is needed.
        is_plain_greedy: the argmax of the raw logits is always the answer: no law is needed.
        is_only_scaled: the temperature alone decides: rows may be shaped together.

    Args:
        eos_token_ids: forbidden, like the stop tokens, before `min_tokens`.
        bad_words_ids: token sequences that `sampling.bad_words` stands for.
        num_prompt: how many of the committed tokens are the prompt.

    Raises:
        RequestError: a token id outside the vocabulary, or more logprobs than it has tokens.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        bad_words_ids: Sequence[Sequence[int]],
        num_prompt: int,
    ) -> None:
        assert all(0 <= token < vocab_size for token in eos_token_ids), "eos out of vocabulary"
        _check(sampling, bad_words_ids, vocab_size)
        self.sampling = sampling
        self.vocab_size = vocab_size
        self._ends = tuple(dict.fromkeys((*eos_token_ids, *sampling.stop_token_ids)))
        self._bad_words_ids = tuple(tuple(word) for word in bad_words_ids)
        self._num_prompt = num_prompt
        self._is_counting = _has_penalty(sampling)
        self._counts = TokenCounts(vocab_size, num_prompt)
        has_mask = bool(self._bad_words_ids) or sampling.min_tokens > 0 or sampling.is_constrained
        is_shifted = bool(sampling.logit_bias) or self._is_counting
        self.is_greedy = sampling.is_greedy
        self.is_plain_greedy = self.is_greedy and not has_mask and not is_shifted
        self.is_only_scaled = not (self.is_greedy or has_mask or is_shifted or _filters(sampling))

    def log_law(
        self,
        logits_V: Tensor,
        tokens: Sequence[int],
        path: Sequence[int] = (),
        mask_V: Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities of the next token, float64; -inf where it is forbidden."""
        return self.shape(logits_V, tokens, path, mask_V).log_softmax(dim=0)

    def shape(
        self,
        logits_V: Tensor,
        tokens: Sequence[int],
        path: Sequence[int] = (),
        mask_V: Tensor | None = None,
    ) -> Tensor:
        """Logits of the law, float64: it is their softmax.

        Args:
            logits_V: raw logits after `tokens` and `path`.
            tokens: committed tokens, prompt first; later calls may only append to them.
            path: draft tokens after them.
            mask_V: what a grammar allows (True); None allows all.

        Raises:
            RequestError: the settings forbid every token, or the logits are not numbers.
        """
        sampling = self.sampling
        if self.is_only_scaled and mask_V is None:
            rows_1V, (peak,) = scale_together(logits_V.unsqueeze(0), [self])
            self._check_peak(peak)
            return rows_1V[0]
        row_V = self.weigh(logits_V, tokens, path, mask_V)
        row_V = transforms.scale(row_V, sampling.temperature)
        if not sampling.is_greedy:
            row_V = transforms.keep_min_p(row_V, sampling.min_p)
            row_V = transforms.keep_top_k(row_V, sampling.top_k)
            row_V = transforms.keep_top_p(row_V, sampling.top_p)
        return row_V

    def weigh(
        self,
        logits_V: Tensor,
        tokens: Sequence[int],
        path: Sequence[int] = (),
        mask_V: Tensor | None = None,
    ) -> Tensor:
        """As `shape`, before temperature and filters: -inf where a setting forbids a token."""
        row_V = logits_V.double()
        if mask_V is not None:
            row_V = row_V.masked_fill(~mask_V.to(row_V.device), transforms.NEVER)
        row_V = transforms.add_bias(row_V, self.sampling.logit_bias)
        row_V = transforms.forbid(row_V, self._forbidden(tokens, path))
        row_V = self._penalize(row_V, tokens, path)
        self._check_peak(float(row_V.max()))
        return row_V

    def _forbidden(self, tokens: Sequence[int], path: Sequence[int]) -> list[int]:
        """Single tokens that minimum length and bad words rule out here."""
        is_too_short = len(tokens) + len(path) - self._num_prompt < self.sampling.min_tokens
        ends = self._ends if is_too_short else ()
        if not self._bad_words_ids:
            return list(ends)
        longest = max(len(word) for word in self._bad_words_ids)
        tail = (*tokens[max(self._num_prompt, len(tokens) - longest) :], *path)
        return [*ends, *transforms.forbidden_by_bad_words(self._bad_words_ids, tail)]

    def _penalize(self, row_V: Tensor, tokens: Sequence[int], path: Sequence[int]) -> Tensor:
        if not self._is_counting:
            return row_V
        self._counts.follow(tokens)
        seen_V, counts_V = self._counts.along(path, row_V.device)
        row_V = transforms.penalize_repetition(row_V, seen_V, self.sampling.repetition_penalty)
        return transforms.penalize_count(
            row_V,
            counts_V,
            frequency=self.sampling.frequency_penalty,
            presence=self.sampling.presence_penalty,
        )

    def _check_peak(self, peak: float) -> None:
        if peak == transforms.NEVER:
            raise RequestError(
                f"{DEAD_END}: {self._masks()} forbid all {self.vocab_size} of them here; "
                "loosen one of these settings"
            )
        if not math.isfinite(peak):
            raise RequestError(f"the model's logits hold {peak}: no token can be drawn from them")

    def _masks(self) -> str:
        """The settings that can forbid tokens, as they were asked for."""
        names = ("logit_bias", "min_tokens", "bad_words", "json_schema", "regex", "grammar")
        asked = {name: getattr(self.sampling, name) for name in names}
        return ", ".join(f"{name}={_short(value)}" for name, value in asked.items() if value)


def scale_together(logits_RV: Tensor, shapers: Sequence[Shaper]) -> tuple[Tensor, list[float]]:
    """`Shaper.shape` of rows that are only scaled, and the peak of each; no row's bits depend on R.

    A row whose peak is not finite is void.
    """
    rows_RV = logits_RV.to(torch.float64, copy=True)
    peaks_R1 = rows_RV.amax(dim=1, keepdim=True)
    temperatures = [[shaper.sampling.temperature] for shaper in shapers]
    temperatures_R1 = torch.tensor(temperatures, dtype=rows_RV.dtype, device=rows_RV.device)
    return rows_RV.sub_(peaks_R1).div_(temperatures_R1), peaks_R1.flatten().tolist()


def laws_together(logits_RV: Tensor, shapers: Sequence[Shaper]) -> list[Tensor | None]:
    """The laws of rows that are only scaled, on the host; None where the logits are no numbers."""
    scaled_RV, peaks = scale_together(logits_RV, shapers)
    laws_RV = scaled_RV.softmax(dim=1).cpu()
    return [
        law_V if math.isfinite(peak) else None
        for law_V, peak in zip(laws_RV.unbind(), peaks, strict=True)
    ]


def _filters(sampling: SamplingParams) -> bool:
    return sampling.min_p > 0.0 or sampling.top_k > 0 or sampling.top_p < 1.0


def _has_penalty(sampling: SamplingParams) -> bool:
    return (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )


def _count(counts_V: Tensor, tokens: Sequence[int]) -> Tensor:
    """Adds one per occurrence, in place."""
    ones = torch.ones(len(tokens), dtype=counts_V.dtype)
    return counts_V.index_add_(0, torch.tensor(tokens), ones)


def _check(
    sampling: SamplingParams, bad_words_ids: Sequence[Sequence[int]], vocab_size: int
) -> None:
    _check_ids("logit_bias", sampling.logit_bias, vocab_size)
    _check_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)
    for word in bad_words_ids:
        if not word:
            raise RequestError(f"bad_words={sampling.bad_words!r}: one of them has no tokens")
        _check_ids("bad_words", word, vocab_size)
    for token, value in sampling.logit_bias.items():
        if math.isnan(value) or value == math.inf:
            raise RequestError(f"logit_bias[{token}]={value}: must be finite, or -inf to forbid")
    if sampling.logprobs is not None and sampling.logprobs > vocab_size:
        raise RequestError(f"logprobs={sampling.logprobs}: the model has {vocab_size} tokens")


def _check_ids(name: str, tokens: Iterable[int], vocab_size: int) -> None:
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise RequestError(f"{name}: token id {token} must lie in [0, {vocab_size})")


def _short(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
