"""/v1/sessions: the log is what the engine is asked, whatever happens to the session around it."""

import asyncio
import json

import httpx
import pytest

from outrider import LLM, AsyncLLM, SamplingParams
from outrider.errors import SessionStorageError
from outrider.serve import response_run
from outrider.serve.app import create_app
from outrider.serve.base import ServeConfig
from outrider.serve.response_events import Rewrite
from outrider.serve.session_service import Sessions
from outrider.stream.events import Committed
from tests.engine.tiny_checkpoint import write_checkpoint
from tests.serve.conftest import TEMPLATE, client_of
from tests.serve.streams import Visit, parse

MAX = 12
TURN = {"max_output_tokens": MAX, "temperature": 0, "ignore_eos": True}
SEEDED = {**TURN, "temperature": 0.9, "seed": 11}
LONG = {**TURN, "max_output_tokens": 200}
FIXED = {**TURN, "speculation": {"method": "draft_model", "num_draft_tokens": 4}}
WIDE = {"max_position_embeddings": 1024}


async def post(client, path, body, status=200, **headers):
    found = await client.post(path, json=body, headers=headers)
    assert found.status_code == status, found.text
    return found.json()


async def create(client, **body):
    return await post(client, "/v1/sessions", body)


async def say(client, session, text, sampling=TURN, status=200, **options):
    body = {**sampling, "input": text, "outrider": {"session": session, **options}}
    return await post(client, "/v1/responses", body, status)


def kept(client) -> Sessions:
    return client.app.state.server.sessions


def tokens_of(client, head, tenant=""):
    return list(kept(client).log.tokens(tenant, head))


def fresh(llm: LLM, prompt, sampling, num_tokens=MAX):
    """What an engine without any session makes of a prompt."""
    names = ("temperature", "seed")
    given = {name: sampling[name] for name in names if name in sampling}
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, **given)
    return llm.generate([list(prompt)], params, "off")[0].token_ids


def text_of(response):
    return response["output"][0]["content"][0]["text"]


@pytest.mark.parametrize("sampling", [TURN, SEEDED], ids=["greedy", "seeded"])
async def test_twenty_turns_are_those_of_a_stateless_run_over_the_same_log(client, llm, sampling):
    session = (await create(client, instructions="be brief"))["id"]
    heads, texts = [], []
    for turn in range(20):
        answer = await say(client, session, f"turn {turn}", sampling)
        report = answer["outrider"]["session"]
        assert report["id"] == session
        assert turn == 0 or report["kv_hit_tokens"] > 0
        assert report["spec"]["class"] == "R1"
        heads.append(report["head"])
        texts.append(text_of(answer))
    log = tokens_of(client, heads[-1])
    for head in heads:
        upto = tokens_of(client, head)
        assert upto == log[: len(upto)], "the log only grows"
        assert fresh(llm, upto[:-MAX], sampling) == upto[-MAX:]
    told = llm.tokenizer.decode(log)
    turns = (f"user: turn {i}\nassistant: {text}\n" for i, text in enumerate(texts))
    assert told + "\n" == "system: be brief\n" + "".join(turns)


async def test_an_answer_that_ended_itself_is_not_closed_twice(client, llm, monkeypatch):
    tokenizer = llm.tokenizer
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    monkeypatch.setattr(tokenizer.backend, "chat_template", template)
    end = tokenizer.eos_token_id
    assert tokenizer.token_text(end) == "<|end|>"

    async def generate(server, ask, request_id, **_):
        yield Committed("r", token_ids=(70, 71, end), text="ab", finish_reason="stop")

    monkeypatch.setattr(response_run, "generate", generate)
    session = (await create(client))["id"]
    for text in ("one", "two"):
        answer = await say(client, session, text)
    told = tokenizer.decode(tokens_of(client, answer["outrider"]["session"]["head"]), False)
    ab = tokenizer.decode([70, 71])
    first = f"<|user|>\none<|end|>\n<|assistant|>\n{ab}<|end|>\n"
    assert told == f"{first}<|user|>\ntwo<|end|>\n<|assistant|>\n{ab}<|end|>"


@pytest.mark.parametrize("sampling", [TURN, SEEDED], ids=["greedy", "seeded"])
async def test_forks_and_rewinds_go_on_as_fresh_runs_over_the_same_log(client, llm, sampling):
    session = (await create(client))["id"]
    first = await say(client, session, "one", sampling)
    second = await say(client, session, "two", sampling)
    at = first["outrider"]["session"]["head"]
    made = await post(client, f"/v1/sessions/{session}/fork", {"at": at, "n": 2})
    branches = [branch["id"] for branch in made["data"]]
    await post(client, f"/v1/sessions/{session}/rewind", {"to": at})
    answers = [await say(client, name, "three", sampling) for name in (session, *branches)]
    logs = [tokens_of(client, answer["outrider"]["session"]["head"]) for answer in answers]
    assert logs[0] == logs[1] == logs[2]
    assert fresh(llm, logs[0][:-MAX], sampling) == logs[0][-MAX:]
    before = tokens_of(client, at)
    assert logs[0][: len(before)] == before
    told = llm.tokenizer.decode(logs[0])
    talk = f"user: one\nassistant: {text_of(first)}\nuser: three\nassistant: "
    assert told == talk + text_of(answers[0])
    elsewhere = second["outrider"]["session"]["head"]
    assert tokens_of(client, elsewhere)[: len(before)] == before, "the old head is still there"


async def test_a_place_within_an_answer_is_closed_before_the_next_message(client, llm):
    session = (await create(client))["id"]
    first = await say(client, session, "one")
    num_tokens = (await client.get(f"/v1/sessions/{session}")).json()["n_tokens"]
    await post(client, f"/v1/sessions/{session}/rewind", {"to": num_tokens - 5})
    cut = llm.tokenizer.decode(tokens_of(client, first["outrider"]["session"]["head"])[:-5])
    second = await say(client, session, "two")
    told = llm.tokenizer.decode(tokens_of(client, second["outrider"]["session"]["head"]))
    assert told == f"{cut}\nuser: two\nassistant: {text_of(second)}"


async def test_truncating_keeps_what_was_heard(client, llm):
    session = (await create(client))["id"]
    answer = await say(client, session, "one", {**TURN, "max_output_tokens": 30})
    half = len(text_of(answer)) // 2
    path = f"/v1/sessions/{session}/truncate"
    head = await post(client, path, {"response_id": answer["id"], "chars": half})
    log = tokens_of(client, answer["outrider"]["session"]["head"])
    kept_tokens = tokens_of(client, head["head"])
    assert kept_tokens == log[: len(kept_tokens)]
    heard = llm.tokenizer.decode(kept_tokens[len(log) - 30 :])
    assert len(heard) <= half
    assert text_of(answer).startswith(heard)
    more = llm.tokenizer.decode(log[len(log) - 30 : len(kept_tokens) + 1])
    assert len(more) > half, "one token more would be too much"
    told = await post(client, path, {"chars": 1, "tokens": 1}, 400)
    assert "one of them" in told["error"]["message"]


async def test_a_stale_head_is_refused_or_forks(client, llm):
    session = (await create(client))["id"]
    first = await say(client, session, "one")
    stale = first["outrider"]["session"]["head"]
    second = await say(client, session, "two", if_head=stale)
    told = await say(client, session, "three", status=409, if_head=stale)
    assert second["outrider"]["session"]["head"] in told["error"]["message"]
    assert told["error"]["code"] == "conflict"
    for path, body in [("append", {"input": "x"}), ("rewind", {"to": 1})]:
        body = {**body, "if_head": stale}
        await post(client, f"/v1/sessions/{session}/{path}", body, 409)
    forked = await say(client, session, "three", if_head=stale, on_conflict="fork")
    branch = forked["outrider"]["session"]
    assert branch["id"] != session
    before = tokens_of(client, stale)
    assert tokens_of(client, branch["head"])[: len(before)] == before
    assert (await client.get(f"/v1/sessions/{session}")).json()["head"] == (
        second["outrider"]["session"]["head"]
    )


async def test_one_writer_at_a_time(client):
    session = (await create(client))["id"]
    body = {**LONG, "input": "one", "stream": True, "outrider": {"session": session}}
    async with Visit(client.app, "POST", "/v1/responses", body) as visit:
        await visit.take(3)
        await say(client, session, "two", status=409)
        await post(client, f"/v1/sessions/{session}/rewind", {"to": 0}, 409)
        state = (await client.get(f"/v1/sessions/{session}")).json()
        assert (state["state"], state["n_tokens"]) == ("live", 0)
        beside = await say(client, session, "two", on_conflict="fork")
        assert beside["outrider"]["session"]["id"] != session
    await say(client, session, "two")


@pytest.mark.parametrize("how", ["leave", "cancel", "fail", "storage"])
async def test_a_broken_turn_leaves_the_last_head(client, how, monkeypatch):
    session = (await create(client))["id"]
    first = await say(client, session, "one")
    head = first["outrider"]["session"]["head"]
    sampling = LONG if how in ("leave", "cancel") else TURN
    body = {**sampling, "input": "two", "stream": True, "outrider": {"session": session}}
    if how == "fail":

        async def generate(server, ask, request_id, **_):
            yield Committed("r", token_ids=(5,), text="x")
            raise RuntimeError("broken")

        monkeypatch.setattr(response_run, "generate", generate)
    if how == "storage":

        def commit(*args, **named):
            raise SessionStorageError("the disk is full: make room")

        monkeypatch.setattr(kept(client).log.turns, "commit", commit)
    async with Visit(client.app, "POST", "/v1/responses", body) as visit:
        seen = await visit.take(4)
        name = seen[0].data["response"]["id"]
        if how == "cancel":
            await post(client, f"/v1/responses/{name}/cancel", {})
        if how != "leave":
            last = (await visit.rest())[-1]
            status = "cancelled" if how == "cancel" else "failed"
            assert last.data["response"]["status"] == status
            assert last.data["response"]["usage"] is None
    monkeypatch.undo()
    async with asyncio.timeout(10):
        while (now := (await client.get(f"/v1/sessions/{session}")).json())["state"] == "live":
            await asyncio.sleep(0.01)
    assert now["head"] == head
    assert kept(client).log.turns.unfinished() == ()
    again = await say(client, session, "two", if_head=head)
    assert again["status"] == "incomplete", "the session goes on"


async def test_append_and_token_ids(client, llm):
    session = (await create(client, token_ids=[70, 71, 72]))["id"]
    appended = await post(client, f"/v1/sessions/{session}/append", {"token_ids": [80, 81]})
    assert tokens_of(client, appended["head"]) == [70, 71, 72, 80, 81]
    assert appended["n_tokens"] == 5
    eager = {"input": "hear this", "prefill": "eager"}
    appended = await post(client, f"/v1/sessions/{session}/append", eager)
    assert (await client.get(f"/v1/sessions/{session}")).json()["kv_tokens"] > 0
    answer = await say(client, session, "now")
    log = tokens_of(client, answer["outrider"]["session"]["head"])
    told = llm.tokenizer.decode(log[5:-MAX])
    assert told == "user: hear this\nuser: now\nassistant: "
    for body in ({"token_ids": [10**6]}, {}, {"input": "a", "token_ids": [1]}, {"token_ids": [-1]}):
        await post(client, f"/v1/sessions/{session}/append", body, 400)


async def test_the_names_of_a_session(client):
    """conversation, headers and the path lead to the same one."""
    made = await create(client, conversation="talk-1")
    body = {**TURN, "input": "hi"}
    answers = [
        await post(client, "/v1/responses", {**body, "conversation": "talk-1"}),
        await post(client, "/v1/responses", {**body, "conversation": {"id": made["id"]}}),
        await post(client, "/v1/responses", body, **{"x-session-id": "talk-1"}),
        await post(client, "/v1/responses", body, **{"X-Outrider-Session": made["id"]}),
        await post(client, f"/v1/sessions/{made['id']}/responses", body),
    ]
    assert {a["outrider"]["session"]["id"] for a in answers} == {made["id"]}
    assert answers[0]["conversation"] == {"id": made["id"]}
    new = await post(client, "/v1/responses", body, **{"x-session-id": "talk-2"})
    again = await post(client, "/v1/responses", body, **{"x-session-id": "talk-2"})
    assert new["outrider"]["session"]["id"] == again["outrider"]["session"]["id"] != made["id"]
    await post(client, "/v1/responses", {**body, "conversation": "nowhere"}, 404)


async def test_speculation_of_a_session_and_of_a_turn(client):
    session = (await create(client, speculation={"policy": "ngram", "num_draft_tokens": 3}))["id"]
    body = {**TURN, "input": "a a a a a a a a"}
    plain = {**body, "speculation": "off"}
    path = f"/v1/sessions/{session}/responses"
    first, off = await post(client, path, body), await post(client, path, plain)
    assert first["outrider"]["session"]["spec"]["class"] == "R0"
    assert first["metrics"]["speculative_decoding"]["num_spec_tokens"] == 3
    assert off["outrider"]["session"]["spec"]["class"] is None
    await post(client, "/v1/sessions", {"speculation": "ngrm"}, 400)


async def test_statistics_grow_with_each_turn(client):
    session = (await create(client))["id"]
    first = await say(client, session, "one", FIXED)
    assert first["outrider"]["session"]["spec"]["accept_prior"] is None
    second = await say(client, session, "two", FIXED)
    prior = second["outrider"]["session"]["spec"]["accept_prior"]
    assert 0 <= prior <= 1
    stats = kept(client).log.stats.get("", session)["draft_model"]["0"]
    told = [r["metrics"]["speculative_decoding"] for r in (first, second)]
    assert sum(t["num_accepted_draft_tokens"] for t in told) == stats["tries"]["accepted"]
    assert stats["drafted"][0] == sum(t["num_spec_steps"] for t in told)
    about = (await client.get(f"/v1/sessions/{session}")).json()
    assert about["spec"]["draft_model"]["class"] == "R1"
    assert about["spec"]["draft_model"]["accept_post"] is not None
    assert about["state"] == "warm"
    (branch,) = (await post(client, f"/v1/sessions/{session}/fork", {}))["data"]
    assert kept(client).log.stats.get("", branch["id"])["draft_model"]["0"] == stats, "copied"


async def test_deleting_frees_nothing_that_a_branch_shares(client):
    session = (await create(client))["id"]
    answer = await say(client, session, "one")
    (branch,) = (await post(client, f"/v1/sessions/{session}/fork", {}))["data"]
    before = tokens_of(client, branch["head"])
    assert (await client.delete(f"/v1/sessions/{session}")).json()["deleted"]
    for path in (f"/v1/sessions/{session}", f"/v1/responses/{answer['id']}"):
        assert (await client.get(path)).status_code == 404
    assert tokens_of(client, branch["head"]) == before
    await say(client, branch["id"], "two")
    await client.delete(f"/v1/sessions/{branch['id']}")
    assert kept(client).log.usage("").tokens == 0


async def test_deleting_ends_what_runs(client):
    session = (await create(client, detach="continue"))["id"]
    body = {**LONG, "input": "one", "background": True, "outrider": {"session": session}}
    await post(client, "/v1/responses", body)
    assert (await client.delete(f"/v1/sessions/{session}")).status_code == 200
    assert client.app.state.server.gate.num_running == 0


async def test_sessions_are_listed_page_by_page(client):
    made = [(await create(client, metadata={"n": str(i)}))["id"] for i in range(5)]
    page = (await client.get("/v1/sessions", params={"limit": 3})).json()
    rest = (await client.get("/v1/sessions", params={"after": page["after"]})).json()
    assert [s["id"] for s in page["data"] + rest["data"]] == made[::-1]
    assert (page["has_more"], rest["has_more"]) == (True, False)
    assert page["data"][0]["settings"]["metadata"] == {"n": "4"}


async def test_tenants_share_nothing(serve):
    client = await serve(api_keys={"one": "a", "two": "b"})
    mine, theirs = {"Authorization": "Bearer one"}, {"Authorization": "Bearer two"}
    session = (await post(client, "/v1/sessions", {"conversation": "talk"}, **mine))["id"]
    text = "the same long prefix for both of us, word by word by word"
    path = f"/v1/sessions/{session}"
    body = {**TURN, "input": text}
    first = await post(client, f"{path}/responses", body, **mine)
    other = (await post(client, "/v1/sessions", {"conversation": "talk"}, **theirs))["id"]
    second = await post(client, f"/v1/sessions/{other}/responses", body, **theirs)
    assert second["outrider"]["session"]["kv_hit_tokens"] == 0, "no KV crosses"
    assert second["usage"]["input_tokens"] == first["usage"]["input_tokens"]
    again = await post(client, "/v1/responses", body, **mine)
    assert again["outrider"]["session"]["kv_hit_tokens"] > 0
    head = first["outrider"]["session"]["head"]
    for call, url, given in [
        (client.get, path, {}),
        (client.delete, path, {}),
        (client.post, f"{path}/fork", {"json": {}}),
        (client.post, f"{path}/append", {"json": {"input": "x"}}),
        (client.post, f"{path}/snapshot", {"json": {}}),
        (client.post, f"{path}/hint", {"json": {"event": "idle"}}),
        (client.post, f"{path}/rewind", {"json": {"to": 0}}),
        (client.post, f"{path}/responses", {"json": body}),
        (client.post, "/v1/sessions", {"json": {"from_snapshot": head}}),
    ]:
        assert (await call(url, headers=theirs, **given)).status_code == 404, url
    listed = (await client.get("/v1/sessions", headers=theirs)).json()["data"]
    assert [s["id"] for s in listed] == [other]


@pytest.mark.parametrize("snapshot", [True, False], ids=["snapshot", "log only"])
async def test_a_restart_goes_on_with_the_same_log(serve, llm, tmp_path, snapshot):
    folder = tmp_path / "state"
    first = await serve(state_dir=folder)
    session = (await create(first))["id"]
    answer = await say(first, session, "one", SEEDED)
    if snapshot:
        taken = await post(first, f"/v1/sessions/{session}/snapshot", {"tier": "disk"})
        assert taken["kv_tokens"] > 0
        assert taken["bytes"] > 0
    second = await serve(state_dir=folder)
    about = (await second.get(f"/v1/sessions/{session}")).json()
    assert about["head"] == answer["outrider"]["session"]["head"]
    got = await second.get(f"/v1/responses/{answer['id']}")
    assert got.json() == answer
    follow = {**SEEDED, "input": "two", "previous_response_id": answer["id"]}
    later = await post(second, "/v1/responses", follow)
    assert later["outrider"]["session"]["id"] == session
    log = tokens_of(second, later["outrider"]["session"]["head"])
    before = tokens_of(second, answer["outrider"]["session"]["head"])
    assert log[: len(before)] == before
    assert fresh(llm, log[:-MAX], SEEDED) == log[-MAX:]


async def test_another_process_restores_kv_and_drafts(tmp_path):
    """Same checkpoint, empty engine: KV and draft KV come from disk, tokens are the same."""
    folders = [
        str(write_checkpoint(tmp_path / name, num_hidden_layers=layers, **WIDE))
        for name, layers in (("target", 2), ("draft", 1))
    ]
    config = ServeConfig(drain_s=0, state_dir=tmp_path / "state")
    answers = []
    for _ in range(2):
        llm = LLM(folders[0], draft_model=folders[1], policy="fixed", check_integrity=True)
        llm.tokenizer.backend.chat_template = TEMPLATE
        app = create_app(AsyncLLM(llm), config)
        async with app.router.lifespan_context(app), client_of(app) as client:
            listed = (await client.get("/v1/sessions")).json()["data"]
            session = listed[0]["id"] if listed else (await create(client))["id"]
            answers.append(await say(client, session, "some words that fill a block or two"))
            log = tokens_of(client, answers[-1]["outrider"]["session"]["head"])
        assert fresh(llm, log[:-MAX], TURN) == log[-MAX:]
    cold, warm = (answer["outrider"]["session"] for answer in answers)
    assert (cold["restored_from"], warm["restored_from"]) == (None, "disk")
    assert warm["restore_ms"] > 0
    assert warm["kv_hit_tokens"] >= 16
    assert warm["spec"]["class"] == "R1"
    assert warm["spec"]["ready_upto"] >= 16
    assert warm["spec"]["accept_prior"] is not None


async def test_a_snapshot_is_a_session_of_its_own(client, llm):
    session = (await create(client))["id"]
    await say(client, session, "one")
    taken = await post(client, f"/v1/sessions/{session}/snapshot", {})
    assert taken["tier"] == "host"
    await say(client, session, "two")
    made = await post(client, "/v1/sessions", {"from_snapshot": taken["id"]})
    assert made["id"] != session
    assert made["n_tokens"] == taken["n_tokens"]
    assert made["outrider"]["session"]["kv_hit_tokens"] > 0
    assert tokens_of(client, made["head"]) == tokens_of(client, taken["head"])
    await post(client, "/v1/sessions", {"from_snapshot": "head_of_nothing"}, 404)
    told = await post(client, f"/v1/sessions/{session}/snapshot", {"tier": "disk"}, 400)
    assert "--state-dir" in told["error"]["message"]


async def test_hints(client):
    session = (await create(client))["id"]
    await say(client, session, "one")
    path = f"/v1/sessions/{session}/hint"
    assert (await post(client, path, {"event": "tool_wait"}))["effect"] == "snapshot"
    assert (await post(client, path, {"event": "final"}))["effect"] == "none"
    await post(client, path, {"event": "lunch"}, 400)


async def test_a_session_expires(llm, tmp_path):
    now = [1000.0]
    app = create_app(AsyncLLM(llm), ServeConfig(drain_s=0), clock=lambda: now[0])
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            client.app = app
            made = await create(client, ttl_s=60)
            assert (await client.get(f"/v1/sessions/{made['id']}")).json()["expires_at"] == 1060
            now[0] += 61
            assert (await client.get(f"/v1/sessions/{made['id']}")).status_code == 404
            await say(client, made["id"], "hello", status=404)


@pytest.mark.parametrize("sampling", [LONG, {**LONG, "temperature": 0.8}], ids=["greedy", "drawn"])
async def test_a_detached_answer_survives_the_process(serve, llm, tmp_path, sampling):
    """No token is lost or told twice: the stream of the next process goes on behind the number."""
    folder = tmp_path / "state"
    first = await serve(state_dir=folder)
    session = (await create(first, detach="continue"))["id"]
    body = {**sampling, "input": "one", "stream": True, "outrider": {"session": session}}
    async with Visit(first.app, "POST", "/v1/responses", body) as visit:
        seen = await visit.take(12)
    name = seen[0].data["response"]["id"]
    runs = kept(first).service.runs
    # As a killed process would: it stops at once and writes nothing more.
    runs._is_closing = True
    live = runs.find("", name)
    live.task.cancel()
    await asyncio.gather(live.task, return_exceptions=True)
    await first.app.state.server.engine.aclose()  # or it takes events of the second's
    second = await serve(state_dir=folder)
    path = f"/v1/responses/{name}?stream=true&starting_after={seen[-1].id}"
    async with Visit(second.app, "GET", path) as visit:
        rest = await visit.rest()
    events = [*seen, *rest]
    assert [event.id for event in events] == [str(n) for n in range(len(events))]
    deltas = [e.data["delta"] for e in events if "delta" in e.data]
    final = events[-1].data["response"]
    assert "".join(deltas) == text_of(final)
    head = (await second.get(f"/v1/sessions/{session}")).json()["head"]
    assert final["outrider"]["session"]["head"] == head
    log = tokens_of(second, head)
    seeded = {**sampling, "seed": final["outrider"]["seed"]}
    assert fresh(llm, log[:-200], seeded, 200) == log[-200:]


async def test_an_attached_answer_does_not(serve, tmp_path):
    folder = tmp_path / "state"
    first = await serve(state_dir=folder)
    session = (await create(first))["id"]
    log = kept(first).log
    log.turns.begin("", session, [5, 6], response_id="resp_killed")
    second = await serve(state_dir=folder)
    assert kept(second).log.turns.unfinished() == ()
    answer = await say(second, session, "one")
    assert answer["status"] == "incomplete"


def test_rewriting_tells_each_character_once():
    told = [
        {"type": "response.created", "sequence_number": 0},
        {"type": "response.output_item.added", "output_index": 0, "item": {"id": "m"}},
        {"type": "d", "item_id": "m", "output_index": 0, "delta": "abc", "sequence_number": 2},
    ]
    new = []
    rewrite = Rewrite(told, lambda event: new.append(dict(event)))
    for event in [
        {"type": "response.created"},
        {"type": "response.output_item.added", "output_index": 0, "item": {"id": "m"}},
        *({"type": "d", "item_id": "m", "output_index": 0, "delta": d} for d in ("a", "bcde", "f")),
        {"type": "response.output_item.added", "output_index": 1, "item": {"id": "n"}},
    ]:
        rewrite(event)
    assert [event.get("delta") for event in new] == ["de", "f", None]


async def test_a_stream_says_its_session_at_the_end(client):
    session = (await create(client))["id"]
    body = {**TURN, "input": "one", "stream": True}
    found = await client.post(f"/v1/sessions/{session}/responses", json=body)
    final = parse(found.text)[-1].data["response"]
    report = final["outrider"]["session"]
    assert set(report) >= {"id", "head", "kv_hit_tokens", "spec", "restored_from", "restore_ms"}
    assert set(report["spec"]) >= {"class", "ready_upto", "accept_prior"}
    assert json.dumps(report)
