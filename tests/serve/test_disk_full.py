"""A full disk: what needs storing is refused or fails whole, all else goes on, and it passes."""

import asyncio
import sqlite3
from contextlib import contextmanager

import pytest

from tests.serve.streams import Visit, parse
from tests.serve.test_app import until
from tests.serve.test_kill import check_stream
from tests.serve.test_sessions import TURN, create, fresh, kept, post, say, tokens_of

LONG = {**TURN, "max_output_tokens": 120}
WRITES = ("INSERT", "UPDATE", "DELETE", "REPLACE")


class Disk:
    """A connection to sqlite on a disk that is full while `is_full`, for statements that say so.

    Attributes:
        refuses: which statements; all by default.
        num_refused: how many were.
    """

    def __init__(self, connection):
        self._connection = connection
        self.is_full = False
        self.refuses = lambda statement: True
        self.num_refused = 0

    def execute(self, statement, *values):
        is_write = statement.lstrip().startswith(WRITES)
        if self.is_full and is_write and self.refuses(statement):
            self.num_refused += 1
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        return self._connection.execute(statement, *values)

    def __getattr__(self, name):
        return getattr(self._connection, name)

    @contextmanager
    def full(self, refuses=lambda statement: True):
        self.is_full, self.refuses = True, refuses
        yield self
        self.is_full = False


@pytest.fixture
async def client(serve, tmp_path, monkeypatch):
    """A server that sweeps all the time."""
    monkeypatch.setattr("outrider.serve.session_sweeper.SWEEP_S", 0.01)
    return await serve(state_dir=tmp_path / "state")


@pytest.fixture
def log_disk(client):
    """Where the session log lies."""
    database = kept(client).log._database
    database._connection = Disk(database._connection)
    return database._connection


@pytest.fixture
def responses_disk(client):
    """Where the responses lie."""
    store = kept(client).responses
    store._db = Disk(store._db)
    return store._db


def check_refusal(found):
    assert found.status_code == 503, found.text
    error = found.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "storage_failed")
    assert "disk is full" in error["message"]
    assert "sqlite" not in error["message"], "no path of ours"
    assert int(found.headers["retry-after"]) > 0


async def check_health(client):
    """What needs no storage is served."""
    assert (await client.get("/health")).status_code == 200
    body = {"prompt": [5, 9], "max_tokens": 4}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    body = {**TURN, "input": "one", "store": False}
    assert (await client.post("/v1/responses", json=body)).status_code == 200


async def check_session(client, llm, session, head):
    """It is where it was, nobody writes to it, and its next turn is as if nothing had been."""
    now = (await client.get(f"/v1/sessions/{session}")).json()
    assert (now["head"], now["response_in_progress"]) == (head, None)
    await until(lambda: kept(client).log.turns.unfinished() == ())
    answer = await say(client, session, "again")
    tokens = tokens_of(client, answer["outrider"]["session"]["head"])
    assert fresh(llm, tokens[:-12], TURN) == tokens[-12:]


async def test_calls_that_write_are_refused_and_change_nothing(client, llm, log_disk):
    session = (await create(client))["id"]
    head = (await say(client, session, "one"))["outrider"]["session"]["head"]
    here = f"/v1/sessions/{session}"
    calls = [
        ("/v1/sessions", {}),
        ("/v1/sessions", {"conversation": "c"}),
        (f"{here}/append", {"token_ids": [5, 6]}),
        (f"{here}/fork", {}),
        (f"{here}/rewind", {"to": 2}),
        (f"{here}/responses", {**TURN, "input": "two"}),
        (f"{here}/responses", {**TURN, "input": "two", "stream": True}),
        ("/v1/responses", {**TURN, "input": "two"}),
        ("/v1/responses", {**TURN, "input": "two", "background": True}),
    ]
    before = kept(client).log.usage("")
    with log_disk.full():
        for path, body in calls:
            check_refusal(await client.post(path, json=body))
        check_refusal(await client.delete(here))
        await check_health(client)
        assert len((await client.get("/v1/sessions")).json()["data"]) == 1
    assert log_disk.num_refused >= len(calls)
    assert kept(client).log.usage("") == before
    await check_session(client, llm, session, head)
    for path, body in calls[:3]:
        await post(client, path, body)


async def test_a_real_limit_of_the_file(client, llm):
    """sqlite's own: the file may not grow by a page."""
    session = (await create(client))["id"]
    head = (await say(client, session, "one"))["outrider"]["session"]["head"]
    database = kept(client).log._database._connection
    (pages,) = database.execute("PRAGMA page_count").fetchone()
    database.execute(f"PRAGMA max_page_count = {pages}")
    body = {"token_ids": [5] * 100_000}
    check_refusal(await client.post(f"/v1/sessions/{session}/append", json=body))
    await check_health(client)
    database.execute("PRAGMA max_page_count = 1000000")
    await check_session(client, llm, session, head)


async def test_a_turn_that_cannot_be_committed_fails_whole(client, llm, log_disk):
    made = await create(client)
    body = {**LONG, "input": "one", "stream": True}
    async with Visit(client.app, "POST", f"/v1/sessions/{made['id']}/responses", body) as visit:
        events = await visit.take(8)
        with log_disk.full():
            events += await visit.rest()
            await check_health(client)
    assert log_disk.num_refused >= 1
    response = events[-1].data["response"]
    assert (events[-1].event, response["status"]) == ("response.failed", "failed")
    assert response["error"]["code"] == "storage_failed"
    assert "nothing was kept" in response["error"]["message"]
    assert (await client.get(f"/v1/responses/{response['id']}")).json() == response
    await check_session(client, llm, made["id"], made["head"])


async def test_one_that_is_not_streamed_is_refused_at_its_end(client, llm, log_disk):
    made = await create(client)
    path, body = f"/v1/sessions/{made['id']}/responses", {**LONG, "input": "one"}
    asked = asyncio.create_task(client.post(path, json=body))
    await until(lambda: client.app.state.server.gate.num_running)
    with log_disk.full():
        check_refusal(await asked)
    assert log_disk.num_refused >= 1
    await check_session(client, llm, made["id"], made["head"])


@pytest.mark.parametrize("more", [{"background": True}, {}], ids=["background", "attached"])
async def test_a_response_whose_row_cannot_be_written_locks_nothing(
    client, llm, responses_disk, more
):
    """Neither at its beginning, nor before its end; nothing of it is kept."""
    made = await create(client)
    path = f"/v1/sessions/{made['id']}/responses"
    with responses_disk.full():
        check_refusal(await client.post(path, json={**TURN, "input": "one", **more}))
        check_refusal(await client.post("/v1/responses", json={**TURN, "input": "one", **more}))
        await check_health(client)
    assert responses_disk.num_refused
    assert kept(client).responses.unfinished() == []
    assert kept(client).service.runs._live == {}
    assert len(kept(client).log.list("").sessions) == 1
    await check_session(client, llm, made["id"], made["head"])


async def test_a_detached_response_tells_nothing_that_is_not_written(
    serve, client, llm, responses_disk
):
    """It fails at the first event that the next process would not know of."""
    made = await create(client, detach="continue")
    body = {**LONG, "input": "one", "stream": True}
    path = f"/v1/sessions/{made['id']}/responses"
    async with Visit(client.app, "POST", path, body) as visit:
        events = await visit.take(8)
        with responses_disk.full(lambda statement: "event" in statement):
            events += await visit.rest()
    response = events[-1].data["response"]
    assert (response["status"], response["error"]["code"]) == ("failed", "storage_failed")
    assert [event.data["sequence_number"] for event in events] == list(range(len(events)))
    written = kept(client).responses.events(response["id"])
    number = events.index(next(e for e in events if e.event.endswith("text.done")))
    assert [event.number for event in written] == list(range(number)), "all up to the failure"
    replayed = parse((await client.get(f"/v1/responses/{response['id']}?stream=true")).text)
    assert replayed == events
    assert (await client.get(f"/v1/responses/{response['id']}")).json() == response
    await check_session(client, llm, made["id"], made["head"])
    # The next process has the response, but not all events: it says so.
    other = await serve(state_dir=client.app.state.server.config.state_dir)
    told = await other.get(f"/v1/responses/{response['id']}?stream=true")
    assert told.status_code == 410
    assert told.json()["response"] == response


@pytest.mark.parametrize("settings", [{}, {"detach": "continue"}], ids=["attached", "detached"])
async def test_what_is_committed_is_complete_though_its_row_must_wait(
    serve, client, responses_disk, settings
):
    """Once its tokens are in the session, a response has not failed, whatever else cannot be."""
    made = await create(client, **settings)
    commit, full = kept(client).log.turns.commit, []

    def committing(*args, **named):
        head = commit(*args, **named)
        full.append(responses_disk.full())
        full[0].__enter__()
        return head

    kept(client).log.turns.commit = committing
    body = {**TURN, "input": "one", "stream": True}
    path = f"/v1/sessions/{made['id']}/responses"
    async with Visit(client.app, "POST", path, body) as visit:
        events = await visit.rest()
    kept(client).log.turns.commit = commit
    response = events[-1].data["response"]
    check_stream(events, response)
    assert response["status"] == "incomplete"
    name = response["id"]
    assert (await client.get(f"/v1/responses/{name}")).json() == response
    assert (await client.get(f"/v1/sessions/{made['id']}")).json()["head"] != made["head"]
    full[0].__exit__(None, None, None)
    await until(lambda: not kept(client).responses._late)
    other = await serve(state_dir=client.app.state.server.config.state_dir)
    assert (await other.get(f"/v1/responses/{name}")).json() == response


async def test_what_cannot_be_learnt_fails_nothing(client, llm, log_disk):
    speculation = {"method": "draft_model", "num_speculative_tokens": 3}
    session = (await create(client, speculation=speculation))["id"]
    with log_disk.full(lambda statement: "stats" in statement):
        answer = await say(client, session, "one")
    assert log_disk.num_refused
    assert answer["status"] == "incomplete"
    await check_session(client, llm, session, answer["outrider"]["session"]["head"])


async def test_the_sweeper_outlives_it(client, log_disk):
    """What was to be forgotten meanwhile is forgotten later."""
    sessions = kept(client)
    await create(client, ttl_s=60)
    client.app.state.server.clock = lambda: 1e12
    with log_disk.full():
        await until(lambda: log_disk.num_refused >= 2)
        assert sessions.log.usage("").sessions == 1
    await until(lambda: sessions.log.usage("").sessions == 0)
