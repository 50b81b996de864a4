"""/metrics says what happened, under both sets of names; counted here from the events."""

import asyncio
import json
import math
import re
from contextlib import aclosing

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from outrider import SamplingParams, SpeculationParams
from outrider.serve.errors import ApiError
from outrider.serve.gate import Gate
from outrider.serve.generation import Ask, generate, whole
from outrider.serve.metrics import Metrics
from outrider.serve.tally import INTER_TOKEN_S, Buckets, Families
from outrider.stream.events import Committed, RequestMetrics

DRAFTED = SpeculationParams(method="draft_model", num_draft_tokens=3)
SAMPLING = SamplingParams(max_tokens=20, temperature=0.8, seed=1, ignore_eos=True)
VLLM_NAMES = {
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total",
    "vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_per_pos_total",
    "vllm:prompt_tokens_total", "vllm:generation_tokens_total",
    "vllm:time_to_first_token_seconds_bucket", "vllm:inter_token_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket", "vllm:request_success_total",
}  # fmt: skip


async def samples(client):
    """(name, labels without those of the server) -> value."""
    return parsed((await client.get("/metrics")).text)


def parsed(text):
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            found[(sample.name, tuple(sorted(labels.items())))] = sample.value
    return found


def summed(found, name):
    return sum(value for (key, _), value in found.items() if key == name)


async def events_of(server, name, sampling=SAMPLING, prompt=(5, 9, 40)):
    ask = Ask(prompt=prompt, sampling=sampling, speculation=DRAFTED)
    return [event async for event in generate(server, ask, name)]


async def test_what_is_counted_is_what_happened(client):
    server = client.app.state.server
    two = SamplingParams(max_tokens=20, temperature=0.8, seed=1, ignore_eos=True, n=2)
    events = await events_of(server, "a") + await events_of(server, "b", two)
    found = await samples(client)
    steps = [event for event in events if event.token_ids]
    drafted = [event for event in steps if event.num_drafted]
    assert drafted
    expected = {
        "prompt_tokens_total": 6,
        "generation_tokens_total": sum(len(event.token_ids) for event in steps),
    }
    for name, value in expected.items():
        assert found["vllm:" + name, ()] == value
        assert found["outrider_" + name, ()] == value
    num_drafts = len(drafted)
    num_draft_tokens = sum(event.num_drafted for event in drafted)
    num_accepted = sum(event.num_accepted for event in drafted)
    assert found["vllm:spec_decode_num_drafts_total", ()] == num_drafts
    assert found["vllm:spec_decode_num_draft_tokens_total", ()] == num_draft_tokens
    assert found["vllm:spec_decode_num_accepted_tokens_total", ()] == num_accepted
    drafter = (("drafter", "draft_model"),)
    assert found["outrider_drafts_total", drafter] == num_drafts
    assert found["outrider_draft_tokens_total", drafter] == num_draft_tokens
    assert found["outrider_accepted_tokens_total", drafter] == num_accepted
    assert found["outrider_completion_steps_total", ()] == len(steps)
    for position in range(3):
        at_least = sum(event.num_accepted > position for event in drafted)
        key = (("position", str(position)),)
        name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
        assert found.get((name, key), 0) == at_least
    assert found["vllm:request_success_total", (("finished_reason", "length"),)] == 3
    ended = (("exactness", "exact"), ("finish_reason", "length"), ("verifier", "sampled"))
    assert found["outrider_completions_total", ended] == 3


async def test_latencies_are_counted_once_each(client):
    server = client.app.state.server
    events = await events_of(server, "a")
    found = await samples(client)
    steps = [event for event in events if event.token_ids]
    num_later = sum(len(event.token_ids) for event in steps[1:])
    for prefix, num_gaps in (("vllm:", len(steps) - 1), ("outrider_", num_later)):
        assert found[prefix + "time_to_first_token_seconds_count", ()] == 1
        assert found[prefix + "e2e_request_latency_seconds_count", ()] == 1
        assert found[prefix + "inter_token_latency_seconds_count", ()] == num_gaps
    first = found["vllm:time_to_first_token_seconds_sum", ()]
    rest = found["vllm:inter_token_latency_seconds_sum", ()]
    request = found["vllm:e2e_request_latency_seconds_sum", ()]
    assert first + rest == pytest.approx(request)
    assert found["outrider_inter_token_latency_seconds_sum", ()] == pytest.approx(rest)


def test_times_by_a_clock(llm):
    now = [100.0]
    metrics = Metrics(llm.engine, Gate(1, 1), "m", clock=lambda: now[0])
    watch = metrics.watch(4, 1)
    now[0] = 102.0
    watch.admit()
    now[0] = 103.0
    watch.take(Committed("r", token_ids=(1,)))
    now[0] = 103.6
    watch.take(Committed("r", token_ids=(1, 2, 3)))
    now[0] = 104.0
    watch.take(Committed("r", finish_reason="stop", metrics=RequestMetrics(num_cached_tokens=2)))
    watch.close()
    found = parsed(metrics.text().decode())
    assert found["outrider_queue_time_seconds_sum", ()] == pytest.approx(2)
    assert found["outrider_time_to_first_token_seconds_sum", ()] == pytest.approx(3)
    assert found["outrider_inter_token_latency_seconds_sum", ()] == pytest.approx(0.6)
    assert found["outrider_inter_token_latency_seconds_bucket", (("le", "0.2"),)] == 3
    assert found["outrider_e2e_request_latency_seconds_sum", ()] == pytest.approx(4)
    assert found["outrider_prompt_tokens_cached_total", ()] == 2
    assert found["outrider_requests_aborted_total", ()] == 0


async def test_state_of_engine_and_gate(serve):
    client = await serve(max_concurrent=2, max_waiting=1)
    server = client.app.state.server
    endless = SamplingParams(max_tokens=900, ignore_eos=True)
    running = [generate(server, Ask(prompt=(5, 9), sampling=endless), f"r{i}") for i in range(2)]
    for one in running:
        await anext(one)
    waiting = asyncio.create_task(whole(server, Ask(prompt=(5,), sampling=SAMPLING), "w"))
    await asyncio.sleep(0.01)
    with pytest.raises(ApiError):
        await whole(server, Ask(prompt=(5,), sampling=SAMPLING), "x")
    found = await samples(client)
    assert found["vllm:num_requests_running", ()] == 2
    assert found["vllm:num_requests_waiting", ()] == 1
    assert 0 < found["vllm:kv_cache_usage_perc", ()] <= 1
    assert found["outrider_requests_running", ()] == 2
    assert found["outrider_requests_rejected_total", (("reason", "queue_full"),)] == 1
    for one in running:
        await one.aclose()
    await waiting
    found = await samples(client)
    assert found["vllm:num_requests_running", ()] == 0
    assert found["outrider_requests_aborted_total", ()] == 2
    assert found["vllm:kv_cache_usage_perc", ()] == 0


async def test_prefix_hits(client):
    server = client.app.state.server
    before = await samples(client)
    prompt = tuple(range(20, 90))
    for name in ("a", "b"):
        await events_of(server, name, prompt=prompt)
    found = await samples(client)
    for prefix in ("vllm:", "outrider_"):
        hits, queries = (
            found[f"{prefix}prefix_cache_{what}_total", ()]
            - before[f"{prefix}prefix_cache_{what}_total", ()]
            for what in ("hits", "queries")
        )
        assert 0 < hits < queries <= 140
    assert found["vllm:prompt_tokens_cached_total", ()] == hits


async def test_depths_of_drafts_and_times_of_steps(client, llm):
    before = await samples(client)
    server = client.app.state.server
    events = await events_of(server, "a")
    plain = Ask(prompt=(5, 9), sampling=SAMPLING, speculation=SpeculationParams(method="off"))
    events += [event async for event in generate(server, plain, "b")]
    found = await samples(client)
    steps = [event for event in events if event.token_ids]
    for depth in range(4):
        name = ("outrider_spec_depth_total", (("depth", str(depth)),))
        expected = sum(event.num_drafted == depth for event in steps)  # chains
        assert found.get(name, 0) - before.get(name, 0) == expected
    for part in ("draft", "forward", "rest"):
        name = ("outrider_step_seconds_total", (("part", part),))
        assert found[name] > before.get(name, 0)


async def test_what_the_adaptive_policy_makes_of_it(client):
    server = client.app.state.server
    asked = SpeculationParams(method="draft_model", policy="adaptive")
    policy = (("policy", "adaptive"),)
    sampling = SamplingParams(max_tokens=60, ignore_eos=True)
    await whole(server, Ask(prompt=(5, 9), sampling=sampling, speculation=asked), "a")
    found = await samples(client)
    told = (await client.get("/debug/controller")).json()["policies"]["adaptive"]
    speedup = told["expected_tokens_per_s"] / told["plain_tokens_per_s"]
    assert found["outrider_controller_expected_speedup", policy] == pytest.approx(speedup)
    assert found["outrider_controller_shut_total", policy] == told["guard"]["times_shut"]
    advantage = found["outrider_controller_advantage", policy]
    if told["guard"]["advantage"] is None:
        assert math.isnan(advantage)
    else:
        assert advantage == pytest.approx(told["guard"]["advantage"])


def test_a_value_on_a_bound_lies_below_it():
    buckets = Buckets((1.0, 2.0))
    for seconds in (0.5, 1.0, 1.5, 2.0, 7.0):
        buckets.observe(seconds)
    buckets.observe(1.5, times=3)
    assert buckets.counts == [2, 5, 1]
    assert buckets.sum == pytest.approx(16.5)


@pytest.mark.parametrize("seconds", [0.0004, 0.001, 0.0037, 0.2, 79.9, 81.0])
def test_histograms_are_those_of_the_library(seconds):
    """The slow twin: prometheus_client's own histogram, one observation per token."""
    registry = CollectorRegistry()
    theirs = Histogram("x", "x", ["model_name"], registry=registry, buckets=INTER_TOKEN_S)
    ours = Buckets(INTER_TOKEN_S)
    for times in (1, 3):
        ours.observe(seconds, times)
        for _ in range(times):
            theirs.labels("m").observe(seconds)
    family = Families("", {"model_name": "m"}).histogram("x", "x", ours)
    (twin,) = registry.collect()
    for mine in family.samples:
        same = next(s for s in twin.samples if (s.name, s.labels) == (mine.name, mine.labels))
        assert mine.value == pytest.approx(same.value)
    assert len(family.samples) == len(INTER_TOKEN_S) + 3


async def test_names_that_dashboards_know(client):
    await events_of(client.app.state.server, "a")
    names = {name for name, _ in await samples(client)}
    assert names >= VLLM_NAMES


async def test_labels_of_vllm(client):
    await events_of(client.app.state.server, "a")
    text = (await client.get("/metrics")).text
    name = client.app.state.server.model_name
    assert f'\nvllm:num_requests_running{{engine="0",model_name="{name}"}}' in text


async def test_no_text_and_no_tenant_is_told(serve):
    client = await serve(api_keys={"key-of-alice": "alice"})
    await whole(
        client.app.state.server, Ask(prompt=(5, 6), sampling=SAMPLING, tenant="alice"), "secret-id"
    )
    text = (await client.get("/metrics")).text
    assert "alice" not in text
    assert "secret-id" not in text


async def test_servers_do_not_share_counters(serve):
    first, second = await serve(), await serve()
    await events_of(first.app.state.server, "a")
    assert summed(await samples(second), "vllm:generation_tokens_total") == 0
    assert b"vllm:" not in generate_latest()  # the process's own registry is left alone


async def test_a_request_that_is_left_counts_as_aborted(client):
    server = client.app.state.server
    ask = Ask(prompt=(5, 9), sampling=SamplingParams(max_tokens=900, ignore_eos=True))
    async with aclosing(generate(server, ask, "a")) as events:
        await anext(events)
    found = await samples(client)
    assert found["outrider_requests_aborted_total", ()] == 1
    assert summed(found, "vllm:request_success_total") == 0


async def test_the_dashboard_asks_for_what_there_is(client, root):
    """Every metric in the Grafana file is one that the server tells."""
    await events_of(client.app.state.server, "a")
    names = {name for name, _ in await samples(client)}
    page = json.loads((root / "dashboards" / "grafana.json").read_text())
    queries = [target["expr"] for panel in page["panels"] for target in panel.get("targets", [])]
    asked = {name for query in queries for name in re.findall(r"(?:vllm:|outrider_)\w+", query)}
    assert len(asked) >= 15
    assert asked - names == set()
    assert len({panel["id"] for panel in page["panels"]}) == len(page["panels"])
