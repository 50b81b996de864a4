"""From visits to tables: tokens per second, ratio to the baseline round by round, same tokens."""

from collections.abc import Iterator, Sequence as Items
from statistics import median
from typing import NamedTuple

Tokens = list[list[int]]


class Visit(NamedTuple):
    """One arm in one round at one concurrency.

    Attributes:
        speed: decoded tokens a second, all sequences together.
        tokens: the answers, by prompt.
    """

    arm: str
    round: int
    concurrency: int
    speed: float
    tokens: Tokens


def decode_speed(num_prompts: int, num_tokens: int, seconds: float, prefill_s: float) -> float:
    """Tokens after the first over the time after the first, given that of one token alone."""
    return num_prompts * (num_tokens - 1) / (seconds - prefill_s)


def table(visits: Items[Visit], concurrency: int, baseline: str) -> Iterator[str]:
    here = [visit for visit in visits if visit.concurrency == concurrency]
    base = {visit.round: visit for visit in here if visit.arm == baseline}
    yield f"| concurrency {concurrency} | tokens/s | ratio (lowest to highest) | same tokens |"
    yield "|---|---|---|---|"
    for arm in dict.fromkeys(visit.arm for visit in here):
        mine = [visit for visit in here if visit.arm == arm]
        ratios = [visit.speed / base[visit.round].speed for visit in mine]
        same = [_num_same(visit.tokens, base[visit.round].tokens) for visit in mine]
        yield (
            f"| {arm} | {median(visit.speed for visit in mine):.0f} | {median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | "
            f"{sum(same)}/{sum(len(visit.tokens) for visit in mine)} |"
        )


def mismatches(visits: Items[Visit], exact: set[str], baseline: str) -> Iterator[str]:
    """A line for each answer of an `exact` arm that is not the baseline's."""
    base = {(v.concurrency, v.round): v.tokens for v in visits if v.arm == baseline}
    for visit in visits:
        if visit.arm not in exact:
            continue
        wanted = base[visit.concurrency, visit.round]
        for index, (mine, theirs) in enumerate(zip(visit.tokens, wanted, strict=True)):
            if mine != theirs:
                yield (
                    f"{visit.arm}, concurrency {visit.concurrency}, round {visit.round}, prompt "
                    f"{index}: differs from token {_first_difference(mine, theirs)} on"
                )


def _num_same(mine: Tokens, theirs: Tokens) -> int:
    return sum(a == b for a, b in zip(mine, theirs, strict=True))


def _first_difference(mine: list[int], theirs: list[int]) -> int:
    pairs = enumerate(zip(mine, theirs, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(mine), len(theirs)))
