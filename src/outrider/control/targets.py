"""Latency targets: which choices keep them within reach."""

from collections.abc import Callable, Sequence as Items

from outrider.control.allocation import Chosen, Ladder
from outrider.control.base import Load, Room


def keeps_targets(
    rooms: Items[Room], ladders: Items[Ladder], load: Load, now: float
) -> Callable[[Chosen], bool]:
    """Whether a choice keeps every target.

    A request's time per token is the step's time over the tokens that it is expected to be given.
    While somebody waits for a first token, the steps until then must end in time.

    Args:
        now: seconds on the engine's clock.
    """
    paced = [
        (index, room.seq.speculation.tpot_s)
        for index, room in enumerate(rooms)
        if room.seq.speculation.tpot_s is not None
    ]
    left = min(
        (
            (seq.arrived_s + seq.speculation.ttft_s - now) / _steps(tokens_left, load.num_prompt)
            for seq, tokens_left in load.prefilling
            if seq.speculation.ttft_s is not None
        ),
        default=None,
    )
    if not paced and left is None:
        return lambda chosen: True

    def keeps(chosen: Chosen) -> bool:
        if left is not None and chosen.seconds > left:
            return False
        return all(
            chosen.seconds <= target * _expected(ladders[index], chosen.depths[index])
            for index, target in paced
        )

    return keeps


def _expected(ladder: Ladder, depth: int) -> float:
    return 1.0 + sum(ladder.forecast.stands[:depth])


def _steps(tokens_left: int, num_prompt: int) -> int:
    """Steps to a first token, this one counted, at the present pace of reading prompts."""
    return 1 + -(-tokens_left // max(num_prompt, 1))
