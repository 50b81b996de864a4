"""Experience: how far drafts reach and how far they stand, learned from commits, by depth.

For each depth that was planned: did the drafter come so far, and did the target accept it, each
given the same of the depth before. An estimate is the mean of a beta posterior with exponential
forgetting; a sequence's own experience starts from what all sequences of its kind have seen.
"""

import math
from collections.abc import Mapping, Sequence as Items
from typing import Any, NamedTuple

FIRST_REACH = 0.9  # share of plans that a drafter nobody has tried is expected to fill
FIRST_STAND = 0.7  # acceptance of its first token (where TurboSpec starts too)
GUESS_WEIGHT = 5.0  # of what is expected beforehand, in observations
OWN_WEIGHT = 10.0  # likewise, where one sequence's experience meets that of all
MEMORY_OF_ALL = 100.0  # observations after which one counts 1/e
MEMORY_OF_ONE = 40.0  # likewise for one sequence
SURPRISE = 0.002  # probability of refusals in a row at which a sequence is taken for changed
SURPRISE_WEIGHT = 2.0  # of each of them from then on
SILENCE_OF_ONE = 150.0  # steps without a draft after which what a sequence has seen counts 1/e


class Forecast(NamedTuple):
    """For depths 1, 2, ... of a draft that is planned so deep.

    Attributes:
        reached: probability that the drafter comes so far.
        stands: probability that the drafter comes so far and the target accepts all of it.
    """

    reached: list[float]
    stands: list[float]


class Experience:
    """What became of one drafter's drafts; with `shared`, of one sequence's.

    Args:
        shared: the experience of all, which this one adds to and starts from.
    """

    def __init__(self, shared: "Experience | None" = None) -> None:
        self._shared = shared
        self._keep = 1.0 - 1.0 / (MEMORY_OF_ALL if shared is None else MEMORY_OF_ONE)
        self._reach: list[list[float]] = []  # per depth [came so far, did not]
        self._stand: list[list[float]] = []  # per depth [stood, fell]
        self.last_step = 0
        self._is_just_told = False
        self.num_drafts = 0
        self._num_refused = 0  # first tokens in a row
        self._kept: dict[str, list[tuple[float, float]]] = {}

    def observe(self, planned: int, drafted: int, accepted: int, step: int) -> None:
        """A draft was planned `planned` deep, came to depth `drafted`, and `accepted` of it stood.

        Args:
            step: number of the engine's step.
        """
        if self._shared is not None:
            self._shared.observe(planned, drafted, accepted, step)
        self.num_drafts += 1
        self.last_step = step
        self._kept.clear()
        self._count(self._reach, min(planned, drafted + 1), drafted)
        self._count(self._stand, min(drafted, accepted + 1), accepted)
        if drafted and self._shared is not None:
            self._notice_change(accepted)

    def _notice_change(self, accepted: int) -> None:
        """Refusals in a row that were all but impossible end what was believed before them."""
        self._num_refused = 0 if accepted else self._num_refused + 1
        stood, fell = self._stand[0]
        before = max(fell - self._num_refused, 0.0) + 1.0
        if self._num_refused and (before / (stood + before + 1.0)) ** self._num_refused < SURPRISE:
            self._stand = [[0.0, SURPRISE_WEIGHT * self._num_refused]]
            self._num_refused = 0

    def expect(self, drafted: Items[float], accepted: Items[float], weight: float) -> None:
        """Takes over counts from elsewhere (a session's statistics), with at most this weight.

        Args:
            drafted, accepted: per depth, how often it was drafted, and accepted with all before.
                They age from the first forecast on.
        """
        before = [drafted[0], *accepted] if drafted else []
        self._is_just_told = True
        self.num_drafts += math.ceil(min(weight, before[0])) if before else 0
        self._stand = []
        self._kept.clear()
        for tried, stood in zip(before, accepted, strict=False):
            if tried <= 0 or stood > tried:
                break
            share = min(1.0, weight / tried)
            self._stand.append([share * stood, share * (tried - stood)])

    def forecast(self, depth: int, step: int, *, hopeful: bool = False) -> Forecast:
        """For depths 1 to `depth`, seen from engine step `step`.

        Args:
            hopeful: a standard deviation better than what is expected.
        """
        if self._is_just_told:
            self._is_just_told, self.last_step = False, step
        reached, stands = [], []
        comes = holds = 1.0
        for (reach, _), (stand, weight) in zip(
            self._rates("_reach", depth, step, FIRST_REACH),
            self._rates("_stand", depth, step, FIRST_STAND),
            strict=True,
        ):
            if hopeful:
                stand = min(1.0, stand + math.sqrt(stand * (1.0 - stand) / weight))
            comes *= reach
            holds *= stand
            reached.append(comes)
            stands.append(comes * holds)
        return Forecast(reached, stands)

    def to_json(self) -> dict[str, Any]:
        return {"reach": self._reach, "stand": self._stand}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Starts from saved counts, which new ones soon outweigh."""
        self._reach, self._stand = (
            [[min(float(n), 20.0) for n in cell] for cell in saved[key]]
            for key in ("reach", "stand")
        )
        self._kept.clear()

    def _count(self, cells: list[list[float]], num_tried: int, num_held: int) -> None:
        while len(cells) < num_tried:
            cells.append([0.0, 0.0])
        keep = self._keep
        for index in range(num_tried):
            cell = cells[index]
            held = index < num_held
            cell[0] = keep * cell[0] + held
            cell[1] = keep * cell[1] + (not held)

    def _rates_of_all(
        self, kind: str, depth: int, step: int, first: float
    ) -> list[tuple[float, float]]:
        """`_rates`, kept until something is observed: many sequences ask in a row."""
        found = self._kept.get(kind)
        if found is None or len(found) < depth:
            found = self._kept[kind] = self._rates(kind, max(depth, 8), step, first)
        return found[:depth]

    def _rates(self, kind: str, depth: int, step: int, first: float) -> list[tuple[float, float]]:
        """By depth the mean, and the observations behind it; what was not tried is as before it."""
        cells: list[list[float]] = getattr(self, kind)
        age, weight = 1.0, GUESS_WEIGHT
        shared: list[tuple[float, float]] = []
        if self._shared is not None:
            age, weight = math.exp((self.last_step - step) / SILENCE_OF_ONE), OWN_WEIGHT
            shared = self._shared._rates_of_all(kind, depth, step, first)
            if not cells:
                return shared
        found: list[tuple[float, float]] = []
        guess, behind = first, weight
        for index in range(depth):
            if shared:
                guess, behind = shared[index]
            yes, no = cells[index] if index < len(cells) else (0.0, 0.0)
            own = age * (yes + no)
            guess = (age * yes + weight * guess) / (own + weight)
            found.append((guess, own + max(behind, 1.0) if shared else own + weight))
        return found
