"""Course: a block of requests played to its end at predicted prices, with prompts and raggedness.

A load of c requests is seldom c requests: answers end at different steps, drafts that stand scatter
those ends further, the last ones run with few beside them, and prompts are read in between. Steps
are played one by one, with answers as long as they may come, for plain decoding and for drafts on
the same answers.

Shape legend: A requests in flight, R requests of a block.
"""

import math
from collections.abc import Callable, Iterator, Sequence as Items
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

NUM_REPEATS = 12  # blocks that are played
NUM_ALONE = 48  # answers, where each is timed by itself

Seconds: TypeAlias = Callable[[int, int], float]  # of a step: requests in flight, prompts read
Ints: TypeAlias = NDArray[np.int64]


class Block(NamedTuple):
    """What is played.

    Attributes:
        num_requests: asked in one block; num_in_flight: of those at a time.
        max_tokens: of an answer. end_rate: chance of each token to be the last before that.
    """

    num_requests: int
    num_in_flight: int
    max_tokens: int
    end_rate: float = 0.0

    @property
    def is_alone(self) -> bool:
        """Whether answers are timed one by one, each from its first token on."""
        return self.num_in_flight == 1


class Course(NamedTuple):
    """What came of it.

    Attributes:
        speedup: how many times as long plain decoding took: geometric mean over blocks.
        decoding: seconds per token of drafted steps beside those of plain ones, steps that read
            prompts left out.
        in_flight: requests per drafted step, those left out.
    """

    speedup: float
    decoding: float
    in_flight: float


def play(block: Block, stands: Items[float], plain_s: Seconds, drafted_s: Seconds) -> Course:
    """Plays blocks under both arms.

    Args:
        stands: by depth, the share of drafts that stand so far.
    """
    rng = np.random.default_rng(0)
    logs: list[float] = []
    plain, drafted = _Sums(), _Sums()
    for _ in range(NUM_ALONE if block.is_alone else NUM_REPEATS):
        lengths_R = _lengths(block, rng)
        before, after = (
            _run(block, lengths_R, chances, seconds, rng, sums)
            for chances, seconds, sums in (((), plain_s, plain), (stands, drafted_s, drafted))
        )
        if before > 0.0 and after > 0.0:
            logs.append(math.log(before / after))
    return Course(
        speedup=math.exp(sum(logs) / max(len(logs), 1)),
        decoding=drafted.per_token / plain.per_token,
        in_flight=drafted.num_in_flight / max(drafted.num_steps, 1),
    )


class _Sums:
    """Of steps that read no prompt."""

    def __init__(self) -> None:
        self.num_steps = self.num_in_flight = self.num_tokens = 0
        self.seconds = 0.0

    @property
    def per_token(self) -> float:
        return self.seconds / self.num_tokens if self.num_tokens else 1.0


def _run(
    block: Block,
    lengths_R: Ints,
    stands: Items[float],
    seconds: Seconds,
    rng: np.random.Generator,
    sums: _Sums,
) -> float:
    """Seconds of one block; of an answer alone, without the step that reads its prompt."""
    falling = np.array(stands[::-1])
    waiting = iter(lengths_R.tolist())
    left_A: Ints = np.zeros(0, dtype=np.int64)
    total = 0.0
    while True:
        fresh = list(_taken(waiting, block.num_in_flight - len(left_A)))
        left_A = np.concatenate([left_A, np.array(fresh, dtype=np.int64)])
        if not len(left_A):
            return total
        accepted_A = len(falling) - np.searchsorted(falling, rng.random(len(left_A)), side="right")
        emitted_A = np.minimum(1 + accepted_A, left_A)
        step_s = seconds(len(left_A), len(fresh))
        if not fresh:
            sums.num_steps += 1
            sums.num_in_flight += len(left_A)
            sums.num_tokens += int(emitted_A.sum())
            sums.seconds += step_s
        if not (fresh and block.is_alone):
            total += step_s
        left_A = left_A - emitted_A
        left_A = left_A[left_A > 0]


def _taken(waiting: Iterator[int], most: int) -> Iterator[int]:
    for _ in range(most):
        found = next(waiting, None)
        if found is None:
            return
        yield found


def _lengths(block: Block, rng: np.random.Generator) -> Ints:
    """Tokens of each answer, two at least: shorter ones are of no use to a comparison."""
    if not block.end_rate:
        return np.full(block.num_requests, block.max_tokens, dtype=np.int64)
    drawn_R = rng.geometric(block.end_rate, size=block.num_requests)
    return np.clip(drawn_R, 2, block.max_tokens).astype(np.int64)
