"""Identity: whether an arm's answers are the base's, token by token, and where they part.

What cannot be told from a rounding difference is told apart from what can: at the first differing
token the base's own margin between the two is compared with what its margins change by when
nothing but the width of a pass changes.
"""

from collections.abc import Iterator, Mapping, Sequence as Items
from dataclasses import dataclass
from typing import Any

import numpy as np

from outrider.bench.lossless.forced import margin, margin_changes, rows
from outrider.bench.target import Reply
from outrider.engine.engine import Engine
from outrider.sampling.rng import PositionStream

TIE_QUANTILE = 0.999


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a target answered to one question, as far as it is compared.

    Attributes:
        token_ids: None where the target tells text only. prompt_ids: None likewise.
    """

    id: str
    text: str
    token_ids: tuple[int, ...] | None
    error: str = ""

    @classmethod
    def of(cls, reply: Reply) -> "Answer":
        return cls(
            id=reply.ask.question.id,
            text=reply.text,
            token_ids=reply.token_ids,
            error=reply.error,
        )

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> "Answer":
        ids = held["token_ids"]
        return cls(
            id=held["id"],
            text=held["text"],
            token_ids=None if ids is None else tuple(ids),
            error=held["error"],
        )


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where two answers to one question part.

    Attributes:
        id: of the question. position: tokens (characters, where there are no tokens) before it.
        base, arm: what comes then, a token id or a character; None where the answer ends.
        margin_nats: by how much the base's own logits prefer its token; with a temperature, those
            plus the noise both arms draw with. margin_ulp: in steps of the number format.
        is_near_tie: the margin is smaller than what rounding alone changes; None where it was not
            looked at.
    """

    id: str
    position: int
    base: int | str | None
    arm: int | str | None
    margin_nats: float | None = None
    margin_ulp: float | None = None
    is_near_tie: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What margins change by between passes of one row and of several, in one run.

    Attributes:
        tie_eps: 99.9th percentile, nats; largest: the largest. num_positions: looked at.
        is_bitwise: the engine promises bitwise equal rows, so that no difference is excused.
    """

    tie_eps: float
    largest: float
    num_positions: int
    width: int
    is_bitwise: bool

    @property
    def breaks_promise(self) -> bool:
        """Whether the rows changed all the same."""
        return self.is_bitwise and self.largest > 0.0


def first_difference(base: Answer, arm: Answer) -> Difference | None:
    """None for equal answers: of equal tokens, or, where either tells none, of equal text."""
    ours: Items[int | str] = base.text
    theirs: Items[int | str] = arm.text
    if base.token_ids is not None and arm.token_ids is not None:
        ours, theirs = base.token_ids, arm.token_ids
    if ours == theirs:
        return None
    pairs = zip(ours, theirs, strict=False)
    shorter = min(len(ours), len(theirs))
    at = next((i for i, (mine, its) in enumerate(pairs) if mine != its), shorter)
    return Difference(
        id=base.id,
        position=at,
        base=ours[at] if at < len(ours) else None,
        arm=theirs[at] if at < len(theirs) else None,
    )


def measure_rounding(
    engine: Engine, texts: Items[tuple[Items[int], Items[int]]], width: int
) -> Rounding:
    """On (prompt, answer) token ids of the base arm.

    Args:
        width: rows of a verifying pass: K + 1.
    """
    changes: list[float] = []
    for prompt, answer in texts:
        if answer:
            tokens = (*prompt, *answer[:-1])
            changes += margin_changes(engine, tokens, len(prompt), width)
    ops = engine.runner.network.ops
    return Rounding(
        tie_eps=float(np.quantile(changes, TIE_QUANTILE)) if changes else 0.0,
        largest=max(changes, default=0.0),
        num_positions=len(changes),
        width=width,
        is_bitwise=ops.is_batch_invariant and engine.spec.device.type == "cpu",
    )


def examine(
    engine: Engine,
    difference: Difference,
    prompt: Items[int],
    answer: Items[int],
    rounding: Rounding,
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> Difference:
    """The difference with its margin: the base's path is run again up to where they part.

    An answer that ends where the other goes on parted at its last token, so there is nothing to
    compare, and it is no near-tie.

    Args:
        answer: token ids of the base arm. temperature, seed: of both answers, drawn with the same
            noise of `PositionStream`.
    """
    ours, theirs = difference.base, difference.arm
    if not isinstance(ours, int) or not isinstance(theirs, int):
        return _with(difference, None, None, is_near_tie=False)
    tokens = (*prompt, *answer[: difference.position])
    logits_V = next(iter(rows(engine, tokens, len(tokens), 1)))
    found = margin(logits_V, ours, theirs, engine.spec.dtype)
    nats, ulp = found
    if temperature > 0.0:
        noise_V = PositionStream(seed, len(tokens)).noise(len(tokens), len(logits_V))
        nats += temperature * float(noise_V[ours] - noise_V[theirs])
        ulp = ulp * abs(nats / found.nats) if found.nats else ulp
    is_near = not rounding.is_bitwise and abs(nats) <= rounding.tie_eps
    return _with(difference, nats, ulp, is_near_tie=is_near)


def differences(base: Items[Answer], arm: Items[Answer]) -> Iterator[Difference]:
    """Of answers to the same questions, those that differ; answers that failed are left out."""
    for ours, theirs in zip(base, arm, strict=True):
        assert ours.id == theirs.id, "answers to other questions"
        if not ours.error and not theirs.error:
            found = first_difference(ours, theirs)
            if found is not None:
                yield found


def _with(
    found: Difference, nats: float | None, ulp: float | None, *, is_near_tie: bool
) -> Difference:
    return Difference(
        id=found.id,
        position=found.position,
        base=found.base,
        arm=found.arm,
        margin_nats=nats,
        margin_ulp=ulp,
        is_near_tie=is_near_tie,
    )
