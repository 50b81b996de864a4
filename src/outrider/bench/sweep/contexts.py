"""Contexts: prompts made as long as a run asks for."""

from collections.abc import Sequence as Items
from dataclasses import replace
from itertools import cycle, islice

from outrider.bench.inprocess import InProcess
from outrider.bench.target import Question, Target
from outrider.engine.prompts import encode
from outrider.errors import ConfigError


def lengthened(
    target: Target, questions: Items[Question], num_tokens: int, max_tokens: int
) -> tuple[Question, ...]:
    """The questions as exactly `num_tokens` token ids: behind text of the others, or their end.

    Args:
        max_tokens: that must find room behind them.

    Raises:
        ConfigError: the target tells no tokens, or has no room for so many.
    """
    if not isinstance(target, InProcess):
        raise ConfigError(f"context {num_tokens}: a server by URL tells no tokens; leave it out")
    most = target.llm.engine.max_model_len - max_tokens
    if not 0 < num_tokens <= most:
        raise ConfigError(
            f"context {num_tokens}: must lie between 1 and {most}, so that {max_tokens} tokens of "
            "an answer fit"
        )
    ids = [list(encode(question.prompt, target.llm.tokenizer)) for question in questions]
    return tuple(
        replace(
            question, id=f"{question.id}, {num_tokens} tokens", prompt=_filled(ids, at, num_tokens)
        )
        for at, question in enumerate(questions)
    )


def _filled(ids: Items[list[int]], at: int, num_tokens: int) -> list[int]:
    own = ids[at][-num_tokens:]
    others = cycle(token for one in [*ids[at + 1 :], *ids[: at + 1]] for token in one)
    return [*islice(others, num_tokens - len(own)), *own]
