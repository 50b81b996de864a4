"""Prediction: how many times as fast a draft length should be, from prices and acceptance.

    S(K, B) = tokens(K) * t(B) / (t(B + B n(K)) + t_draft(K, B) + t_host)

The same expectation that the adaptive policy decides by (`control.allocation.evaluate`), with what
it leaves out: the host's time between steps, and, where a block of requests is named, its course:
prompts, the drafter's reading of them, and steps with fewer requests in flight (`Course`).
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from outrider.bench.calibration.course import Block, Course, play
from outrider.bench.calibration.steps import Totals
from outrider.control.acceptance import Forecast
from outrider.control.allocation import Ladder, evaluate
from outrider.control.cost import CostModel, DraftCounts, PassCounts, StepPrice
from outrider.control.linear_cost import LinearCost

HOST_SIZES = (1.0, 0.3)  # per step, sequence
PARTS = ("draft", "pass", "verify and commit", "between steps")
PROMPTS, BATCH, ACCEPTANCE = "prompts and edges", "requests in flight", "acceptance"


class Profile(NamedTuple):
    """How far one drafter's drafts reach and stand, on one kind of text, at one temperature.

    Attributes:
        nodes_per_depth: of its trees; 1 for a chain.
        num_drafts: plans that this was counted on.
    """

    drafter: str
    forecast: Forecast
    nodes_per_depth: float = 1.0
    num_drafts: int = 0

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "forecast": self.forecast._asdict()}

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> "Profile":
        return cls(**{**held, "forecast": Forecast(**held["forecast"])})

    def tokens(self, depth: int) -> float:
        """Expected per pass of a sequence."""
        return 1.0 + sum(self.forecast.stands[:depth])


class Load(NamedTuple):
    """What a speed-up is predicted for.

    Attributes:
        batch: sequences that decode together. context: tokens each of them has in the KV cache.
        is_drawn: whether tokens are drawn, so that each needs a law.
        num_prompt: prompt tokens of each, if they are part of what is timed; else 0.
        num_tokens: of an answer, at most.
        num_requests: of a block, `batch` of them at a time; 0 has `batch` in flight all the time.
        end_rate: chance of each token to end its answer before that.
    """

    batch: int
    context: int
    is_drawn: bool
    num_prompt: int = 0
    num_tokens: int = 64
    num_requests: int = 0
    end_rate: float = 0.0


class Predicted(NamedTuple):
    """A speed-up, and where it comes from.

    Attributes:
        needed: tokens per pass at which it would be 1, with all requests in flight. tokens: those
            that are expected.
        parts: seconds of a step by `PARTS`. plain_s: of one without drafts.
        prompts: of one answer's seconds per token, without drafts, those of its prompt.
        decoding: seconds per token beside plain decoding's, in steps that read no prompt.
    """

    speedup: float
    needed: float
    tokens: float
    parts: tuple[float, float, float, float]
    plain_s: float
    prompts: float = 0.0
    decoding: float = 1.0


class Predictor(NamedTuple):
    """Prices of one machine and model.

    Attributes:
        host: seconds between steps, by step and sequence.
    """

    cost: CostModel
    host: LinearCost

    def predict(self, profile: Profile, depth: int, load: Load) -> Predicted:
        """Drafting `depth` deep for everybody."""
        batch = load.batch
        price = self._price(load)
        ladder = Ladder(profile.forecast, profile.nodes_per_depth, 1.0, profile.drafter)
        between = self.host.predict((1.0, batch))
        plain = evaluate([ladder] * batch, [0] * batch, batch, price)
        drafted = evaluate([ladder] * batch, [depth] * batch, batch, price)
        nodes = batch * profile.nodes_per_depth * sum(profile.forecast.reached[:depth])
        draft_s = self.cost.draft(profile.drafter, DraftCounts(depth, batch, round(nodes), 0))
        laws = batch + nodes if load.is_drawn else 0.0
        rest_s = self.cost.rest.predict((1.0, batch, laws, nodes))
        parts = (draft_s, drafted.seconds - draft_s - rest_s, rest_s, between)
        plain_s = plain.seconds + between
        tokens = drafted.tokens / batch
        needed = (drafted.seconds + between) / plain_s
        prompts = self._prompt_s(load) / (load.num_tokens * plain_s / batch)
        decoding = needed / tokens
        speedup = (1.0 + prompts) / (decoding + prompts)
        if load.num_requests:
            speedup, decoding, _ = self._course(profile, depth, load)
        return Predicted(speedup, needed, tokens, parts, plain_s, prompts, decoding)

    def _course(self, profile: Profile, depth: int, load: Load) -> Course:
        """Of a block, to its end."""
        block = Block(load.num_requests, load.batch, load.num_tokens, load.end_rate)
        reading = max(self.cost.draft_cost(profile.drafter).prices[4], 0.0)  # per token of lag

        @cache
        def seconds(depth: int, num_in_flight: int, num_prompts: int) -> float:
            at = load._replace(batch=num_in_flight)
            ladder = Ladder(profile.forecast, profile.nodes_per_depth, 1.0, profile.drafter)
            depths = [depth] * num_in_flight
            step = evaluate([ladder] * num_in_flight, depths, num_in_flight, self._price(at))
            nodes = num_in_flight * profile.nodes_per_depth * sum(profile.forecast.reached[:depth])
            prompt_s = self._rows_s(num_in_flight + nodes, num_prompts * load.num_prompt)
            if depth:
                prompt_s += reading * num_prompts * load.num_prompt
            return step.seconds + self.host.predict((1.0, num_in_flight)) + prompt_s

        return play(
            block,
            profile.forecast.stands[:depth],
            lambda num_in_flight, num_prompts: seconds(0, num_in_flight, num_prompts),
            lambda num_in_flight, num_prompts: seconds(depth, num_in_flight, num_prompts),
        )

    def plain_s(self, load: Load) -> float:
        """Seconds of a step without drafts."""
        counts = _counts(load)
        return self.cost.step(counts) + self.host.predict((1.0, load.batch))

    def answer_s(self, load: Load) -> float:
        """Seconds that one answer keeps the engine from others, without drafts."""
        return self.plain_s(load) / load.batch * load.num_tokens + self._prompt_s(load)

    def _price(self, load: Load) -> StepPrice:
        return StepPrice(
            self.cost,
            _counts(load),
            num_prompt=0,
            drawn_share=float(load.is_drawn),
            mean_context=load.context,
        )

    def _prompt_s(self, load: Load) -> float:
        """What one prompt adds to the pass that reads it."""
        return self._rows_s(load.batch, load.num_prompt)

    def _rows_s(self, num_rows: float, num_more: int) -> float:
        """What further rows add to a pass."""
        if not num_more:
            return 0.0
        passes = self.cost.passes
        return passes.predict(num_rows + num_more) - passes.predict(num_rows)


class Residual(NamedTuple):
    """How far a measured speed-up is from the predicted one, and why.

    Attributes:
        relative: measured / predicted - 1.
        term: what explains most of it. terms: what each adds to 1 / speed-up; together
            1 / measured - 1 / predicted.
    """

    relative: float
    term: str
    terms: dict[str, float]


def explain(
    predictor: Predictor,
    profile: Profile,
    depth: int,
    load: Load,
    measured: float,
    plain: Totals,
    drafted: Totals,
) -> Residual:
    """Puts what was measured in the place of what was assumed, one term after the other.

    Args:
        measured: the speed-up. plain, drafted: the steps of the two arms that gave it.
    """
    first = predictor.predict(profile, depth, load)
    seen = predictor.predict(profile, depth, _as_seen(load, drafted))
    plain_s = predictor.plain_s(_as_seen(load, plain))  # of a step, as that arm ran
    steps = drafted.mean_batch / plain.mean_batch * first.tokens  # plain ones that one stands for
    guesses = [part / (steps * plain_s) for part in seen.parts]
    faster = first.tokens / drafted.tokens_per_pass
    counted = _shares(drafted, plain)
    decoding = first.decoding
    terms = {BATCH: sum(guesses) - decoding, ACCEPTANCE: sum(guesses) * (faster - 1.0)}
    for name, guess, found in zip(PARTS, guesses, counted, strict=True):
        terms[name] = found - guess * faster
    terms[PROMPTS] = 1.0 / measured - sum(counted) - (1.0 / first.speedup - decoding)
    return Residual(
        measured / first.speedup - 1.0, max(terms, key=lambda name: abs(terms[name])), terms
    )


def _shares(drafted: Totals, plain: Totals) -> list[float]:
    """Seconds per token of a step's parts, beside those of a plain step as a whole."""
    plain_s = plain.seconds / plain.num_tokens
    spent = (drafted.draft_s, drafted.pass_s, drafted.rest_s, drafted.between_s)
    return [part / drafted.num_tokens / plain_s for part in spent]


def _as_seen(load: Load, seen: Totals) -> Load:
    batch, context = max(round(seen.mean_batch), 1), round(seen.mean_context)
    return load._replace(batch=batch, context=context)


def _counts(load: Load) -> PassCounts:
    drawn = load.batch if load.is_drawn else 0
    return PassCounts(load.batch, load.batch * load.context, 0, load.batch, drawn)
