"""Load: figures against hand-made replies, and levels on a target that only keeps time."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from outrider.bench.feed import Feed, Listed, in_order_of
from outrider.bench.load import Level, Measured, closed_loop, measure, open_loop, repeated
from outrider.bench.load_summary import (
    blocks,
    busiest_second,
    most_in_flight,
    read_slo,
    summary,
)
from outrider.bench.target import Acceptance, Arm, Ask, Question, Reply
from outrider.errors import ConfigError
from outrider.request import SamplingParams, SpeculationParams

ARM = Arm(name="a")
QUESTIONS = [Question(id=str(i), prompt=f"{i}?") for i in range(5)]
LEVEL = closed_loop(QUESTIONS, 2, 5)


def ask(at_s: float = 0.0) -> Ask:
    return Ask(question=QUESTIONS[0], sampling=SamplingParams(), arm=ARM, at_s=at_s)


def reply(due_s: float, first_s: float, step_s: float, num: int, **more: object) -> Reply:
    """One token per chunk, `step_s` apart."""
    chunks = tuple(first_s + step_s * i for i in range(num))
    values = {
        "ask": ask(),
        "due_s": due_s,
        "sent_s": due_s,
        "first_s": first_s,
        "last_s": chunks[-1],
        "chunk_s": chunks,
        "num_prompt_tokens": 10,
        "num_tokens": num,
    }
    return Reply(**{**values, **more})  # type: ignore[arg-type]


def figures(replies: Sequence[Reply], level: Level = LEVEL, arm: Arm = ARM, **more: object) -> dict:
    slo = more.pop("slo", None)
    return summary(Measured(level=level, arm=arm, replies=tuple(replies), **more), slo)  # type: ignore[arg-type]


def test_figures_are_vllms() -> None:
    replies = [reply(0.0, 0.1, 0.01, 11), reply(0.0, 0.3, 0.02, 21), reply(1.0, 1.2, 0.03, 6)]
    found = figures(replies)
    duration = 1.2 + 5 * 0.03
    assert found["duration"] == pytest.approx(duration)
    assert (found["completed"], found["failed"], found["total_input_tokens"]) == (3, 0, 30)
    assert found["output_throughput"] == pytest.approx(38 / duration)
    assert found["total_token_throughput"] == pytest.approx(68 / duration)
    assert found["request_throughput"] == pytest.approx(3 / duration)
    assert found["median_ttft_ms"] == pytest.approx(200.0)
    assert found["mean_tpot_ms"] == pytest.approx(20.0)
    assert found["mean_e2el_ms"] == pytest.approx(1e3 * (0.2 + 0.7 + 0.35) / 3)
    gaps = [10.0] * 10 + [20.0] * 20 + [30.0] * 5
    assert found["p90_itl_ms"] == pytest.approx(float(np.percentile(gaps, 90)))
    assert found["std_itl_ms"] == pytest.approx(float(np.std(gaps)))
    for name in ("ttft", "tpot", "itl", "e2el"):
        ordered = [found[f"p{percent}_{name}_ms"] for percent in (50, 90, 95, 99)]
        assert ordered == sorted(ordered)
        assert ordered[0] == found[f"median_{name}_ms"]
    assert found["mean_tokens_per_chunk"] == 1.0


def test_the_time_per_token_is_not_the_gap_between_chunks() -> None:
    """Four tokens in each of three chunks: the gap is 40 ms, a token takes 80 / 11 ms."""
    one = reply(0.0, 0.1, 0.04, 3, num_tokens=12)
    found = figures([one])
    assert found["median_itl_ms"] == pytest.approx(40.0)
    assert found["median_tpot_ms"] == pytest.approx(80.0 / 11)
    assert found["mean_tokens_per_chunk"] == 4.0


def test_failures_earn_nothing_but_are_told() -> None:
    failed = Reply(ask=ask(), due_s=0.0, sent_s=0.0, error="status 500")
    found = figures([reply(0.0, 0.1, 0.01, 11), failed, failed], slo={"ttft": 500.0})
    assert (found["completed"], found["failed"]) == (1, 2)
    assert found["errors"] == {"status 500": 2}
    assert found["slo_attainment"] == pytest.approx(1 / 3)
    assert not found["slo_met"]
    alone = figures([failed])
    assert alone["median_ttft_ms"] is None
    assert alone["output_throughput"] == 0.0


def test_goodput_counts_what_kept_every_limit() -> None:
    replies = [
        reply(0.0, 0.1, 0.01, 11),  # ttft 100, tpot 10
        reply(0.0, 0.9, 0.01, 11),  # late
        reply(0.0, 0.1, 0.05, 11),  # slow
        reply(0.0, 0.1, 0.01, 1),  # of one token: no time per token to keep
    ]
    found = figures(replies, slo={"ttft": 500.0, "tpot": 20.0})
    assert found["slo_attainment"] == 0.5
    assert found["request_goodput"] == pytest.approx(2 / found["duration"])
    assert found["output_goodput"] == pytest.approx(12 / found["duration"])
    assert not found["slo_met"]
    assert figures(replies[:1], slo={"ttft": 500.0, "tpot": 20.0})["slo_met"]
    assert "slo_met" not in figures(replies)


def test_limits_are_read() -> None:
    assert read_slo(["ttft:500", "e2el:2e4"]) == {"ttft": 500.0, "e2el": 20000.0}
    assert read_slo(["llama3.1-8b", "tpot:50"]) == {"ttft": 2000, "tpot": 50.0}
    for wrong in ("ttft", "ttft:0", "itl:5", "ttft:x", "nobody"):
        with pytest.raises(ConfigError, match="--slo"):
            read_slo([wrong])


def test_acceptance_is_the_requests_own_before_the_targets_counters() -> None:
    own = Acceptance(0, 4, 12, 6, (1, 1, 1, 1))
    counted = Acceptance(0, 10, 40, 10)
    found = figures([reply(0.0, 0.1, 0.01, 11, acceptance=own)] * 2, counted=counted)
    assert found["spec_decode_source"] == "requests"
    assert found["spec_decode_acceptance_rate"] == pytest.approx(50.0)
    assert found["spec_decode_acceptance_length"] == 2.5
    assert found["spec_decode_per_position_acceptance_rates"] == [0.75, 0.5, 0.25]
    assert found["spec_decode_num_drafts"] == 8
    other = figures([reply(0.0, 0.1, 0.01, 11)], counted=counted)
    assert (other["spec_decode_source"], other["spec_decode_acceptance_length"]) == ("counters", 2)
    none = figures([reply(0.0, 0.1, 0.01, 11)])
    assert (none["spec_decode_source"], none["spec_decode_num_drafts"]) == (None, 0)


def test_acceptance_on_filler_is_withheld_unless_made_up() -> None:
    own = Acceptance(0, 4, 12, 6, (1, 1, 1, 1))
    filler = Level(name="trace", questions=tuple(QUESTIONS), is_filler=True)
    replies = [reply(0.0, 0.1, 0.01, 11, acceptance=own)]
    assert "spec_decode_acceptance_length" not in figures(replies, filler)
    synthetic = Arm(name="s", speculation=SpeculationParams(verifier="synthetic"))
    assert figures(replies, filler, synthetic)["spec_decode_acceptance_length"] == 2.5


def test_busiest_second_and_most_in_flight() -> None:
    replies = [reply(0.0, 0.5, 0.25, 4), reply(1.3, 1.5, 0.25, 2, num_tokens=6)]
    assert busiest_second(replies) == 8.0  # two of the first, six of the second
    assert most_in_flight(replies) == 1
    assert most_in_flight([reply(0.0, 0.5, 0.25, 4), reply(1.0, 1.5, 0.25, 2)]) == 2
    assert (busiest_second([]), most_in_flight([])) == (0.0, 0)


def test_blocks_hold_every_request() -> None:
    failed = Reply(ask=ask(), due_s=0.0, sent_s=0.0, error="no")
    measured = Measured(level=LEVEL, arm=ARM, replies=(reply(0.0, 0.1, 0.01, 11), failed))
    good, bad = blocks(measured)
    assert (good["first_s"], good["num_tokens"], "error" in good) == (0.1, 11, False)
    assert (bad["last_s"], bad["error"]) == (None, "no")


class Pretender:
    """A target whose answers take a second, or wait for the ones before at `capacity`."""

    name = "pretender"

    def __init__(self, capacity: int = 1000) -> None:
        self.capacity = capacity
        self.asks: list[Ask] = []

    def describe(self) -> dict:
        return {}

    def counters(self) -> Acceptance:
        return Acceptance(num_drafts=len(self.asks))

    def run(
        self,
        asks: Sequence[Ask],
        *,
        concurrency: int,
        tick: Callable[[Reply], None] = lambda reply: None,
    ) -> list[Reply]:
        return in_order_of(asks, self.serve(Listed(asks), concurrency=concurrency, tick=tick))

    def serve(
        self,
        feed: Feed,
        *,
        concurrency: int,
        tick: Callable[[Reply], None] = lambda reply: None,
    ) -> list[Reply]:
        now, flying, found = 0.0, [], []
        free = [0.0] * self.capacity
        while True:
            due_s = feed.due_s
            if (
                due_s is not None
                and len(flying) < concurrency
                and (not flying or due_s <= flying[0].last_s)
            ):
                now = max(now, due_s)
                asked = feed.take(now)
                self.asks.append(asked)
                start = max(now, min(free))
                free[free.index(min(free))] = start + 1.0
                flying.append(
                    Reply(ask=asked, due_s=asked.at_s or now, sent_s=now, first_s=start + 0.1,
                          last_s=start + 1.0, num_tokens=10)
                )  # fmt: skip
                flying.sort(key=lambda each: each.last_s or 0.0)
            elif flying:
                done = flying.pop(0)
                now = max(now, done.last_s or 0.0)
                found.append(done)
                feed.note(done)
                tick(done)
            else:
                return found


def test_a_closed_loop_keeps_so_many_in_flight() -> None:
    measured = measure(Pretender(), closed_loop(QUESTIONS, 3, 12), ARM, SamplingParams())
    assert most_in_flight(measured.replies) == 3
    found = summary(measured)
    assert (found["concurrency"], found["request_rate"]) == (3, None)
    assert found["duration"] == pytest.approx(4.0)
    assert found["spec_decode_num_drafts"] == 12
    assert not measured.is_short


def test_an_open_loop_keeps_its_rate_and_finds_saturation() -> None:
    served = measure(Pretender(20), open_loop(QUESTIONS, 10.0, 300), ARM, SamplingParams())
    found = summary(served)
    assert (found["stopped"], found["saturated"], found["too_short"]) == ("", False, False)
    assert found["offered_rate"] == pytest.approx(10.0, rel=0.2)
    assert found["request_throughput"] == pytest.approx(found["offered_rate"], rel=0.05)
    over = measure(Pretender(4), open_loop(QUESTIONS, 10.0, 300), ARM, SamplingParams())
    assert (over.stopped, over.is_saturated) == ("saturated", True)
    assert len(over.replies) < 300
    capped = Level(
        name="c", questions=repeated(QUESTIONS, 50), at_s=tuple(np.arange(1, 51) / 10.0),
        concurrency=2,
    )  # fmt: skip
    measured = measure(Pretender(), capped, ARM, SamplingParams())
    assert (measured.is_saturated, most_in_flight(measured.replies)) == (False, 2)
    assert summary(measured)["p99_ttft_ms"] > 15_000, "waiting for room counts from when it was due"


def test_time_ends_a_load() -> None:
    level = closed_loop(QUESTIONS, 1, 100, until_s=5.5)
    measured = measure(Pretender(), level, ARM, SamplingParams())
    assert (measured.stopped, len(measured.replies)) == ("time", 6)


def test_repeated_questions_have_names_of_their_own_and_levels_share_no_cache() -> None:
    names = [question.id for question in repeated(QUESTIONS, 12)]
    assert len(set(names)) == 12
    assert names[5] == "0, round 2"
    target = Pretender()
    for arm in (ARM, Arm(name="b")):
        for level in (closed_loop(QUESTIONS, 1, 5), closed_loop(QUESTIONS, 2, 5)):
            measure(target, level, arm, SamplingParams())
    assert len({asked.tenant for asked in target.asks}) == 4


def test_a_data_sets_length_bounds_the_answer() -> None:
    asked = [Question(id="short", prompt="x", max_tokens=7), Question(id="free", prompt="x")]
    target = Pretender()
    measure(target, closed_loop(asked, 1, 2), ARM, SamplingParams(max_tokens=50))
    assert [each.sampling.max_tokens for each in target.asks] == [7, 50]
    measure(target, closed_loop(asked, 1, 2), ARM, SamplingParams(max_tokens=5))
    assert [each.sampling.max_tokens for each in target.asks[2:]] == [5, 5]


def test_evenly_spaced_and_impossible_levels() -> None:
    assert open_loop(QUESTIONS, 2.0, 3, burstiness=None).at_s == pytest.approx(
        (0.0, 0.5, 1.0), abs=1e-6
    )
    with pytest.raises(ConfigError, match="no prompts"):
        repeated([], 3)
    with pytest.raises(ConfigError, match="a time for each"):
        Level(name="x", questions=tuple(QUESTIONS), at_s=(1.0,))
    assert math.isclose(open_loop(QUESTIONS, 2.0, 3).rate or 0.0, 2.0)
