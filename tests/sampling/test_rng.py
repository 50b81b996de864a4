"""The streams: pinned words, uniform and independent draws, tokens that are a function of keys."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from outrider.sampling.rng import PositionStream, RootStream, fold

MASK = 2**64 - 1


def philox(seed: int, lane: int, position: int, index: int) -> int:
    """Word `index` of a stream, from the definition of Philox4x64-10 (Salmon et al., 2011)."""
    counter, key = [index // 4 + 1, position, 0, 0], [seed, lane]
    for _ in range(10):
        high_0, low_0 = divmod(counter[0] * 0xD2E7470EE14C6C93, 2**64)
        high_1, low_1 = divmod(counter[2] * 0xCA5A826395121157, 2**64)
        counter = [high_1 ^ counter[1] ^ key[0], low_1, high_0 ^ counter[3] ^ key[1], low_0]
        key = [(key[0] + 0x9E3779B97F4A7C15) & MASK, (key[1] + 0xBB67AE8584CAA73B) & MASK]
    return counter[index % 4]


def uniform(word: int) -> float:
    return ((word >> 12) + 0.5) * 2.0**-52


class Given(RootStream):
    """A stream of given uniforms."""

    def __init__(self, *uniforms: float) -> None:
        self._given = list(uniforms)

    def _uniform(self) -> float:
        return self._given.pop(0)


def law(*weights: float) -> torch.Tensor:
    weights_V = torch.tensor(weights, dtype=torch.float64)
    return weights_V / weights_V.sum()


def chi_square(counts: np.ndarray, law_V: torch.Tensor) -> float:
    """Deviations from the law in standard deviations of the chi-square statistic."""
    expected = law_V.numpy() * counts.sum()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    statistic = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_root_streams_are_philox_keyed_by_seed_purpose_and_root(seed):
    for purpose, lane in (("verify", 1), ("draft", 2)):
        stream = RootStream(seed, 41, purpose)
        drawn = [stream._uniform() for _ in range(9)]
        assert drawn == [uniform(philox(seed, lane, 41, i)) for i in range(9)]


def test_noise_is_philox_keyed_by_seed_position_and_token():
    noise = PositionStream(5, 0).noise(1000, 13)
    by_definition = [-math.log(-math.log(uniform(philox(5, 3, 1000, i)))) for i in range(13)]
    assert noise.dtype == torch.float64
    assert noise.tolist() == pytest.approx(by_definition, rel=1e-13)


def test_golden_tokens():
    """What seeds stand for: a change here changes every user's seeded output."""
    law_V = law(*range(1, 51))
    root, position = RootStream(1, 10, "verify"), PositionStream(1, 11)
    assert [root.pick(law_V) for _ in range(8)] == GOLDEN_ROOT
    assert [position.pick(law_V) for _ in range(8)] == GOLDEN_POSITION
    assert [fold(1, i) for i in range(3)] == GOLDEN_FOLD


GOLDEN_ROOT = [47, 38, 34, 47, 42, 10, 40, 45]
GOLDEN_POSITION = [37, 45, 37, 15, 37, 17, 47, 49]
GOLDEN_FOLD = [1, 259756865590636166, 6241624501426016668]


def test_uniforms_stay_inside_zero_and_one(monkeypatch):
    for word in (0, MASK):
        assert 0.0 < uniform(word) < 1.0
    monkeypatch.setattr("outrider.sampling.rng._generator", lambda *key: Words([0, MASK]))
    stream = RootStream(0, 0, "verify")
    assert [stream._uniform(), stream._uniform()] == [uniform(0), uniform(MASK)]


class Words:
    """A generator of given words."""

    def __init__(self, words: list[int]) -> None:
        self._words = words

    def random_raw(self, size: int) -> np.ndarray:
        taken, self._words = self._words[:size], self._words[size:]
        return np.array(taken, dtype=np.uint64)


@pytest.mark.parametrize("u", [uniform(0), 0.3, 0.5, uniform(MASK)])
def test_no_uniform_picks_a_token_of_probability_zero(u):
    for weights in ([0, 0, 1], [1, 0, 0], [0, 0.3, 0, 0.7, 0], [0.1] * 10 + [0], [0, 1e-300, 1, 0]):
        law_V = torch.tensor(weights, dtype=torch.float64)
        assert law_V[Given(u).pick(law_V)] > 0


def test_pick_inverts_the_cumulated_law():
    law_V = law(2, 0, 3, 5)
    assert [Given(u).pick(law_V) for u in (0.1, 0.19, 0.21, 0.49, 0.51)] == [0, 0, 2, 2, 3]


def test_float32_laws_that_do_not_quite_sum_to_one_are_drawn_in_proportion():
    law_V = torch.full((3,), 1 / 3 + 1e-6)
    assert Given(uniform(MASK)).pick(law_V) == 2
    assert Given(0.34).pick(law_V) == 1


def test_flip_keeps_its_probability():
    stream = RootStream(3, 3, "verify")
    share = sum(stream.flip(0.3) for _ in range(20000)) / 20000
    assert abs(share - 0.3) < 4 * math.sqrt(0.21 / 20000)
    assert all(stream.flip(1.0) and not stream.flip(0.0) for _ in range(100))


@pytest.mark.parametrize("weights", [(1, 2, 3, 4), (5, 0, 1, 0, 0.01), (1,) * 40])
def test_both_streams_draw_from_the_law(weights):
    law_V = law(*weights)
    root, position = RootStream(11, 0, "verify"), PositionStream(12, 0)
    for stream in (root, position):
        picks = [stream.pick(law_V) for _ in range(6000)]
        assert abs(chi_square(np.bincount(picks, minlength=len(law_V)), law_V)) < 4


def test_root_draws_of_consecutive_roots_are_independent():
    law_V = law(1, 1, 1)
    pairs = [
        RootStream(4, root, "verify").pick(law_V) * 3
        + RootStream(4, root + 1, "verify").pick(law_V)
        for root in range(8000)
    ]
    assert abs(chi_square(np.bincount(pairs, minlength=9), law(*[1] * 9))) < 4


def test_picks_at_consecutive_positions_are_independent():
    stream, law_V = PositionStream(9, 0), law(1, 2, 1)
    picks = np.array([stream.pick(law_V) for _ in range(8000)])
    pairs = np.bincount(picks[::2] * 3 + picks[1::2], minlength=9)
    assert abs(chi_square(pairs, torch.outer(law_V, law_V).flatten())) < 4


def test_every_part_of_the_key_changes_the_draws():
    noises = [
        PositionStream(seed, 0).noise(position, 64) for seed in (0, 1, 2) for position in range(3)
    ]
    noises += [PositionStream(fold(0, i), 0).noise(0, 64) for i in (1, 2)]
    draws = torch.stack(noises)
    assert len(draws.unique()) == draws.numel()
    roots = [
        RootStream(seed, root, purpose)._uniform()
        for seed in (0, 1)
        for root in (0, 1)
        for purpose in ("verify", "draft")
    ]
    assert len(set(roots)) == len(roots)


def test_noise_of_a_smaller_vocabulary_is_a_prefix():
    stream = PositionStream(1, 0)
    long = stream.noise(77, 1000)
    for size in (1, 2, 3, 5, 63, 64, 999):
        assert torch.equal(stream.noise(77, size), long[:size])


def test_pick_is_the_argmax_of_log_law_plus_noise():
    law_V = law(*torch.rand(100, generator=torch.Generator().manual_seed(0)).tolist())
    law_V[::3] = 0.0
    stream = PositionStream(2, 50)
    for i in range(50):
        scores_V = law_V.log() + stream.noise(50 + i, 100)
        assert stream.pick(law_V) == int(scores_V.argmax())


@given(st.integers(1, 3000), st.floats(0.0, 30.0), st.integers(0, 10**6))
def test_the_few_contenders_hold_the_argmax_of_all(size, spread, seed):
    """Flat laws, peaked laws, and laws with zeros, against the definition over all tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits_V = torch.randn(size, generator=generator, dtype=torch.float64) * spread
    logits_V[torch.rand(size, generator=generator) < 0.3] = -math.inf
    logits_V[seed % size] = 0.0
    law_V = logits_V.softmax(dim=0)
    noise_V = PositionStream(seed, 0).noise(7, size)
    assert PositionStream(seed, 7).pick(law_V) == int((law_V.log() + noise_V).argmax())


def test_pick_depends_on_the_position_not_on_how_it_was_reached():
    law_V = law(*range(1, 20))
    first = PositionStream(3, 10)
    picks = [first.pick(law_V) for _ in range(6)]
    assert [PositionStream(3, 10 + i).pick(law_V) for i in range(6)] == picks


def test_ties_go_to_the_lower_id(monkeypatch):
    monkeypatch.setattr("outrider.sampling.rng._generator", lambda *key: Words([9] * 4))
    assert PositionStream(0, 0).pick(law(0, 1, 1, 0)) == 1


def test_a_coupled_stream_has_no_coins():
    with pytest.raises(AssertionError, match="coins"):
        PositionStream(0, 0).flip(0.5)


def test_fold_keeps_the_first_completion_and_separates_the_others():
    assert fold(123, 0) == 123
    seeds = {fold(seed, index) for seed in range(50) for index in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)
