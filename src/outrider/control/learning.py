"""Lessons: what the adaptive policy learns from each step: acceptance, prices, and the balance."""

from outrider.control.base import Facts, Step, StepTimes
from outrider.control.cost import CostModel, DraftCounts, PassCounts
from outrider.control.guard import Guard, Purse
from outrider.control.minds import Minds

WARM_UP = 64  # steps whose times are all learned from; then every few, for learning takes time too
EVERY = 4
FEWEST = 4  # timings of passes, before anything is held against what they would take
OURS = "adaptive"  # rows whose drafts the guard judges
NOT_DRAFTED = DraftCounts(0, 0, 0, 0)


class Lessons:
    """Reads steps into experience, cost model, guard and purse.

    Attributes:
        step: steps seen so far. step_s: seconds of a step of late.
    """

    def __init__(self, facts: Facts) -> None:
        self.minds = Minds()
        self.cost = CostModel(facts.context_price)
        self.guard = Guard()
        self.purse = Purse()
        self.step = 0
        self.step_s = 0.0
        self._plain_size = self._plain_at = 0
        self._plain_s = 0.0

    def observe(self, step: Step) -> None:
        self.step += 1
        self.minds.now = self.step
        drafted = self._learn_acceptance(step)
        times = step.times
        if times is None:
            return
        self.step_s += 0.1 * (times.total - self.step_s) if self.step_s else times.total
        self.purse.earn(times.total)
        every = EVERY if drafted else 4 * EVERY
        if self.step <= WARM_UP or not self.step % every:
            self._learn_times(step, times, drafted)
        if drafted and self.cost.passes.num_timings >= FEWEST:
            self._weigh(step, times)

    def _learn_acceptance(self, step: Step) -> dict[str, DraftCounts]:
        """Returns what was drafted, by drafter."""
        found: dict[str, DraftCounts] = {}
        for row, part, commit in zip(step.batch.rows, step.plan, step.commits, strict=True):
            if not part.num_nodes or commit.error:
                continue
            seq, drafter, tree = row.seq, part.drafter, commit.tree
            mind = self.minds.of(seq)
            reached = len(tree.tokens) if part.width == 1 else part.depth
            if drafter in mind.experience:
                accepted = len(commit.accepted)
                mind.experience[drafter].observe(part.depth, reached, accepted, self.step)
            depth, num_rows, num_nodes, lag = found.get(drafter, NOT_DRAFTED)
            found[drafter] = DraftCounts(
                max(depth, part.depth),
                num_rows + 1,
                num_nodes + len(tree.tokens),
                lag + max(mind.lag(seq, drafter) - len(commit.tokens), 0),
            )
            mind.drafted_at[drafter] = len(seq.tokens)
        return found

    def _learn_times(self, step: Step, times: StepTimes, drafted: dict[str, DraftCounts]) -> None:
        counts = self._counts(step)
        if drafted:
            self._learn_drafting(drafted, times.draft)
        self.cost.observe_pass(counts, times.forward, times.rest)

    def _learn_drafting(self, drafted: dict[str, DraftCounts], seconds: float) -> None:
        """Drafting is timed as a whole: where several drafted, all but the dearest as expected."""
        expected = {name: self.cost.draft(name, counts) for name, counts in drafted.items()}
        dearest = max(expected, key=expected.__getitem__)
        others = sum(expected.values()) - expected[dearest]
        self.cost.observe_draft(dearest, drafted[dearest], max(seconds - others, 0.0))

    def _weigh(self, step: Step, times: StepTimes) -> None:
        """A step in which our rows alone drafted is held against what it would have taken plainly.

        Drafts that other policies asked for say nothing of ours.
        """
        drafting = [
            row.seq for row, part in zip(step.batch.rows, step.plan, strict=True) if part.num_nodes
        ]
        if any(seq.speculation.policy != OURS for seq in drafting):
            return
        size = sum(row.num_tokens for row in step.batch.rows)
        if self._plain_size != size or self.step - self._plain_at >= 4 * EVERY:
            self._plain_size, self._plain_at = size, self.step
            self._plain_s = self.cost.step(self._counts(step, drafts=False))
        tokens, num_emitting = _emitted(step)
        self.guard.observe(self.step, tokens, times.total, num_emitting, self._plain_s)

    def lost_s(self, step: Step, times: StepTimes, advantage: float) -> float:
        """Seconds that a step took beyond what its tokens take usually; prompts are left out.

        Args:
            advantage: goodput of what is usual at present over that of plain decoding.
        """
        plain = self._counts(step, drafts=False)
        tokens, num_emitting = _emitted(step)
        if not num_emitting:
            return 0.0
        bare = plain._replace(num_rows=num_emitting, visits=0)
        bare_s = self.cost.step(bare)
        prompt_s = self.cost.step(plain) - bare_s
        return times.total - prompt_s - tokens * bare_s / (num_emitting * advantage)

    def _counts(self, step: Step, *, drafts: bool = True) -> PassCounts:
        """What the pass is counted by; without `drafts`, what it would have been counted by."""
        num_rows = context = visits = num_emitting = num_drawn = 0
        for row, commit in zip(step.batch.rows, step.commits, strict=True):
            seq, num_tokens, _ = row
            emits = 1 if commit.tokens else 0
            drafted = len(commit.tree.tokens) if drafts else 0
            start = len(seq.tokens) - len(commit.tokens) - num_tokens
            num_rows += drafted + num_tokens
            context += start
            visits += (num_tokens - 1 + drafted) * start
            num_emitting += emits
            if seq.request.sampling.temperature > 0.0:
                num_drawn += emits + drafted
        return PassCounts(num_rows, context, visits, num_emitting, num_drawn)


def _emitted(step: Step) -> tuple[int, int]:
    """Tokens that a step committed, and to how many sequences."""
    counts = [len(commit.tokens) for commit in step.commits]
    return sum(counts), sum(count > 0 for count in counts)
