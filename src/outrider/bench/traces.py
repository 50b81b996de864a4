"""Traces: recorded arrivals and lengths of real services, and prompts of those lengths.

Lengths come without text. Prompts are then cut out of a pool, and what is accepted of drafts on
them means nothing.
"""

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence as Items
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from outrider.bench.arrivals import opened
from outrider.bench.result import content_hash
from outrider.engine.prompts import Prompt
from outrider.errors import ConfigError

MOONCAKE_BLOCK = 512  # tokens that each of its `hash_ids` stands for
WORDS_PER_TOKEN = 0.75


class Arrival(NamedTuple):
    """One recorded request.

    Attributes:
        at_s: seconds after the first. num_tokens: of the answer.
        blocks: names of the blocks that the prompt consists of; equal names are equal tokens.
        block_tokens: length of each but the last; 0 without blocks.
    """

    at_s: float
    num_prompt_tokens: int
    num_tokens: int
    blocks: tuple[str, ...] = ()
    block_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Arrivals in order.

    Attributes:
        layout: whose file it is. has_times: whether it tells when requests came.
        left_out: by reason.
    """

    name: str
    layout: str
    arrivals: tuple[Arrival, ...]
    has_times: bool = True
    left_out: Mapping[str, int]

    @property
    def hash(self) -> str:
        return content_hash([tuple(arrival) for arrival in self.arrivals])

    @property
    def rate(self) -> float | None:
        """Mean requests per second."""
        span = self.arrivals[-1].at_s - self.arrivals[0].at_s
        return (len(self.arrivals) - 1) / span if self.has_times and span > 0 else None

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "hash": self.hash,
            "layout": self.layout,
            "num_requests": len(self.arrivals),
            "requests_per_second": self.rate,
            "left_out": dict(self.left_out),
        }

    def times(self) -> list[float]:
        """When each comes."""
        if not self.has_times:
            raise ConfigError(f"trace {self.name!r} tells no times: give a rate beside it")
        return opened([arrival.at_s for arrival in self.arrivals])

    def take(self, limit: int | None) -> "Trace":
        """The first ones."""
        return self if limit is None else replace(self, arrivals=self.arrivals[:limit])

    def faster(self, factor: float) -> "Trace":
        """The same requests in 1 / factor of the time."""
        if factor <= 0:
            raise ConfigError(f"speed={factor}: must be above 0")
        return self._with(lambda each: each._replace(at_s=each.at_s / factor))

    def shorter(self, share: float) -> "Trace":
        """Prompts and answers of this share of their lengths, for models of short context.

        Blocks are as many as before, so what is shared keeps its share.
        """
        if share <= 0:
            raise ConfigError(f"scale={share}: must be above 0")
        return self._with(
            lambda each: each._replace(
                num_prompt_tokens=max(1, round(each.num_prompt_tokens * share)),
                num_tokens=max(1, round(each.num_tokens * share)),
                block_tokens=max(1, round(each.block_tokens * share)) if each.blocks else 0,
            )
        )

    def fitting(self, max_model_len: int | None) -> "Trace":
        """Without those that the model could not hold."""
        if max_model_len is None:
            return self
        fits = [each for each in self.arrivals if _length(each) <= max_model_len]
        if not fits:
            raise ConfigError(
                f"trace {self.name!r}: all of its requests are longer than {max_model_len} tokens; "
                "scale their lengths down"
            )
        num_long = len(self.arrivals) - len(fits)
        reason = {f"longer than {max_model_len} tokens": num_long} if num_long else {}
        return replace(self, arrivals=tuple(fits), left_out={**self.left_out, **reason})

    def _with(self, change: Callable[[Arrival], Arrival]) -> "Trace":
        return replace(self, arrivals=tuple(change(each) for each in self.arrivals))


class Filler:
    """Prompts of wanted lengths, cut out of a pool of text; equal blocks are equal tokens.

    Args:
        encode: text to token ids; None makes texts of about the wanted length.
    """

    def __init__(
        self, texts: Iterable[str], encode: Callable[[str], Items[int]] | None = None
    ) -> None:
        found = list(texts)
        self._ids = None if encode is None else [token for text in found for token in encode(text)]
        self._words = [word for text in found for word in text.split()]
        if not (self._ids or self._words):
            raise ConfigError("the pool of prompts holds no text: give another file")

    @property
    def is_exact(self) -> bool:
        """Whether prompts have exactly the length that was asked for."""
        return self._ids is not None

    def prompt(self, arrival: Arrival, name: str) -> Prompt:
        """What no block names is this request's own."""
        pool, share = (self._words, WORDS_PER_TOKEN) if self._ids is None else (self._ids, 1.0)
        wanted = max(1, round(arrival.num_prompt_tokens * share))
        length = max(1, round(arrival.block_tokens * share))
        found: list[Any] = []
        for block in arrival.blocks:
            found += _cut(pool, f"block {block}", length)
        found += _cut(pool, f"request {name}", max(0, wanted - len(found)))
        return " ".join(found[:wanted]) if self._ids is None else found[:wanted]


def read_trace(path: Path) -> Trace:
    """Azure's CSV, Mooncake's JSON lines, BurstGPT's CSV, or lengths alone as Vidur has them.

    Raises:
        ConfigError: no such file, or none of these layouts.
    """
    if not path.is_file():
        raise ConfigError(f"no trace {str(path)!r}: give a file")
    text = path.read_text(encoding="utf-8-sig")
    rows = _json_rows(path, text) if text.lstrip().startswith("{") else _table(text)
    if not rows:
        raise ConfigError(f"trace {str(path)!r} holds no request: give another")
    layout = _layout_of(rows[0], path)
    return _trace(path.name, layout, rows)


class Layout(NamedTuple):
    """Whose columns mean what.

    Attributes:
        time: column of when it came, "" for none; seconds: what that says.
        blocks: column of the blocks' names.
    """

    name: str
    prompt: str
    answer: str
    time: str = ""
    seconds: Callable[[Any], float] = float
    blocks: str = ""


def _moment(told: Any) -> float:
    """Azure writes up to seven digits of a second; all its times are UTC, said or not."""
    text = str(told).strip().removesuffix("Z").removesuffix("+00:00")
    whole, _, digits = text.partition(".")
    return datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{digits or 0}")


LAYOUTS = (
    Layout(
        "mooncake", "input_length", "output_length", "timestamp",
        lambda told: float(told) / 1e3, "hash_ids",
    ),
    Layout("azure", "ContextTokens", "GeneratedTokens", "TIMESTAMP", _moment),
    Layout("burstgpt", "Request tokens", "Response tokens", "Timestamp"),
    Layout("vidur", "num_prefill_tokens", "num_decode_tokens", "arrived_at"),
    Layout("vidur lengths", "num_prefill_tokens", "num_decode_tokens"),
)  # fmt: skip


def _layout_of(row: Mapping[str, Any], path: Path) -> Layout:
    for layout in LAYOUTS:
        if {layout.prompt, layout.answer, layout.time or layout.prompt} <= row.keys():
            return layout
    raise ConfigError(
        f"trace {str(path)!r} has columns {', '.join(map(str, row))}: none of the layouts "
        f"{', '.join(layout.name for layout in LAYOUTS)}; rename them"
    )


def _trace(name: str, layout: Layout, rows: Items[Mapping[str, Any]]) -> Trace:
    found, num_failed = [], 0
    for number, row in enumerate(rows, start=1):
        try:
            arrival = _arrival(layout, row)
        except (LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"trace {name!r}, request {number}: {error!r}; repair it") from error
        if arrival.num_prompt_tokens > 0 and arrival.num_tokens > 0:
            found.append(arrival)
        else:
            num_failed += 1
    if not found:
        raise ConfigError(f"trace {name!r} holds no request with an answer: give another")
    found.sort(key=lambda arrival: arrival.at_s)
    start = found[0].at_s
    return Trace(
        name=name,
        layout=layout.name,
        arrivals=tuple(each._replace(at_s=each.at_s - start) for each in found),
        has_times=bool(layout.time),
        left_out={"no prompt or no answer": num_failed} if num_failed else {},
    )


def _arrival(layout: Layout, row: Mapping[str, Any]) -> Arrival:
    blocks = tuple(map(str, row.get(layout.blocks) or ())) if layout.blocks else ()
    return Arrival(
        at_s=layout.seconds(row[layout.time]) if layout.time else 0.0,
        num_prompt_tokens=int(float(row[layout.prompt])),
        num_tokens=int(float(row[layout.answer])),
        blocks=blocks,
        block_tokens=MOONCAKE_BLOCK if blocks else 0,
    )


def _cut(pool: Items[Any], name: str, count: int) -> list[Any]:
    """So many items, from a place that the name decides."""
    start = int(content_hash(name), 16) % len(pool)
    return [pool[(start + i) % len(pool)] for i in range(count)]


def _table(text: str) -> list[dict[str, Any]]:
    return list(csv.DictReader(text.splitlines()))


def _json_rows(path: Path, text: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}:{number}: no JSON ({error.msg}); repair it") from error
    return rows


def _length(arrival: Arrival) -> int:
    return arrival.num_prompt_tokens + arrival.num_tokens
