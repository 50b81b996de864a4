"""Trials: a small share of time goes to what is not in use, so that nothing is closed for good."""

from collections.abc import Callable, Iterator, Sequence as Items
from typing import NamedTuple

from outrider.control.allocation import Chosen, Ladder, allocate, evaluate, kept
from outrider.control.base import PLAIN, Load, Room
from outrider.control.cost import DraftCounts
from outrider.control.deciding import Decider, Scene, Thought
from outrider.control.learning import CATCH_UP_STEPS, Lessons
from outrider.control.minds import Mind
from outrider.control.targets import has_targets
from outrider.step import RowPlan

HOPE_MARGIN = 1.03  # by which a plan at hopeful prices must beat the one in force, to be tried
HOPE_COST = 0.3  # steps' time in the purse, from which hopes are worth thinking about
TRIAL_DEPTH = 2
TRY_EVERY = 12  # steps
ENOUGH = 4  # drafts of a sequence, after which another tells more
BURST = 4  # steps that a hope is tried for, as long as it can be paid
FEW, SILENCE = 8, 24  # drafts, and steps without one, that make a drafter worth a trial
SURE_ENOUGH = 0.05  # of ln(seconds) of a plain step; beyond it one is tried for its own sake


class Hope(NamedTuple):
    """A plan that would be best at hopeful prices.

    Attributes:
        seconds: that it is expected to lose. again_s: likewise, of the steps after the first.
        num_left: steps to try it for.
    """

    depths: list[int]
    seconds: float
    again_s: float
    num_left: int = BURST


class Trials:
    """Spends the purse: on a hopeful plan, a drafter out of use, or a plain step.

    Attributes:
        due_at: step before which nothing is tried.
    """

    def __init__(self, lessons: Lessons, decider: Decider) -> None:
        self.due_at = 0
        self._lessons = lessons
        self._decider = decider
        self._hoped: Hope | None = None
        self._turn = self._drafter_turn = 0
        self._doubts_plain = False

    def prepare(self, scene: Scene, thought: Thought, *, hopes: bool) -> None:
        """Notes, after a decision, what would be worth a trial.

        Args:
            hopes: look for the plan that would be best if all that is not well known were good.
        """
        passes, purse = self._lessons.cost.passes, self._lessons.purse
        self._doubts_plain = passes.uncertainty(scene.load.num_rows) > SURE_ENOUGH
        if not hopes:
            return
        self._hoped = None
        if purse.seconds >= HOPE_COST * self._lessons.step_s:
            self._hoped = self._hope(scene, thought)

    def replace_some(
        self,
        rooms: Items[Room],
        minds: Items[Mind],
        plans: list[RowPlan],
        load: Callable[[], Load],
    ) -> None:
        """Puts a trial in the place of what was planned, where one is due and can be paid."""
        step = self._lessons.step
        if step < self.due_at:
            return
        self.due_at = step + (2 if self._lessons.is_warming_up else TRY_EVERY)
        if not self._lessons.purse.holds_something:
            return
        self._turn += 1
        if self._turn % 3 == 0 and self._try_plain(plans):
            return
        if self._turn % 2 and self._try_drafter(rooms, minds, plans, load):
            return
        if self._try_hope(rooms, minds, plans) or self._try_drafter(rooms, minds, plans, load):
            return
        self._try_plain(plans)

    def _hope(self, scene: Scene, thought: Thought) -> Hope | None:
        rooms, minds, load, _, _ = scene
        ladders = self._decider.ladders(rooms, minds)
        misses = self._decider.misses(rooms, ladders, load, scene.price)
        price = self._decider.price(rooms, load, hopeful=True)
        better = self._decider.ladders(rooms, minds, hopeful=True)
        best = allocate(better, scene.plain.tokens, price, misses)
        present = evaluate(better, thought.chosen.depths, scene.plain.tokens, price)
        if not any(best.depths) or best.goodput <= HOPE_MARGIN * present.goodput:
            return None
        hoped = self._affordable(scene, ladders, best.depths, thought)
        real = evaluate(ladders, hoped.depths, scene.plain.tokens, scene.price)
        return None if (misses or kept)(real) > 1.0 else hoped

    def _affordable(
        self, scene: Scene, ladders: Items[Ladder], depths: list[int], thought: Thought
    ) -> Hope:
        """The hoped-for plan, or a part of it that the purse can pay for: less deep, fewer rows.

        Rows that a drafter has much to catch up with are the first to be left out, for a trial pays
        for all of that at once.
        """
        dearest = sorted(range(len(depths)), key=lambda row: ladders[row].entry)
        while True:
            real = evaluate(ladders, depths, scene.plain.tokens, scene.price)
            lost = max(real.seconds - real.tokens / thought.chosen.goodput, 0.0)
            used = [row for row in dearest if depths[row]]
            again = lost
            lost += (CATCH_UP_STEPS - 1) * sum(ladders[row].entry for row in used)
            if lost <= self._lessons.purse.seconds or (max(depths) <= 1 and len(used) <= 1):
                return Hope(depths, lost, again)
            if max(depths) > TRIAL_DEPTH or len(used) == 1:
                depths = [(depth + 1) // 2 for depth in depths]
            else:
                left_out = set(used[len(used) // 2 :])
                depths = [0 if row in left_out else depth for row, depth in enumerate(depths)]

    def _try_hope(self, rooms: Items[Room], minds: Items[Mind], plans: list[RowPlan]) -> bool:
        hoped, self._hoped = self._hoped, None
        if hoped is None or len(hoped.depths) != len(rooms):
            return False
        if not self._lessons.purse.pays(hoped.seconds):
            return False
        plans[:] = map(Mind.plan, minds, rooms, hoped.depths)
        if hoped.num_left > 1:
            self._hoped = Hope(hoped.depths, hoped.again_s, hoped.again_s, hoped.num_left - 1)
            self.due_at = self._lessons.step
        return True

    def _try_drafter(
        self,
        rooms: Items[Room],
        minds: Items[Mind],
        plans: list[RowPlan],
        load: Callable[[], Load],
    ) -> bool:
        """One row drafts with somebody of whom nothing was heard for a while."""
        silent = [found for found in _not_in_use(rooms, plans) if self._is_silent(rooms, *found)]
        if not silent:
            return False
        index, number = self._most_telling(rooms, minds, silent)
        room, mind = rooms[index], minds[index]
        part = room.plan(TRIAL_DEPTH, room.seq.speculation.candidates[number])
        lag = mind.lag(room.seq, part.drafter)
        counts = DraftCounts(part.depth, 1, part.num_nodes, lag)
        cost, held = self._lessons.cost, load()
        more = cost.passes.predict(held.num_rows + part.num_nodes)
        more -= cost.passes.predict(held.num_rows)
        seconds = cost.draft(part.drafter, counts) + max(more, 0.0)
        if not part.num_nodes or self._misses_by(rooms, minds, held, seconds):
            return False
        if not self._lessons.purse.pays(seconds):
            return False
        plans[index] = part
        return True

    def _most_telling(
        self, rooms: Items[Room], minds: Items[Mind], silent: Items[tuple[int, int]]
    ) -> tuple[int, int]:
        """Drafters in turn; a sequence that was begun with, then new ones, each for a few drafts.

        Sequences differ, so few drafts of many tell more than many of one; but what a drafter has
        to catch up with is paid for but once.
        """
        self._drafter_turn += 1
        names = [rooms[index].seq.speculation.candidates[n].drafter for index, n in silent]
        kinds = list(dict.fromkeys(names))
        name = kinds[self._drafter_turn % len(kinds)]

        def order(place: tuple[int, int]) -> tuple[int, int]:
            mind, seq = minds[place[0]], rooms[place[0]].seq
            num_drafts = mind.experience[name].num_drafts
            rank = 0 if 0 < num_drafts < ENOUGH else 1 if not num_drafts else 2
            return rank, mind.lag(seq, name)

        places = (place for place, other in zip(silent, names, strict=True) if other == name)
        return min(places, key=order)

    def _misses_by(
        self, rooms: Items[Room], minds: Items[Mind], load: Load, seconds: float
    ) -> bool:
        """Whether so many seconds more would make the step miss a latency target."""
        thought = self._decider.thought
        if thought is None or len(thought.chosen.depths) != len(rooms):
            return False
        if not has_targets(rooms, load):
            return False
        price, ladders = self._decider.price(rooms, load), self._decider.ladders(rooms, minds)
        misses = self._decider.misses(rooms, ladders, load, price)
        depths, tokens, usual = thought.chosen
        return misses is not None and misses(Chosen(depths, tokens, usual + seconds)) > 1.0

    def _is_silent(self, rooms: Items[Room], index: int, number: int) -> bool:
        seq = rooms[index].seq
        heard = self._lessons.minds.common(seq, seq.speculation.candidates[number].drafter)
        return heard.num_drafts < FEW or self._lessons.step - heard.last_step >= SILENCE

    def _try_plain(self, plans: list[RowPlan]) -> bool:
        """What drafts are held against must be known as well as they are."""
        thought = self._decider.thought
        if thought is None or not self._doubts_plain or not any(part.num_nodes for part in plans):
            return False
        lost = 1.0 - 1.0 / thought.advantage
        if thought.is_for_targets or not self._lessons.purse.pays(
            max(lost, 0.0) * thought.plain.seconds
        ):
            return False
        self._doubts_plain = False
        plans[:] = [PLAIN] * len(plans)
        return True


def _not_in_use(rooms: Items[Room], plans: Items[RowPlan]) -> Iterator[tuple[int, int]]:
    """(row, candidate) that this step would hear nothing of."""
    used = {part.drafter for part in plans if part.num_nodes}
    for index, (room, part) in enumerate(zip(rooms, plans, strict=True)):
        candidates = room.seq.speculation.candidates
        if part.num_nodes and len(candidates) == 1:
            continue
        for number, candidate in enumerate(candidates):
            if candidate.drafter not in used:
                yield index, number
