"""The predicted speed-up is the formula's, and what explains a residual is what was changed."""

import math

import pytest

from outrider.bench.calibration.calibrate import EveryStep
from outrider.bench.calibration.prediction import (
    ACCEPTANCE,
    BATCH,
    HOST_SIZES,
    PARTS,
    PROMPTS,
    Load,
    Predictor,
    Profile,
    explain,
)
from outrider.bench.calibration.steps import Totals
from outrider.control.acceptance import Forecast
from outrider.control.base import Facts
from outrider.control.cost import CostModel, DraftCounts, PassCounts
from outrider.control.fixed import FixedPolicy, OffPolicy
from outrider.control.linear_cost import LinearCost
from outrider.testing.simulate import Machine, Terms, simulate

ALPHA = 0.8
CHAIN = Forecast([1.0] * 8, [ALPHA**i for i in range(1, 9)])
PROFILE = Profile("model", CHAIN)


def pass_s(num_rows: float, context: float = 0.0) -> float:
    """Memory-bound up to 16 rows."""
    return 1e-3 * max(16.0, num_rows) / 16.0 + 1e-9 * context


def predictor(*, draft_s: float = 1e-4, rest_s: float = 2e-5, host_s: float = 3e-5) -> Predictor:
    """Prices as they would be learned; drafting costs `draft_s` per depth."""
    cost, host = CostModel(), LinearCost(HOST_SIZES)
    for _ in range(6):
        for num_rows in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128):
            cost.passes.observe(num_rows, 0, 0, pass_s(num_rows))
    for batch in (1, 4, 16) * 40:
        for depth in (1, 4, 8):
            cost.observe_draft(
                "model", DraftCounts(depth, batch, batch * depth, 0), draft_s * depth
            )
        cost.rest.observe(PassCounts(batch, 0, 0, batch, 0).rest, rest_s)
        host.observe((1.0, batch), host_s)
    return Predictor(cost, host)


def load(batch: int = 1, **fields) -> Load:
    return Load(batch=batch, context=1, is_drawn=False, **fields)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_one_sequence_is_as_fast_as_the_formula_says(depth: int) -> None:
    found = predictor().predict(PROFILE, depth, load())
    tokens = (1 - ALPHA ** (depth + 1)) / (1 - ALPHA)
    step = pass_s(1 + depth) + 1e-4 * depth + 2e-5 + 3e-5
    plain = pass_s(1) + 2e-5 + 3e-5
    assert found.tokens == pytest.approx(tokens)
    assert found.needed == pytest.approx(step / plain, rel=0.03)
    assert found.speedup == pytest.approx(tokens * plain / step, rel=0.03)


def test_parts_add_up_to_the_step() -> None:
    found = predictor().predict(PROFILE, 4, load(8))
    assert sum(found.parts) == pytest.approx(found.needed * found.plain_s)
    assert dict(zip(PARTS, found.parts, strict=True))["draft"] == pytest.approx(4e-4, rel=0.05)


def test_the_more_at_once_the_less_it_brings() -> None:
    found = [predictor().predict(PROFILE, 4, load(batch)).speedup for batch in (1, 4, 8, 16)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 1.5
    assert found[-1] < 1.0


def test_prompts_dilute_what_is_gained() -> None:
    bare = predictor().predict(PROFILE, 4, load(num_tokens=64)).speedup
    diluted = predictor().predict(PROFILE, 4, load(num_prompt=128, num_tokens=64))
    share = diluted.prompts
    assert share == pytest.approx((pass_s(129) - pass_s(1)) / (64 * diluted.plain_s), rel=0.1)
    assert 1 / diluted.speedup == pytest.approx((1 / bare + share) / (1 + share))


def totals(batch: float, tokens: float, parts: tuple[float, float, float, float]) -> Totals:
    """A hundred steps alike."""
    draft_s, pass_s, rest_s, between_s = (100 * part for part in parts)
    return Totals(
        num_steps=100,
        num_sequences=round(100 * batch),
        num_tokens=round(100 * batch * tokens),
        context=round(100 * batch),
        draft_s=draft_s,
        pass_s=pass_s,
        rest_s=rest_s,
        between_s=between_s,
    )


PLAIN = (0.0, pass_s(1), 2e-5, 3e-5)
CHANGED = {
    "draft": (9e-4, pass_s(5), 2e-5, 3e-5),
    "pass": (4e-4, 1.7e-3, 2e-5, 3e-5),
    "verify and commit": (4e-4, pass_s(5), 6e-4, 3e-5),
    "between steps": (4e-4, pass_s(5), 2e-5, 6e-4),
}


@pytest.mark.parametrize("term", PARTS)
def test_the_part_that_took_longer_is_named(term: str) -> None:
    prices = predictor()
    tokens = sum(ALPHA**i for i in range(5))
    plain, drafted = totals(1, 1.0, PLAIN), totals(1, tokens, CHANGED[term])
    measured = drafted.num_tokens / drafted.seconds * plain.seconds / plain.num_tokens
    found = explain(prices, PROFILE, 4, load(), measured, plain, drafted)
    assert found.term == term
    assert found.relative < -0.1


@pytest.mark.parametrize(
    ("term", "batch", "tokens", "share"),
    [(ACCEPTANCE, 1, 1.9, 1.0), (BATCH, 24, 3.3616, 1.0), (PROMPTS, 1, 3.3616, 0.6)],
)
def test_what_is_no_part_of_a_step_is_named(
    term: str, batch: int, tokens: float, share: float
) -> None:
    """Fewer tokens stood; more were in flight with drafts than planned; time outside of steps."""
    prices = predictor()
    rows = pass_s(batch * 5)
    drafted = totals(batch, tokens, (4e-4, rows, 2e-5, 3e-5))
    plain = totals(1, 1.0, PLAIN)
    measured = share * drafted.num_tokens / drafted.seconds * plain.seconds / plain.num_tokens
    found = explain(prices, PROFILE, 4, load(), measured, plain, drafted)
    assert found.term == term


def test_terms_add_up() -> None:
    prices = predictor()
    plain, drafted = totals(3, 1.0, PLAIN), totals(2.5, 2.2, (7e-4, 2e-3, 1e-4, 9e-5))
    found = explain(prices, PROFILE, 4, load(4), 0.9, plain, drafted)
    predicted = prices.predict(PROFILE, 4, load(4)).speedup
    assert sum(found.terms.values()) == pytest.approx(1 / 0.9 - 1 / predicted)
    assert found.relative == pytest.approx(0.9 / predicted - 1)


def test_break_even_is_where_a_run_has_it() -> None:
    """Prices learned from simulated steps, against the same machine simulated at fixed K."""
    machine = Machine(
        pass_s=pass_s, draft_s={"model": lambda rows, depth: 1e-4 * depth}, rest_s=1e-6
    )
    batches = (1, 2, 4, 8, 16, 32, 64)
    learned = _learned(machine, batches)
    guesses, measured = {}, {}
    for batch in batches:
        guesses[batch] = learned.predict(PROFILE, 4, load(batch)).speedup
        run = simulate(
            lambda clock: FixedPolicy(),
            machine,
            lambda step, batch=batch: Terms(batch, {"model": ALPHA}, context=1),
            400,
            num_draft_tokens=4,
        )
        measured[batch] = run.over_plain()
        assert guesses[batch] == pytest.approx(measured[batch], rel=0.1)
    crossed = [min(b for b in batches if found[b] < 1.0) for found in (guesses, measured)]
    assert abs(math.log2(crossed[0] / crossed[1])) <= 1.0


def _learned(machine: Machine, batches: tuple[int, ...]) -> Predictor:
    lessons = EveryStep(Facts())

    class Learning(FixedPolicy):
        def observe(self, step) -> None:
            lessons.observe(step)

    class Plain(OffPolicy, Learning):
        name = "fixed"

    for policy in (Learning, Plain):
        for batch in batches:
            simulate(
                lambda clock, policy=policy: policy(),
                machine,
                lambda step, batch=batch: Terms(batch, {"model": ALPHA}, context=1),
                60,
                num_draft_tokens=4,
            )
    return Predictor(lessons.cost, LinearCost(HOST_SIZES))
