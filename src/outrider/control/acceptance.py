"""Experience: how far drafts reach and how far they stand, learned from commits, by depth.

For each depth that was planned: did the drafter come so far, and did the target accept it, each
given the same of the depth before. An estimate is the mean of a beta posterior with exponential
forgetting; a sequence's own experience starts from what all sequences of its kind have seen, and
how much that weighs is learned too: whatever would have told best what sequences did (prequential
log loss, Dawid 1984).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence as Items
from typing import Any, NamedTuple

FIRST_REACH = 0.9  # share of plans that a drafter nobody has tried is expected to fill
FIRST_STAND = 0.7  # acceptance of its first token (where TurboSpec starts too)
GUESS_WEIGHT = 5.0  # of what is expected beforehand, in observations
OWN_WEIGHTS = (5.0, 10.0, 40.0)  # likewise, where one sequence's experience meets that of all
USUAL_WEIGHT = 1  # which of them, where nothing is known
CLEARLY = 3.0  # nats by which another weight must have done better
MEMORY_OF_LOSSES = 500.0  # drafts after which how well a weight did counts 1/e
UNREAD = 32  # drafts that are kept before they are counted
MEMORY_OF_ALL = 250.0  # observations after which one counts 1/e
MEMORY_OF_ONE = 40.0  # likewise for one sequence
SURPRISE = 0.002  # probability of refusals in a row at which a sequence is taken for changed
SURPRISE_WEIGHT = 2.0  # of each of them from then on
SAVED_WEIGHT = 30.0  # most observations that what another run saw counts for
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
        self.own_weight = OWN_WEIGHTS[USUAL_WEIGHT]  # of this one for a sequence that begins
        self._num_sequences = 0.0  # that drafts are from, forgotten like them
        self._losses = [0.0] * len(OWN_WEIGHTS)
        self._new: list[tuple[int, int, int]] = []
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
        self._new.append((planned, drafted, accepted))
        if len(self._new) >= UNREAD:
            self._read()

    def _read(self) -> None:
        """Counts what was observed since the last time, as if it had been at once."""
        if not self._new:
            return
        new, self._new = self._new, []
        self._kept.clear()
        if self._shared is not None:
            self._shared.weigh(self._stand[0] if self._stand else (0.0, 0.0), new)
            if not self._reach:
                self._shared._num_sequences += 1.0
        else:
            self._num_sequences *= self._keep ** len(new)
        for (planned, drafted, accepted), times in Counter(new).items():
            self._count(self._reach, min(planned, drafted + 1), drafted, times)
            self._count(self._stand, min(drafted, accepted + 1), accepted, times)
        if self._shared is not None:
            self._notice_change([accepted for _, drafted, accepted in new if drafted])

    def weigh(self, own: Items[float], new: Items[tuple[int, int, int]]) -> None:
        """Learns from a sequence how much this experience should weigh beside its own.

        Args:
            own: first tokens of its drafts that stood and fell. new: of its next drafts, what
                `observe` was told.
        """
        stood_before, fell_before = own
        if not stood_before + fell_before:
            return
        stood = sum(accepted > 0 for _, drafted, accepted in new if drafted)
        fell = sum(accepted == 0 for _, drafted, accepted in new if drafted)
        guess = self._rates_of_all("_stand", 1, self.last_step, FIRST_STAND)[0][0]
        keep = (1.0 - 1.0 / MEMORY_OF_LOSSES) ** (stood + fell)
        for place, weight in enumerate(OWN_WEIGHTS):
            p = (stood_before + weight * guess) / (stood_before + fell_before + weight)
            p = min(max(p, 0.001), 0.999)
            loss = -stood * math.log(p) - fell * math.log(1.0 - p)
            self._losses[place] = keep * self._losses[place] + loss
        best = min(self._losses)
        if self._losses[USUAL_WEIGHT] - best > CLEARLY:
            self.own_weight = OWN_WEIGHTS[self._losses.index(best)]
        else:
            self.own_weight = OWN_WEIGHTS[USUAL_WEIGHT]

    def _notice_change(self, accepted: Items[int]) -> None:
        """Refusals in a row that were all but impossible end what was believed before them."""
        for count in accepted:
            self._num_refused = 0 if count else self._num_refused + 1
        if not self._num_refused or not self._stand:
            return
        stood, fell = self._stand[0]
        before = max(fell - self._num_refused, 0.0) + 1.0
        if (before / (stood + before + 1.0)) ** self._num_refused < SURPRISE:
            self._stand = [[0.0, SURPRISE_WEIGHT * self._num_refused]]
            self._num_refused = 0

    def expect(self, drafted: Items[float], accepted: Items[float], weight: float) -> None:
        """Takes over counts from elsewhere (a session's statistics).

        Each depth counts for as many observations as it was drafted, at most for `weight`; the rate
        stays. So it meets what all sequences have seen at the weight of that many drafts of this
        one, and new ones outweigh it as they would outweigh those. They age from the first
        forecast on.

        Args:
            drafted, accepted: per depth, the drafts that came so far and of which all before it was
                accepted, and those of them that were accepted there too. From a depth on that
                nobody came to, or where counts contradict each other, nothing is taken over.
            weight: most observations that a depth counts for.
        """
        self._read()
        self._is_just_told = True
        self.num_drafts += math.ceil(min(weight, drafted[0])) if drafted else 0
        self._stand = []
        self._kept.clear()
        most = math.inf
        for tried, stood in zip(drafted, accepted, strict=False):
            if not 0 < tried <= most or stood > tried:
                break
            most = stood
            share = min(1.0, weight / tried)
            self._stand.append([share * stood, share * (tried - stood)])

    def forecast(
        self, depth: int, step: int, *, hopeful: bool = False, trust: float = 0.0
    ) -> Forecast:
        """For depths 1 to `depth`, seen from engine step `step`.

        Args:
            hopeful: a standard deviation better than what is expected.
            trust: so many standard deviations better than what is expected, of how sequences differ
                as far as this one is not known yet: what is given up is not heard of again.
        """
        if self._is_just_told:
            self._is_just_told, self.last_step = False, step
        self._read()
        reached, stands = [], []
        comes = holds = 1.0
        doubts = self._doubts(depth, step) if trust else [0.0] * depth
        for (reach, _), (stand, weight), doubt in zip(
            self._rates("_reach", depth, step, FIRST_REACH),
            self._rates("_stand", depth, step, FIRST_STAND),
            doubts,
            strict=True,
        ):
            better = (1.0 if hopeful else 0.0) / math.sqrt(weight) + trust * doubt
            if better:
                stand = min(1.0, stand + better * math.sqrt(stand * (1.0 - stand)))
            comes *= reach
            holds *= stand
            reached.append(comes)
            stands.append(comes * holds)
        return Forecast(reached, stands)

    def to_json(self) -> dict[str, Any]:
        self._read()
        return {"reach": self._reach, "stand": self._stand}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Starts from saved counts, which new ones soon outweigh: other texts may come.

        Raises:
            KeyError, TypeError, ValueError: `to_json` did not write them.
        """
        self._reach, self._stand = (
            [_scaled(cell, SAVED_WEIGHT) for cell in saved[key]] for key in ("reach", "stand")
        )
        self._kept.clear()

    def _count(self, cells: list[list[float]], num_tried: int, num_held: int, times: int) -> None:
        while len(cells) < num_tried:
            cells.append([0.0, 0.0])
        keep = self._keep**times
        added = (1.0 - keep) / (1.0 - self._keep)
        for index in range(num_tried):
            cell = cells[index]
            cell[0] *= keep
            cell[1] *= keep
            cell[index >= num_held] += added

    def _doubts(self, depth: int, step: int) -> list[float]:
        """By depth, a standard deviation of what is not known of this sequence beside others."""
        if self._shared is None:
            return [0.0] * depth
        age, weight = self._age(step), self._shared.own_weight
        seen = [age * sum(cell) for cell in self._stand[:depth]]
        seen += [0.0] * (depth - len(seen))
        return [1.0 / math.sqrt(weight + count) for count in seen]

    def _age(self, step: int) -> float:
        return math.exp((self.last_step - step) / SILENCE_OF_ONE)

    def _rates_of_all(
        self, kind: str, depth: int, step: int, first: float
    ) -> list[tuple[float, float]]:
        """`_rates`, kept until something is observed: many sequences ask in a row."""
        self._read()
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
            age, weight = self._age(step), self._shared.own_weight
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
        if self._shared is None and self._num_sequences:
            most = (self.own_weight + 1.0) * (self._num_sequences + 1.0)  # for sequences differ
            found = [(guess, 1.0 / (1.0 / behind + 1.0 / most)) for guess, behind in found]
        return found


def _scaled(cell: Items[float], most: float) -> list[float]:
    """Counts of what held and what did not, at the same rate, for `most` observations at most."""
    held, failed = (float(number) for number in cell)
    if not 0.0 <= held < math.inf or not 0.0 <= failed < math.inf:
        raise ValueError(f"counts {held:g} and {failed:g}")
    share = min(1.0, most / (held + failed)) if held + failed else 0.0
    return [share * held, share * failed]
