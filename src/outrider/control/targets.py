"""Latency targets: how far each choice would miss them."""

import math
from collections.abc import Sequence as Items

from outrider.control.allocation import Chosen, Ladder, Misses
from outrider.control.base import Load, Room

SOON = 1e-4  # seconds: the least that a step may be asked to end in
GRAIN = 1.02  # misses closer than this are equal


def misses_of(
    rooms: Items[Room], ladders: Items[Ladder], load: Load, now: float, prompt_s: float
) -> Misses | None:
    """By how much a choice misses the targets; None where there are none.

    A request's time per token is the step's time over the tokens that it is expected to be given.
    While somebody whose prompt is being read waits for a first token, the steps until then must end
    in time; plain steps may come too late already, which no draft makes good.

    Args:
        now: seconds on the engine's clock. prompt_s: of the step, for its prompt tokens.
    """
    if not has_targets(rooms, load):
        return None
    paced = [
        (index, room.seq.speculation.tpot_s)
        for index, room in enumerate(rooms)
        if room.seq.speculation.tpot_s is not None
    ]
    left = min(
        (
            (due_s - now) / _steps(tokens_left, load.num_prompt)
            for due_s, tokens_left in awaited(load)
        ),
        default=None,
    )

    def misses(chosen: Chosen) -> float:
        seconds = chosen.seconds + prompt_s
        found = [
            seconds / (target * _expected(ladders[index], chosen.depths[index]))
            for index, target in paced
        ]
        if left is not None:
            found.append(seconds / max(left, SOON))
        return max(1.0, GRAIN ** round(math.log(max(found), GRAIN)))

    return misses


def has_targets(rooms: Items[Room], load: Load) -> bool:
    """Whether anybody has asked for one that this step bears on."""
    return any(room.seq.speculation.tpot_s is not None for room in rooms) or bool(awaited(load))


def awaited(load: Load) -> list[tuple[float, int]]:
    """First tokens with a target that are still to come: when due, and prompt tokens left."""
    return [
        (seq.arrived_s + seq.speculation.ttft_s, tokens_left)
        for seq, tokens_left in load.prefilling
        if seq.speculation.ttft_s is not None and not seq.num_generated and not seq.is_finished
    ]


def _expected(ladder: Ladder, depth: int) -> float:
    return 1.0 + sum(ladder.forecast.stands[:depth])


def _steps(tokens_left: int, num_prompt: int) -> int:
    """Steps to a first token, this one counted, at the present pace of reading prompts."""
    return 1 + -(-tokens_left // max(num_prompt, 1))
