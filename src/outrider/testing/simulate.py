"""A machine on paper for policies: known prices, known acceptance, a clock that it moves itself.

No model runs: a step costs what the prices say, a drafted token stands with the probability that
is given, so what a policy should have done is known.
"""

import random
from collections.abc import Callable, Mapping, Sequence as Items
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from outrider.control.base import Policy, StepTimes
from outrider.control.controller import Controller
from outrider.request import Candidate, Request, SamplingParams, Speculation
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, Batch, Commit, DraftTree, Plan, Row

MAX_LEN = 1 << 40


class Terms(NamedTuple):
    """What holds at one step of a simulated run.

    Attributes:
        batch_size: sequences that decode. num_prompt: prompt tokens beside them, of a sequence
            that is not drafted for.
        acceptance: by drafter, the probability that a drafted token stands, given those before.
        coverage: by drafter, the probability that it has anything to propose.
    """

    batch_size: int
    acceptance: dict[str, float]
    coverage: Mapping[str, float] = MappingProxyType({})
    num_prompt: int = 0
    context: int = 256


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Seconds of passes and of drafting.

    Attributes:
        pass_s: of the target, by rows and context in all. draft_s: by drafter, from rows and depth.
        rest_s: of the host per sequence. noise: standard deviation of a step's time, relative.
    """

    pass_s: Callable[[int, int], float]
    draft_s: dict[str, Callable[[int, int], float]]
    rest_s: float = 0.0
    noise: float = 0.03


@dataclass
class Run:
    """What happened, step by step; the time of prompts is left out."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    plain_seconds: list[float] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    depths: list[float] = field(default_factory=list)

    def goodput(self, first: int = 0, last: int | None = None) -> float:
        """Tokens per second of steps `first` to `last`."""
        return sum(self.tokens[first:last]) / sum(self.seconds[first:last])

    def over_plain(self, first: int = 0, last: int | None = None) -> float:
        """Seconds that plain decoding would have needed for the same tokens, over those it took."""
        parts = zip(
            self.tokens[first:last],
            self.plain_seconds[first:last],
            self.batch_sizes[first:last],
            strict=True,
        )
        plain = sum(tokens * seconds / size for tokens, seconds, size in parts)
        return plain / sum(self.seconds[first:last])

    def worst_window(self, length: int) -> float:
        """Lowest `over_plain` of any `length` steps in a row."""
        starts = range(max(1, len(self.seconds) - length + 1))
        return min(self.over_plain(start, start + length) for start in starts)


def simulate(
    make_policy: Callable[[Callable[[], float]], Policy],
    machine: Machine,
    terms: Callable[[int], Terms],
    num_steps: int,
    *,
    num_draft_tokens: int = 8,
    seed: int = 0,
) -> Run:
    """Runs a policy through `num_steps` steps.

    Args:
        make_policy: from a clock.
        terms: by step.
    """
    world = _World(machine, random.Random(seed))
    controller = Controller(MAX_LEN, [make_policy(lambda: world.now)])
    name = list(controller.policies)[-1]
    for step in range(num_steps):
        now = terms(step)
        world.populate(now, name, num_draft_tokens)
        batch = Batch(world.rows(now, num_draft_tokens), [])
        plan = controller.plan(batch)
        commits, times = world.run(batch, plan, now)
        controller.observe(batch, plan, commits, times)
    return world.run_so_far


class _World:
    """Sequences that never end, and the time that passes."""

    def __init__(self, machine: Machine, rng: random.Random) -> None:
        self.machine = machine
        self.rng = rng
        self.now = 0.0
        self.sequences: list[Sequence] = []
        self.prompt: Sequence | None = None
        self.run_so_far = Run()
        self._num_made = 0

    def populate(self, terms: Terms, policy: str, num_draft_tokens: int) -> None:
        while len(self.sequences) > terms.batch_size:
            self.sequences.pop(0)
        candidates = tuple(
            Candidate(name, num_draft_tokens, 1, num_draft_tokens) for name in terms.acceptance
        )
        while len(self.sequences) < terms.batch_size:
            spec = Speculation(
                drafter=candidates[0].drafter,
                num_draft_tokens=num_draft_tokens,
                policy=policy,
                candidates=candidates,
            )
            self.sequences.append(self._sequence(spec, terms.context))

    def rows(self, terms: Terms, num_draft_tokens: int) -> list[Row]:
        rows = [Row(seq, 1, num_draft_tokens) for seq in self.sequences]
        if terms.num_prompt:
            prompt = self._sequence(Speculation(), 2 * terms.num_prompt)
            prompt.num_cached = 0
            rows.append(Row(prompt, terms.num_prompt, 0))
        return rows

    def run(self, batch: Batch, plan: Plan, terms: Terms) -> tuple[list[Commit], StepTimes]:
        commits: list[Commit] = []
        deepest: dict[str, list[int]] = {}
        num_rows = 0
        for row, part in zip(batch.rows, plan, strict=True):
            seq = row.seq
            num_rows += row.num_tokens
            if not row.reaches_end:
                commits.append(Commit(seq))
                continue
            drafted = part.depth if part.num_nodes and self._comes(terms, part.drafter) else 0
            if part.num_nodes:
                deepest.setdefault(part.drafter, []).append(part.depth)
            accepted = self._stands(drafted, terms.acceptance.get(part.drafter, 0.0))
            num_rows += drafted
            commits.append(self._commit(seq, part.drafter, drafted, accepted))
        return commits, self._pass_time(batch, commits, num_rows, deepest, terms)

    def _pass_time(
        self,
        batch: Batch,
        commits: Items[Commit],
        num_rows: int,
        deepest: dict[str, list[int]],
        terms: Terms,
    ) -> StepTimes:
        machine, context = self.machine, sum(row.seq.num_cached for row in batch.rows)
        factor = max(self.rng.gauss(1.0, machine.noise), 0.5)
        draft = sum(
            machine.draft_s[name](len(depths), max(depths)) for name, depths in deepest.items()
        )
        rest = machine.rest_s * terms.batch_size
        forward = machine.pass_s(num_rows, context)
        times = StepTimes(factor * draft, factor * forward, factor * rest)
        plain_rows = sum(row.num_tokens for row in batch.rows)
        self.now += times.total
        plain_s = machine.pass_s(len(self.sequences), context)
        prompt_s = machine.pass_s(plain_rows, context) - plain_s
        so_far = self.run_so_far
        so_far.seconds.append(times.total - prompt_s)
        so_far.tokens.append(sum(len(commit.tokens) for commit in commits))
        so_far.plain_seconds.append(plain_s + rest)
        so_far.batch_sizes.append(terms.batch_size)
        planned = [depth for depths in deepest.values() for depth in depths]
        so_far.depths.append(sum(planned) / max(terms.batch_size, 1))
        return times

    def _commit(self, seq: Sequence, drafter: str, drafted: int, accepted: int) -> Commit:
        tokens = (0,) * (accepted + 1)
        seq.tokens.extend(tokens)
        seq.num_cached = len(seq.tokens) - 1
        tree = DraftTree.chain((0,) * drafted, drafter) if drafted else EMPTY_TREE
        return Commit(seq, tree, tokens, drafted, accepted, accepted, tuple(range(accepted)))

    def _comes(self, terms: Terms, drafter: str) -> bool:
        return self.rng.random() < terms.coverage.get(drafter, 1.0)

    def _stands(self, drafted: int, acceptance: float) -> int:
        for index in range(drafted):
            if self.rng.random() >= acceptance:
                return index
        return drafted

    def _sequence(self, spec: Speculation, context: int) -> Sequence:
        self._num_made += 1
        request = Request(
            id=f"simulated-{self._num_made}",
            prompt_token_ids=(0,),
            sampling=SamplingParams(max_tokens=None),
        )
        seq = Sequence(
            id=request.id, request=request, index=0, tokens=[0] * context, seed=0, speculation=spec
        )
        seq.num_prompt = 1
        seq.num_cached = context - 1
        return seq
