"""Killed: what `kill -9` leaves of sessions and streams, and what the next process makes of it."""

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager, contextmanager

import httpx
import pytest

from outrider import LLM, SamplingParams
from outrider.session.log import SessionLog
from tests.engine.tiny_checkpoint import write_checkpoint
from tests.serve.conftest import TEMPLATE
from tests.serve.streams import Visit, parse
from tests.serve.test_sessions import kept, tokens_of

NUM_TOKENS = 700
GREEDY = {"max_output_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
DRAWN = {**GREEDY, "temperature": 0.8, "seed": 5}
START = "import sys; from outrider.cli.main import app; app(sys.argv[1:])"
SLOW_S = 600  # a machine may stop one of two processes for minutes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model of two layers whose tokenizer has a chat template."""
    folder = write_checkpoint(tmp_path_factory.mktemp("killed"), max_position_embeddings=4096)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    return folder


@contextmanager
def serving(checkpoint, state, *options):
    """`outrider serve` in a process of its own; gives the process and a client."""
    command = [
        sys.executable, "-c", START, "serve", str(checkpoint), "--port", "0", "--state-dir",
        str(state), "--device", "cpu", "--dtype", "float32", *options,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        url = address(process)
        with httpx.Client(base_url=url, timeout=SLOW_S) as client:
            yield process, client
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def address(process):
    told = []
    for line in process.stderr:
        if line.startswith("serving "):
            return line.split()[-1]
        told.append(line)
    raise AssertionError("".join(told))


def read(lines, count):
    """So many events of a stream; None for all."""
    blocks, block = [], []
    for line in lines:
        if line:
            block.append(line)
            continue
        blocks.append("\n".join(block))
        block = []
        if len(blocks) == count:
            break
    return parse("\n\n".join(blocks))


def wait_for_end(client, name):
    while (body := client.get(f"/v1/responses/{name}").json())["status"] == "in_progress":
        time.sleep(0.01)
    return body


def text_of(response):
    return "".join(part["text"] for item in response["output"] for part in item["content"])


def text_of_events(events):
    return "".join(event.data["delta"] for event in events if "delta" in event.data)


def fresh(llm, prompt, sampling):
    given = {name: sampling[name] for name in ("temperature", "seed") if name in sampling}
    params = SamplingParams(max_tokens=sampling["max_output_tokens"], ignore_eos=True, **given)
    return llm.generate([list(prompt)], params, "off")[0].token_ids


def check_stream(events, response):
    """Numbers without gaps, each character once, one end, and the end is what is kept."""
    assert [event.data["sequence_number"] for event in events] == list(range(len(events)))
    assert text_of_events(events) == text_of(response)
    ends = [e for e in events if e.event in ("response.completed", "response.incomplete")]
    assert ends == [events[-1]]
    assert events[-1].data["response"] == response


def check_log(state, llm, session, sampling):
    """The session holds one turn, once, as an engine makes it that nobody killed."""
    with SessionLog(state / "sessions.sqlite", lambda: 0.0) as log:
        assert log.turns.unfinished() == ()
        head = log.get("", session).head
        tokens = list(log.tokens("", head))
        assert len(log.heads("", session)) == 2
    assert fresh(llm, tokens[:-NUM_TOKENS], sampling) == tokens[-NUM_TOKENS:]
    return tokens


def test_a_killed_server_loses_and_doubles_nothing(checkpoint, tmp_path):
    """In mid-stream: a background response, a detached session, and one that is not."""
    llm = LLM(str(checkpoint), device="cpu", dtype="float32")
    state = tmp_path / "state"
    with serving(checkpoint, state) as (process, client):
        detached = client.post("/v1/sessions", json={"detach": "continue"}).json()["id"]
        attached = client.post("/v1/sessions", json={}).json()
        here = f"/v1/sessions/{attached['id']}/responses"
        there = f"/v1/sessions/{detached}/responses"
        body = {**GREEDY, "input": "the quick", "stream": True}
        drawn = {**body, **DRAWN, "background": True}
        long = {**body, "max_output_tokens": 5 * NUM_TOKENS}  # in the making at the kill
        with (
            client.stream("POST", "/v1/responses", json=drawn) as first,
            client.stream("POST", there, json=body) as second,
            client.stream("POST", here, json=long) as third,
        ):
            streams = [each.iter_lines() for each in (first, second, third)]
            seen = [read(lines, 20) for lines in streams]
            process.send_signal(signal.SIGKILL)
            process.wait()
    names = [events[0].data["response"]["id"] for events in seen]
    assert all(events[-1].event == "response.output_text.delta" for events in seen)

    with serving(checkpoint, state, "--drain-s", str(SLOW_S)) as (process, client):
        # What was taken up again is told on from any number, as if nothing had been.
        for name, events in zip(names[:2], seen, strict=False):
            path = f"/v1/responses/{name}?stream=true"
            rest = parse(client.get(f"{path}&starting_after={events[-1].id}").text)
            response = client.get(f"/v1/responses/{name}").json()
            check_stream([*events, *rest], response)
            from_the_start = parse(client.get(path).text)
            assert from_the_start == [*events, *rest], "what was told is told again the same"
            assert response["usage"]["output_tokens"] == NUM_TOKENS
        # An attached one is nobody's any more, and its session is where it was.
        gone = client.get(f"/v1/responses/{names[2]}")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "response_not_found")
        now = client.get(f"/v1/sessions/{attached['id']}").json()
        assert (now["head"], now["state"] == "live") == (attached["head"], False)
        again = client.post(here, json={**body, "stream": False}).json()
        assert text_of(again).startswith(text_of_events(seen[2]))
        # SIGTERM with a stream in flight: it comes to its end, and the process to a good one.
        with client.stream("POST", "/v1/completions", json=completion(400)) as response:
            lines = response.iter_lines()
            read(lines, 3)
            process.send_signal(signal.SIGTERM)
            last = read(lines, None)
        assert last[-1].data == "[DONE]"
        reasons = [each["finish_reason"] for e in last[:-1] for each in e.data["choices"]]
        assert reasons[-1] == "length"
        assert process.wait(SLOW_S) == 0
    implicit = response_session(state, names[0])
    check_log(state, llm, implicit, DRAWN)
    tokens = check_log(state, llm, detached, GREEDY)
    assert check_log(state, llm, attached["id"], GREEDY) == tokens


def completion(max_tokens):
    return {"prompt": [5, 9], "max_tokens": max_tokens, "ignore_eos": True, "stream": True}


def response_session(state, name):
    with SessionLog(state / "sessions.sqlite", lambda: 0.0) as log:
        return log.head_of_response("", name).session


@pytest.mark.slow
def test_kills_at_any_moment(checkpoint, tmp_path):
    """One answer through many deaths, at moments of every kind, and three more behind it."""
    llm, rng = LLM(str(checkpoint), device="cpu", dtype="float32"), random.Random(3)
    state = tmp_path / "state"
    with serving(checkpoint, state) as (_, client):
        session = client.post("/v1/sessions", json={"detach": "continue"}).json()["id"]
    path, events, name = f"/v1/sessions/{session}/responses", [], ""
    body = {**GREEDY, "input": "the quick", "stream": True}
    answers = []
    for death in range(12):
        with serving(checkpoint, state) as (process, client):
            if not name:
                asked = client.stream("POST", path, json=body)
            else:
                query = f"?stream=true&starting_after={events[-1].id}"
                asked = client.stream("GET", f"/v1/responses/{name}{query}")
            with asked as stream:
                more = read(stream.iter_lines(), rng.choice([1, 2, 5, 60, 300, None]))
                events += more
                name = events[0].data["response"]["id"]
                if events[-1].event == "response.incomplete":
                    check_stream(events, client.get(f"/v1/responses/{name}").json())
                    answers.append(name)
                    name, events = "", []
                process.send_signal(signal.SIGKILL)
                process.wait()
        assert death < 11 or answers
    with serving(checkpoint, state) as (_, client):
        if name:
            wait_for_end(client, name)
            answers.append(name)
    with SessionLog(state / "sessions.sqlite", lambda: 0.0) as log:
        heads = log.heads("", session)
        assert [head.response_id for head in heads[1:]] == answers
        tokens = list(log.tokens("", heads[-1]))
    stop = 0
    for head in heads[1:]:
        start = head.num_tokens - NUM_TOKENS
        assert start > stop
        assert fresh(llm, tokens[:start], GREEDY) == tokens[start : head.num_tokens]
        stop = head.num_tokens


# The moments around the end of a response, at which its two files say different things.

SHORT = {"max_output_tokens": 12, "temperature": 0, "ignore_eos": True}
MOMENTS = ["before the commit", "after the commit", "before the row", "after the row"]


@asynccontextmanager
async def copies(client, folder):
    """Copies of the state, as a kill would leave it, at each moment of the next response."""
    sessions, runs = kept(client), kept(client).service.runs
    turns, row = sessions.log.turns, runs._keep
    commit = turns.commit

    def copy(moment):
        shutil.copytree(folder, folder.with_name(moment))

    def committing(*args, **named):
        copy(MOMENTS[0])
        head = commit(*args, **named)
        copy(MOMENTS[1])
        return head

    def keeping(live):
        copy(MOMENTS[2])
        row(live)
        copy(MOMENTS[3])

    turns.commit, runs._keep = committing, keeping
    try:
        yield
    finally:
        turns.commit, runs._keep = commit, row


async def finished(client, name):
    while (body := (await client.get(f"/v1/responses/{name}")).json())["status"] == "in_progress":
        await asyncio.sleep(0.01)
    return body


async def test_a_kill_around_the_end_of_an_attached_response(serve, tmp_path):
    """From the commit on it is there, as its tokens are; before it is nobody's."""
    folder = tmp_path / "state"
    client = await serve(state_dir=folder)
    made = (await client.post("/v1/sessions", json={})).json()
    body = {**SHORT, "input": "one"}
    async with copies(client, folder):
        expected = (await client.post(f"/v1/sessions/{made['id']}/responses", json=body)).json()
    for moment in MOMENTS:
        other = await serve(state_dir=folder.with_name(moment))
        found = await other.get(f"/v1/responses/{expected['id']}")
        now = (await other.get(f"/v1/sessions/{made['id']}")).json()
        if moment == MOMENTS[0]:
            assert (found.status_code, now["head"]) == (404, made["head"])
            continue
        response = found.json()
        assert now["head"] == response["outrider"]["session"]["head"] != made["head"], moment
        for name in ("status", "output", "usage", "metrics", "incomplete_details"):
            assert response[name] == expected[name], moment


@pytest.mark.parametrize("kind", ["background", "detached"])
async def test_a_kill_around_the_end_of_a_response(serve, tmp_path, kind):
    """Whatever was written of the end, the response is complete and in its session once."""
    folder = tmp_path / "state"
    client = await serve(state_dir=folder)
    settings = {"detach": "continue"} if kind == "detached" else {}
    session = (await client.post("/v1/sessions", json=settings)).json()["id"]
    body = {**SHORT, "input": "one", "stream": True, "outrider": {"session": session}}
    body["background"] = kind == "background"
    async with copies(client, folder), Visit(client.app, "POST", "/v1/responses", body) as visit:
        events = await visit.rest()
    expected = events[-1].data["response"]
    name = expected["id"]
    tokens = tokens_of(client, (await client.get(f"/v1/sessions/{session}")).json()["head"])
    for moment in MOMENTS:
        other = await serve(state_dir=folder.with_name(moment))
        found = await finished(other, name)
        assert found["status"] == "incomplete", moment
        assert text_of(found) == text_of(expected), moment
        assert found["usage"]["output_tokens"] == 12, moment
        now = (await other.get(f"/v1/sessions/{session}")).json()
        assert found["outrider"]["session"]["head"] == now["head"], moment
        assert tokens_of(other, now["head"]) == tokens, moment
        assert kept(other).log.turns.unfinished() == (), moment
        for after in (-1, 3, len(events) - 2, len(events) - 1):
            query = f"stream=true&starting_after={after}"
            told = parse((await other.get(f"/v1/responses/{name}?{query}")).text)
            if after < 0:
                check_stream(told, found)
                assert told[:-1] == events[:-1], moment
            assert [event.id for event in told] == [e.id for e in events[after + 1 :]], moment
        again = {**body, "stream": False, "background": False}
        follow = (await other.post("/v1/responses", json=again)).json()
        assert follow["status"] == "incomplete", moment


async def killed(client, folder, **more):
    """The name of a background response, and in `folder` what a kill in its midst would leave."""
    body = {**SHORT, "max_output_tokens": 300, "input": "one", "stream": True, "background": True}
    body |= more
    async with Visit(client.app, "POST", "/v1/responses", body) as visit:
        name = (await visit.take(8))[0].data["response"]["id"]
    shutil.copytree(client.app.state.server.config.state_dir, folder)
    await client.post(f"/v1/responses/{name}/cancel")
    await client.app.state.server.engine.aclose()  # the next server has the same engine
    return name


async def test_a_response_that_kills_every_process_is_given_up(serve, tmp_path):
    """Three processes die at it and tell nothing new; the fourth lets it be."""
    folder = tmp_path / "state1"
    name = await killed(await serve(state_dir=tmp_path / "state"), folder)
    for death in range(1, 5):
        folder = folder.with_name(f"state{death}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("outrider.serve.response_run.Runs._generate", never)
            client = await serve(state_dir=folder)
            found = (await client.get(f"/v1/responses/{name}")).json()
            shutil.copytree(folder, folder.with_name(f"state{death + 1}"))
        assert found["status"] == ("failed" if death == 4 else "in_progress")


async def never(*_):
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("more", "config", "reason"),
    [
        ({"model": "demo"}, {"served_model_name": "other"}, "is not served here"),
        ({"speculation": {"verifier": "typical"}}, {"allow_lossy": False}, "allow-lossy"),
        ({}, {}, "see its log"),
    ],
)
async def test_a_response_that_cannot_be_taken_up_does_not_stop_the_start(
    serve, tmp_path, monkeypatch, caplog, more, config, reason
):
    """However often: it has failed, and says of what."""
    folder = tmp_path / "killed"
    first = await serve(state_dir=tmp_path / "state", served_model_name="demo")
    name = await killed(first, folder, **more)
    if not more:
        monkeypatch.setattr("outrider.serve.response_plan.Plan.again", lambda *_: 1 / 0)
    other = await serve(state_dir=folder, **config)
    assert "cannot be taken up again" in caplog.text
    found = (await other.get(f"/v1/responses/{name}")).json()
    assert found["status"] == "failed"
    assert reason in found["error"]["message"]
    told = parse((await other.get(f"/v1/responses/{name}?stream=true")).text)
    assert told[-1].event == "response.failed"
    assert [event.id for event in told] == [str(number) for number in range(len(told))]
    assert kept(other).log.turns.unfinished() == ()
