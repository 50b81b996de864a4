"""Sessions: how long they and what belongs to them stay, whose they are, and how many."""

import asyncio
import os

import pytest

from outrider import AsyncLLM
from outrider.errors import ConfigError, SessionStorageError
from outrider.serve import session_sweeper
from outrider.serve.app import create_app
from outrider.serve.base import ServeConfig
from outrider.serve.response_store import ResponseStore, Stored
from tests.serve.conftest import client_of
from tests.serve.streams import Visit
from tests.serve.test_sessions import LONG, TURN, create, kept, post, say, tokens_of

TTL = 60


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
async def client(llm, clock, tmp_path):
    app = create_app(AsyncLLM(llm), ServeConfig(drain_s=0, state_dir=tmp_path / "s"), clock=clock)
    async with app.router.lifespan_context(app), client_of(app) as client:
        yield client


async def sweep(client):
    await kept(client).sweeper.sweep()


async def test_one_that_expires_leaves_nothing(client, clock):
    session = (await create(client, ttl_s=TTL))["id"]
    answer = await say(client, session, "some words that fill a block or two")
    failed = await post(
        client, "/v1/responses", {**LONG, "input": "a", "background": True, "conversation": session}
    )
    await post(client, f"/v1/responses/{failed['id']}/cancel", {})
    await post(client, f"/v1/sessions/{session}/snapshot", {})
    other = (await create(client))["id"]
    await say(client, other, "hello")
    clock.now += TTL + 1
    await sweep(client)
    for name in (answer["id"], failed["id"]):
        assert (await client.get(f"/v1/responses/{name}")).status_code == 404
    warmth = kept(client).warmth
    assert (len(warmth.bundles), len(warmth.snapshots)) == (0, 0)
    assert (await client.get(f"/v1/sessions/{other}")).status_code == 200


async def test_deleting_forgets_what_ran_and_what_failed(client):
    session = (await create(client))["id"]
    names = []
    for _ in range(2):
        body = {**LONG, "input": "a", "background": True, "conversation": session}
        names.append((await post(client, "/v1/responses", body))["id"])
        if len(names) == 1:
            await post(client, f"/v1/responses/{names[0]}/cancel", {})
    await client.delete(f"/v1/sessions/{session}")
    for name in names:
        assert (await client.get(f"/v1/responses/{name}")).status_code == 404


async def test_a_session_outlives_its_answer(client, clock):
    session = (await create(client, ttl_s=TTL))["id"]
    body = {**LONG, "input": "one", "stream": True, "outrider": {"session": session}}
    async with Visit(client.app, "POST", "/v1/responses", body) as visit:
        await visit.take(4)
        clock.now += TTL + 1
        await sweep(client)
        assert (await client.get(f"/v1/sessions/{session}")).json()["state"] == "live"
        final = (await visit.rest())[-1].data["response"]
    assert final["status"] == "incomplete"
    assert final["error"] is None
    found = (await client.get(f"/v1/sessions/{session}")).json()
    assert found["head"] == final["outrider"]["session"]["head"]
    assert found["expires_at"] == clock.now + TTL, "its time begins anew"


@pytest.mark.parametrize("error", [SessionStorageError("full"), RuntimeError("unforeseen")])
async def test_the_sweeper_goes_on_after_an_error(llm, monkeypatch, clock, error):
    monkeypatch.setattr(session_sweeper, "SWEEP_S", 0.001)
    app = create_app(AsyncLLM(llm), ServeConfig(drain_s=0), clock=clock)
    async with app.router.lifespan_context(app), client_of(app) as client:
        expired, num_calls = kept(client).log.expired, 0

        def fails(now):
            nonlocal num_calls
            num_calls += 1
            if num_calls < 3:
                raise error
            return expired(now)

        monkeypatch.setattr(kept(client).log, "expired", fails)
        session = (await create(client, ttl_s=TTL))["id"]
        clock.now += TTL + 1
        async with asyncio.timeout(10):
            while kept(client).log.usage("").sessions:
                await asyncio.sleep(0.002)
        assert num_calls >= 3
        assert (await client.get(f"/v1/sessions/{session}")).status_code == 404


async def test_a_snapshot_takes_what_is_asked_for(client, clock):
    session = (await create(client, ttl_s=7, metadata={"a": "b"}, detach="continue"))["id"]
    await say(client, session, "one")
    taken = (await post(client, f"/v1/sessions/{session}/snapshot", {}))["id"]
    same = await create(client, from_snapshot=taken)
    about = (await client.get(f"/v1/sessions/{same['id']}")).json()
    assert about["settings"] == {"metadata": {"a": "b"}, "detach": "continue"}
    assert (about["expires_at"], about["conversation"]) == (clock.now + 7, None)
    asked = {
        "ttl_s": 99,
        "conversation": "talk",
        "metadata": {"c": "d"},
        "detach": "abort",
        "speculation": "ngram",
    }
    made = await create(client, from_snapshot=taken, **asked)
    about = (await client.get("/v1/sessions/talk")).json()
    assert about["id"] == made["id"]
    assert about["expires_at"] == clock.now + 99
    assert about["settings"] == {"metadata": {"c": "d"}, "speculation": {"method": "ngram"}}
    answer = await say(client, "talk", "two")
    assert answer["outrider"]["session"]["spec"]["drafter"] == "ngram"
    await post(client, "/v1/sessions", {"from_snapshot": taken, "conversation": "talk"}, 409)
    refused = {"from_snapshot": taken, "speculation": "nothing known"}
    await post(client, "/v1/sessions", refused, 400)
    told = await post(client, "/v1/sessions", {"from_snapshot": "head_none"}, 404)
    assert told["error"]["param"] == "from_snapshot"


async def test_a_second_server_is_kept_out(client, llm):
    folder = client.app.state.server.config.state_dir
    app = create_app(AsyncLLM(llm), ServeConfig(drain_s=0, state_dir=folder))
    with pytest.raises(ConfigError, match=str(folder)):
        async with app.router.lifespan_context(app):
            raise AssertionError("it may not begin")


async def test_all_files_are_their_owners_alone(llm, tmp_path):
    folder = tmp_path / "state"
    folder.mkdir(mode=0o755)
    (folder / "responses.sqlite").touch(mode=0o644)
    mask = os.umask(0o022)
    app = create_app(AsyncLLM(llm), ServeConfig(drain_s=0, state_dir=folder))
    try:
        async with app.router.lifespan_context(app), client_of(app) as client:
            session = (await create(client))["id"]
            await say(client, session, "some words that fill a block or two")
            await post(client, f"/v1/sessions/{session}/snapshot", {})
            paths = [folder, *folder.rglob("*")]
            open_to_others = [p.name for p in paths if p.stat().st_mode & 0o077]
    finally:
        os.umask(mask)
    assert {"responses.sqlite-wal", "sessions.sqlite"} <= {p.name for p in paths}
    assert open_to_others == []


async def test_a_tenant_stores_no_more_than_it_may(serve):
    keys = {"one": "a", "two": "b"}
    client = await serve(api_keys=keys, max_sessions=2, max_session_tokens=40)
    mine, theirs = {"Authorization": "Bearer one"}, {"Authorization": "Bearer two"}
    made = [await post(client, "/v1/sessions", {}, **mine) for _ in range(2)]
    refused = await post(client, "/v1/sessions", {}, 403, **mine)
    assert refused["error"]["code"] == "quota_exceeded"
    assert "3 sessions" in refused["error"]["message"]
    await post(client, "/v1/sessions", {}, **theirs)
    path = f"/v1/sessions/{made[0]['id']}"
    await post(client, f"{path}/append", {"token_ids": [5] * 40}, **mine)
    refused = await post(client, f"{path}/append", {"token_ids": [5]}, 403, **mine)
    assert "41 tokens" in refused["error"]["message"]
    await post(client, f"{path}/responses", {**TURN, "input": "one"}, 403, **mine)
    await client.delete(path, headers=mine)
    path = f"/v1/sessions/{made[1]['id']}"
    await post(client, f"{path}/append", {"token_ids": [5]}, **mine)


@pytest.mark.parametrize("name", ["max_sessions", "max_session_tokens"])
def test_no_quota_is_below_one(name):
    with pytest.raises(ConfigError, match=f"{name}=0"):
        ServeConfig(**{name: 0})


def test_responses_of_one_tenant_crowd_out_no_others():
    store = ResponseStore(max_responses=2)
    mine = [stored("a", number) for number in range(4)]
    theirs = [stored("b", -number) for number in range(2)]
    for each in (*mine, *theirs):
        store.put(each)
    store.expire(responses_before=-99, events_before=-99)
    left = [each for each in (*mine, *theirs) if store.get(each.tenant, each.id)]
    assert left == [*mine[2:], *theirs]
    store.close()


def stored(tenant, updated):
    return Stored(
        id=f"resp_{tenant}{updated}", tenant=tenant, session=None, previous=None,
        updated=updated, num_prompt=0, num_tokens=0, is_final=True, body={}, items=[],
    )  # fmt: skip


PLACE = "/v1/sessions/{}"
BAD = [
    ("/v1/sessions", {"ttl_s": "60"}, "ttl_s"),
    ("/v1/sessions", {"ttl_s": True}, "ttl_s"),
    ("/v1/sessions", {"token_ids": ["5"]}, "token_ids.0"),
    ("/v1/sessions", {"token_ids": [10**6]}, "token_ids"),
    ("/v1/sessions", {"token_ids": [5], "instructions": "a"}, "instructions"),
    (f"{PLACE}/fork", {"at": True}, "at"),
    (f"{PLACE}/fork", {"at": 999}, "at"),
    (f"{PLACE}/fork", {"n": "2"}, "n"),
    (f"{PLACE}/rewind", {"to": True}, "to"),
    (f"{PLACE}/rewind", {"to": 1.0}, "to"),
    (f"{PLACE}/rewind", {"to": 999}, "to"),
    (f"{PLACE}/rewind", {"to": 1, "drop": "yes"}, "drop"),
    (f"{PLACE}/append", {"input": []}, "input"),
    (f"{PLACE}/append", {"token_ids": []}, "token_ids"),
    (f"{PLACE}/append", {"token_ids": [10**6]}, "token_ids"),
    (f"{PLACE}/append", {}, "input"),
    (f"{PLACE}/truncate", {}, "chars"),
    (f"{PLACE}/truncate", {"chars": "1"}, "chars"),
    (f"{PLACE}/truncate", {"chars": 1}, "response_id"),
    (f"{PLACE}/hint", {"event": 1}, "event"),
    (f"{PLACE}/responses", {"input": []}, "input"),
    (f"{PLACE}/responses", {"input": "a", "conversation": "b"}, "conversation"),
    (f"{PLACE}/responses", {"input": "a", "if_head": 5}, "if_head"),
    ("/tokenize", {"prompt": "a", "return_token_strs": "yes"}, "return_token_strs"),
    ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
    ("/detokenize", {"tokens": ["5"]}, "tokens.0"),
    ("/detokenize", {"tokens": [True]}, "tokens.0"),
]


@pytest.mark.parametrize(("path", "body", "param"), BAD)
async def test_what_is_wrong_is_refused_by_its_name(client, path, body, param):
    session = (await create(client, token_ids=[5, 6, 7]))["id"]
    refused = await post(client, path.format(session), body, 400)
    assert refused["error"]["param"] == param
    about = (await client.get(f"/v1/sessions/{session}")).json()
    assert about["n_tokens"] == 3


@pytest.mark.parametrize(
    ("verb", "body"),
    [
        ("append", {"token_ids": [9]}),
        ("rewind", {"to": 1}),
        ("fork", {}),
        ("truncate", {"tokens": 1}),
        ("responses", {**TURN, "input": "two"}),
    ],
)
async def test_a_stale_head_is_told_in_the_same_way_everywhere(client, verb, body):
    session = (await create(client))["id"]
    stale = (await client.get(f"/v1/sessions/{session}")).json()["head"]
    now = (await say(client, session, "one"))["outrider"]["session"]["head"]
    path = f"/v1/sessions/{session}/{verb}"
    refused = (await post(client, path, {**body, "if_head": stale}, 409))["error"]
    assert (refused["code"], refused["param"]) == ("conflict", "if_head")
    assert now in refused["message"]
    assert (await client.get(f"/v1/sessions/{session}")).json()["head"] == now
    await post(client, path, {**body, "if_head": now})


async def test_a_response_in_the_path_may_fork(client):
    session = (await create(client))["id"]
    stale = (await client.get(f"/v1/sessions/{session}")).json()["head"]
    await say(client, session, "one")
    path = f"/v1/sessions/{session}/responses"
    body = {**TURN, "input": "two", "if_head": stale}
    forked = await post(client, path, {**body, "on_conflict": "fork"})
    assert forked["outrider"]["session"]["id"] != session
    assert len(tokens_of(client, forked["outrider"]["session"]["head"])) > 0
    twice = await post(client, path, {**body, "outrider": {"if_head": stale}}, 400)
    assert twice["error"]["param"] == "if_head"


ROUTES = [
    ("POST", "/v1/sessions"),
    ("GET", "/v1/sessions"),
    *((method, "/v1/sessions/x") for method in ("GET", "DELETE")),
    *(
        ("POST", f"/v1/sessions/x/{verb}")
        for verb in ("append", "responses", "fork", "rewind", "truncate", "hint", "snapshot")
    ),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_a_page_elsewhere_has_no_sessions(client, method, path):
    """DNS rebinding: no key is asked for on loopback, so the name must be ours."""
    found = await client.request(method, path, json={}, headers={"Host": "evil.example"})
    assert found.status_code == 403
    assert found.json()["error"]["code"] == "host_not_allowed"
    assert kept(client).log.usage("").sessions == 0
