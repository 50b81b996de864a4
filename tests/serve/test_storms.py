"""Storms: hundreds of clients that read slowly, leave at any moment, or are too many."""

import asyncio
import json
import random
import socket
import struct
import tracemalloc

import pytest

from outrider.serve.sse import Frame, event_stream
from outrider.stream.outbox import FAIR_SHARE, Unread
from tests.serve.streams import parse, patient
from tests.serve.test_app import Socket, is_idle, until
from tests.serve.test_process import Running

TOKENS = 12
JSON = [("content-type", "application/json"), ("host", "localhost")]
COMPLETION = {"prompt": [5, 9, 40], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
MESSAGES = [{"role": "user", "content": "the quick"}]
INPUT = {"input": "the quick", "ignore_eos": True, "temperature": 0}
MANY = pytest.mark.parametrize(
    "number", [120, pytest.param(500, marks=pytest.mark.slow)], ids=["some", "many"]
)


class Client(Socket):
    """Sends one JSON body; takes as many writes as it is allowed to."""

    def __init__(self, app, path, body, method="POST"):
        data = json.dumps(body).encode()
        headers = [*JSON, ("content-length", str(len(data)))]
        super().__init__(app, method, path, headers, [data])
        self.is_reading = asyncio.Event()
        self.is_reading.set()
        self.leaves_after = -1  # writes

    async def send(self, message):
        if len(self.sent) == self.leaves_after:
            self.gone.set()
        await self.is_reading.wait()
        await super().send(message)

    def start(self):
        self.task = asyncio.create_task(self.talk())
        return self

    async def leave(self):
        self.gone.set()
        self.is_reading.set()
        await patient(asyncio.gather(self.task, return_exceptions=True), 20)


def completion(app, **fields):
    return Client(app, "/v1/completions", {**COMPLETION, "stream": True, **fields})


def text_of(client):
    events = [event.data for event in parse(client.body.decode())]
    assert events[-1] == "[DONE]"
    return "".join(part["text"] for event in events[:-1] for part in event["choices"])


def assert_nothing_is_left(server):
    assert is_idle(server)
    assert (server.gate.num_running, server.gate.num_waiting) == (0, 0)
    assert server.open_requests == set()
    assert server.unread.total == 0
    assert server.engine._clients == {}


# Slow readers


@MANY
async def test_readers_who_stall_hold_no_place(serve, number):
    """None of them takes a byte; others are served all the same, and nothing they asked is lost."""
    app = (await serve(max_waiting=number)).app
    server = app.state.server
    stalled = [completion(app) for _ in range(number)]
    for each in stalled:
        each.is_reading.clear()
        each.start()
    healthy = completion(app).start()
    health = Client(app, "/health", {}, "GET").start()
    await patient(health.task, 2)
    assert health.status == 200
    await patient(healthy.task, 60)
    assert all(not each.sent for each in stalled)
    await until(lambda: not server.gate.num_running + server.gate.num_waiting)
    assert is_idle(server)
    assert 0 < server.unread.total <= number * TOKENS
    expected = text_of(healthy)
    for each in stalled:
        each.is_reading.set()
    await asyncio.gather(*(each.task for each in stalled))
    assert {text_of(each) for each in stalled} == {expected}
    assert_nothing_is_left(server)


@pytest.mark.parametrize("unread", [Unread(most=4), Unread(4 * FAIR_SHARE, FAIR_SHARE)])
async def test_what_nobody_reads_is_bounded(serve, unread):
    """Beyond the bound a stalled reader loses its answer; one that reads does not."""
    app = (await serve(max_concurrent=3)).app
    server = app.state.server
    server.unread = unread
    stalled = [completion(app, max_tokens=200) for _ in range(2)]
    for each in stalled:
        each.is_reading.clear()
        each.start()
    healthy = completion(app, max_tokens=200).start()
    await patient(healthy.task, 30)
    await until(lambda: is_idle(server))
    assert len(text_of(healthy)) > 0
    assert unread.total <= 2 * FAIR_SHARE
    for each in stalled:
        each.is_reading.set()
    await asyncio.gather(*(each.task for each in stalled))
    for each in stalled:
        events = [event.data for event in parse(each.body.decode())] if each.status == 200 else []
        told = events[-2] if events else json.loads(each.body)
        assert told["error"]["code"] == "fell_behind"
    assert_nothing_is_left(server)


@pytest.mark.slow
async def test_memory_of_stalled_readers_is_bounded(serve):
    """Twice as long answers for 100 stalled readers cost no more, once the bound is reached."""
    app = (await serve(max_concurrent=32, max_waiting=500)).app
    server = app.state.server
    peaks = []
    for max_tokens in (100, 800):
        server.unread = Unread(most=64, most_of_all=4096)
        tracemalloc.start()
        stalled = [completion(app, max_tokens=max_tokens).start() for _ in range(100)]
        for each in stalled:
            each.is_reading.clear()
        await asyncio.sleep(0.5)
        async with asyncio.timeout(120):
            while not is_idle(server) or server.gate.num_waiting:
                await asyncio.sleep(0.05)
        peaks.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        await asyncio.gather(*(each.leave() for each in stalled))
    assert_nothing_is_left(server)
    assert peaks[1] < 1.5 * peaks[0], peaks


# Those who leave


def errand(app, rng, session):
    """One of all kinds of requests that generate."""
    length = rng.choice([1, 8, 60])
    stream = rng.random() < 0.7
    chat = {"messages": MESSAGES, "max_tokens": length, "ignore_eos": True, "stream": stream}
    response = {**INPUT, "max_output_tokens": max(length, 16), "stream": stream}
    tails = {"stream_options": {"outrider": {"visibility": "provisional"}}} if stream else {}
    smooth = {"stream_options": {"outrider": {"pacing": "smooth"}}} if stream else {}
    message = {"model": "x", "messages": MESSAGES, "max_tokens": length, "stream": stream}
    message["model"] = app.state.server.model_name
    path, body = rng.choice(
        [
            ("/v1/completions", {**COMPLETION, "max_tokens": length, "stream": stream, "n": 2}),
            ("/v1/completions", {**COMPLETION, "max_tokens": length, "stream": stream, **smooth}),
            ("/v1/chat/completions", {**chat, **tails}),
            ("/v1/messages", message),
            ("/v1/responses", response),
            ("/v1/responses", {**response, "store": False, **tails}),
            ("/v1/responses", {**response, **smooth}),
            (
                f"/v1/sessions/{session}/responses",
                {**response, "outrider": {"on_conflict": "fork"}},
            ),
        ]
    )
    return Client(app, path, body)


async def come_and_go(client, rng, pause_s):
    """Leaves at once, after some time, with some write, or with the last word."""
    await asyncio.sleep(rng.random() * pause_s)
    how = rng.random()
    if how < 0.5:
        client.leaves_after = rng.choice([0, 0, 1, 2, 5, 20])
    client.start()
    if how >= 0.5:
        for _ in range(rng.choice([0, 1, 2, 3, 5, 8, 13, 50, 200])):
            await asyncio.sleep(0)
        await asyncio.sleep(rng.choice([0, 0, rng.random() * 0.2]))
        await client.leave()
    await patient(asyncio.gather(client.task, return_exceptions=True), 60)


@pytest.mark.parametrize(
    ("seed", "number"),
    [(1, 60), *(pytest.param(seed, 400, marks=pytest.mark.slow) for seed in range(2, 8))],
)
async def test_whoever_leaves_takes_all_of_it_along(serve, seed, number):
    rng = random.Random(seed)
    client = await serve(max_concurrent=16, max_waiting=100)
    app, server = client.app, client.app.state.server
    session = (await client.post("/v1/sessions", json={})).json()["id"]
    before = await stored(server)
    visitors = [errand(app, rng, session) for _ in range(number)]
    pause_s = number / 100
    await asyncio.gather(*(come_and_go(visitor, rng, pause_s) for visitor in visitors))
    left_early = [each for each in visitors if not each.sent]
    assert len(left_early) > number / 20, "some leave before the first frame"
    await until(lambda: is_idle(server) and not server.gate.num_running)
    assert_nothing_is_left(server)
    kept = server.sessions
    assert await kept.call(kept.log.turns.unfinished) == ()
    for each in (await client.get("/v1/sessions?limit=100")).json()["data"]:
        assert each["response_in_progress"] is None
    assert (await client.get(f"/v1/sessions/{session}")).json()["state"] != "live"
    # Sessions that were made for one response are there if and only if the response is.
    assert await stored(server) - before <= set(kept_responses(server))
    response = await client.post(f"/v1/sessions/{session}/responses", json=INPUT)
    assert response.status_code == 200


async def stored(server):
    """The sessions without a name that hold something, or nothing."""
    kept = server.sessions
    page = await kept.call(kept.log.list, "", 1000)
    return {each.id for each in page.sessions if each.settings.get("is_implicit")}


def kept_responses(server):
    rows = server.sessions.responses._db.execute("SELECT session FROM response WHERE is_final")
    return [session for (session,) in rows]


# Too many


async def test_an_overflow_is_counted_and_passes(serve):
    client = await serve(max_concurrent=4, max_waiting=8)
    body = {**COMPLETION, "max_tokens": 30}
    asked = (client.post("/v1/completions", json=body) for _ in range(100))
    answers = await asyncio.gather(*asked)
    refused = [each for each in answers if each.status_code == 429]
    assert [each.status_code for each in answers].count(200) == 12
    assert len(refused) == 88
    for each in refused:
        assert each.json()["error"]["code"] == "queue_full"
        assert each.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(each.headers["retry-after"]) <= 60
    page = (await client.get("/metrics")).text
    assert 'outrider_requests_rejected_total{model_name="' in page
    (line,) = (
        line
        for line in page.splitlines()
        if line.startswith("outrider_requests_rejected_total") and 'reason="queue_full"' in line
    )
    assert float(line.split()[-1]) == 88
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    assert_nothing_is_left(client.app.state.server)


# Sockets


def add_flood(running, num_frames, num_bytes):
    """A stream of far more bytes than any buffer on the way holds."""
    ended = []

    @running.app.get("/flood")
    async def flood():
        async def frames():
            try:
                for _ in range(num_frames):
                    yield Frame(data={"text": "x" * num_bytes})
                ended.append("told")
            finally:
                ended.append("closed")

        return event_stream(frames())

    return ended


def connect(url, path="/flood", window=4096):
    """A connection with a small window that has asked and reads nothing by itself."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    made.connect((url.host, url.port))
    made.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    made.setblocking(False)
    return made


@pytest.mark.parametrize(("num_frames", "num_bytes"), [(400, 1 << 16), (1, 1 << 24)])
async def test_a_connection_that_takes_nothing_is_cut_off(llm, num_frames, num_bytes):
    async with Running(llm, drain_s=0, write_timeout_s=0.3) as running:
        ended = add_flood(running, num_frames, num_bytes)
        connections = running.process.server_state.connections
        await running.client.get("/health")
        num_others = len(connections)
        stalled = [connect(running.client.base_url) for _ in range(8)]
        await until(lambda: len(connections) == num_others + len(stalled))
        assert "told" not in ended or num_frames == 1
        assert (await running.client.get("/health")).status_code == 200
        await until(lambda: len(connections) <= num_others)
        await until(lambda: ended.count("closed") == len(stalled))
        for each in stalled:
            each.close()


@pytest.mark.parametrize(("num_frames", "num_bytes"), [(250, 1 << 16), (1, 1 << 24)])
async def test_a_connection_that_reads_slowly_is_not(llm, num_frames, num_bytes):
    """It takes longer than the limit for one frame, but never takes nothing for so long."""
    async with Running(llm, drain_s=0, write_timeout_s=0.5) as running:
        ended = add_flood(running, num_frames, num_bytes)
        loop = asyncio.get_running_loop()
        with connect(running.client.base_url, window=1 << 18) as slow:
            total, start = 0, loop.time()
            while total < num_frames * num_bytes:
                piece = await patient(loop.sock_recv(slow, 1 << 17), 5)
                assert piece, "cut off"
                total += len(piece)
                await asyncio.sleep(0.01)
            assert loop.time() - start > 0.8
            assert ended == ["told", "closed"]


@MANY
async def test_hundreds_of_sockets_hang_up(llm, number):
    rng = random.Random(7)
    async with Running(llm, drain_s=0, max_waiting=number) as running:
        url, server = running.client.base_url, running.server
        for wave in range(0, number, 60):
            made = [connect(url, f"/stream/s{wave + i}?endless=1") for i in range(60)]
            for each in made:
                if rng.random() < 0.5:
                    await asyncio.sleep(rng.random() * 0.01)
                if rng.random() < 0.5:  # a reset, not a farewell
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.close()
        await until(lambda: is_idle(server) and not server.gate.num_running)
        assert (await running.client.get("/health")).status_code == 200
        await until(lambda: not server.gate.num_waiting and not server.open_requests)
        assert_nothing_is_left(server)
