"""Which loads `outrider bench load` puts on a target, from what was asked for."""

import math
from collections.abc import Callable, Iterator, Sequence as Items
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import typer

from outrider.bench import traces
from outrider.bench.arrivals import ramp
from outrider.bench.datasets import Dataset
from outrider.bench.load import Level, Server, closed_loop, open_loop, repeated
from outrider.bench.talks import Habits
from outrider.bench.target import Question
from outrider.bench.traces import Filler, Trace
from outrider.errors import ConfigError
from outrider.models.hub import resolve
from outrider.tokenizer import load_tokenizer

CONCURRENCIES = (1, 4, 16)
ROUNDS = 4  # requests per one in flight, of a closed loop without a number
MIN_REQUESTS = 16
OPEN_S = 30.0  # of an open loop without a number


class Asked(NamedTuple):
    """Which loads were asked for.

    Attributes:
        burstiness: None is evenly. ramp: first rate, last rate, seconds.
        habits: of users who talk, their number left out.
    """

    data: Dataset
    trace: Trace | None
    concurrencies: tuple[int, ...]
    rates: tuple[float, ...]
    burstiness: float | None
    ramp: tuple[float, float, float] | None
    habits: Habits | None
    num_requests: int | None
    duration: float | None
    seed: int


def levels(asked: Asked, encode: Callable[[str], Items[int]] | None) -> Iterator[Level]:
    """Closed loops first, then rising rates, a ramp, a trace."""
    if asked.habits is not None and (asked.rates or asked.ramp or asked.trace):
        raise ConfigError("--turns: talks go at their own pace; drop --rate, --ramp and --trace")
    questions = asked.data.questions
    is_open = asked.rates or asked.ramp or asked.trace
    for concurrency in asked.concurrencies or (() if is_open else CONCURRENCIES):
        yield _closed(asked, concurrency)
    if asked.trace is not None:
        yield from _replays(asked, asked.trace, encode)
        return
    for rate in asked.rates:
        yield _at_rate(asked, questions, rate, _num_at(asked, rate))
    if asked.ramp is not None:
        yield _climb(asked, asked.ramp)


def _num_at(asked: Asked, rate: float) -> int:
    return asked.num_requests or max(MIN_REQUESTS, math.ceil(OPEN_S * rate))


def _climb(asked: Asked, rates: tuple[float, float, float]) -> Level:
    times = ramp(*rates, burstiness=asked.burstiness, seed=asked.seed)
    return Level(
        name=f"ramp {rates[0]:g} to {rates[1]:g}",
        questions=repeated(asked.data.questions, len(times)),
        at_s=tuple(times),
        until_s=asked.duration,
    )


def _closed(asked: Asked, concurrency: int) -> Level:
    questions = asked.data.questions
    num = asked.num_requests or max(MIN_REQUESTS, ROUNDS * concurrency)
    level = closed_loop(questions, concurrency, num, asked.duration)
    if asked.habits is None:
        return level
    habits = replace(asked.habits, num_users=concurrency)
    return replace(level, name=f"{concurrency} users", habits=habits)


def _replays(
    asked: Asked, trace: Trace, encode: Callable[[str], Items[int]] | None
) -> Iterator[Level]:
    """The trace at its own pace, or its lengths at the rates that were asked for."""
    texts = (str(question.prompt) for question in asked.data.as_text().questions)
    filler = Filler(texts, encode)
    questions = tuple(
        Question(
            id=f"{trace.name} {number}",
            prompt=filler.prompt(arrival, str(number)),
            max_tokens=arrival.num_tokens,
        )
        for number, arrival in enumerate(trace.arrivals)
    )
    if not asked.rates:
        yield Level(
            name=trace.name,
            questions=questions,
            at_s=tuple(trace.times()),
            rate=trace.rate,
            until_s=asked.duration,
            is_filler=True,
        )
    for rate in asked.rates:
        level = _at_rate(asked, questions, rate, len(questions))
        yield replace(level, name=f"{trace.name} at {level.name}", is_filler=True)


def _at_rate(asked: Asked, questions: Items[Question], rate: float, num: int) -> Level:
    return open_loop(
        questions,
        rate,
        num,
        burstiness=asked.burstiness,
        seed=asked.seed,
        until_s=asked.duration,
    )


def read_trace(
    path: Path | None, speed: float, share: float, limit: int | None, target: Server
) -> Trace | None:
    if path is None:
        return None
    max_model_len = target.describe().get("max_model_len")
    trace = traces.read_trace(path).faster(speed).shorter(share).fitting(max_model_len).take(limit)
    for reason, count in trace.left_out.items():
        typer.echo(f"{trace.name}: left out {count}: {reason}", err=True)
    return trace


def encoder(target: Server, tokenizer: str | None) -> Callable[[str], Items[int]] | None:
    """For prompts of exact length: the engine's own, or the one that is named."""
    llm = getattr(target, "llm", None)
    if tokenizer is not None:
        return load_tokenizer(resolve(tokenizer)).encode
    return None if llm is None or llm.tokenizer is None else llm.tokenizer.encode


def read_ramp(text: str) -> tuple[float, float, float]:
    try:
        first, last, seconds = (float(part) for part in text.split(":"))
    except ValueError:
        raise ConfigError(f"--ramp {text!r}: write FIRST:LAST:SECONDS, such as 1:8:60") from None
    return first, last, seconds
