"""Decider: of all drafts that could be verified in a step, those with the highest goodput.

Every row's draft is forecast depth by depth (`Experience`), passes and drafting are priced
(`CostModel`), and the nodes that raise expected committed tokens per second of the whole batch are
taken (`allocate`). A change of mind needs a margin.

Sources: goodput as the objective (SmartSpec, Liu et al. 2024), nodes by survival over the batch
(AdaSpec, Li et al. 2025), drafters as arms of a bandit (BanditSpec, Hou et al. 2025).
"""

from collections.abc import Callable, Sequence as Items
from typing import NamedTuple

from outrider.control.acceptance import Forecast
from outrider.control.allocation import Chosen, Ladder, Misses, alike, allocate, evaluate, kept
from outrider.control.base import Load, Room
from outrider.control.cost import PassCounts, StepPrice
from outrider.control.learning import CATCH_UP_STEPS, Lessons
from outrider.control.minds import Mind
from outrider.control.targets import misses_of
from outrider.step import StopRule

START_MARGIN = 1.05  # by which speculation must beat plain decoding before it begins
CHANGE_MARGIN = 1.02  # by which a plan must beat the one in force
DRAFTER_MARGIN = 1.05  # by which a drafter must beat a row's present one
TRUST = 0.35  # standard deviations that a sequence not known yet is taken to be better
FEW_OBSERVATIONS = 300  # of confidence
USUAL_STAND = 0.7  # of a next token, where all before it stands
HIGHEST_FLOOR = 0.8
HOPELESS = 0.9  # of plain decoding's goodput
LOWEST_WEIGHT = 0.125


class Thought(NamedTuple):
    """A decision.

    Attributes:
        plain: the step without drafts. chosen: as decided. why: one line.
        is_for_targets: whether latency targets, not goodput, ask for these drafts.
    """

    plain: Chosen
    chosen: Chosen
    why: str
    is_for_targets: bool = False

    @property
    def advantage(self) -> float:
        """Goodput over plain decoding's."""
        return self.chosen.goodput / self.plain.goodput


class Scene(NamedTuple):
    """What a decision is made about."""

    rooms: Items[Room]
    minds: Items[Mind]
    load: Load
    price: StepPrice
    plain: Chosen


class Decider:
    """Chooses a drafter and a depth for every row.

    Args:
        clock: seconds, for targets.

    Attributes:
        thought: the last decision.
    """

    def __init__(self, lessons: Lessons, clock: Callable[[], float]) -> None:
        self.thought: Thought | None = None
        self._lessons = lessons
        self._clock = clock
        self._background: tuple[Load, StepPrice, Chosen] | None = None

    def think(
        self, rooms: Items[Room], minds: Items[Mind], load: Load, *, thoroughly: bool
    ) -> Scene:
        """Prices everything anew.

        Args:
            thoroughly: weigh every row even where drafts look hopeless for all of them alike.
        """
        price = self.price(rooms, load)
        plain = Chosen([0] * len(rooms), self._tokens(rooms, load), price.at(0.0))
        scene = Scene(rooms, minds, load, price, plain)
        self._background = load, price, plain
        if not thoroughly and self._looks_hopeless(scene):
            lost = Thought(plain, plain, "drafts are far from paying for themselves")
            self._adopt(rooms, minds, lost)
        else:
            self._choose_drafters(scene)
            self._adopt(rooms, minds, self._weigh(scene))
        return scene

    def tune(self, rooms: Items[Room], minds: Items[Mind]) -> None:
        """Decides again at the prices of the last time, by what rows have seen since."""
        if self._background is not None:
            self._adopt(rooms, minds, self._weigh(Scene(rooms, minds, *self._background)))

    def receive(self, room: Room, mind: Mind, num_rooms: int) -> None:
        """Gives a row that has come the draft that is worth most at the present price of time."""
        if self._background is None or self.thought is None:
            return
        ladder = self._ladder(room, mind, mind.candidate, 1.0)
        rate = self.thought.chosen.goodput
        mind.decide(_worth(ladder, self._background[1], rate, num_rooms)[1])

    def ladders(
        self, rooms: Items[Room], minds: Items[Mind], *, hopeful: bool = False
    ) -> list[Ladder]:
        """Every row's draft by the drafter that it has."""
        return [
            self._ladder(room, mind, mind.candidate, weight, hopeful=hopeful)
            for room, mind, weight in zip(rooms, minds, weights_of(rooms), strict=True)
        ]

    def misses(
        self, rooms: Items[Room], ladders: Items[Ladder], load: Load, price: StepPrice
    ) -> Misses | None:
        return misses_of(rooms, ladders, load, self._clock(), price.prompt_s)

    def price(self, rooms: Items[Room], load: Load, *, hopeful: bool = False) -> StepPrice:
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
            self._lessons.cost,
            counts,
            num_prompt=load.num_prompt,
            drawn_share=drawn / max(len(rooms), 1),
            mean_context=sum(room.seq.num_cached for room in rooms) / max(len(rooms), 1),
            hopeful=hopeful,
        )

    def _adopt(self, rooms: Items[Room], minds: Items[Mind], thought: Thought) -> None:
        self.thought = thought
        num_drafting = sum(depth > 0 for depth in thought.chosen.depths)
        for room, mind, depth in zip(rooms, minds, thought.chosen.depths, strict=True):
            mind.decide(depth)
            mind.stop = self._stop(room, mind, num_drafting) if depth > 1 else None

    def _stop(self, room: Room, mind: Mind, num_drafting: int) -> StopRule | None:
        """Ends a chain where one token more is expected to bring less than its time is worth.

        Until enough is known of a drafter's confidence, it is only asked for.
        """
        is_asked = room.seq.speculation.policy_options.get("confidence", False)
        if not is_asked or self._background is None or self.thought is None:
            return None
        drafter = room.seq.speculation.candidates[mind.candidate].drafter
        costs = self._background[1].draft(drafter)
        known = self._lessons.confidence_of(drafter, mind)
        if known.num_observations < FEW_OBSERVATIONS:
            return known.rule(0.0)
        seconds = costs.depth / num_drafting + costs.node + self._background[1].node_s
        return known.rule(min(seconds * self.thought.chosen.goodput / USUAL_STAND, HIGHEST_FLOOR))

    def _weigh(self, scene: Scene) -> Thought:
        """Every row's draft, depth by depth, against its price."""
        plain = scene.plain
        ladders = self.ladders(scene.rooms, scene.minds)
        misses = self.misses(scene.rooms, ladders, scene.load, scene.price)
        best = allocate(ladders, plain.tokens, scene.price, misses)
        before = [
            min(mind.depth, len(ladder.forecast.stands))
            for mind, ladder in zip(scene.minds, ladders, strict=True)
        ]
        in_force = evaluate(ladders, before, plain.tokens, scene.price)
        return _settle(plain, best, in_force, misses or kept)

    def _looks_hopeless(self, scene: Scene) -> bool:
        """Whether drafts of every row alike, at what all have seen, would lose clearly.

        A short way to know what is usual under load. Rows that have choices or targets, or fare
        better than all, are weighed one by one.
        """
        step, seq = self._lessons.step, scene.rooms[0].seq
        drafter, most, _, num_nodes = seq.speculation.candidates[0]
        common = self._lessons.minds.common(seq, drafter)
        pooled = common.forecast(most, step, hopeful=True)
        for room, mind in zip(scene.rooms, scene.minds, strict=True):
            spec = room.seq.speculation
            if mind.depth or len(spec.candidates) > 1:
                return False
            if self._lessons.minds.common(room.seq, spec.candidates[0].drafter) is not common:
                return False
            own = mind.experience[drafter]
            if own.num_drafts and own.forecast(1, step).stands[0] > pooled.stands[0]:
                return False
            if spec.tpot_s is not None:
                return False
        usual = Ladder(pooled, num_nodes / most, 1.0, drafter)
        least = HOPELESS * scene.plain.goodput
        rows = alike(usual, len(scene.rooms), scene.plain.tokens, scene.price)
        return all(chosen.goodput < least for chosen in rows)

    def _ladder(
        self, room: Room, mind: Mind, candidate: int, weight: float, *, hopeful: bool = False
    ) -> Ladder:
        drafter, most, _, num_nodes = room.seq.speculation.candidates[candidate]
        forecast = self._forecast(room, mind, candidate, hopeful=hopeful)
        per_token = self._lessons.cost.draft_cost(drafter).prices[4]
        entry = per_token * mind.lag(room.seq, drafter) / CATCH_UP_STEPS
        return Ladder(forecast, num_nodes / most, weight, drafter, entry)

    def _forecast(self, room: Room, mind: Mind, candidate: int, *, hopeful: bool) -> Forecast:
        drafter, most, _, _ = room.seq.speculation.candidates[candidate]
        depth = min(room.depth, most, room.num_nodes)
        found = mind.experience[drafter]
        return found.forecast(depth, self._lessons.step, hopeful=hopeful, trust=TRUST)

    def _choose_drafters(self, scene: Scene) -> None:
        """For each row the candidate whose draft is worth most to it, at the present price of time.

        What a drafter costs by call and depth is shared by all rows.
        """
        rate = self.thought.chosen.goodput if self.thought else 0.0
        for room, mind in zip(scene.rooms, scene.minds, strict=True):
            candidates = room.seq.speculation.candidates
            if len(candidates) < 2:
                continue
            worth = [
                _worth(self._ladder(room, mind, index, 1.0), scene.price, rate, len(scene.rooms))[0]
                for index in range(len(candidates))
            ]
            best = max(range(len(worth)), key=worth.__getitem__)
            if worth[best] > DRAFTER_MARGIN * worth[mind.candidate]:
                mind.candidate = best

    def _tokens(self, rooms: Items[Room], load: Load) -> float:
        """Weighted tokens that the step commits without drafts of ours."""
        tokens = sum(weights_of(rooms)) + max(load.num_emitting - len(rooms), 0)
        for seq, part in load.planned:
            found = self._lessons.minds.of(seq).experience.get(part.drafter)
            if found is not None:
                tokens += sum(found.forecast(part.depth, self._lessons.step).stands)
        return tokens


def _settle(plain: Chosen, best: Chosen, in_force: Chosen, misses: Misses) -> Thought:
    """The new plan where it is better by a margin, else the one in force."""
    missed = misses(best)
    if missed < misses(plain):
        stays = misses(in_force) <= missed and best.goodput <= CHANGE_MARGIN * in_force.goodput
        why = "what comes nearest to the latency targets" if missed > 1.0 else "the latency targets"
        chosen = in_force if stays else best
        return Thought(plain, chosen, why, is_for_targets=chosen.goodput < plain.goodput)
    if misses(in_force) > missed:
        in_force = plain
    if not any(best.depths):
        return Thought(plain, plain, "no draft is expected to pay for itself")
    if best.goodput <= CHANGE_MARGIN * in_force.goodput and in_force.goodput >= plain.goodput:
        return Thought(plain, in_force, "nothing is better by enough to change")
    margin = 1.0 if any(in_force.depths) else START_MARGIN
    if best.goodput <= margin * plain.goodput:
        return Thought(plain, plain, "what drafts are expected to bring is within the margin")
    return Thought(plain, best, "the drafts with the highest expected goodput")


def _worth(ladder: Ladder, price: StepPrice, rate: float, num_rooms: int) -> tuple[float, int]:
    """Tokens that the best depth brings, less what its time would bring otherwise; that depth."""
    costs = price.draft(ladder.drafter)
    per_depth, per_node = costs.depth / num_rooms, costs.node + price.node_s
    tokens, seconds = 0.0, costs.call / num_rooms + costs.row + ladder.entry
    best = 0.0, 0
    for depth, (reached, stands) in enumerate(zip(*ladder.forecast, strict=True), 1):
        tokens += stands
        seconds += per_depth + reached * ladder.num_nodes * per_node
        best = max(best, (tokens - rate * seconds, depth))
    return best


def weights_of(rooms: Items[Room]) -> list[float]:
    """Tokens of the most urgent requests count 1, of each lower priority half as much."""
    first = min((room.seq.request.priority for room in rooms), default=0)
    return [max(0.5 ** (room.seq.request.priority - first), LOWEST_WEIGHT) for room in rooms]
