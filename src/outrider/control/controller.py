"""Controller: asks each request's policy how far to speculate in this step."""

from collections.abc import Sequence as Items
from functools import partial
from typing import Any

from outrider.control.base import PLAIN, Load, Policy, Room, Step, StepTimes
from outrider.control.fixed import FixedPolicy
from outrider.control.limits import usable
from outrider.errors import ConfigError
from outrider.step import Batch, Commit, Plan, Row, RowPlan


class Controller:
    """Policies by name; rows of one step may follow different ones.

    Args:
        max_model_len: longest sequence the engine allows.
        policies: what requests may name; None is "fixed" alone.
        default: policy of requests that neither name one nor say how far to draft.

    Attributes:
        seconds: of all steps so far, where the engine has a clock.

    Raises:
        ConfigError: two policies have one name.
    """

    def __init__(
        self, max_model_len: int, policies: Items[Policy] = (), default: str = "fixed"
    ) -> None:
        self.max_model_len = max_model_len
        self.default = default
        self.seconds = StepTimes(0.0, 0.0, 0.0)
        self.policies: dict[str, Policy] = {}
        for policy in policies or (FixedPolicy(),):
            if policy.name in self.policies:
                raise ConfigError(f"two policies are named {policy.name!r}: leave one out")
            self.policies[policy.name] = policy

    def resting(self, num_rows: int) -> frozenset[str]:
        """Policies that will draft nothing in a step of so many sequences."""
        return frozenset(name for name, policy in self.policies.items() if policy.rests(num_rows))

    def plan(self, batch: Batch) -> Plan:
        plan: Plan = [PLAIN] * len(batch.rows)
        asked: dict[str, list[tuple[int, Room]]] = {}
        for index, row in enumerate(batch.rows):
            room = self._room(row)
            if room is not None:
                asked.setdefault(row.seq.speculation.policy, []).append((index, room))
        for policy in sorted(map(self.policies.__getitem__, asked), key=_is_asked_late):
            places = asked[policy.name]
            load = partial(_load, batch, plan)
            answers = policy.plan([room for _, room in places], load)
            for (index, room), part in zip(places, answers, strict=True):
                assert part.depth <= room.depth, f"policy {policy.name} plans beyond what is usable"
                assert part.num_nodes <= room.num_nodes, f"policy {policy.name} plans too much"
                plan[index] = part
        return plan

    def observe(
        self, batch: Batch, plan: Plan, commits: Items[Commit], times: StepTimes | None = None
    ) -> None:
        """What became of a step, and how long it took where the engine has a clock."""
        if times is not None:
            before = self.seconds
            self.seconds = StepTimes(
                before.draft + times.draft, before.forward + times.forward, before.rest + times.rest
            )
        step = Step(batch, plan, commits, times)
        for policy in self.policies.values():
            policy.observe(step)

    def forget_seconds(self) -> None:
        """Starts counting anew."""
        self.seconds = StepTimes(0.0, 0.0, 0.0)

    def explain(self) -> dict[str, Any]:
        """By policy, why K is what it is."""
        return {name: policy.explain() for name, policy in self.policies.items()}

    def _room(self, row: Row) -> Room | None:
        seq, _, max_draft_nodes = row
        spec = seq.speculation
        if not max_draft_nodes or not spec.drafter or not row.reaches_end:
            return None
        depth = min(usable(seq, self.max_model_len), spec.num_draft_tokens)
        return Room(seq, depth, max_draft_nodes) if depth > 0 else None


def _is_asked_late(policy: Policy) -> bool:
    return policy.needs_clock


def _load(batch: Batch, plan: Plan) -> Load:
    num_rows = num_prompt = num_emitting = num_drawn = context = visits = 0
    planned: list[tuple[Any, RowPlan]] = []
    prefilling = []
    for row, part in zip(batch.rows, plan, strict=True):
        seq, num_tokens, _ = row
        num_rows += num_tokens
        context += seq.num_cached
        visits += (num_tokens - 1) * seq.num_cached
        is_emitting = num_tokens == len(seq.tokens) - seq.num_cached
        num_emitting += is_emitting
        num_drawn += is_emitting and seq.request.sampling.temperature > 0.0
        num_prompt += num_tokens - is_emitting
        if part.num_nodes:
            planned.append((seq, part))
        if len(seq.tokens) == seq.num_prompt:
            prefilling.append((seq, len(seq.tokens) - seq.num_cached - num_tokens))
    return Load(num_rows, num_prompt, num_emitting, num_drawn, context, visits, planned, prefilling)
