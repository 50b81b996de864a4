"""Continuation: the tokens by which new messages follow a token log, without encoding it again.

The log holds answers as they were generated. Only what a chat template puts around and between
messages is looked up, by rendering a short conversation with a mark in it.
"""

from collections.abc import Mapping, Sequence as Items
from typing import Any

from outrider.errors import RequestError, TokenizerError
from outrider.tokenizer import NO_TEMPLATE, Tokenizer, check_messages

Message = Mapping[str, Any]
MARK = "outrider7c41mark"
CONTEXT: tuple[Message, ...] = (
    {"role": "user", "content": "-"},
    {"role": "assistant", "content": MARK},
)
MAX_OVERLAP = 4  # tokens by which an answer may have closed itself


def opening(
    tokenizer: Tokenizer,
    messages: Items[Message],
    variables: Mapping[str, Any],
    *,
    awaits_answer: bool,
) -> list[int]:
    """Token ids of a conversation from its beginning.

    Args:
        awaits_answer: whether the assistant's turn begins behind it.

    Raises:
        TokenizerError: there is no chat template. RequestError: it refuses the messages.
    """
    text = _render(tokenizer, messages, variables, awaits_answer)
    return tokenizer.encode(text, add_special_tokens=False)


def continuation(
    tokenizer: Tokenizer,
    log: Items[int],
    messages: Items[Message],
    variables: Mapping[str, Any],
    *,
    is_open: bool,
    awaits_answer: bool,
) -> list[int]:
    """Token ids that follow a log which is not empty; raises as `opening`.

    Args:
        is_open: whether the log ends in an answer that nothing has closed yet. Tokens by which
            the answer closed itself are not said twice.
    """
    check_messages(messages)
    closing = _render(tokenizer, CONTEXT, variables, False).partition(MARK)[2]
    text = _render(tokenizer, [*CONTEXT, *messages], variables, awaits_answer).partition(MARK)[2]
    if not is_open:
        text = text.removeprefix(closing)
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids[_overlap(tokenizer, log, ids) :] if is_open else ids


def _overlap(tokenizer: Tokenizer, log: Items[int], ids: list[int]) -> int:
    """How many of `ids` the log ends with, from a special token on; 0 where it ends in text."""
    for size in range(min(MAX_OVERLAP, len(log), len(ids)), 0, -1):
        if list(log[-size:]) == ids[:size] and ids[0] in tokenizer.special_ids:
            return size
    return 0


def _render(
    tokenizer: Tokenizer, messages: Items[Message], variables: Mapping[str, Any], gen: bool
) -> str:
    check_messages(messages)
    backend = tokenizer.backend
    if not getattr(backend, "chat_template", None):
        raise TokenizerError(NO_TEMPLATE)
    try:
        return str(
            backend.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=gen,
                **variables,
            )
        )
    except Exception as error:
        # A template is a program of the model's author: it may raise anything.
        raise RequestError(f"the chat template refuses the messages: {error}") from error
