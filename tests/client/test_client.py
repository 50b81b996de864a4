"""Client and AsyncClient: what they show follows the stream's rule, and failures are one kind."""

import asyncio
import json
from itertools import pairwise

import httpx
import pytest

from outrider.client import AsyncClient, Client, ClientError, Shown
from outrider.client.stream import Reader
from outrider.errors import ConfigError
from outrider.serve.base import ServeConfig

BODY = {"max_output_tokens": 24, "temperature": 0, "ignore_eos": True}
EAGER = {"outrider": {"min_stability": 0.0, "max_updates_per_s": 100000}}
BASE = "http://localhost"
FINAL = {"id": "r1", "status": "completed"}


def durable(number, kind, **fields):
    return {"type": f"response.{kind}", "sequence_number": number, **fields}


def tail(base, version, text):
    return {"type": "outrider:output_text.tail", "base": base, "v": version, "text": text}


def sse(*events):
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode()


CREATED = durable(0, "created", response={"id": "r1"})
# The protocol's example, without the events that carry no text.
TRANSCRIPT = [
    CREATED,
    durable(1, "output_text.delta", delta="The"),
    tail(1, 1, " answer is likely no"),
    durable(2, "output_text.delta", delta=" answer is yes"),
    tail(2, 2, ", with caveats"),
    durable(3, "output_text.delta", delta=", with caveats."),
    durable(4, "output_text.done"),
    durable(5, "completed", response=FINAL),
]
SHOWN = [
    Shown("The", ""),
    Shown("The", " answer is likely no"),
    Shown("The answer is yes", ""),
    Shown("The answer is yes", ", with caveats"),
    Shown("The answer is yes, with caveats.", ""),
    Shown("The answer is yes, with caveats.", "", FINAL),
]


class Breaking(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body whose connection breaks."""

    def __init__(self, body):
        self.body = body

    def __iter__(self):
        yield self.body
        raise httpx.ReadError("gone")

    async def __aiter__(self):
        yield self.body
        raise httpx.ReadError("gone")


def scripted(*answers):
    """A client whose server gives these answers, and the requests that it got."""
    requests = []
    left = list(answers)

    def handle(request):
        requests.append(request)
        answer = left.pop(0)
        if isinstance(answer, httpx.Response):
            return answer
        content = {"content": answer} if isinstance(answer, bytes) else {"stream": answer}
        return httpx.Response(200, **content)

    return Client(BASE, "key", transport=httpx.MockTransport(handle)), requests


def read(*events):
    reader = Reader()
    return [shown for line in sse(*events).decode().split("\n")[:-1] for shown in reader.take(line)]


def test_the_transcript_of_the_design():
    client, requests = scripted(sse(*TRANSCRIPT))
    assert list(client.stream_response("is it?", session="s1", metadata={"a": "b"})) == SHOWN
    (request,) = requests
    assert request.headers["authorization"] == "Bearer key"
    assert json.loads(request.content) == {
        "input": "is it?",
        "stream": True,
        "metadata": {"a": "b"},
        "outrider": {"session": "s1"},
        "stream_options": {"outrider": {"visibility": "provisional"}},
    }


def test_tails_that_are_late_or_old_are_ignored():
    delta = durable(1, "output_text.delta", delta="a")
    assert read(CREATED, delta, tail(0, 1, "late")) == [Shown("a", "")]
    newer = [tail(1, 2, "new"), tail(1, 1, "old"), tail(1, 2, "same")]
    assert read(CREATED, delta, *newer) == [Shown("a", ""), Shown("a", "new")]
    assert read(CREATED, delta, tail(2, 1, "early")) == [Shown("a", "")]


def test_any_durable_event_voids_the_tail():
    events = [CREATED, durable(1, "output_text.delta", delta="a"), tail(1, 1, "b")]
    assert read(*events, durable(2, "unheard_of"))[-1] == Shown("a", "")


def test_events_that_nobody_knows_change_nothing():
    with_others = [[event, {"type": "outrider:news", "text": "?"}] for event in TRANSCRIPT]
    assert read(*(event for pair in with_others for event in pair)) == SHOWN


@pytest.mark.parametrize("after", range(1, len(TRANSCRIPT)))
@pytest.mark.parametrize("has_error", [True, False], ids=["error", "early end"])
def test_a_broken_connection_is_taken_up_once(after, has_error):
    head = sse(*TRANSCRIPT[:after]) + b'data: {"type": "respo'
    last = max(event.get("sequence_number", 0) for event in TRANSCRIPT[:after])
    rest = [event for event in TRANSCRIPT if event.get("sequence_number", -1) > last]
    client, requests = scripted(Breaking(head) if has_error else head, sse(*rest))
    states = list(client.stream_response("is it?"))
    assert states[-1] == SHOWN[-1]
    committed = [state.committed for state in states]
    assert all(late.startswith(early) for early, late in pairwise(committed))
    assert (requests[1].method, requests[1].url.path) == ("GET", "/v1/responses/r1")
    assert dict(requests[1].url.params) == {"stream": "true", "starting_after": str(last)}


def test_a_connection_that_breaks_twice_or_too_early_is_an_error():
    client, requests = scripted(Breaking(sse(*TRANSCRIPT[:3])), Breaking(sse(TRANSCRIPT[3])))
    with pytest.raises(ClientError, match="broke off: gone") as raised:
        list(client.stream_response("is it?"))
    assert raised.value.status is None
    assert len(requests) == 2
    client, requests = scripted(Breaking(b""))
    with pytest.raises(ClientError, match="broke off"):
        list(client.stream_response("is it?"))
    assert len(requests) == 1


@pytest.mark.parametrize(
    "event",
    [
        durable(1, "failed", response={"error": {"code": "x", "message": "no luck"}}),
        {"type": "error", "sequence_number": 1, "code": "x", "message": "no luck"},
        {"error": {"message": "no luck", "code": "x"}},
    ],
    ids=["failed", "error", "envelope"],
)
def test_a_response_that_fails_is_an_error(event):
    client, requests = scripted(sse(CREATED, event))
    with pytest.raises(ClientError, match="no luck") as raised:
        list(client.stream_response("is it?"))
    assert raised.value.code == "x"
    assert len(requests) == 1, "there is nothing to resume"


@pytest.mark.parametrize(
    ("response", "status", "message"),
    [
        (httpx.Response(409, json={"error": {"message": "gone on", "code": "c"}}), 409, "gone on"),
        (httpx.Response(502, text="<html>proxy"), 502, "<html>proxy"),
        (httpx.Response(500, json=["odd"]), 500, '["odd"]'),
        (httpx.Response(503), 503, "Service Unavailable"),
        (httpx.Response(200, text="no json"), 200, "no JSON object: no json"),
    ],
    ids=str,
)
def test_errors_have_status_and_message(response, status, message):
    client, _ = scripted(response)
    with client, pytest.raises(ClientError) as raised:
        client.sessions.get("s1")
    assert (raised.value.status, raised.value.message) == (status, message)


def test_a_server_that_is_not_there_is_an_error():
    def handle(request):
        raise httpx.ConnectError("refused")

    client = Client(BASE, transport=httpx.MockTransport(handle))
    with pytest.raises(ClientError, match="ConnectError: refused"):
        client.sessions.create()


def test_calls_of_sessions_send_what_is_given():
    client, requests = scripted(*[httpx.Response(200, json={})] * 12)
    sessions = client.sessions
    sessions.create(token_ids=(1, 2), ttl_s=60)
    sessions.append("a/b", "hello", if_head="h")
    sessions.fork("s", at=0, n=2)
    sessions.rewind("s", 0, drop=True)
    sessions.snapshot("s", include=("kv",))
    sessions.get("s")
    sessions.delete("s")
    sessions.list()
    sessions.list(limit=2, after="1.5~s")
    sessions.respond("s", "hello", if_head="h", max_output_tokens=3)
    sessions.truncate("s", chars=7, response_id="r", if_head="h")
    sessions.hint("s", "tool_wait")
    told = [
        (r.method, r.url.raw_path.decode(), json.loads(r.content) if r.content else None)
        for r in requests
    ]
    appended = {"input": "hello", "if_head": "h", "on_conflict": "error", "prefill": "lazy"}
    answered = {
        "input": "hello", "if_head": "h", "on_conflict": "error", "max_output_tokens": 3
    }  # fmt: skip
    assert told == [
        ("POST", "/v1/sessions", {"token_ids": [1, 2], "ttl_s": 60}),
        ("POST", "/v1/sessions/a%2Fb/append", appended),
        ("POST", "/v1/sessions/s/fork", {"at": 0, "n": 2}),
        ("POST", "/v1/sessions/s/rewind", {"to": 0, "drop": True}),
        ("POST", "/v1/sessions/s/snapshot", {"include": ["kv"]}),
        ("GET", "/v1/sessions/s", None),
        ("DELETE", "/v1/sessions/s", None),
        ("GET", "/v1/sessions", None),
        ("GET", "/v1/sessions?limit=2&after=1.5~s", None),
        ("POST", "/v1/sessions/s/responses", answered),
        ("POST", "/v1/sessions/s/truncate", {"chars": 7, "response_id": "r", "if_head": "h"}),
        ("POST", "/v1/sessions/s/hint", {"event": "tool_wait"}),
    ]
    with pytest.raises(ConfigError, match="stream_response"):
        sessions.respond("s", "hello", stream=True)


@pytest.fixture
async def app(serve):
    raw = await serve(ServeConfig(drain_s=0.0, api_keys={"key": "alice"}))
    return raw.app


@pytest.fixture
async def client(app):
    async with AsyncClient(BASE, "key", transport=httpx.ASGITransport(app=app)) as client:
        yield client


async def states_of(client, text, **body):
    return [shown async for shown in client.stream_response(text, **{**BODY, **body})]


async def test_tails_change_nothing_that_is_committed(client):
    plain = await states_of(client, "the quick", provisional=False)
    eager = await states_of(client, "the quick", stream_options=EAGER)
    assert eager[-1].committed == plain[-1].committed != ""
    assert not any(shown.tail for shown in plain)
    assert any(shown.tail for shown in eager)
    assert eager[-1].tail == ""
    for early, late in pairwise(eager):
        assert late.committed.startswith(early.committed)
    assert eager[-1].response["status"] == "incomplete"


async def test_sessions_from_beginning_to_end(client):
    sessions = client.sessions
    name = (await sessions.create(instructions="be brief"))["id"]
    first = (await states_of(client, "one", session=name))[-1].response["outrider"]["session"]
    assert first["id"] == name
    num_tokens = (await sessions.get(name))["n_tokens"]
    longer = await sessions.append(name, "by the way", if_head=first["head"])
    assert longer["n_tokens"] > num_tokens
    with pytest.raises(ClientError) as raised:
        await sessions.append(name, "too late", if_head=first["head"])
    assert raised.value.status == 409
    branches = (await sessions.fork(name, n=2))["data"]
    assert len({branch["id"] for branch in branches} | {name}) == 3
    assert (await sessions.rewind(name, first["head"]))["n_tokens"] == num_tokens
    snapshot = await sessions.snapshot(name)
    again = await sessions.create(from_snapshot=snapshot["id"])
    texts = [
        (await states_of(client, "go on", session=s))[-1].committed for s in (name, again["id"])
    ]
    assert texts[0] == texts[1]
    assert (await sessions.get(name))["id"] == name
    assert (await sessions.delete(name))["deleted"]
    with pytest.raises(ClientError, match="404") as raised:
        await sessions.get(name)
    assert raised.value.code == "not_found"


async def test_answers_of_a_session_without_a_stream(client):
    sessions = client.sessions
    names = [(await sessions.create())["id"] for _ in range(3)]
    first = await sessions.respond(names[0], "one", **BODY)
    head = first["outrider"]["session"]["head"]
    await sessions.respond(names[0], "two", if_head=head, **BODY)
    with pytest.raises(ClientError) as raised:
        await sessions.respond(names[0], "three", if_head=head, **BODY)
    assert (raised.value.status, raised.value.code) == (409, "conflict")
    now = (await sessions.get(names[0]))["n_tokens"]
    assert (await sessions.truncate(names[0], tokens=1))["n_tokens"] < now
    assert (await sessions.hint(names[0], "tool_wait"))["effect"] == "snapshot"
    page = await sessions.list(limit=2)
    rest = await sessions.list(limit=2, after=page["after"])
    assert {each["id"] for each in page["data"] + rest["data"]} == set(names)
    assert (page["has_more"], rest["has_more"]) == (True, False)


class BreaksOnce(httpx.ASGITransport):
    """Drops the first connection after so many bytes."""

    def __init__(self, app, num_bytes):
        super().__init__(app=app)
        self.num_bytes = num_bytes
        self.num_requests = 0

    async def handle_async_request(self, request):
        response = await super().handle_async_request(request)
        self.num_requests += 1
        if self.num_requests > 1:
            return response
        body = await response.aread()
        return httpx.Response(200, stream=Breaking(body[: self.num_bytes]))


@pytest.mark.parametrize("num_bytes", [2500, 6000])
async def test_a_real_server_is_resumed(client, app, num_bytes):
    whole = await states_of(client, "the quick")
    transport = BreaksOnce(app, num_bytes)
    async with AsyncClient(BASE, "key", transport=transport) as broken:
        states = await states_of(broken, "the quick", background=True)
    assert transport.num_requests == 2
    assert states[-1].committed == whole[-1].committed


async def test_refusals_of_a_real_server(client, app):
    with pytest.raises(ClientError, match="Unrecognized") as raised:
        await states_of(client, "the quick", wrong=1)
    assert raised.value.status == 400
    stranger = AsyncClient(BASE, "wrong", transport=httpx.ASGITransport(app=app))
    async with stranger:
        with pytest.raises(ClientError) as raised:
            await states_of(stranger, "the quick")
    assert (raised.value.status, raised.value.code) == (401, "invalid_api_key")


async def test_a_reader_that_leaves_closes_its_connection():
    closed = asyncio.Event()

    class Endless(httpx.AsyncByteStream):
        async def __aiter__(self):
            yield sse(*TRANSCRIPT[:3])
            await asyncio.sleep(60)

        async def aclose(self):
            closed.set()

    async def handle(request):
        return httpx.Response(200, stream=Endless())

    async with AsyncClient(BASE, transport=httpx.MockTransport(handle)) as client:
        states = client.stream_response("is it?")
        assert await anext(states) == SHOWN[0]
        await states.aclose()
        assert closed.is_set()
