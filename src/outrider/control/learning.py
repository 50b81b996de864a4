"""Lessons: what the adaptive policy learns from each step: acceptance, prices, and the balance."""

from collections.abc import Callable
from typing import NamedTuple

from outrider.control.base import Facts, Step, StepTimes
from outrider.control.confidence import Calibration
from outrider.control.cost import CostModel, DraftCounts, PassCounts
from outrider.control.guard import Guard, Purse
from outrider.control.minds import Mind, Minds
from outrider.control.schedule import Schedule
from outrider.sequence import Sequence
from outrider.step import Commit, DraftTree, RowPlan

WARM_UP = 64  # steps whose times are all learned from; then every few, for learning takes time too
EVERY, EVERY_PLAIN = 4, 16  # steps with and without drafts, at least
LEARNING_SHARE = 0.004  # of a step's time, spent on learning from times
MAX_INTERVAL = 64  # steps
CATCH_UP_STEPS = 32  # over which a drafter's catching up is spread
FEWEST = 4  # timings of passes, before anything is held against what they would take
OURS = "adaptive"  # rows whose drafts the guard judges
NOT_DRAFTED = DraftCounts(0, 0, 0, 0)


class Seen(NamedTuple):
    """One step at a glance.

    Attributes:
        drafted: by drafter. is_ours: whether nobody drafted for rows of other policies.
        num_rows: committed tokens in the pass. num_tokens: committed by it. num_emitting: sequences
            that got some.
    """

    drafted: dict[str, DraftCounts]
    is_ours: bool
    num_rows: int
    num_tokens: int
    num_emitting: int


class Lessons:
    """Reads steps into experience, cost model, guard and purse.

    Attributes:
        step: steps seen so far. step_s: seconds of a step of late.
        is_priced: whether prices were there from the start.
        is_awaited: whether somebody with a target for its first token waits for it.
    """

    def __init__(self, facts: Facts) -> None:
        self.minds = Minds()
        self.cost = CostModel(facts.context_price)
        self.confidence: dict[tuple[str, str], Calibration] = {}
        self.guard = Guard()
        self.purse = Purse()
        self.step = 0
        self.step_s = 0.0
        self.is_priced = False
        self.is_awaited = False
        self._plain_size = 0, 0
        self._plain_at = 0
        self._plain_s = self._decoding_share = 0.0
        self._unpaid_s = 0.0  # of reading what drafters had to catch up with
        self._clock: Callable[[], float] = facts.clock or (lambda: 0.0)
        self._times = {  # to learn from, by whether a step drafts
            True: Schedule(LEARNING_SHARE, EVERY, MAX_INTERVAL),
            False: Schedule(LEARNING_SHARE, EVERY_PLAIN, MAX_INTERVAL),
        }

    def observe(self, step: Step, *, is_judged: bool = True) -> None:
        """One step of the engine.

        Args:
            is_judged: whether its drafts have to pay for themselves.
        """
        self.step += 1
        self.minds.now = self.step
        seen = self._learn_acceptance(step)
        times = step.times
        if times is None:
            return
        self.step_s += 0.1 * (times.total - self.step_s) if self.step_s else times.total
        if seen.num_emitting:
            self.purse.earn(times.total, self._decoding_s(times, seen))
        if self.is_warming_up or self.step >= self._times[bool(seen.drafted)].due_at:
            self._learn_times(step, times, seen.drafted)
        if is_judged and seen.drafted and seen.is_ours and not self.purse.is_open:
            self._weigh(step, times, seen)

    @property
    def is_warming_up(self) -> bool:
        """Prices are not known yet: every step tells something."""
        return self.step <= WARM_UP and not self.is_priced

    def _decoding_s(self, times: StepTimes, seen: Seen) -> float:
        """A step's time without what the prompts in it took."""
        if seen.num_rows == seen.num_emitting:
            return times.total
        passes = self.cost.passes
        if passes.num_timings < FEWEST:
            return times.total * seen.num_emitting / seen.num_rows
        more = passes.predict(seen.num_rows) - passes.predict(seen.num_emitting)
        return max(times.total - more, 0.0)

    def _learn_acceptance(self, step: Step) -> Seen:
        drafted: dict[str, DraftCounts] = {}
        num_rows = num_tokens = num_emitting = 0
        is_ours, self.is_awaited = True, False
        for row, part, commit in zip(step.batch.rows, step.plan, step.commits, strict=True):
            num_rows += row.num_tokens
            if commit.tokens:
                num_tokens += len(commit.tokens)
                num_emitting += 1
            elif row.seq.speculation.ttft_s is not None and not row.seq.num_generated:
                self.is_awaited = self.is_awaited or commit.finish_reason is None
            if part.num_nodes:
                is_ours = is_ours and row.seq.speculation.policy == OURS
                if not commit.error:
                    self._learn_draft(row.seq, part, commit, drafted)
        return Seen(drafted, is_ours, num_rows, num_tokens, num_emitting)

    def _learn_draft(
        self, seq: Sequence, part: RowPlan, commit: Commit, drafted: dict[str, DraftCounts]
    ) -> None:
        drafter, num_drafted = part.drafter, len(commit.tree.tokens)
        mind = self.minds.of(seq)
        found = mind.experience.get(drafter)
        if found is not None:
            reached = num_drafted if part.width == 1 else _deepest(commit.tree)
            found.observe(part.depth, reached, len(commit.accepted), self.step)
        if part.stop is not None and commit.tree.confidence:
            self.confidence_of(drafter, mind).observe_draft(
                commit.tree.confidence, len(commit.accepted)
            )
        depth, num_rows, num_nodes, lag = drafted.get(drafter, NOT_DRAFTED)
        drafted[drafter] = DraftCounts(
            max(depth, num_drafted if part.stop else part.depth),
            num_rows + 1,
            num_nodes + num_drafted,
            lag + max(mind.lag(seq, drafter) - len(commit.tokens), 0),
        )
        mind.drafted_at[drafter] = len(seq.tokens)

    def confidence_of(self, drafter: str, mind: Mind) -> Calibration:
        """What a drafter's confidence means for requests that sample like this one."""
        return self.confidence.setdefault((drafter, mind.kind), Calibration())

    def _learn_times(self, step: Step, times: StepTimes, drafted: dict[str, DraftCounts]) -> None:
        started = self._clock()
        if drafted:
            self._learn_drafting(drafted, times.draft)
        self.cost.observe_pass(self._counts(step), times.forward, times.rest)
        spent = self._clock() - started
        self._times[bool(drafted)].done(self.step, spent, self.step_s)

    def _learn_drafting(self, drafted: dict[str, DraftCounts], seconds: float) -> None:
        """Drafting is timed as a whole: where several drafted, all but the dearest as expected."""
        expected = {name: self.cost.draft(name, counts) for name, counts in drafted.items()}
        dearest = max(expected, key=expected.__getitem__)
        others = sum(expected.values()) - expected[dearest]
        self.cost.observe_draft(dearest, drafted[dearest], max(seconds - others, 0.0))

    def _weigh(self, step: Step, times: StepTimes, seen: Seen) -> None:
        """A step in which our rows alone drafted is held against what it would have taken plainly.

        Drafts that other policies asked for say nothing of ours, and trials are paid for already.
        """
        if self.cost.passes.num_timings < FEWEST:
            return
        size = seen.num_rows, seen.num_emitting
        if self._plain_size != size or self.step - self._plain_at >= EVERY_PLAIN:
            self._plain_size, self._plain_at = size, self.step
            plain = self._counts(step, drafts=False)
            self._plain_s = self.cost.step(plain)
            bare = plain._replace(num_rows=seen.num_emitting, visits=0)
            self._decoding_share = min(self.cost.step(bare) / self._plain_s, 1.0)
        # A token more spares a step of decoding, not the prompts that this step has read.
        gained = self._decoding_share * (seen.num_tokens - seen.num_emitting)
        seconds = times.total + self._spread(seen.drafted)
        tokens = seen.num_emitting + gained
        self.guard.observe(self.step, tokens, seconds, seen.num_emitting, self._plain_s)

    def _spread(self, drafted: dict[str, DraftCounts]) -> float:
        """Seconds to add to a step, so that reading a prompt counts for all drafts that follow."""
        entry = 0.0
        for drafter, counts in drafted.items():
            if counts.lag:
                entry += counts.lag * self.cost.draft_cost(drafter).prices[4]
        self._unpaid_s += entry
        due = self._unpaid_s / CATCH_UP_STEPS
        self._unpaid_s -= due
        return due - entry

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
        num_rows = context = visits = num_emitting = num_drawn = num_nodes = 0
        for row, commit in zip(step.batch.rows, step.commits, strict=True):
            seq, num_tokens, _ = row
            emits = 1 if commit.tokens else 0
            drafted = len(commit.tree.tokens) if drafts else 0
            start = len(seq.tokens) - len(commit.tokens) - num_tokens
            num_rows += drafted + num_tokens
            context += start
            visits += (num_tokens - 1 + drafted) * start
            num_emitting += emits
            num_nodes += drafted
            if seq.request.sampling.temperature > 0.0:
                num_drawn += emits + drafted
        return PassCounts(num_rows, context, visits, num_emitting, num_drawn, num_nodes)


def _deepest(tree: DraftTree) -> int:
    depths: list[int] = []
    for parent in tree.parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 1)
    return max(depths, default=0)


def _emitted(step: Step) -> tuple[int, int]:
    """Tokens that a step committed, and to how many sequences."""
    counts = [len(commit.tokens) for commit in step.commits]
    return sum(counts), sum(count > 0 for count in counts)
