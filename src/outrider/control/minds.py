"""Minds: what the adaptive policy keeps for each sequence, and what all of a kind have seen."""

from weakref import WeakKeyDictionary

from outrider.control.acceptance import Experience
from outrider.sequence import Sequence

TEMPERATURES = (0.0, 0.5, 1.0)  # upper ends of kinds that share experience; hotter is one more
PAST_WEIGHT = 12.0  # most observations that a request's past counts for
USUAL_ROUND = 4  # committed tokens that a drafter in use is behind by


class Mind:
    """What is kept for one sequence.

    Attributes:
        candidate: index of the drafter in force. depth: how far it drafts; 0 is plain decoding.
        experience: by drafter.
        born: step of the policy at which it began.
        drafted_at: by drafter, length of the token log when it last drafted.
    """

    __slots__ = ("born", "candidate", "depth", "drafted_at", "experience")

    def __init__(self, experience: dict[str, Experience], born: int) -> None:
        self.born = born
        self.candidate = 0
        self.depth = 0
        self.experience = experience
        self.drafted_at: dict[str, int] = {}

    def lag(self, seq: Sequence, drafter: str) -> int:
        """Committed tokens that a drafter has to catch up with, the usual few left out."""
        return max(len(seq.tokens) - self.drafted_at.get(drafter, 0) - USUAL_ROUND, 0)


class Minds:
    """By sequence; a mind goes with its sequence.

    Attributes:
        now: number of the policy's step.
    """

    def __init__(self) -> None:
        self.now = 0
        self.shared: dict[tuple[str, str], Experience] = {}
        self._minds: WeakKeyDictionary[Sequence, Mind] = WeakKeyDictionary()

    def of(self, seq: Sequence, depth: int = 0) -> Mind:
        """A new one starts with what its kind and its request's past have seen.

        Args:
            depth: how far it drafts until something is decided.
        """
        mind = self._minds.get(seq)
        if mind is None:
            drafters = [candidate.drafter for candidate in seq.speculation.candidates]
            experience = {name: Experience(self.common(seq, name)) for name in drafters}
            mind = Mind(experience, self.now)
            _remember(mind, seq)
            mind.depth = min(depth, seq.speculation.num_draft_tokens)
            self._minds[seq] = mind
        return mind

    def common(self, seq: Sequence, drafter: str) -> Experience:
        """What all sequences of this kind have seen of a drafter."""
        key = (drafter, kind_of(seq.request.sampling.temperature))
        if key not in self.shared:
            self.shared[key] = Experience()
        return self.shared[key]


def _remember(mind: Mind, seq: Sequence) -> None:
    """Starts from how drafts for such text fared before, where the request tells of it."""
    for drafter, past in seq.request.experience.items():
        if drafter in mind.experience:
            mind.experience[drafter].expect(past["drafted"], past["accepted"], PAST_WEIGHT)


def kind_of(temperature: float) -> str:
    """Temperatures that share experience: greedy, up to 0.5, up to 1, and hotter."""
    return next((f"{high:g}" for high in TEMPERATURES if temperature <= high), "inf")
