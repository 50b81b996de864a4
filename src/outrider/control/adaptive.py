"""AdaptivePolicy: of all drafts that could be verified in a step, those that pay; perhaps none.

Speculation is priced, not assumed. Each time it thinks, the policy forecasts every row's draft,
depth by depth (`Experience`), prices passes and drafting (`CostModel`), and takes the nodes that
raise expected committed tokens per second of the whole batch (`allocate`). Three things keep it
honest: a change of mind needs a margin; what is measured while it speculates is held against plain
decoding (`Guard`), which ends speculation that does not pay whatever the forecast says; and a small
share of time (`Purse`) goes to trying what is not in use, so that nothing is closed for good.

Sources: goodput as the objective (SmartSpec, Liu et al. 2024), nodes by survival over the batch
(AdaSpec, Li et al. 2025), off when utility falls below one (Cascade, Saxena et al. 2025), drafters
as arms of a bandit (BanditSpec, Hou et al. 2025).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence as Items
from typing import Any, NamedTuple, Self

from outrider.control.acceptance import Forecast
from outrider.control.allocation import DEPTHS, Chosen, Ladder, allocate, evaluate
from outrider.control.base import PLAIN, Balance, Facts, Load, Room, Step
from outrider.control.cost import DraftCounts, PassCounts, StepPrice
from outrider.control.learning import WARM_UP, Lessons
from outrider.control.minds import Mind
from outrider.control.targets import keeps_targets
from outrider.request import Option
from outrider.step import RowPlan

START_MARGIN = 1.05  # by which speculation must beat plain decoding before it begins
CHANGE_MARGIN = 1.02  # by which a plan must beat the one in force
DRAFTER_MARGIN = 1.05  # by which a drafter must beat a row's present one
HOPE_MARGIN = 1.03  # by which a plan at hopeful prices must beat the one in force, to be tried
THINKING_SHARE = 0.004  # of a step's time, spent on deciding
MAX_HOLD = 48  # steps that a decision is kept for
TRIAL_DEPTH = 2
TRY_EVERY = 12  # steps
HOPE_EVERY = 4  # thoughts
HOPE_COST = 0.3  # steps' time in the purse, from which hopes are worth thinking about
HOPELESS = 0.9  # of plain decoding's goodput
FEW, SILENCE = 8, 24  # drafts, and steps without one, that make a drafter worth a trial
CATCH_UP_STEPS = 32  # over which a drafter's catching up is spread
SURE_ENOUGH = 0.05  # of ln(seconds) of a plain step; beyond it one is tried for its own sake
LOWEST_WEIGHT = 0.125


class Thought(NamedTuple):
    """The last decision.

    Attributes:
        plain: the step without drafts. chosen: as decided. why: one line.
    """

    plain: Chosen
    chosen: Chosen
    why: str


class Hope(NamedTuple):
    """A plan that would be best at hopeful prices, and the seconds that it is expected to lose."""

    depths: list[int]
    seconds: float


class AdaptivePolicy:
    """K by measured goodput, per request, at every load.

    Args:
        facts: the engine's clock and what is known of its model.
    """

    name = "adaptive"
    needs_clock = True
    options: Mapping[str, Option] = {}

    def __init__(self, facts: Facts = Facts()) -> None:
        self.lessons = Lessons(facts)
        self._facts = facts
        self._clock: Callable[[], float] = facts.clock or (lambda: 0.0)
        self._thought: Thought | None = None
        self._hoped: Hope | None = None
        self._think_at = 0
        self._think_s = 0.0
        self._num_rooms = 0
        self._usual_depth = 0
        self._turn = 0
        self._num_thoughts = 0
        self._try_at = 0
        self._is_drafting = False
        self._doubts_plain = False

    @classmethod
    def build(cls, facts: Facts) -> Self:
        return cls(facts)

    def rests(self, num_rows: int) -> bool:
        """Drafts do not pay at present, and it is not yet time to think or to try again."""
        return (
            not self._is_drafting
            and self.lessons.step < min(self._think_at, self._try_at)
            and not self._has_changed(num_rows)
        )

    def plan(self, rooms: Items[Room], load: Callable[[], Load]) -> list[RowPlan]:
        minds = [self.lessons.minds.of(room.seq, self._usual_depth) for room in rooms]
        if self._is_due(len(rooms)):
            self._think(rooms, minds, load())
        if self._is_shut(minds):
            plans = [PLAIN] * len(rooms)
        else:
            plans = [_plan(room, mind, mind.depth) for room, mind in zip(rooms, minds, strict=True)]
        self._try_something(rooms, minds, plans, load)
        return plans

    def _is_shut(self, minds: Items[Mind]) -> bool:
        """Whether the guard holds; not where all sequences are newer than what it saw."""
        guard = self.lessons.guard
        if not guard.is_shut(self.lessons.step):
            return False
        if all(mind.born > guard.shut_at for mind in minds):
            guard.reopen()
            return False
        return True

    def observe(self, step: Step) -> None:
        self.lessons.observe(step)
        purse = self.lessons.purse
        if purse.is_open and step.times is not None and self._thought is not None:
            advantage = self._thought.chosen.goodput / self._thought.plain.goodput
            purse.settle(self.lessons.lost_s(step, step.times, advantage))

    def balance(self) -> Balance:
        """Beside plain decoding: what is expected of the last decision, and what was measured."""
        thought, guard = self._thought, self.lessons.guard
        expected = thought.chosen.goodput / thought.plain.goodput if thought else None
        return Balance(expected, guard.advantage, guard.num_shut)

    def explain(self) -> dict[str, Any]:
        """What is in force and why, what drafts are expected to bring, and what things cost."""
        lessons, thought = self.lessons, self._thought
        return {
            "step": lessons.step,
            "why": thought.why if thought else "nothing was decided yet",
            "plain_tokens_per_s": thought.plain.goodput if thought else None,
            "expected_tokens_per_s": thought.chosen.goodput if thought else None,
            "depths": _histogram(thought.chosen.depths) if thought else {},
            "guard": lessons.guard.explain(lessons.step),
            "purse_s": lessons.purse.seconds,
            "acceptance": [
                {
                    "drafter": drafter,
                    "temperature_up_to": kind,
                    "stands": [round(p, 3) for p in found.forecast(8, lessons.step).stands],
                    "num_drafts": found.num_drafts,
                }
                for (drafter, kind), found in lessons.minds.shared.items()
            ],
            "cost": lessons.cost.to_json(),
        }

    def prices(self) -> dict[str, Any]:
        """What passes and drafting cost here, to be saved."""
        return self.lessons.cost.to_json()

    def take_prices(self, saved: dict[str, Any]) -> None:
        """Starts from saved prices; ValueError where they are of another form."""
        self.lessons.cost.load(saved)

    def forget_texts(self) -> None:
        """Starts anew but for the prices."""
        cost, step = self.lessons.cost, self.lessons.step
        self.lessons = Lessons(self._facts)
        self.lessons.cost, self.lessons.step = cost, step
        self._thought = self._hoped = None
        self._think_at = self._try_at = self._num_rooms = self._usual_depth = 0
        self._is_drafting = self._doubts_plain = False

    # Deciding

    def _is_due(self, num_rooms: int) -> bool:
        """Now and then, when many have come or gone, and at once while little is known."""
        return self._has_changed(num_rooms) or self.lessons.step >= self._think_at

    def _has_changed(self, num_rooms: int) -> bool:
        return abs(num_rooms - self._num_rooms) > self._num_rooms // 4

    def _think(self, rooms: Items[Room], minds: Items[Mind], load: Load) -> None:
        started = self._clock()
        self._num_rooms = len(rooms)
        self._num_thoughts += 1
        price, tokens = self._price(rooms, load), self._tokens(rooms, load)
        plain = evaluate([], [], tokens, price)._replace(depths=[0] * len(rooms))
        hopes = not self._num_thoughts % HOPE_EVERY or self.lessons.step < WARM_UP
        if not hopes and self._looks_hopeless(rooms, minds, plain, price):
            self._thought = Thought(plain, plain, "drafts are far from paying for themselves")
        else:
            self._thought = self._weigh(rooms, minds, load, price, plain, hopes=hopes)
        self._doubts_plain = self.lessons.cost.passes.uncertainty(load.num_rows) > SURE_ENOUGH
        for mind, depth in zip(minds, self._thought.chosen.depths, strict=True):
            mind.depth = depth
        used = [depth for depth in self._thought.chosen.depths if depth]
        self._is_drafting = bool(used)
        self._usual_depth = round(sum(used) / len(used)) if 2 * len(used) > len(rooms) else 0
        self._think_s += 0.3 * (self._clock() - started - self._think_s)
        self._think_at = self.lessons.step + self._hold()

    def _weigh(
        self,
        rooms: Items[Room],
        minds: Items[Mind],
        load: Load,
        price: StepPrice,
        plain: Chosen,
        *,
        hopes: bool,
    ) -> Thought:
        """Every row's draft, depth by depth, against its price."""
        self._choose_drafters(rooms, minds, price)
        ladders = [
            self._ladder(room, mind, mind.candidate, weight)
            for room, mind, weight in zip(rooms, minds, _weights(rooms), strict=True)
        ]
        is_allowed = keeps_targets(rooms, ladders, load, self._clock())
        best = allocate(ladders, plain.tokens, price, is_allowed)
        before = [
            min(mind.depth, len(ladder.forecast.stands))
            for mind, ladder in zip(minds, ladders, strict=True)
        ]
        kept = evaluate(ladders, before, plain.tokens, price)
        thought = _settle(plain, best, kept if is_allowed(kept) else plain)
        if hopes:
            self._hope(rooms, minds, ladders, load, thought, price)
        return thought

    def _looks_hopeless(
        self, rooms: Items[Room], minds: Items[Mind], plain: Chosen, price: StepPrice
    ) -> bool:
        """Whether drafts of every row alike, at what all have seen, would lose clearly.

        A short way to know what is usual under load. Rows that have choices, or fare better than
        all, are weighed one by one.
        """
        seq = rooms[0].seq
        drafter, most, _, num_nodes = seq.speculation.candidates[0]
        common = self.lessons.minds.common(seq, drafter)
        pooled = common.forecast(most, self.lessons.step, hopeful=True)
        for room, mind in zip(rooms, minds, strict=True):
            candidates = room.seq.speculation.candidates
            if mind.depth or len(candidates) > 1 or candidates[0].drafter != drafter:
                return False
            own = mind.experience[drafter]
            if own.num_drafts and own.forecast(1, self.lessons.step).stands[0] > pooled.stands[0]:
                return False
        ladders = [Ladder(pooled, num_nodes / most, 1.0, drafter)] * len(rooms)
        depths = [depth for depth in DEPTHS if depth <= most]
        return all(
            evaluate(ladders, [depth] * len(rooms), plain.tokens, price).goodput
            < HOPELESS * plain.goodput
            for depth in depths
        )

    def _hold(self) -> int:
        """Steps that a decision is kept for, so that deciding takes its small share of time."""
        if self.lessons.step < FEW or not self.lessons.step_s:
            return 1
        steps = self._think_s / (THINKING_SHARE * self.lessons.step_s)
        return max(1, min(MAX_HOLD, math.ceil(steps)))

    def _ladder(self, room: Room, mind: Mind, candidate: int, weight: float) -> Ladder:
        drafter, most, _, num_nodes = room.seq.speculation.candidates[candidate]
        forecast = self._forecast(room, mind, candidate)
        per_token = max(self.lessons.cost.draft_cost(drafter).prices[4], 0.0)
        entry = per_token * mind.lag(room.seq, drafter) / CATCH_UP_STEPS
        return Ladder(forecast, num_nodes / most, weight, drafter, entry)

    def _forecast(
        self, room: Room, mind: Mind, candidate: int, *, hopeful: bool = False
    ) -> Forecast:
        drafter, most, _, _ = room.seq.speculation.candidates[candidate]
        depth = min(room.depth, most)
        return mind.experience[drafter].forecast(depth, self.lessons.step, hopeful=hopeful)

    def _choose_drafters(self, rooms: Items[Room], minds: Items[Mind], price: StepPrice) -> None:
        """For each row the candidate whose draft is worth most to it, at the present price of time.

        What a drafter costs by call and depth is shared by all rows.
        """
        rate = self._thought.chosen.goodput if self._thought else 0.0
        for room, mind in zip(rooms, minds, strict=True):
            candidates = room.seq.speculation.candidates
            if len(candidates) < 2:
                continue
            worth = [
                _worth(self._ladder(room, mind, index, 1.0), price, rate, len(rooms))
                for index in range(len(candidates))
            ]
            best = max(range(len(worth)), key=worth.__getitem__)
            if worth[best] > DRAFTER_MARGIN * worth[mind.candidate]:
                mind.candidate = best

    def _hope(
        self,
        rooms: Items[Room],
        minds: Items[Mind],
        ladders: Items[Ladder],
        load: Load,
        thought: Thought,
        price: StepPrice,
    ) -> None:
        """Notes the plan that would be best if all that is not well known were good."""
        self._hoped = None
        if self.lessons.purse.seconds < HOPE_COST * self.lessons.step_s:
            return
        plain, chosen, _ = thought
        hopeful = self._price(rooms, load, hopeful=True)
        better = [
            ladder._replace(forecast=self._forecast(room, mind, mind.candidate, hopeful=True))
            for room, mind, ladder in zip(rooms, minds, ladders, strict=True)
        ]
        best = allocate(better, plain.tokens, hopeful)
        present = evaluate(better, chosen.depths, plain.tokens, hopeful)
        if best.goodput > HOPE_MARGIN * present.goodput:
            self._hoped = self._affordable(ladders, best.depths, thought, price)

    def _affordable(
        self, ladders: Items[Ladder], depths: list[int], thought: Thought, price: StepPrice
    ) -> Hope:
        """The hoped-for plan, or a part of it that the purse can pay for."""
        while True:
            real = evaluate(ladders, depths, thought.plain.tokens, price)
            lost = max(real.seconds - real.tokens / thought.chosen.goodput, 0.0)
            if lost <= self.lessons.purse.seconds or max(depths) <= 1:
                return Hope(depths, lost)
            depths = [(depth + 1) // 2 for depth in depths]

    # Trying

    def _try_something(
        self,
        rooms: Items[Room],
        minds: Items[Mind],
        plans: list[RowPlan],
        load: Callable[[], Load],
    ) -> None:
        """Spends the purse: on a hopeful plan, a drafter out of use, or a plain step."""
        if self.lessons.step < self._try_at or not self.lessons.purse.holds_something:
            return
        if self._hoped is None:
            self._try_at = self.lessons.step + TRY_EVERY
        if self._try_hope(rooms, minds, plans) or self._try_drafter(rooms, minds, plans, load):
            return
        self._try_plain(plans)

    def _try_hope(self, rooms: Items[Room], minds: Items[Mind], plans: list[RowPlan]) -> bool:
        hoped, self._hoped = self._hoped, None
        if hoped is None or len(hoped.depths) != len(rooms):
            return False
        if not self.lessons.purse.pays(hoped.seconds):
            return False
        plans[:] = map(_plan, rooms, minds, hoped.depths)
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
        self._turn += 1
        index, number = silent[self._turn % len(silent)]
        room, mind = rooms[index], minds[index]
        part = room.plan(TRIAL_DEPTH, room.seq.speculation.candidates[number])
        lag = mind.lag(room.seq, part.drafter)
        counts = DraftCounts(part.depth, 1, part.num_nodes, lag)
        cost, num_rows = self.lessons.cost, load().num_rows
        more = cost.passes.predict(num_rows + part.num_nodes) - cost.passes.predict(num_rows)
        seconds = cost.draft(part.drafter, counts) + max(more, 0.0)
        if not part.num_nodes or not self.lessons.purse.pays(seconds):
            return False
        plans[index] = part
        return True

    def _is_silent(self, rooms: Items[Room], index: int, number: int) -> bool:
        seq = rooms[index].seq
        heard = self.lessons.minds.common(seq, seq.speculation.candidates[number].drafter)
        return heard.num_drafts < FEW or self.lessons.step - heard.last_step >= SILENCE

    def _try_plain(self, plans: list[RowPlan]) -> None:
        """What drafts are held against must be known as well as they are."""
        thought = self._thought
        if thought is None or not self._doubts_plain or not any(part.num_nodes for part in plans):
            return
        lost = 1.0 - thought.plain.goodput / thought.chosen.goodput
        if self.lessons.purse.pays(max(lost, 0.0) * thought.plain.seconds):
            self._doubts_plain = False
            plans[:] = [PLAIN] * len(plans)

    # What the step holds

    def _price(self, rooms: Items[Room], load: Load, *, hopeful: bool = False) -> StepPrice:
        planned = sum(part.num_nodes for _, part in load.planned)
        counts = PassCounts(
            load.num_rows + planned,
            load.context,
            load.visits,
            load.num_emitting,
            load.num_drawn,
        )
        drawn = sum(room.seq.request.sampling.temperature > 0.0 for room in rooms)
        return StepPrice(
            self.lessons.cost,
            counts,
            num_prompt=load.num_prompt,
            drawn_share=drawn / max(len(rooms), 1),
            mean_context=load.context / max(load.num_emitting, 1),
            hopeful=hopeful,
        )

    def _tokens(self, rooms: Items[Room], load: Load) -> float:
        """Weighted tokens that the step commits without drafts of ours."""
        tokens = sum(_weights(rooms)) + max(load.num_emitting - len(rooms), 0)
        for seq, part in load.planned:
            found = self.lessons.minds.of(seq).experience.get(part.drafter)
            if found is not None:
                tokens += sum(found.forecast(part.depth, self.lessons.step).stands)
        return tokens


def _settle(plain: Chosen, best: Chosen, kept: Chosen) -> Thought:
    """The new plan where it is better by a margin, else the one in force."""
    if not any(best.depths):
        return Thought(plain, plain, "no draft is expected to pay for itself")
    if best.goodput <= CHANGE_MARGIN * kept.goodput and kept.goodput >= plain.goodput:
        return Thought(plain, kept, "nothing is better by enough to change")
    margin = 1.0 if any(kept.depths) else START_MARGIN
    if best.goodput <= margin * plain.goodput:
        return Thought(plain, plain, "what drafts are expected to bring is within the margin")
    return Thought(plain, best, "the drafts with the highest expected goodput")


def _worth(ladder: Ladder, price: StepPrice, rate: float, num_rooms: int) -> float:
    """Tokens that the best depth brings, less what its time would bring otherwise."""
    costs = price.draft(ladder.drafter)
    per_depth, per_node = costs.depth / num_rooms, costs.node + price.node_s
    tokens, seconds = 0.0, costs.call / num_rooms + costs.row + ladder.entry
    best = 0.0
    for reached, stands in zip(*ladder.forecast, strict=True):
        tokens += stands
        seconds += per_depth + reached * ladder.num_nodes * per_node
        best = max(best, tokens - rate * seconds)
    return best


def _plan(room: Room, mind: Mind, depth: int) -> RowPlan:
    if not depth:
        return PLAIN
    return room.plan(depth, room.seq.speculation.candidates[mind.candidate])


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


def _weights(rooms: Items[Room]) -> list[float]:
    """Tokens of the most urgent requests count 1, of each lower priority half as much."""
    first = min((room.seq.request.priority for room in rooms), default=0)
    return [max(0.5 ** (room.seq.request.priority - first), LOWEST_WEIGHT) for room in rooms]


def _histogram(depths: Items[int]) -> dict[str, int]:
    return {str(depth): depths.count(depth) for depth in sorted(set(depths))}
