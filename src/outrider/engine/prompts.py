"""Prompts as users give them (text, token ids, chat messages) into requests."""

import secrets
from collections.abc import Iterable, Mapping, Sequence as Items
from dataclasses import replace
from typing import Any, TypeAlias

from outrider.errors import RequestError
from outrider.request import (
    PastDrafts,
    Request,
    SamplingParams,
    SpeculationParams,
    StreamParams,
)
from outrider.tokenizer import Tokenizer

Message: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = str | Items[int] | Items[Message]
NOTHING: PastDrafts = {}


def encode(prompt: Prompt, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Token ids of a text, of chat messages (through the chat template), or as they are."""
    if isinstance(prompt, str):
        if not prompt:
            raise RequestError("the prompt is empty: give some text")
        return tuple(_needed(tokenizer, "a text prompt").encode(prompt))
    items = list(prompt) if isinstance(prompt, Iterable) else []
    if items and all(isinstance(item, Mapping) for item in items):
        chat = _needed(tokenizer, "a chat prompt")
        return tuple(chat.apply_chat_template([dict(m) for m in items if isinstance(m, Mapping)]))
    ids = [item for item in items if isinstance(item, int) and not isinstance(item, bool)]
    if not items or len(ids) < len(items):
        raise RequestError(
            f"prompt={short(prompt)}: give a text, token ids, or messages like "
            '{"role": "user", "content": "..."}'
        )
    return tuple(ids)


def make_request(
    request_id: str,
    prompt: Prompt,
    sampling: SamplingParams,
    speculation: SpeculationParams,
    stream: StreamParams,
    tokenizer: Tokenizer | None,
    *,
    priority: int = 0,
    tenant: str = "",
    experience: PastDrafts = NOTHING,
) -> Request:
    """A request whose seed is drawn here if none was given."""
    if not isinstance(sampling, SamplingParams):
        raise RequestError(f"sampling={short(sampling)}: give SamplingParams(...)")
    return Request(
        id=request_id,
        prompt_token_ids=encode(prompt, tokenizer),
        sampling=sampling,
        speculation=with_prediction(speculation, tokenizer),
        stream=stream,
        seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
        priority=priority,
        tenant=tenant,
        bad_words_ids=_bad_words(sampling, tokenizer),
        experience=experience,
    )


def with_prediction(
    speculation: SpeculationParams, tokenizer: Tokenizer | None
) -> SpeculationParams:
    """The expected text as token ids, as they would continue a prompt."""
    text = speculation.prediction
    if text is None:
        return speculation
    ids = tuple(_needed(tokenizer, "prediction").encode(text, add_special_tokens=False))
    return replace(speculation, prediction=None, prediction_token_ids=ids)


def _bad_words(
    sampling: SamplingParams, tokenizer: Tokenizer | None
) -> tuple[tuple[int, ...], ...]:
    """Each bad word as it reads at the start of a text and after a space."""
    if not sampling.bad_words:
        return ()
    encoder = _needed(tokenizer, "bad_words")
    spellings = [text for word in sampling.bad_words for text in (word, " " + word.lstrip())]
    encoded = [tuple(encoder.encode(text, add_special_tokens=False)) for text in spellings]
    return tuple(dict.fromkeys(encoded))


def _needed(tokenizer: Tokenizer | None, what: str) -> Tokenizer:
    if tokenizer is None:
        raise RequestError(f"{what} needs a tokenizer: load one, or give token ids")
    return tokenizer


def short(value: object, limit: int = 60) -> str:
    """How a value is shown in a message, on one line."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
