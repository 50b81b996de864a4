"""A target whose clock the test controls: what each answer takes is a function of who asks what."""

from outrider.bench.target import Acceptance, Arm, Question, Reply
from outrider.request import SpeculationParams

OFF = Arm(name="off", speculation=SpeculationParams(method="off"))
ON = Arm(name="on", speculation=SpeculationParams(method="ngram"))
OTHER = Arm(name="other", speculation=SpeculationParams(method="suffix"))
NUM_TOKENS = 11


def questions(count=12, **fields):
    return tuple(Question(id=f"q{i}", prompt=f"question {i}", **fields) for i in range(count))


class Simulated:
    """Answers of 11 tokens, or of `num_tokens(ask)`.

    Args:
        seconds: (arm's name, question's id, number of the run) -> seconds per token after the
            first, which itself takes as long.
        error: (ask) -> why it fails, "" where it does not.
        tells: replies carry their acceptance, else only `counters` do.

    Attributes:
        runs: (arm's name, question ids, tenant, seeds) of each run, in order. now: its clock.
    """

    name = "simulated"

    def __init__(self, seconds, *, error=lambda ask: "", num_tokens=None, tells=True):
        self.runs, self.now = [], 0.0
        self._seconds, self._error, self._tells = seconds, error, tells
        self._num_tokens = num_tokens or (lambda ask: NUM_TOKENS)
        self._counted = [0, 0, 0]

    def clock(self):
        return self.now

    def describe(self):
        return {"model": "simulated"}

    def counters(self):
        num_drafts, num_draft_tokens, num_accepted = self._counted
        return Acceptance(0, num_drafts, num_draft_tokens, num_accepted)

    def run(self, asks, *, concurrency, tick=lambda reply: None):
        """Each of `concurrency` seats takes the next ask when it is free."""
        free = [0.0] * concurrency
        replies = [self._answer(ask, free) for ask in asks]
        self.runs.append(
            (
                asks[0].arm.name,
                tuple(ask.question.id for ask in asks),
                {ask.tenant for ask in asks},
                tuple(ask.sampling.seed for ask in asks),
            )
        )
        self.now += max(free)
        return replies

    def _answer(self, ask, free):
        seat = min(range(len(free)), key=free.__getitem__)
        sent, error, count = free[seat], self._error(ask), self._num_tokens(ask)
        if error:
            return Reply(ask=ask, due_s=sent, sent_s=sent, error=error)
        step = self._seconds(ask.arm.name, ask.question.id, len(self.runs))
        free[seat] = sent + step * count
        num_drafts = 4 * (ask.arm.name != "off")
        for i, more in enumerate((num_drafts, 3 * num_drafts, 2 * num_drafts)):
            self._counted[i] += more
        told = Acceptance(count - 1, num_drafts, 3 * num_drafts, 2 * num_drafts, (0, 0, num_drafts))
        return Reply(
            ask=ask,
            due_s=sent,
            sent_s=sent,
            first_s=sent + step,
            last_s=free[seat],
            num_tokens=count,
            text=f"answer to {ask.question.id}",
            acceptance=told if self._tells else None,
        )
