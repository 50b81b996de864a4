"""Warmer: what is kept comes back whenever the engine has less, over HTTP."""

import pytest

from outrider import LLM, AsyncLLM
from outrider.serve.app import create_app
from outrider.serve.base import ServeConfig
from tests.engine.tiny_checkpoint import write_checkpoint
from tests.serve.conftest import TEMPLATE, client_of
from tests.serve.test_sessions import TURN, create, fresh, kept, post, say, tokens_of

OPENING = "a question that is long enough to fill some blocks of keys and values, and then some"
MAX = TURN["max_output_tokens"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A target and a draft model with KV for little more than one conversation."""
    folder = tmp_path_factory.mktemp("small")
    paths = [
        str(write_checkpoint(folder / name, num_hidden_layers=n, max_position_embeddings=256))
        for name, n in (("target", 2), ("draft", 1))
    ]
    llm = LLM(paths[0], draft_model=paths[1], policy="fixed", kv_cache_memory_bytes=200_000)
    llm.tokenizer.backend.chat_template = TEMPLATE
    assert llm.engine.manager.num_blocks < 50
    return llm


@pytest.fixture
async def client(small):
    app = create_app(AsyncLLM(small), ServeConfig(drain_s=0))
    async with app.router.lifespan_context(app), client_of(app) as client:
        yield client
    small.flush()


async def crowd_out(client):
    for number in range(12):
        body = {**TURN, "prompt": f"{number} " * 60, "max_tokens": 4}
        del body["max_output_tokens"]
        await post(client, "/v1/completions", body)


async def test_what_was_evicted_and_is_kept_comes_back(client, small):
    session = (await create(client))["id"]
    path = f"/v1/sessions/{session}"
    await say(client, session, OPENING)
    taken = await post(client, f"{path}/snapshot", {})
    assert taken["kv_tokens"] > 0
    await crowd_out(client)
    cold = (await client.get(path)).json()
    assert cold["kv_tokens"] == cold["tiers"]["device"] == 0
    assert cold["tiers"]["host"] == taken["kv_tokens"]
    assert cold["state"] == "warm", "a bundle is in a tier"
    answer = await say(client, session, "and then?")
    report = answer["outrider"]["session"]
    assert report["restored_from"] == "host"
    assert report["kv_hit_tokens"] >= taken["kv_tokens"]
    assert report["spec"]["ready_upto"] > 0
    log = tokens_of(client, report["head"])
    assert fresh(small, log[:-MAX], TURN) == log[-MAX:]


async def test_a_session_that_is_there_is_not_loaded_again(client):
    session = (await create(client))["id"]
    await say(client, session, OPENING)
    await post(client, f"/v1/sessions/{session}/snapshot", {})
    report = (await say(client, session, "and then?"))["outrider"]["session"]
    assert report["restored_from"] is None
    assert report["kv_hit_tokens"] > 0
    hint = f"/v1/sessions/{session}/hint"
    assert (await post(client, hint, {"event": "resume_soon"}))["effect"] == "none"
    await post(client, hint, {"event": "tool_wait"})
    await crowd_out(client)
    assert (await post(client, hint, {"event": "resume_soon"}))["effect"] == "restored"


async def test_a_session_of_which_nothing_is_kept_is_cold(client):
    session = (await create(client))["id"]
    await say(client, session, OPENING)
    await crowd_out(client)
    assert (await client.get(f"/v1/sessions/{session}")).json()["state"] == "cold"
    report = (await say(client, session, "and then?"))["outrider"]["session"]
    assert (report["restored_from"], report["kv_hit_tokens"]) == (None, 0)


async def test_the_size_of_a_snapshot_is_of_all_of_it(client):
    session = (await create(client))["id"]
    await say(client, session, OPENING)
    path = f"/v1/sessions/{session}/snapshot"
    first, second = [await post(client, path, {}) for _ in range(2)]
    assert first["bytes"] == first["bytes_written"] == second["bytes"] > 0
    assert second["bytes_written"] == 0
    assert (await post(client, path, {"include": ["stats"]}))["bytes"] == 0
    refused = await post(client, path, {"include": []}, 400)
    assert refused["error"]["param"] == "include"


def bundles(client):
    warmth = kept(client).warmth
    return len(warmth.bundles), len(warmth.snapshots)


async def test_deleting_leaves_nothing_of_a_session(client):
    session = (await create(client))["id"]
    for text in (OPENING, "and then?"):
        answer = await say(client, session, text)
        await post(client, f"/v1/sessions/{session}/snapshot", {})
    path = f"/v1/sessions/{session}"
    await post(client, f"{path}/rewind", {"to": 20})
    await say(client, session, "or else?")
    await post(client, f"{path}/snapshot", {})
    assert (await client.get(f"/v1/responses/{answer['id']}")).status_code == 200
    assert (await client.delete(path)).status_code == 200
    assert bundles(client) == (0, 0)
    assert (await client.get(f"/v1/responses/{answer['id']}")).status_code == 404


@pytest.mark.parametrize("is_snapshot_before", [True, False])
async def test_branches_leave_nothing_once_both_are_gone(client, is_snapshot_before):
    session = (await create(client))["id"]
    answer = await say(client, session, OPENING)
    if is_snapshot_before:
        await post(client, f"/v1/sessions/{session}/snapshot", {})
    fork = (await post(client, f"/v1/sessions/{session}/fork", {}))["data"][0]["id"]
    for name in (session, fork):
        await say(client, name, f"what of {name}?")
        await post(client, f"/v1/sessions/{name}/snapshot", {})
    await client.delete(f"/v1/sessions/{session}")
    left = (await client.get(f"/v1/sessions/{fork}")).json()
    assert left["tiers"]["host"] > answer["usage"]["input_tokens"], "the fork's stays"
    await client.delete(f"/v1/sessions/{fork}")
    assert bundles(client) == (0, 0)


async def test_what_a_rewind_drops_leaves_nothing(client):
    session = (await create(client))["id"]
    first = await say(client, session, OPENING)
    path = f"/v1/sessions/{session}"
    before = await post(client, f"{path}/snapshot", {})
    second = await say(client, session, "and then? " * 4)
    await post(client, f"{path}/snapshot", {})
    num_all = bundles(client)[0]
    to = first["outrider"]["session"]["head"]
    await post(client, f"{path}/rewind", {"to": to, "drop": True, "if_head": to}, 409)
    assert bundles(client)[0] == num_all, "refused: nothing is forgotten"
    await post(client, f"{path}/rewind", {"to": to, "drop": True})
    assert bundles(client) == (num_all - 2, 1), "one of the target, one of the draft model"
    assert (await client.get(path)).json()["tiers"]["host"] == before["kv_tokens"]
    assert (await client.get(f"/v1/responses/{second['id']}")).status_code == 404
