"""Saturation: found at rates that cannot be served, and not at those that can, by simulation."""

import heapq

import numpy as np
import pytest

from outrider.bench.arrivals import gamma
from outrider.bench.feed import Listed
from outrider.bench.saturation import Watched, fall_behind
from outrider.bench.target import Arm, Ask, Question, Reply
from outrider.request import SamplingParams

QUESTION = Question(id="q", prompt="x")
ARM = Arm(name="a")


def ask(at_s: float) -> Ask:
    return Ask(question=QUESTION, sampling=SamplingParams(), arm=ARM, at_s=at_s)


def simulate(
    load: float, num_servers: int, num: int, seed: int, *, burstiness: float = 1.0, **options
) -> tuple[Watched, int]:
    """A queue before servers that take a second on average; the feed and how many were sent."""
    rng = np.random.default_rng(seed)
    times = gamma(load * num_servers, num, burstiness=burstiness, seed=seed)
    feed = Watched(Listed([ask(t) for t in times]), **options)
    free, flying, num_sent = [0.0] * num_servers, [], 0
    while flying or feed.due_s is not None:
        due_s = feed.due_s
        if flying and (due_s is None or flying[0][0] <= due_s):
            feed.note(heapq.heappop(flying)[2])
            continue
        asked = feed.take(due_s)
        num_sent += 1
        start = max(due_s, heapq.heappop(free))
        end = start + rng.gamma(4.0, 0.25)
        heapq.heappush(free, end)
        reply = Reply(ask=asked, due_s=due_s, sent_s=due_s, first_s=start + 0.1, last_s=end)
        heapq.heappush(flying, (end, num_sent, reply))
    feed.conclude()
    return feed, num_sent


@pytest.mark.parametrize("num_servers", [1, 8, 32])
@pytest.mark.parametrize("load", [0.3, 0.7, 0.9])
def test_a_rate_that_is_served_is_let_be(num_servers: int, load: float) -> None:
    runs = [simulate(load, num_servers, 800, seed) for seed in range(10)]
    assert sum(feed.is_saturated for feed, _ in runs) <= 1
    assert not any(feed.is_short for feed, _ in runs)


@pytest.mark.parametrize("num_servers", [1, 8, 32])
@pytest.mark.parametrize("load", [1.5, 2.5])
def test_a_rate_that_cannot_be_served_is_left_early(num_servers: int, load: float) -> None:
    for seed in range(10):
        feed, num_sent = simulate(load, num_servers, 2000, seed)
        assert feed.is_saturated
        assert num_sent < 1000


def test_bursts_are_no_saturation() -> None:
    runs = [simulate(0.6, 8, 800, seed, burstiness=0.2) for seed in range(10)]
    assert sum(feed.is_saturated for feed, _ in runs) <= 1


def test_a_short_list_is_judged_at_its_end_or_told_as_too_short() -> None:
    feed, num_sent = simulate(3.0, 8, 150, 0)
    assert feed.is_saturated
    brief, num_sent = simulate(50.0, 8, 60, 0)
    assert (brief.is_saturated, brief.is_short, num_sent) == (False, True, 60)


def test_time_ends_a_feed() -> None:
    feed, num_sent = simulate(0.5, 8, 400, 0, until_s=10.0)
    assert feed.is_late
    assert num_sent == sum(t <= 10.0 for t in gamma(4.0, 400, seed=0))


def test_it_can_be_left_out() -> None:
    feed, num_sent = simulate(3.0, 8, 500, 0, finds_saturation=False)
    assert (feed.is_saturated, num_sent) == (False, 500)


def test_falling_behind_is_counted_after_the_start() -> None:
    came = [0.1 * i for i in range(200)]
    assert not fall_behind(came, [t + 3.0 for t in came if t + 3.0 < 20.0], 5.0)
    assert fall_behind(came, [2 * t for t in came if 2 * t < 20.0], 5.0)
