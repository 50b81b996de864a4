"""Prompts: what a model is told of instructions and tools, wherever its session stands."""

import pytest

from outrider import AsyncLLM
from outrider.serve.app import create_app
from outrider.serve.base import ServeConfig
from tests.serve.conftest import client_of
from tests.serve.streams import Visit
from tests.serve.test_sessions import LONG, TURN, create, kept, post, say, tokens_of

SPEAK, OTHER = "speak in verse", "speak in prose"
TOOLS = [{"type": "function", "name": "weather", "parameters": {"type": "object"}}]


async def told(client, llm, answer):
    """The text that the model has read and written, up to the answer's end."""
    return llm.tokenizer.decode(tokens_of(client, answer["outrider"]["session"]["head"]))


async def ask(client, session, text, **fields):
    return await say(client, session, text, {**TURN, **fields})


@pytest.fixture
async def session(client):
    return (await create(client))["id"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"instructions": SPEAK}, SPEAK), ({"tools": TOOLS}, '"name": "weather"')],
    ids=["instructions", "tools"],
)
@pytest.mark.parametrize("how", ["rewind", "drop", "fork", "refused"])
async def test_what_is_no_longer_told_is_told_again(client, llm, session, fields, words, how):
    first = await ask(client, session, "one")
    head = first["outrider"]["session"]["head"]
    place = f"/v1/sessions/{session}"
    if how == "refused":
        refused = {**TURN, **fields, "input": "longer than the model may read " * 200}
        await post(client, f"{place}/responses", refused, 400)
    else:
        second = await ask(client, session, "two", **fields)
        assert words in await told(client, llm, second)
    if how == "fork":
        session = (await post(client, f"{place}/fork", {"at": head}))["data"][0]["id"]
    elif how in ("rewind", "drop"):
        await post(client, f"{place}/rewind", {"to": head, "drop": how == "drop"})
    third = await ask(client, session, "three", **fields)
    assert (await told(client, llm, third)).count(words) == 1
    fourth = await ask(client, session, "four", **fields)
    assert (await told(client, llm, fourth)).count(words) == 1, "and not more than once"


async def test_a_turn_that_was_left_has_told_nothing(client, llm, session):
    await ask(client, session, "one")
    body = {**LONG, "input": "two", "stream": True, "instructions": SPEAK}
    body["outrider"] = {"session": session}
    async with Visit(client.app, "POST", "/v1/responses", body) as visit:
        await visit.take(4)
    while kept(client).response_in(session):
        await client.get(f"/v1/sessions/{session}")
    answer = await ask(client, session, "two", instructions=SPEAK)
    assert (await told(client, llm, answer)).count(SPEAK) == 1


async def test_a_place_before_the_end_of_the_question_knows_nothing_of_it(client, llm, session):
    first = await ask(client, session, "one")
    num_first = len(tokens_of(client, first["outrider"]["session"]["head"]))
    await ask(client, session, "two", instructions=SPEAK)
    await post(client, f"/v1/sessions/{session}/rewind", {"to": num_first + 3})
    answer = await ask(client, session, "three", instructions=SPEAK)
    assert SPEAK in await told(client, llm, answer)


async def test_going_back_to_former_instructions_is_told(client, llm):
    session = (await create(client, instructions=SPEAK))["id"]
    for words in (None, OTHER, OTHER, SPEAK, SPEAK, None):
        answer = await ask(client, session, "go on", **({"instructions": words} if words else {}))
    text = await told(client, llm, answer)
    assert (text.count(SPEAK), text.count(OTHER)) == (2, 1)


async def test_a_sessions_own_instructions_are_told_behind_given_tokens(client, llm):
    session = (await create(client, instructions=SPEAK))["id"]
    await post(client, f"/v1/sessions/{session}/append", {"token_ids": [70, 71]})
    for text in ("one", "two"):
        answer = await ask(client, session, text)
    assert (await told(client, llm, answer)).count(SPEAK) == 1


async def test_tools_that_were_switched_off_are_told_once_they_are_on(client, llm, session):
    await ask(client, session, "one", tools=TOOLS, tool_choice="none")
    answer = await ask(client, session, "two", tools=TOOLS)
    assert '"name": "weather"' in await told(client, llm, answer)


async def test_a_turn_that_is_taken_up_knows_what_it_told(llm, tmp_path):
    config = ServeConfig(drain_s=0, state_dir=tmp_path)
    app = create_app(AsyncLLM(llm), config)
    async with app.router.lifespan_context(app), client_of(app) as client:
        session = (await create(client, detach="continue"))["id"]
        body = {**LONG, "input": "one", "stream": True, "instructions": SPEAK}
        body["outrider"] = {"session": session}
        async with Visit(app, "POST", "/v1/responses", body) as visit:
            name = (await visit.take(4))[0].data["response"]["id"]
    app = create_app(AsyncLLM(llm), config)
    async with app.router.lifespan_context(app), client_of(app) as client:
        async with Visit(app, "GET", f"/v1/responses/{name}?stream=true") as visit:
            await visit.rest()
        answer = await ask(client, session, "two", instructions=SPEAK)
        assert (await told(client, llm, answer)).count(SPEAK) == 1


async def test_truncate_finds_the_answer_after_a_rewind_to_it(client, session):
    first = await ask(client, session, "one")
    await ask(client, session, "two")
    path = f"/v1/sessions/{session}"
    await post(client, f"{path}/rewind", {"to": first["outrider"]["session"]["head"]})
    whole = (await client.get(path)).json()["n_tokens"]
    cut = await post(client, f"{path}/truncate", {"tokens": 3})
    assert cut["n_tokens"] == whole - TURN["max_output_tokens"] + 3
    refused = await post(client, f"{path}/truncate", {"tokens": 3}, 400)
    assert refused["error"]["param"] == "response_id"
