"""/v1/responses: OpenAI's events in OpenAI's order, tails, resuming, chains, and an end to all."""

import asyncio
import json

import pytest
from hypothesis import given, strategies as st
from pydantic import TypeAdapter

from outrider import LLM
from outrider.errors import EngineError
from outrider.request import Speculation
from outrider.serve import response_run
from outrider.serve.errors import ApiError
from outrider.serve.response_events import ResponseWriter, Rewrite
from outrider.serve.response_service import TERMINAL
from outrider.serve.ring import RingLimits, Rings
from outrider.serve.tools import Tool, ToolUse
from outrider.serve.turns import Turn
from outrider.stream.events import Committed, RequestMetrics, Tail
from tests.serve.streams import Visit, parse

MAX = 24
BODY = {"input": "the quick", "max_output_tokens": MAX, "temperature": 0, "ignore_eos": True}
LONG = {**BODY, "max_output_tokens": 200}
ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


async def post(client, body, status=200, path="/v1/responses", **headers):
    found = await client.post(path, json=body, headers=headers)
    assert found.status_code == status, found.text
    return found.json()


def text_of(response):
    return "".join(
        part["text"]
        for item in response["output"]
        if item["type"] == "message"
        for part in item["content"]
    )


def text_of_events(events):
    return "".join(
        e.data["delta"] for e in events if e.data["type"] == "response.output_text.delta"
    )


def without_repeats(names):
    return [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]


def sessions_of(client):
    """All of them, those that clients do not see among them."""
    return client.app.state.server.sessions.log.list("").sessions


def prompt_of(llm: LLM, text):
    return llm.tokenizer.apply_chat_template([{"role": "user", "content": text}])


async def test_a_whole_response(client, llm):
    found = await post(client, {**BODY, "metadata": {"k": "v"}, "instructions": None})
    assert found["object"] == "response"
    assert found["status"] == "incomplete"
    assert found["incomplete_details"] == {"reason": "max_output_tokens"}
    assert found["metadata"] == {"k": "v"}
    (message,) = found["output"]
    assert (message["type"], message["role"]) == ("message", "assistant")
    assert message["content"][0]["type"] == "output_text"
    prompt = prompt_of(llm, "the quick")
    usage = found["usage"]
    assert usage["input_tokens"] == len(prompt)
    assert usage["output_tokens"] == MAX
    assert usage["total_tokens"] == len(prompt) + MAX
    assert "cached_tokens" in usage["input_tokens_details"]
    assert found["outrider"]["exactness"] == {"mode": "exact", "method": None, "params": {}}
    assert found["metrics"]["speculative_decoding"]["num_draft_tokens"] > 0
    assert found["outrider"]["session"]["id"].startswith("sess_")


async def test_the_answer_is_that_of_the_engine(client, llm):
    found = await post(client, BODY)
    answers = _generate(llm, prompt_of(llm, "the quick"))
    assert text_of(found) == answers.text


def _generate(llm, prompt, **sampling):
    from outrider import SamplingParams

    params = SamplingParams(max_tokens=MAX, ignore_eos=True, **sampling)
    return llm.generate([list(prompt)], params, "off")[0]


async def test_events_come_in_openais_order_and_numbers_are_ids(client):
    found = await client.post("/v1/responses", json={**BODY, "stream": True})
    assert found.headers["content-type"].startswith("text/event-stream")
    events = parse(found.text)
    names = [event.event for event in events]
    assert without_repeats(names) == [*ORDER, "response.incomplete"]
    assert names == [event.data["type"] for event in events]
    assert [event.id for event in events] == [str(number) for number in range(len(events))]
    assert [event.data["sequence_number"] for event in events] == list(range(len(events)))
    last = events[-1].data["response"]
    assert text_of_events(events) == text_of(last) == events[-4].data["text"]
    assert events[0].data["response"]["output"] == []
    assert events[0].data["response"]["status"] == "in_progress"
    item = events[2].data["item"]
    assert all(event.data["item_id"] == item["id"] for event in events if "item_id" in event.data)


async def test_openais_own_types_take_every_event(client):
    types = pytest.importorskip("openai.types.responses")
    read = TypeAdapter(types.ResponseStreamEvent).validate_python
    tool = {"type": "function", "name": "look", "parameters": {"type": "object"}}
    body = {**BODY, "top_logprobs": 1, "tools": [tool], "stream": True}
    for choice in ("none", "required"):
        found = await client.post("/v1/responses", json={**body, "tool_choice": choice})
        for event in parse(found.text):
            assert read(event.data).type == event.event


async def test_streamed_and_whole_are_the_same_response(client):
    whole = await post(client, {**BODY, "temperature": 0.9, "seed": 7})
    body = {**BODY, "temperature": 0.9, "seed": 7, "stream": True}
    streamed = parse((await client.post("/v1/responses", json=body)).text)[-1].data["response"]
    assert text_of(whole) == text_of(streamed)
    changing = ("id", "created_at", "completed_at", "output", "outrider", "usage")
    assert {k: v for k, v in whole.items() if k not in changing} == {
        k: v for k, v in streamed.items() if k not in changing
    }


def scripted(events, pause_s=0.1):
    """An engine that says what it is told to."""

    async def generate(server, ask, request_id, **_):
        for event in events:
            await asyncio.sleep(pause_s)
            yield event

    return generate


METRICS = RequestMetrics(
    num_prompt_tokens=9,
    num_generated_tokens=8,
    num_steps=3,
    num_drafts=2,
    num_draft_tokens=8,
    num_accepted_tokens=6,
    accepted_histogram=(0, 0, 1, 0, 1),
    drafter="draft_model",
    verifier="sampled",
    exactness="exact",
)


def _tail(version, tokens, text, committed_chars, stability):
    return Tail(
        request_id="r",
        index=0,
        token_ids=tokens,
        text=text,
        committed_chars=committed_chars,
        stability=stability,
        source="draft",
        version=version,
    )


TRANSCRIPT = [
    Committed("r", 0, 0, (5,), "The"),
    _tail(1, (6, 7, 20, 21), " answer is likely no", 3, 0.83),
    Committed("r", 0, 1, (6, 7, 8), " answer is yes", 4, 2, 2),
    _tail(2, (9, 10, 11), ", with caveats", 17, 0.91),
    Committed(
        "r", 0, 4, (9, 10, 11, 12), ", with caveats.", 4, 4, 4,
        finish_reason="stop", stop_reason="x", metrics=METRICS,
    ),
]  # fmt: skip
PROVISIONAL = {"stream": True, "stream_options": {"outrider": {"visibility": "provisional"}}}


async def test_the_transcript_of_the_design(client, monkeypatch):
    monkeypatch.setattr(response_run, "generate", scripted(TRANSCRIPT))
    found = await client.post("/v1/responses", json={**BODY, **PROVISIONAL, "background": True})
    events = parse(found.text)
    told = [
        (event.id, event.data["type"].partition("response.")[2] or "tail") for event in events[4:]
    ]
    assert told == [
        ("4", "output_text.delta"),
        (None, "tail"),
        ("5", "output_text.delta"),
        (None, "tail"),
        ("6", "output_text.delta"),
        ("7", "output_text.done"),
        ("8", "content_part.done"),
        ("9", "output_item.done"),
        ("10", "completed"),
    ]
    deltas = [event.data["delta"] for event in events if "delta" in event.data]
    assert deltas == ["The", " answer is yes", ", with caveats."]
    first, second = (event for event in events if event.id is None)
    item = events[2].data["item"]["id"]
    assert first.event == "outrider:output_text.tail"
    assert first.data == {
        "type": "outrider:output_text.tail",
        "base": 4,
        "item_id": item,
        "output_index": 0,
        "content_index": 0,
        "committed_chars": 3,
        "text": " answer is likely no",
        "n_tokens": 4,
        "stability": 0.83,
        "source": "draft",
        "v": 1,
    }
    assert second.data == first.data | {
        "base": 5,
        "committed_chars": 17,
        "text": ", with caveats",
        "n_tokens": 3,
        "stability": 0.91,
        "v": 2,
    }
    final = events[-1].data["response"]
    shown = final["usage"]["outrider"]["stream"]
    assert {
        k: shown[k] for k in ("ne_gross", "flickers", "tail_updates", "max_retract_tokens")
    } == {
        "ne_gross": 0.25,
        "flickers": 1,
        "tail_updates": 2,
        "max_retract_tokens": 2,
    }
    speculation = final["metrics"]["speculative_decoding"]
    assert speculation["mean_acceptance_length"] == 4.0
    assert speculation["draft_acceptance_rate"] == 0.75
    assert events[0].data["response"]["outrider"]["stream"]["visibility"] == "provisional"
    resumed = await client.get(
        f"/v1/responses/{final['id']}", params={"stream": True, "starting_after": 5}
    )
    assert parse(resumed.text) == events[-5:], "tails are not replayed"
    assert parse(resumed.text)[0].id == "6"


async def test_whoever_ignores_tails_reads_the_standard_stream(client):
    body = {**BODY, "temperature": 0.9, "seed": 3, "max_output_tokens": 60}
    plain = parse((await client.post("/v1/responses", json={**body, "stream": True})).text)
    asked = {"visibility": "provisional", "min_stability": 0.0, "max_updates_per_s": 1000}
    body |= {"stream": True, "stream_options": {"outrider": asked}}
    told = parse((await client.post("/v1/responses", json=body)).text)
    durable = [event for event in told if event.id is not None]
    assert text_of_events(durable) == text_of_events(plain)
    assert [e.id for e in durable] == [str(n) for n in range(len(durable))]
    assert without_repeats([e.event for e in durable]) == without_repeats([e.event for e in plain])
    last = -1
    for event in told:
        if event.id is None:
            assert event.data["base"] == last
        else:
            last = event.data["sequence_number"]
    assert told[-1].id is not None, "no tail after the end"


async def test_resuming_in_mid_stream_gives_exactly_what_was_missed(client):
    body = {**LONG, "background": True, "stream": True}
    async with Visit(client.app, "POST", "/v1/responses", body) as visit:
        seen = await visit.take(9)
        name = seen[0].data["response"]["id"]
    path = f"/v1/responses/{name}?stream=true&starting_after={seen[-1].id}"
    async with Visit(client.app, "GET", path) as visit:
        more = await visit.take(5)
    async with Visit(
        client.app, "GET", f"/v1/responses/{name}?stream=true", last_event_id=more[-1].id
    ) as visit:
        rest = await visit.rest()
    events = [*seen, *more, *rest]
    assert [event.id for event in events] == [str(n) for n in range(len(events))]
    whole = (await client.get(f"/v1/responses/{name}")).json()
    assert text_of_events(events) == text_of(whole)
    assert whole["usage"]["output_tokens"] == 200
    assert events[-1].data["response"] == whole
    again = parse((await client.get(path)).text)
    assert again == [*more, *rest], "and once more when all is over"


async def test_a_client_that_leaves_ends_its_response(client):
    server = client.app.state.server
    before = server.llm.engine.stats.num_generated_tokens
    async with Visit(client.app, "POST", "/v1/responses", {**LONG, "stream": True}) as visit:
        await visit.take(6)
    async with asyncio.timeout(10):
        while server.gate.num_running:
            await asyncio.sleep(0.01)
    assert server.llm.engine.stats.num_generated_tokens - before < 190


async def idle(client):
    """Nothing is being made, and nothing begun is left open."""
    sessions = client.app.state.server.sessions
    async with asyncio.timeout(10):
        while sessions.service.runs._live or client.app.state.server.gate.num_running:
            await asyncio.sleep(0.01)
    assert sessions.log.turns.unfinished() == ()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_leaves_nothing_behind(client, stream):
    """Neither the session that was made for its response nor a row that nobody asks for."""
    runs = client.app.state.server.sessions.service.runs
    async with Visit(client.app, "POST", "/v1/responses", {**LONG, "stream": stream}) as visit:
        async with asyncio.timeout(10):
            while not any(len(live.ring) > 8 for live in runs._live.values()):
                await asyncio.sleep(0.001)
        (name,) = runs._live
    assert visit.status in (0, 200)
    await idle(client)
    assert (await client.get(f"/v1/responses/{name}")).status_code == 404
    assert sessions_of(client) == ()
    assert client.app.state.server.sessions.responses.unfinished() == []


@pytest.mark.parametrize("stream", [True, False])
async def test_whoever_listens_in_and_leaves_ends_nothing(client, stream):
    """The client that asked for the response is one of those it is made for."""
    runs = client.app.state.server.sessions.service.runs
    body = {**LONG, "stream": stream}
    async with Visit(client.app, "POST", "/v1/responses", body) as owner:
        async with asyncio.timeout(10):
            while not any(len(live.ring) > 2 for live in runs._live.values()):
                await asyncio.sleep(0.001)
        (name,) = runs._live
        async with Visit(client.app, "GET", f"/v1/responses/{name}?stream=true") as guest:
            assert len(await guest.take(4)) == 4
        await asyncio.sleep(0)
        assert name in runs._live
        await owner._task
    assert (await client.get(f"/v1/responses/{name}")).json()["usage"]["output_tokens"] == 200


async def test_what_has_failed_is_told_in_the_status(client, monkeypatch):
    """As in every other dialect; in a stream that has begun it is the last event."""

    async def generate(server, ask, request_id, **_):
        yield Committed("r", 0, 0, (5,), "The")
        raise ApiError(504, "the request took too long", code="timeout")

    monkeypatch.setattr(response_run, "generate", generate)
    told = await post(client, BODY, 504)
    assert told["error"]["code"] == "timeout"
    assert sessions_of(client) == ()
    events = parse((await client.post("/v1/responses", json={**BODY, "stream": True})).text)
    failed = events[-1].data["response"]
    assert (failed["status"], failed["error"]["code"]) == ("failed", "timeout")


@pytest.mark.parametrize("broken", ["report", "finish"])
async def test_what_goes_wrong_behind_the_commit_fails_nothing(client, monkeypatch, broken):
    """The tokens are in the session: the response is complete, and told so once."""
    sessions = client.app.state.server.sessions
    original = getattr(sessions, broken)

    def report(*_):
        raise RuntimeError("unforeseen")

    async def finish(*args):
        await original(*args)
        raise EngineError("the canary found the engine broken")

    monkeypatch.setattr(sessions, broken, {"report": report, "finish": finish}[broken])
    events = parse((await client.post("/v1/responses", json={**BODY, "stream": True})).text)
    ends = [event for event in events if event.event in TERMINAL]
    assert [event.event for event in ends] == ["response.incomplete"]
    response = ends[0].data["response"]
    assert (await client.get(f"/v1/responses/{response['id']}")).json() == response
    assert response["usage"]["output_tokens"] == MAX
    head = sessions.log.head_of_response("", response["id"])
    assert response["outrider"]["session"]["head"] == head.id


async def test_a_reader_of_the_last_event_that_leaves_hears_no_other(client, monkeypatch):
    """The answer is complete, though the engine has not let go of it yet."""

    async def generate(server, ask, request_id, **_):
        metrics = RequestMetrics(num_generated_tokens=1)
        yield Committed("r", 0, 0, (5,), "The", finish_reason="stop", metrics=metrics)
        await asyncio.Event().wait()

    monkeypatch.setattr(response_run, "generate", generate)
    async with Visit(client.app, "POST", "/v1/responses", {**BODY, "stream": True}) as visit:
        events = await visit.take(9)
    final = events[-1].data["response"]
    assert final["status"] == "completed"
    await idle(client)
    assert (await client.get(f"/v1/responses/{final['id']}")).json() == final
    told = parse((await client.get(f"/v1/responses/{final['id']}?stream=true")).text)
    assert told == events


async def test_a_background_response_passes_the_gate_before_it_is_promised(serve):
    client = await serve(max_concurrent=1, max_waiting=1)
    body = {**LONG, "background": True}
    first, second = await post(client, body), await post(client, body)
    assert (first["status"], second["status"]) == ("queued", "queued"), "it may wait"
    told = await client.post("/v1/responses", json=body)
    assert (told.status_code, told.json()["error"]["code"]) == (429, "queue_full")
    assert "retry-after" in told.headers
    assert len(sessions_of(client)) == 2
    burst = [client.post("/v1/responses", json=body) for _ in range(5)]
    assert {found.status_code for found in await asyncio.gather(*burst)} == {429}
    for each in (first, second):
        await post(client, {}, path=f"/v1/responses/{each['id']}/cancel")
    await idle(client)


@pytest.mark.parametrize("body", [{"background": True}, {"conversation": "c"}, {}])
async def test_a_server_that_drains_takes_nothing_new(client, body):
    """Nor does it leave anybody waiting, or anything begun."""
    await post(client, {"conversation": "c", "detach": "continue"}, path="/v1/sessions")
    client.app.state.server.gate.drain()
    async with asyncio.timeout(10):
        told = await post(client, {**BODY, **body}, 503)
    assert told["error"]["code"] == "draining"
    await idle(client)
    assert len(sessions_of(client)) == 1
    (session,) = sessions_of(client)
    assert client.app.state.server.sessions.response_in(session.id) is None


async def test_past_the_ring_410_with_the_final_object(client):
    service = client.app.state.server.sessions.service
    service.runs.rings = Rings(RingLimits(max_events=4))
    final = await post(client, BODY)
    path = f"/v1/responses/{final['id']}?stream=true&starting_after=0"
    gone = await client.get(path)
    assert gone.status_code == 410
    assert gone.json()["error"]["code"] == "events_gone"
    assert gone.json()["response"] == final
    service.runs.rings.drop(final["id"])
    assert (await client.get(path)).json()["response"] == final


async def test_a_background_response_is_queued_and_comes_to_its_end(client):
    found = await post(client, {**BODY, "background": True})
    assert (found["status"], found["output"]) == ("queued", [])
    async with asyncio.timeout(10):
        while (now := (await client.get(f"/v1/responses/{found['id']}")).json())["status"] in (
            "queued",
            "in_progress",
        ):
            await asyncio.sleep(0.01)
    assert now["status"] == "incomplete"
    assert now["usage"]["output_tokens"] == MAX


async def test_cancelling_ends_it_and_its_session_stays_where_it_was(client):
    first = await post(client, BODY)
    body = {**LONG, "background": True, "previous_response_id": first["id"]}
    running = await post(client, body)
    cancelled = await post(client, {}, path=f"/v1/responses/{running['id']}/cancel")
    assert cancelled["status"] == "cancelled"
    assert (await client.get(f"/v1/responses/{running['id']}")).json() == cancelled
    session = (await client.get(f"/v1/sessions/{first['outrider']['session']['id']}")).json()
    assert session["head"] == first["outrider"]["session"]["head"]
    assert session["state"] != "live"
    again = await post(client, {}, path=f"/v1/responses/{first['id']}/cancel")
    assert again == first, "what is complete stays so"


async def test_responses_go_on_from_the_one_before(client, llm):
    first = await post(client, BODY)
    second = await post(client, {**BODY, "previous_response_id": first["id"], "input": "and"})
    third = await post(client, {**BODY, "previous_response_id": second["id"], "input": "or"})
    side = await post(client, {**BODY, "previous_response_id": first["id"], "input": "or"})
    sessions = [r["outrider"]["session"]["id"] for r in (first, second, third, side)]
    assert sessions[0] == sessions[1] == sessions[2] != sessions[3], "a second child is a branch"
    assert second["previous_response_id"] == first["id"]
    assert second["usage"]["input_tokens_details"]["cached_tokens"] > 0
    log = client.app.state.server.sessions.log
    for response in (second, third, side):
        tokens = list(log.tokens("", log.head_of_response("", response["id"])))
        prompt, answer = tokens[:-MAX], tokens[-MAX:]
        assert _generate(llm, prompt).token_ids == answer
    told = llm.tokenizer.decode(log.tokens("", log.head_of_response("", side["id"])))
    expected = f"user: the quick\nassistant: {text_of(first)}\nuser: or\nassistant: "
    assert told == expected + text_of(side)


async def test_instructions_do_not_carry_over(client, llm):
    first = await post(client, {**BODY, "instructions": "be brief"})
    body = {**BODY, "previous_response_id": first["id"], "input": "and"}
    same = await post(client, {**body, "instructions": "be brief"})
    other = await post(client, {**body, "instructions": "be long"})
    none = await post(client, body)
    log = client.app.state.server.sessions.log

    def told(response):
        return llm.tokenizer.decode(log.tokens("", log.head_of_response("", response["id"])))

    talk = f"user: the quick\nassistant: {text_of(first)}\nuser: and\nassistant: "
    assert told(same) == f"system: be brief\n{talk}{text_of(same)}"
    assert told(other) == f"system: be long\n{talk}{text_of(other)}"
    assert told(none) == f"{talk}{text_of(none)}"


async def test_what_is_not_stored_cannot_be_asked_for(client):
    found = await post(client, {**BODY, "store": False})
    assert (await client.get(f"/v1/responses/{found['id']}")).status_code == 404
    follow = {**BODY, "previous_response_id": found["id"]}
    told = await post(client, follow, 404)
    assert told["error"]["code"] == "response_not_found"
    assert sessions_of(client) == ()
    stored = await post(client, BODY)
    more = await post(client, {**BODY, "store": False, "previous_response_id": stored["id"]})
    assert more["usage"]["input_tokens"] > stored["usage"]["total_tokens"]
    assert len(sessions_of(client)) == 1
    assert (await client.get("/v1/sessions")).json()["data"] == [], "nobody asked for one"


async def test_deleting_forgets_the_response_and_its_tokens(client):
    found = await post(client, BODY)
    path = f"/v1/responses/{found['id']}"
    assert (await client.delete(path)).json()["deleted"] is True
    assert (await client.get(path)).status_code == 404
    assert (await client.get(f"{path}?stream=true")).status_code == 404
    assert (await client.delete(path)).status_code == 404
    assert sessions_of(client) == ()


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_what_is_no_number_is_refused(client, number):
    """A response tells its tools again, and such a thing could not be told."""
    schema = f'{{"type": "object", "properties": {{"a": {{"enum": [1, {number}]}}}}}}'
    tools = f'[{{"type": "function", "name": "f", "parameters": {schema}}}]'
    told = await client.post(
        "/v1/responses",
        content=f'{{"input": "a", "max_output_tokens": 1, "tools": {tools}}}',
        headers={"content-type": "application/json"},
    )
    assert told.status_code == 400
    assert told.json()["error"]["param"] == "tools"


async def test_input_items(client):
    items = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "two"}]},
        {"role": "user", "content": [{"type": "input_text", "text": "three"}]},
    ]
    found = await post(client, {**BODY, "input": items})
    path = f"/v1/responses/{found['id']}/input_items"
    page = (await client.get(path, params={"order": "asc", "limit": 2})).json()
    assert [item["content"] for item in page["data"]] == [items[0]["content"], items[1]["content"]]
    assert page["has_more"]
    rest = (await client.get(path, params={"order": "asc", "after": page["last_id"]})).json()
    assert [item["content"] for item in rest["data"]] == [items[2]["content"]]
    newest = (await client.get(path)).json()["data"]
    assert newest[0]["id"] == rest["last_id"]


async def test_structured_output_is_what_was_asked_for(client):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "name": "it", "schema": schema, "strict": True}
    body = {**BODY, "max_output_tokens": 100, "text": {"format": form}}
    found = await post(client, {**body, "temperature": 0.7, "seed": 5})
    assert found["text"] == {"format": form}
    if found["status"] == "completed":
        assert isinstance(json.loads(text_of(found))["a"], int)


async def test_a_forced_call_is_an_item_of_its_own(client):
    tool = {"type": "function", "name": "look", "parameters": {
        "type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"],
        "additionalProperties": False}}  # fmt: skip
    body = {**BODY, "tools": [tool], "tool_choice": {"type": "function", "name": "look"}}
    body |= {"max_output_tokens": 200, "ignore_eos": False}
    events = parse((await client.post("/v1/responses", json={**body, "stream": True})).text)
    assert without_repeats([event.event for event in events]) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    (call,) = events[-1].data["response"]["output"]
    assert (call["type"], call["name"], call["status"]) == ("function_call", "look", "completed")
    deltas = [e.data["delta"] for e in events if "delta" in e.data]
    assert "".join(deltas) == call["arguments"]
    assert json.loads(call["arguments"])["n"] in (1, 2)
    response = events[-1].data["response"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "7"}
    follow = {**BODY, "tools": [tool], "previous_response_id": response["id"], "input": [result]}
    answer = await post(client, {**follow, "tool_choice": "none"})
    assert answer["usage"]["input_tokens"] > response["usage"]["total_tokens"]


async def test_logprobs(client):
    body = {**BODY, "top_logprobs": 2, "include": ["message.output_text.logprobs"]}
    found = await post(client, body)
    logprobs = found["output"][0]["content"][0]["logprobs"]
    assert len(logprobs) == MAX
    assert all(len(token["top_logprobs"]) == 2 for token in logprobs)


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ({"conversation": "a", "previous_response_id": "b"}, "name the same thing"),
        ({"background": True, "store": False}, "needs store=true"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "must be message"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_image"),
        ({"input": []}, "say something"),
        ({"tools": [{"type": "web_search"}]}, "only functions"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"temperature": -1}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"speculation": "ngrm"}, "did you mean 'ngram'"),
        ({"nonsense": 1}, "nonsense"),
        ({"stream_options": {"outrider": {"retract": "maybe"}}, "stream": True}, "retract"),
        ({"n": 2}, "one answer"),
    ],
    ids=lambda value: str(value)[:24],
)
async def test_what_cannot_be_honoured_is_refused_and_leaves_nothing(client, body, match):
    told = await post(client, {**BODY, **body}, 400)
    assert match in told["error"]["message"]
    assert sessions_of(client) == ()


async def test_a_refusal_of_the_engine_has_its_status_and_leaves_nothing(client):
    body = {**BODY, "input": "word " * 2000}
    for more in ({}, {"stream": True}):
        told = await post(client, {**body, **more}, 400)
        assert "max_model_len" in told["error"]["message"]
    assert sessions_of(client) == ()
    assert client.app.state.server.sessions.log.turns.unfinished() == ()


@pytest.mark.parametrize("session", [None, "there"])
@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"input": "word " * 2000}, "max_model_len"),
        ({"text": {"format": {"type": "json_schema", "name": "s", "schema": {"type": "no"}}}},
         "does not compile"),
    ],
    ids=["prompt", "schema"],
)  # fmt: skip
async def test_a_background_response_that_cannot_be_had_is_refused_at_once(
    serve, more, match, session
):
    """As one that somebody waits for, be there a seat or not; its session is where it was."""
    client = await serve(max_concurrent=1)
    body = {**BODY, **more, "background": True}
    before = None
    if session is not None:
        body["conversation"] = session
        before = await post(client, {"conversation": session}, path="/v1/sessions")
    running = await post(client, {**LONG, "background": True})
    num_sessions = len(sessions_of(client))
    for stream in (False, True):
        told = await post(client, {**body, "stream": stream}, 400)
        assert match in told["error"]["message"]
    assert len(sessions_of(client)) == num_sessions
    turns = client.app.state.server.sessions.log.turns.unfinished()
    assert [turn.response_id for turn in turns] in ([], [running["id"]])
    if before is not None:
        now = (await client.get(f"/v1/sessions/{before['id']}")).json()
        assert (now["head"], now["response_in_progress"]) == (before["head"], None)
    await post(client, {}, path=f"/v1/responses/{running['id']}/cancel")
    await idle(client)


async def test_a_full_queue_is_429_and_leaves_nothing(serve):
    client = await serve(max_concurrent=1, max_waiting=0)
    async with Visit(client.app, "POST", "/v1/responses", {**LONG, "stream": True}) as visit:
        await visit.take(2)
        told = await client.post("/v1/responses", json={**BODY, "stream": True})
        assert told.status_code == 429
        assert "retry-after" in told.headers
    assert client.app.state.server.sessions.log.turns.unfinished() == ()


async def test_an_engine_that_fails_ends_the_stream_as_failed(client, monkeypatch):
    async def generate(server, ask, request_id, **_):
        yield Committed("r", 0, 0, (5,), "The")
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(response_run, "generate", generate)
    events = parse((await client.post("/v1/responses", json={**BODY, "stream": True})).text)
    assert [event.event for event in events][-3:] == [
        "response.content_part.done",
        "response.output_item.done",
        "response.failed",
    ]
    failed = events[-1].data["response"]
    assert failed["status"] == "failed"
    assert "unforeseen" not in failed["error"]["message"], "what we did not foresee is not shown"
    assert (await client.get(f"/v1/responses/{failed['id']}")).json() == failed


async def test_steps_of_an_answer_are_told_on_request(client):
    options = {"outrider": {"steps": True}}
    found = await client.post(
        "/v1/responses", json={**BODY, "stream": True, "stream_options": options}
    )
    steps = [
        event.data["outrider"]["step"] for event in parse(found.text) if "outrider" in event.data
    ]
    assert sum(len(step["tokens"]) for step in steps) == MAX


async def test_two_tenants_do_not_see_each_others_responses(serve):
    client = await serve(api_keys={"one": "a", "two": "b"})
    mine, theirs = {"Authorization": "Bearer one"}, {"Authorization": "Bearer two"}
    found = await post(client, BODY, **mine)
    assert (await client.get(f"/v1/responses/{found['id']}", headers=mine)).status_code == 200
    for call, path in [
        (client.get, f"/v1/responses/{found['id']}"),
        (client.get, f"/v1/responses/{found['id']}?stream=true"),
        (client.get, f"/v1/responses/{found['id']}/input_items"),
        (client.delete, f"/v1/responses/{found['id']}"),
    ]:
        assert (await call(path, headers=theirs)).status_code == 404
    follow = {**BODY, "previous_response_id": found["id"]}
    await post(client, follow, 404, **theirs)


def written(texts, tools=(), status="completed"):
    """Events of an answer in these commits, each with a step; texts "" are held back."""
    use = ToolUse(tools=tools, choice="auto" if tools else "none")
    turn = Turn(id="resp_a", ask=None, speculation=Speculation(), tool_use=use)
    events = []
    writer = ResponseWriter(
        {"id": "resp_a", "output": []},
        lambda event: events.append(json.loads(json.dumps(event))),
        pieces=turn.pieces().take,
        step=lambda event: {"tokens": [str(event.offset)], "accepted": 1},
    )
    for place, text in enumerate(texts):
        last = "stop" if place == len(texts) - 1 else None
        writer.take(Committed("r", 0, place, (5,), text, finish_reason=last))
    writer.close(status, {})
    return events


def steps_in(events):
    """Token texts of the steps that come with deltas, and of those that come at the end."""
    told = [e["outrider"]["step"]["tokens"][0] for e in events if "delta" in e and "outrider" in e]
    return told, [step["tokens"][0] for step in events[-1].get("outrider", {}).get("steps", [])]


CALLING = [
    "",
    "So. <tool",
    '_call>{"name":',
    ' "f", "argu',
    'ments": {"a"',
    "",
    ": 1}}</tool_",
    "call>",
]


@pytest.mark.parametrize("tools", [(), (Tool("f"),)])
@pytest.mark.parametrize(
    "texts", [["", "", "a", "", "b", ""], ["", ""], [""], ["<tool_call>", "{", ""], CALLING]
)
def test_each_step_is_told_once_and_in_order(texts, tools):
    events = written(texts, tools)
    assert steps_in(events) == ([str(place) for place in range(len(texts))], [])
    kinds = {"message": "output_text", "function_call": "function_call_arguments"}
    for item in events[-1]["response"]["output"]:
        mine = [e for e in events if e.get("item_id") == item["id"] and "delta" in e]
        assert {e["type"] for e in mine} == {f"response.{kinds[item['type']]}.delta"}
        told = item["arguments"] if "arguments" in item else item["content"][0]["text"]
        assert "".join(e["delta"] for e in mine) == told


def test_steps_of_an_answer_that_says_nothing_come_at_its_end():
    events = written(["", ""], status="incomplete")
    assert steps_in(events) == ([], ["0", "1"])
    assert events[-1]["response"]["output"] == []


@given(st.integers(0, 12), st.integers(1, 3), st.integers(1, 3))
def test_an_answer_made_again_tells_each_step_once(num_told, size, again):
    """Other portions, the same tokens: what was told stands, and the rest follows it."""

    def deltas(size):
        for at in range(0, 12, size):
            tokens = list("abcdefghijkl"[at : at + size])
            step = {"tokens": tokens, "accepted": size - 1, "num_drafted": 3}
            yield {
                "type": "d",
                "item_id": "m",
                "delta": "".join(tokens),
                "outrider": {"step": step},
            }

    told = [*deltas(size)][: num_told // size]
    rewrite = Rewrite(told, told.append)
    for event in deltas(again):
        rewrite(event)
    steps = [event["outrider"]["step"] for event in told]
    assert "".join(token for step in steps for token in step["tokens"]) == "abcdefghijkl"
    assert "".join(event["delta"] for event in told) == "abcdefghijkl"
    assert all(0 <= step["accepted"] <= len(step["tokens"]) for step in steps)


def answer_of(*texts):
    """Events of messages that say these."""
    events = []
    for place, text in enumerate(texts):
        item = {"id": f"m{place}", "type": "message", "content": []}
        at = {"item_id": item["id"], "output_index": place}
        part = {"text": "", "logprobs": []}
        events.append({"type": "response.output_item.added", "output_index": place, "item": item})
        events.append({"type": "response.content_part.added", **at, "part": part})
        for char in text:
            delta = {"delta": char, "logprobs": []}
            events.append({"type": "response.output_text.delta", **at, **delta})
        events.append({"type": "response.output_text.done", **at, "text": text})
        done = {**item, "content": [{"text": text, "logprobs": []}]}
        events.append({"type": "response.output_item.done", "output_index": place, "item": done})
    return json.loads(json.dumps(events))


def retold(told, again):
    """The events of a stream whose answer is made again, to its end or its failure."""
    events = list(told)
    rewrite = Rewrite(told, lambda event: events.append(json.loads(json.dumps(event))))
    response = {"output": ["whatever was made"]}
    try:
        for event in again:
            rewrite(event)
        rewrite.end()
    except ApiError:
        rewrite({"type": "response.failed", "response": response})
    return events


@given(
    texts=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    others=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    data=st.data(),
)
def test_two_answers_are_never_told_as_one(texts, others, data):
    """What is made again either goes on from what was told, or fails with what was told."""
    whole, other = answer_of(*texts), answer_of(*others)
    num_told = data.draw(st.integers(0, len(whole)))
    told = whole[:num_told]
    assert retold(told, answer_of(*texts)) == whole
    events = retold(told, other)
    if other[:num_told] == told:
        assert events == other
        return
    assert events[:-1] == told, "nothing of the other answer"
    assert events[-1]["type"] == "response.failed"
    said = "".join(event["delta"] for event in told if "delta" in event)
    output = events[-1]["response"]["output"]
    assert "".join(part["text"] for item in output for part in item["content"]) == said


async def test_a_message_that_is_not_there_is_not_accepted(client):
    found = await post(client, BODY)
    path = f"/v1/responses/{found['id']}/accept"
    await post(client, {"chars": 1, "item_id": "msg_none"}, 404, path)
    await post(client, {"chars": 1}, 404, "/v1/responses/resp_none/accept")
    item = found["output"][0]["id"]
    assert (await post(client, {"chars": 0, "item_id": item}, 200, path))["text"] == ""


async def test_tails_are_neither_stored_nor_fed_back(client, monkeypatch):
    """I10: neither the log, nor the stored response, nor its cost, nor the next turn."""
    kept = []
    for events in (TRANSCRIPT, [event for event in TRANSCRIPT if isinstance(event, Committed)]):
        session = (await post(client, {}, 200, "/v1/sessions"))["id"]
        body = {**BODY, **PROVISIONAL, "outrider": {"session": session}}
        with monkeypatch.context() as patch:
            patch.setattr(response_run, "generate", scripted(events, pause_s=0.02))
            said = parse((await client.post("/v1/responses", json=body)).text)
        follow = await post(client, {**BODY, "outrider": {"session": session}})
        sessions = client.app.state.server.sessions
        head = (await sessions.find("", session)).head
        log = await sessions.call(sessions.log.tokens, "", head)
        name = said[0].data["response"]["id"]
        again = parse((await client.get(f"/v1/responses/{name}?stream=true")).text)
        stored = (await client.get(f"/v1/responses/{name}")).json()
        told = stored["usage"].pop("outrider")["stream"]["tail_updates"]
        kinds = [event.event for event in again]
        kept.append((list(log), text_of(stored), stored["usage"], kinds, text_of(follow)))
        assert told == len(events) - 3
        assert [e.data for e in again] == [e.data for e in said if e.id is not None]
    assert kept[0] == kept[1]


async def test_a_lossy_answer_says_how_many_tokens_it_owes_to_that(client):
    body = {
        **BODY,
        "speculation": {"method": "draft_model", "num_draft_tokens": 4, "verifier": "typical"},
        "temperature": 1,
    }
    found = await post(client, body)
    made = found["outrider"]["exactness"]
    counts = found["metrics"]["speculative_decoding"]
    assert 0 < made["relaxed_tokens"] <= counts["num_accepted_draft_tokens"]
    assert "session" in found["outrider"]
    assert "relaxed_tokens" not in (await post(client, BODY))["outrider"]["exactness"]


async def test_padding_is_said_when_a_response_is_created_and_not_later(client):
    made = await client.post("/v1/responses", json={"input": "def", "max_output_tokens": 2})
    path = f"/v1/responses/{made.json()['id']}"
    refused = await client.get(path, params={"stream": True, "include_obfuscation": True})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "include_obfuscation"
    assert (await client.get(path)).status_code == 200
