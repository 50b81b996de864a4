"""The application: keys, ids, limits, leaving clients, generation, streams, and the drain."""

import asyncio
import json
from contextlib import aclosing, asynccontextmanager

import pytest

from outrider import AsyncLLM, SamplingParams, SpeculationParams
from outrider.errors import ConfigError, EngineError, RequestError
from outrider.serve import models
from outrider.serve.app import create_app, drain
from outrider.serve.base import ServeConfig
from outrider.serve.errors import ApiError
from outrider.serve.generation import Ask, generate, started, whole
from outrider.serve.sse import Frame, event_stream
from outrider.stream.events import Committed, Tail
from outrider.stream.options import StreamOptions

SHORT = SamplingParams(max_tokens=12, temperature=0.9, seed=5, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=900, ignore_eos=True)


def ask(sampling=SHORT, **fields):
    return Ask(prompt=(5, 9, 40), sampling=sampling, **fields)


async def until(holds):
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.005)


def is_idle(server):
    return not server.llm.engine.has_work() and server.llm.engine.manager.num_used == 0


class Socket:
    """An ASGI connection by hand: what is sent is kept, and the client may leave."""

    def __init__(self, app, method="GET", path="/", headers=(), chunks=(b"",), write_s=0.0):
        self.app = app
        self.scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
            "path": path, "raw_path": path.encode(), "query_string": b"", "scheme": "http",
            "headers": [(name.encode(), value.encode()) for name, value in headers],
            "server": ("test", 80), "client": ("test", 1), "root_path": "", "state": {},
        }  # fmt: skip
        self.chunks = list(chunks)
        self.gone = asyncio.Event()
        self.sent = []
        self.write_s = write_s

    async def receive(self):
        if self.chunks:
            body = self.chunks.pop(0)
            return {"type": "http.request", "body": body, "more_body": bool(self.chunks)}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        await asyncio.sleep(self.write_s)
        self.sent.append(message)

    async def talk(self):
        await self.app(self.scope, self.receive, self.send)

    @property
    def status(self):
        return self.sent[0]["status"]

    @property
    def body(self):
        return b"".join(message.get("body", b"") for message in self.sent)


# Keys, ids, limits


async def test_without_keys_nobody_is_asked(client):
    assert (await client.get("/v1/models")).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer key-a"}, 200),
        ({"authorization": "bearer key-b"}, 200),
        ({"x-api-key": "key-b"}, 200),
        ({"Authorization": "Bearer key-c"}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({"Authorization": "Basic key-a"}, 401),
        ({"Authorization": "Bearer kéy".encode("latin-1")}, 401),
        ({}, 401),
    ],
)
async def test_keys(serve, headers, status):
    client = await serve(api_keys={"key-a": "alice", "key-b": "bob"})
    response = await client.get("/v1/models", headers=headers)
    assert response.status_code == status
    if status == 401:
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"


async def test_every_route_but_those_of_watchers_asks_for_the_key(serve):
    client = await serve(api_keys={"key-a": "alice"})
    page = (await client.get("/openapi.json")).json()
    is_open = {"/health", "/ready", "/version", "/metrics"}
    for path, operations in page["paths"].items():
        for method in operations:
            response = await client.request(method, path.replace("{", "").replace("}", ""))
            # A wrong body may be told before the key is looked at; work is never done.
            expected = (200,) if path in is_open else (400, 401)
            assert response.status_code in expected, (method, path)


async def test_request_ids_are_echoed_or_given(client):
    echoed = await client.get("/health", headers={"X-Request-Id": "mine-1"})
    assert echoed.headers["x-request-id"] == "mine-1"
    for bad in ("a b", "x" * 200, 'a"b'):
        given = await client.get("/health", headers={"X-Request-Id": bad})
        assert given.headers["x-request-id"].startswith("req_")
    missing = await client.get("/nothing")
    assert missing.headers["x-request-id"].startswith("req_")


async def test_long_bodies_are_refused_by_their_length(serve):
    client = await serve(max_body_bytes=100)
    response = await client.post("/tokenize", json={"prompt": "x" * 200})
    assert response.status_code == 413
    assert "100 bytes" in response.json()["error"]["message"]
    assert (await client.post("/tokenize", json={"prompt": "x"})).status_code == 200


async def test_long_bodies_are_refused_when_they_hide_their_length(serve):
    client = await serve(max_body_bytes=100)

    async def chunks():
        for _ in range(50):
            yield b" " * 10

    response = await client.post(
        "/tokenize", content=chunks(), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 413
    assert "100 bytes" in response.json()["error"]["message"]


async def test_other_origins_are_not_let_in(serve):
    for origins, allowed in (((), None), (("https://a.example",), "https://a.example")):
        client = await serve(allowed_origins=origins)
        response = await client.get("/health", headers={"Origin": "https://a.example"})
        assert response.headers.get("access-control-allow-origin") == allowed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", 70000), ("max_concurrent", 0), ("max_waiting", -1), ("max_body_bytes", 0),
        ("request_timeout_s", 0), ("drain_s", -1), ("api_keys", {"": "a"}),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_honoured(field, value):
    with pytest.raises(ConfigError, match=field):
        ServeConfig(**{field: value})


@pytest.mark.parametrize(
    ("host", "is_open"),
    [("127.0.0.1", False), ("localhost", False), ("::1", False), ("0.0.0.0", True), ("a.b", True)],
)
def test_who_can_reach_it(host, is_open):
    assert ServeConfig(host=host).is_open == is_open
    assert not ServeConfig(host=host, api_keys={"k": "t"}).is_open


async def test_an_open_door_is_told(serve, caplog):
    await serve(host="0.0.0.0")
    assert "asks for no key" in caplog.text


# Generation


async def test_generate_gives_the_tokens_of_the_engine(client, llm):
    server = client.app.state.server
    events = [event async for event in generate(server, ask(), "a")]
    (expected,) = llm.generate([[5, 9, 40]], SHORT)
    assert [t for event in events for t in event.token_ids] == expected.token_ids
    assert server.gate.num_running == 0
    assert server.gate.num_admitted == 1


async def test_whole_gives_every_completion(client, llm):
    sampling = SamplingParams(max_tokens=8, temperature=1.0, seed=3, n=3, logprobs=2)
    answers = await whole(client.app.state.server, ask(sampling), "a")
    (expected,) = llm.generate([[5, 9, 40]], sampling)
    for answer, completion in zip(answers, expected.completions, strict=True):
        assert answer.token_ids == tuple(completion.token_ids)
        assert answer.text == completion.text
        assert answer.finish_reason == completion.finish_reason
        assert len(answer.logprobs) == len(answer.token_ids)
        assert answer.metrics.num_generated_tokens == len(answer.token_ids)


async def test_closing_the_iterator_aborts(client):
    server = client.app.state.server
    async with aclosing(generate(server, ask(ENDLESS), "a")) as events:
        await anext(events)
        assert server.gate.num_running == 1
    assert server.gate.num_running == 0
    await until(lambda: is_idle(server))


async def test_a_request_out_of_time_is_aborted(serve):
    server = (await serve(request_timeout_s=0.05)).app.state.server
    with pytest.raises(ApiError, match=r"longer than 0\.05 s") as error:
        await whole(server, ask(ENDLESS), "a")
    assert error.value.status == 504
    assert server.gate.num_running == 0
    await until(lambda: is_idle(server))


async def test_time_in_the_queue_counts(serve):
    server = (await serve(request_timeout_s=0.2, max_concurrent=1)).app.state.server
    async with server.gate.seat():
        with pytest.raises(ApiError) as error:
            await whole(server, ask(), "a")
    assert error.value.status == 504
    assert server.gate.num_waiting == 0


async def test_refusals_come_before_the_first_event(client):
    server = client.app.state.server
    bad = Ask(prompt=(10**6,), sampling=SHORT)
    with pytest.raises(RequestError, match="knows ids"):
        await started(generate(server, bad, "a"))
    events = await started(generate(server, ask(), "b"))
    assert [type(event) async for event in events][-1] is Committed


@pytest.mark.parametrize(
    ("verifier", "settings", "is_allowed"),
    [
        ("sampled", {"allow_lossy": False}, True),
        ("typical", {}, True),
        ("typical", {"allow_lossy": False}, False),
        ("synthetic", {}, False),
        ("synthetic", {"allow_synthetic": True}, True),
    ],
)
async def test_rules_that_the_operator_forbids(serve, verifier, settings, is_allowed):
    server = (await serve(**settings)).app.state.server
    speculation = SpeculationParams(method="ngram", verifier=verifier)
    if is_allowed:
        assert await whole(server, ask(speculation=speculation), "a")
    else:
        with pytest.raises(RequestError, match=f"verifier='{verifier}'"):
            await whole(server, ask(speculation=speculation), "a")


async def test_an_overload_is_told_and_passes(serve):
    server = (await serve(max_concurrent=2, max_waiting=3)).app.state.server
    many = await asyncio.gather(
        *(whole(server, ask(), f"r{i}") for i in range(12)), return_exceptions=True
    )
    refused = [one for one in many if isinstance(one, ApiError)]
    assert (len(many) - len(refused), len(refused)) == (5, 7)
    assert {error.status for error in refused} == {429}
    assert all(int(error.headers["Retry-After"]) >= 1 for error in refused)
    assert await whole(server, ask(), "again")


async def test_tenants_share_no_cache(client):
    server = client.app.state.server
    prompt = tuple(range(10, 60))
    asks = [Ask(prompt=prompt, sampling=SHORT, tenant=tenant) for tenant in ("a", "b", "a")]
    cached = [
        (await whole(server, one, f"t{i}"))[0].metrics.num_cached_tokens
        for i, one in enumerate(asks)
    ]
    assert cached[:2] == [0, 0]
    assert cached[2] > 0


async def test_tails_come_to_those_who_ask_and_text_is_the_same(client):
    server = client.app.state.server
    speculation = SpeculationParams(method="draft_model")
    plain = [e async for e in generate(server, ask(speculation=speculation), "a")]
    stream = StreamOptions(visibility="provisional", min_stability=0.0, max_updates_per_s=1e6)
    told = [e async for e in generate(server, ask(speculation=speculation, stream=stream), "b")]
    durable = [event for event in told if isinstance(event, Committed)]
    assert any(isinstance(event, Tail) for event in told)
    assert "".join(e.text for e in durable) == "".join(e.text for e in plain)
    assert isinstance(told[-1], Committed)


# Streams


def frames_of(server, sampling=SHORT):
    async def frames():
        async with aclosing(await started(generate(server, ask(sampling), "s"))) as events:
            async for event in events:
                yield Frame(data={"ids": event.token_ids}, id=str(event.offset))
        yield Frame(data="[DONE]")

    return frames()


def add_stream(app, sampling=SHORT, **options):
    @app.get("/stream")
    async def stream():
        return event_stream(frames_of(app.state.server, sampling), **options)

    @app.post("/whole")
    async def answer():
        return [a.text for a in await whole(app.state.server, ask(sampling), "w")]


async def test_a_stream_on_the_wire(client, llm):
    add_stream(client.app)
    response = await client.get("/stream")
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    blocks = response.text.strip().split("\n\n")
    assert blocks[-1] == "data: [DONE]"
    told = [json.loads(block.split("data: ")[1])["ids"] for block in blocks[:-1]]
    ids = [token for part in told for token in part]
    assert ids == llm.generate([[5, 9, 40]], SHORT)[0].token_ids
    assert blocks[1].startswith("id: 1\ndata: ")


async def test_a_refusal_before_the_stream_has_a_status(serve):
    client = await serve(max_concurrent=1, max_waiting=0)
    add_stream(client.app)
    async with client.app.state.server.gate.seat():
        response = await client.get("/stream")
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["code"] == "queue_full"


async def test_a_failure_in_mid_stream_is_an_event(serve):
    client = await serve(request_timeout_s=0.15)
    add_stream(client.app, ENDLESS)
    response = await client.get("/stream")
    assert response.status_code == 200
    *_, error, done = response.text.strip().split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "timeout"
    assert done == "data: [DONE]"


async def test_a_bug_in_mid_stream_tells_nothing(client):
    async def frames():
        yield Frame(data="one")
        raise KeyError("secret-of-ours")

    @client.app.get("/broken")
    async def broken():
        return event_stream(frames())

    response = await client.get("/broken")
    assert "internal_error" in response.text
    assert "secret" not in response.text


@pytest.mark.parametrize(("method", "path"), [("GET", "/stream"), ("POST", "/whole")])
async def test_a_client_that_leaves_ends_the_work(client, method, path):
    app, server = client.app, client.app.state.server
    add_stream(app, ENDLESS)
    before = server.llm.engine.stats.num_generated_tokens
    socket = Socket(app, method, path)
    talk = asyncio.create_task(socket.talk())
    await until(lambda: server.llm.engine.stats.num_generated_tokens > before + 3)
    socket.gone.set()
    done, _ = await asyncio.wait([talk], timeout=5)
    assert done
    assert server.gate.num_running == 0
    await until(lambda: is_idle(server))
    assert server.llm.engine.stats.num_generated_tokens - before < 600


async def test_who_leaves_while_waiting_leaves_the_queue(serve):
    client = await serve(max_concurrent=1)
    server = client.app.state.server
    add_stream(client.app)
    async with server.gate.seat():
        socket = Socket(client.app, "GET", "/stream")
        talk = asyncio.create_task(socket.talk())
        await until(lambda: server.gate.num_waiting == 1)
        socket.gone.set()
        done, _ = await asyncio.wait([talk], timeout=5)
        assert done
        assert server.gate.num_waiting == 0
    assert socket.sent == []


async def test_a_quiet_stream_is_kept_alive(client):
    go = asyncio.Event()

    async def frames():
        await go.wait()
        yield Frame(data="late")

    @client.app.get("/quiet")
    async def quiet():
        return event_stream(frames(), keep_alive_s=0.01)

    socket = Socket(client.app, "GET", "/quiet")
    talk = asyncio.create_task(socket.talk())
    await until(lambda: socket.body.count(b": keep-alive\n\n") >= 3)
    go.set()
    await asyncio.wait_for(talk, 5)
    assert socket.status == 200
    assert socket.body.endswith(b"data: late\n\n")


async def test_a_slow_reader_gets_all_text_and_fewer_tails(client):
    stream = StreamOptions(visibility="provisional", min_stability=0.0, max_updates_per_s=1e6)
    speculation = SpeculationParams(method="draft_model")
    server = client.app.state.server
    one = Ask(prompt=(5, 9, 40), sampling=SHORT, speculation=speculation, stream=stream)

    async def read(name, pause_s):
        told = []
        async for event in generate(server, one, name):
            told.append(event)
            await asyncio.sleep(pause_s)
        return told

    fast, slow = await read("fast", 0), await read("slow", 0.03)

    def texts(told):
        return "".join(event.text for event in told if isinstance(event, Committed))

    def num_tails(told):
        return sum(isinstance(event, Tail) for event in told)

    assert texts(slow) == texts(fast)
    assert num_tails(slow) < num_tails(fast)


def test_frames_on_the_wire():
    assert Frame(data="a\nb").encode() == b"data: a\ndata: b\n\n"
    assert Frame(data={"t": "a\nb"}, event="e", id="4").encode() == (
        b'id: 4\nevent: e\ndata: {"t":"a\\nb"}\n\n'
    )
    assert b"\xed" not in Frame(data={"t": "\ud800"}).encode()
    assert Frame(data="").encode() == b"data: \n\n"
    assert Frame(data="a\u2028b\r\nc").encode() == "data: a\u2028b\ndata: c\n\n".encode()


@pytest.mark.parametrize("text", ["", "a", "é" * 7, "x" * 300])
def test_padding_hides_the_size(text):
    frame = Frame(data={"delta": text}, event="e", id="7").encode(pads=True)
    assert len(frame) == 512
    assert json.loads(frame.split(b"data: ")[1])["delta"] == text


# Health and the drain


async def test_ready_until_the_drain(client):
    assert (await client.get("/health")).status_code == 200
    assert (await client.get("/ready")).status_code == 200
    server = client.app.state.server
    server.gate.drain()
    assert (await client.get("/ready")).status_code == 503
    assert (await client.get("/health")).status_code == 200
    with pytest.raises(ApiError) as error:
        await whole(server, ask(), "a")
    assert error.value.status == 503
    assert "Retry-After" in error.value.headers


async def test_a_drain_lets_requests_end(serve):
    server = (await serve(ServeConfig(drain_s=20))).app.state.server
    running = asyncio.create_task(whole(server, ask(), "a"))
    await until(lambda: server.gate.num_running == 1)
    await drain(server)
    (answer,) = await running
    assert answer.finish_reason == "length"


async def test_a_drain_aborts_what_takes_too_long(serve):
    client = await serve(ServeConfig(drain_s=0.05))
    add_stream(client.app, ENDLESS)
    streamed = asyncio.create_task(client.get("/stream"))
    server = client.app.state.server
    await until(lambda: server.gate.num_running == 1)
    await asyncio.sleep(0.05)
    await drain(server)
    response = await streamed
    assert '"code":"draining"' in response.text
    assert (await client.get("/health")).status_code == 200
    await until(lambda: is_idle(server))
    assert server.open_requests == set()


async def test_a_broken_engine_is_unwell_and_can_be_drained(client, llm, monkeypatch, caplog):
    def broken():
        raise KeyError("a bug of the engine")

    server = client.app.state.server
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", broken)
        with pytest.raises(EngineError):
            await whole(server, ask(), "a")
    assert (await client.get("/health")).status_code == 503
    assert (await client.get("/ready")).json()["error"]["code"] == "engine_failed"
    await drain(server)
    assert "a bug of the engine" in caplog.text


async def test_modules_are_left_while_the_engine_lives(llm, monkeypatch):
    """What sessions keep warm is written after the last request, by an engine that still runs."""
    log = []

    @asynccontextmanager
    async def lifespan(server):
        log.append("in")
        yield
        log.append((server.gate.is_draining, await server.engine.call(lambda: "alive")))

    monkeypatch.setattr(models, "lifespan", lifespan, raising=False)
    engine = AsyncLLM(llm)
    app = create_app(engine, ServeConfig(drain_s=0))
    async with app.router.lifespan_context(app):
        assert log == ["in"]
    assert log == ["in", (True, "alive")]
    with pytest.raises(EngineError, match="closed"):
        await engine.call(print)


async def test_the_page_for_programs(client):
    page = (await client.get("/openapi.json")).json()
    for operations in page["paths"].values():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            assert "503" in operation["responses"]
    assert (await client.get("/docs")).status_code == 404
