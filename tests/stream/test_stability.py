"""Stability: calibrated where drafts stand by chance, bounded, and enough to keep erasure low."""

import random
from collections import deque

import pytest

from outrider.request import MAX_DRAFT_TOKENS, StreamParams
from outrider.stream import stability
from outrider.stream.erasure import Erasure
from outrider.stream.events import Committed, Tail
from outrider.stream.stability import Stability, num_shown

CONCENTRATION = 4.0


def num_standing(rng, mean, length):
    """Leading tokens that stand; each with an acceptance of its own from a Beta law."""
    law = CONCENTRATION * mean, CONCENTRATION * (1 - mean)
    fell = (i for i in range(length) if rng.random() >= rng.betavariate(*law))
    return next(fell, length)


def observe(experience, stood, length, source="d"):
    experience.observe(source, stood, min(stood + 1, length))


def calibration_error(pairs, num_bins=10):
    """Expected calibration error: mean gap of forecast and frequency over bins of the forecast."""
    bins = [[] for _ in range(num_bins)]
    for forecast, came in pairs:
        bins[min(int(forecast * num_bins), num_bins - 1)].append((forecast, came))
    gaps = [abs(sum(f for f, _ in b) - sum(c for _, c in b)) for b in bins]
    return sum(gaps) / len(pairs)


def forecasts(experience, mean, length, num_steps, *, learns=True, seed=0):
    """(forecast, whether it came true) of every prefix of every draft."""
    rng, pairs = random.Random(seed), []
    for _ in range(num_steps):
        survival = experience.survival("d", length)
        stood = num_standing(rng, mean, length)
        pairs += [(joint, stood > i) for i, joint in enumerate(survival)]
        if learns:
            observe(experience, stood, length)
    return pairs


@pytest.mark.parametrize("mean", [0.3, 0.6, 0.8, 0.9])
@pytest.mark.parametrize("length", [4, 8])
def test_forecasts_are_calibrated(mean, length):
    assert calibration_error(forecasts(Stability(), mean, length, 4000)) < 0.02


def test_the_measure_finds_what_is_not_calibrated():
    assert calibration_error(forecasts(Stability(), 0.6, 4, 4000, learns=False)) > 0.1


def test_a_completion_of_its_own_kind_is_calibrated_among_others():
    """Two in three completions are of another kind; what all have seen fits neither."""
    shared, error, error_of_all = Stability(), [], []
    for round_ in range(60):
        for mean in (0.9, 0.9, 0.3):
            own = Stability(shared)
            pairs = forecasts(own, mean, 4, 60, seed=round_)[80:]
            if mean == 0.3 and round_ >= 10:
                error.append(calibration_error(pairs))
                lumped = shared.survival("d", 4)
                error_of_all.append(
                    calibration_error([(lumped[i % 4], came) for i, (_, came) in enumerate(pairs)])
                )
    assert sum(error) / 50 < 0.5 * sum(error_of_all) / 50


def test_forecasts_follow_a_change():
    experience = Stability()
    forecasts(experience, 0.95, 4, 2000)
    assert experience.survival("d", 1)[0] > 0.9
    forecasts(experience, 0.2, 4, 600)
    assert experience.survival("d", 1)[0] < 0.3


def test_without_experience_the_prior_holds_and_drafters_do_not_mix():
    experience = Stability()
    assert experience.survival("d", 3) == pytest.approx([0.8, 0.64, 0.512])
    observe(experience, 0, 3)
    assert experience.survival("other", 1) == pytest.approx([0.8])
    assert experience.survival("d", 2) == pytest.approx([1.6 / 3, (1.6 / 3) ** 2])


def test_what_was_not_tried_teaches_nothing_of_its_own():
    """The third position has seen nothing: it expects what the second has come to."""
    experience = Stability()
    for _ in range(50):
        observe(experience, 1, 3)
    first, second, third = experience.survival("d", 3)
    assert first > 0.95
    assert third / second == pytest.approx(second / first)
    cut = Stability()
    cut.observe("d", 2, 2)
    assert cut.survival("d", 3)[2] > 0.512, "the end of the output is nobody's failure"


def test_memory_is_bounded():
    experience = Stability()
    for i in range(1000):
        observe(experience, 200, 200, source=str(i % 200))
    assert len(experience._cells) == stability.MAX_SOURCES
    assert max(map(len, experience._cells.values())) == MAX_DRAFT_TOKENS
    assert len(experience.survival("199", 200)) == 200


def shown(survival, **params):
    return num_shown(survival, StreamParams(visibility="provisional", **params))


def test_the_gate_cuts_where_stability_falls_below_it():
    assert shown([0.95, 0.9, 0.85, 0.79]) == 3
    assert shown([0.8]) == 1
    assert shown([0.79]) == 0
    assert shown([0.9, 0.3, 0.1], min_stability=0.0) == 3
    assert shown([0.99] * 20, max_tail_tokens=5) == 5
    assert shown([]) == 0


def test_from_a_gate_of_one_half_on_expected_erasure_is_bounded():
    """0.1 + 0.19 + 0.271 + 0.344 <= 0.2 (1 + 5.13) < all that plus 0.41."""
    survival = [0.9**i for i in range(1, 9)]
    assert shown(survival, min_stability=0.5) == 4
    assert shown(survival, min_stability=0.49) == 6


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def simulate(mean, length, gate, num_steps=6000, seed=0):
    """A model of readers: each redrafted token comes back the same half of the time."""
    rng, clock, experience = random.Random(seed), Clock(), Stability()
    erasure = Erasure(clock)
    params = StreamParams(visibility="provisional", min_stability=gate)
    offset, fresh, again = 0, iter(range(10**9)), deque()
    for _ in range(num_steps):
        old = [again[i] if i < len(again) and rng.random() < 0.5 else None for i in range(length)]
        path = [next(fresh) if token is None else token for token in old]
        survival = experience.survival("d", length)
        tail = tuple(path[: num_shown(survival, params)])
        if tail:
            erasure.observe(tail_of(tail))
        clock.now += 1.0
        stood = num_standing(rng, mean, length)
        observe(experience, stood, length)
        erasure.observe(Committed("r", 0, offset, (*path[:stood], next(fresh))))
        offset += stood + 1
        again = deque(path[stood + 1 :])
    return erasure.summary(), offset / num_steps


def tail_of(tokens):
    return Tail(
        request_id="r", index=0, token_ids=tokens, text="x", committed_chars=0,
        stability=1.0, source="draft", version=1,
    )  # fmt: skip


@pytest.mark.parametrize("mean", [0.6, 0.8, 0.9])
@pytest.mark.parametrize("length", [4, 8])
def test_a_gate_of_one_half_keeps_erasure_low(mean, length):
    found, _ = simulate(mean, length, 0.5)
    assert 0.0 <= found["ne_net"] <= found["ne_gross"] <= 0.2
    assert found["tail_updates"] > 0


@pytest.mark.parametrize(
    ("mean", "length", "per_step", "gross", "net"),
    [(0.6, 4, 2.3, 1.20, 0.80), (0.8, 4, 3.4, 0.46, 0.31), (0.9, 8, 6.2, 0.45, 0.27)],
)
def test_without_a_gate_the_model_gives_the_table(mean, length, per_step, gross, net):
    """Known rows without a gate, and that erasure is measured as they count it."""
    found, tokens_per_step = simulate(mean, length, 0.0)
    assert tokens_per_step == pytest.approx(per_step, abs=0.1)
    assert found["ne_gross"] == pytest.approx(gross, abs=0.05)
    assert found["ne_net"] == pytest.approx(net, abs=0.05)
