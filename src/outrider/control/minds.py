"""Minds: what the adaptive policy keeps for each sequence, and what all of a kind have seen."""

from typing import Any

from outrider.control.acceptance import Experience
from outrider.control.base import PLAIN, Room
from outrider.sequence import Sequence
from outrider.step import RowPlan, StopRule

TEMPERATURES = (0.0, 0.5, 1.0)  # upper ends of kinds that share experience; hotter is one more
PAST_WEIGHT = 12.0  # most observations that a request's past counts for
USUAL_ROUND = 4  # committed tokens that a drafter in use is behind by


class Mind:
    """What is kept for one sequence.

    Attributes:
        candidate: index of the drafter in force. depth: how far it drafts; 0 is plain decoding.
        is_new: whether nothing was decided for it yet.
        kind: how it samples and how hot, as far as a drafter's confidence means the same.
        stop: when its chains end before their depth.
        experience: by drafter.
        born: step of the policy at which it began.
        drafted_at: by drafter, length of the token log when it last drafted.
        num_preemptions: of the sequence by then; after one more it is new to its drafters.
    """

    __slots__ = (
        "_plan",
        "_planned_for",
        "born",
        "candidate",
        "depth",
        "drafted_at",
        "experience",
        "is_new",
        "kind",
        "num_preemptions",
        "stop",
    )

    def __init__(
        self, experience: dict[str, Experience], born: int, kind: str, num_preemptions: int = 0
    ) -> None:
        self.kind = kind
        self.num_preemptions = num_preemptions
        self.stop: StopRule | None = None
        self.is_new = True
        self._plan = PLAIN
        self._planned_for = (0, 0, 0, 0)
        self.born = born
        self.candidate = 0
        self.depth = 0
        self.experience = experience
        self.drafted_at: dict[str, int] = {}

    def decide(self, depth: int) -> None:
        self.depth, self.is_new = depth, False

    def plan(self, room: Room, depth: int) -> RowPlan:
        """A draft of this depth by its drafter; the last one is kept, for most are alike."""
        if not depth:
            return PLAIN
        wanted = (depth, room.depth, room.num_nodes, self.candidate)
        if wanted != self._planned_for:
            candidate = room.seq.speculation.candidates[self.candidate]
            self._plan, self._planned_for = room.plan(depth, candidate), wanted
        plan = self._plan
        return plan if self.stop is None or plan.width > 1 else plan._replace(stop=self.stop)

    def lag(self, seq: Sequence, drafter: str) -> int:
        """Committed tokens that a drafter has to catch up with, the usual few left out."""
        return max(len(seq.tokens) - self.drafted_at.get(drafter, 0) - USUAL_ROUND, 0)


class Minds:
    """Makes minds; each goes with its sequence.

    Attributes:
        now: number of the policy's step.
    """

    def __init__(self) -> None:
        self.now = 0
        self.shared: dict[tuple[str, str], Experience] = {}

    def of(self, seq: Sequence) -> Mind:
        """A new one starts with what its kind and its request's past have seen."""
        mind: Mind | None = seq.policy_state.get(self)
        if mind is not None:
            if mind.num_preemptions != seq.num_preemptions:  # drafters forgot it, too
                mind.num_preemptions = seq.num_preemptions
                mind.drafted_at.clear()
            return mind
        drafters = [candidate.drafter for candidate in seq.speculation.candidates]
        experience = {name: Experience(self.common(seq, name)) for name in drafters}
        way, preempted = _way_of_sampling(seq), seq.num_preemptions
        mind = seq.policy_state[self] = Mind(experience, self.now, way, preempted)
        _remember(mind, seq)
        return mind

    def common(self, seq: Sequence, drafter: str) -> Experience:
        """What all sequences of this kind have seen of a drafter."""
        key = (drafter, kind_of(seq.request.sampling.temperature))
        if key not in self.shared:
            self.shared[key] = Experience()
        return self.shared[key]

    def to_json(self) -> list[dict[str, Any]]:
        """What all have seen, to be saved."""
        saved = [
            {"drafter": drafter, "temperature_up_to": kind, **found.to_json()}
            for (drafter, kind), found in self.shared.items()
        ]
        return [entry for entry in saved if entry["stand"]]

    @staticmethod
    def read(saved: Any) -> dict[tuple[str, str], Experience]:
        """What `to_json` wrote. ValueError where it did not."""
        found: dict[tuple[str, str], Experience] = {}
        try:
            for entry in saved:
                experience = Experience()
                experience.load(entry)
                found[str(entry["drafter"]), str(entry["temperature_up_to"])] = experience
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no experience of drafts: {error}") from None
        return found


def _way_of_sampling(seq: Sequence) -> str:
    return f"{kind_of(seq.request.sampling.temperature)} {seq.speculation.draft_sample_method}"


def _remember(mind: Mind, seq: Sequence) -> None:
    """Starts from how drafts for such text fared before, where the request tells of it."""
    for drafter, past in seq.request.experience.items():
        if drafter in mind.experience:
            mind.experience[drafter].expect(past["drafted"], past["accepted"], PAST_WEIGHT)


def kind_of(temperature: float) -> str:
    """Temperatures that share experience: greedy, up to 0.5, up to 1, and hotter."""
    return next((f"{high:g}" for high in TEMPERATURES if temperature <= high), "inf")
