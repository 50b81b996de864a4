"""What was said in a session, as the studio reads it from the server."""

import pytest

BODY = {"max_output_tokens": 12, "temperature": 0, "ignore_eos": True}


async def respond(client, session, text, **more):
    body = {**BODY, "input": text, "outrider": {"session": session}, **more}
    answer = await client.post("/v1/responses", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def made(client, **body):
    return (await client.post("/v1/sessions", json=body)).json()["id"]


async def told(client, session):
    answer = await client.get(f"/v1/outrider/transcripts/{session}")
    assert answer.status_code == 200, answer.text
    found = answer.json()
    where = (await client.get(f"/v1/sessions/{session}")).json()
    assert (found["head"], found["n_tokens"]) == (where["head"], where["n_tokens"])
    turns = found["data"]
    assert [turn["begin"] for turn in turns] == [0, *(turn["end"] for turn in turns)][: len(turns)]
    assert [turn["end"] for turn in turns][-1:] == [where["n_tokens"]] * bool(turns)
    return turns


def text_of(response):
    (item,) = response["output"]
    return item["content"][0]["text"]


def texts(turns):
    return [(turn["role"], turn["text"]) for turn in turns]


async def test_turns_are_told_with_their_places(client):
    session = await made(client)
    assert await told(client, session) == []
    first = await respond(client, session, "one")
    second = await respond(client, session, [{"role": "user", "content": "two"}])
    turns = await told(client, session)
    assert texts(turns) == [
        ("user", "one"),
        ("assistant", text_of(first)),
        ("user", "two"),
        ("assistant", text_of(second)),
    ]
    assert [turns[1]["id"], turns[3]["id"]] == [first["id"], second["id"]]
    assert turns[3]["usage"] == second["usage"]
    assert turns[3]["outrider"]["exactness"]["mode"] == "exact"


async def test_a_rewind_takes_turns_back_and_cuts_answers(client):
    session = await made(client)
    await respond(client, session, "one")
    await respond(client, session, "two")
    whole = await told(client, session)
    to = whole[2]["begin"]
    await client.post(f"/v1/sessions/{session}/rewind", json={"to": to})
    assert await told(client, session) == whole[:2]
    cut = to - 6
    await client.post(f"/v1/sessions/{session}/rewind", json={"to": cut})
    question, answer = await told(client, session)
    assert question == whole[0]
    assert (answer["begin"], answer["end"]) == (whole[1]["begin"], cut)
    assert whole[1]["text"].startswith(answer["text"])
    assert len(answer["text"]) < len(whole[1]["text"])


async def test_of_rival_answers_the_one_in_the_log_is_told(client):
    session = await made(client)
    sampled = {"temperature": 2.0}
    rivals = []
    for seed in range(3):
        rivals.append(await respond(client, session, "one", **sampled, seed=seed))
        place = (await told(client, session))[0]["begin"]
        await client.post(f"/v1/sessions/{session}/rewind", json={"to": place})
    assert len({text_of(rival) for rival in rivals}) == 3
    for seed in (1, 0, 2):
        await respond(client, session, "one", **sampled, seed=seed)
        assert texts(await told(client, session))[1] == ("assistant", text_of(rivals[seed]))
        await client.post(f"/v1/sessions/{session}/rewind", json={"to": 0})


async def test_a_branch_tells_what_it_shares(client):
    session = await made(client)
    await respond(client, session, "one")
    shared = await told(client, session)
    await respond(client, session, "two")
    body = {"at": shared[-1]["end"]}
    branch = (await client.post(f"/v1/sessions/{session}/fork", json=body)).json()["data"][0]["id"]
    assert await told(client, branch) == shared
    await respond(client, branch, "elsewhere")
    assert [turn["text"] for turn in await told(client, branch)][2] == "elsewhere"
    assert [turn["text"] for turn in await told(client, session)][2] == "two"


async def test_what_nobody_answered_is_told_as_it_reads(client):
    session = await made(client, token_ids=[65, 66, 67])
    assert [turn["role"] for turn in await told(client, session)] == ["log"]
    await client.post(f"/v1/sessions/{session}/append", json={"input": "by the way"})
    await respond(client, session, "one")
    await client.post(f"/v1/sessions/{session}/append", json={"input": "and then"})
    turns = await told(client, session)
    assert [turn["role"] for turn in turns] == ["log", "user", "assistant", "log"]
    assert "by the way" in turns[0]["text"]
    assert turns[1]["text"] == "one"
    assert "and then" in turns[3]["text"]


async def test_answers_that_were_deleted_are_told_from_their_tokens(client):
    session = await made(client)
    gone = await respond(client, session, "one")
    kept = await respond(client, session, "two")
    await client.delete(f"/v1/responses/{gone['id']}")
    turns = await told(client, session)
    assert [turn["role"] for turn in turns] == ["log", "user", "assistant"]
    assert "one" in turns[0]["text"]
    assert text_of(gone).strip() in turns[0]["text"]
    assert texts(turns)[1:] == [("user", "two"), ("assistant", text_of(kept))]


async def test_a_session_belongs_to_its_tenant(serve):
    client = await serve(api_keys={"a": "alice", "b": "bob"})
    alice, bob = ({"Authorization": f"Bearer {key}"} for key in "ab")
    session = (await client.post("/v1/sessions", json={}, headers=alice)).json()["id"]
    path = f"/v1/outrider/transcripts/{session}"
    assert (await client.get(path, headers=alice)).status_code == 200
    assert (await client.get(path, headers=bob)).status_code == 404
    assert (await client.get(path)).status_code == 401


@pytest.mark.parametrize("name", ["nothing", "sess_0"])
async def test_no_such_session(client, name):
    answer = await client.get(f"/v1/outrider/transcripts/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"
