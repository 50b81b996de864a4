"""Whatever is posted, the server answers with a reason, and serves the next request as before."""

import asyncio
import json
import random
from copy import deepcopy
from typing import Any

import pytest

MESSAGES = [{"role": "user", "content": "the quick"}]
TOOL = {"name": "pick", "parameters": {"type": "object", "properties": {"a": {"enum": ["b"]}}}}
CHAT = {"messages": MESSAGES, "max_tokens": 3, "temperature": 0}
RESPONSE = {"input": "the quick", "max_output_tokens": 3, "temperature": 0}
MESSAGE = {"messages": MESSAGES, "max_tokens": 3}
# What is mutated: bodies that are right. A path without one begins with an empty object.
BODIES: dict[str, dict[str, Any]] = {
    "/tokenize": {"prompt": "the quick"},
    "/detokenize": {"tokens": [5, 6]},
    "/v1/chat/completions": {**CHAT, "tools": [{"type": "function", "function": TOOL}]},
    "/v1/completions": {"prompt": "the quick", "max_tokens": 3, "logprobs": 2},
    "/v1/messages": {**MESSAGE, "stop_sequences": ["x"]},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/v1/responses": {**RESPONSE, "tools": [{"type": "function", **TOOL}]},
    "/v1/responses/{response_id}/accept": {"chars": 1},
    "/v1/sessions": {"token_ids": [5, 6], "ttl_s": 60},
    "/v1/sessions/{session_id}/append": {"input": "the quick"},
    "/v1/sessions/{session_id}/responses": RESPONSE,
    "/v1/sessions/{session_id}/fork": {"n": 1},
    "/v1/sessions/{session_id}/rewind": {"to": 0},
    "/v1/sessions/{session_id}/truncate": {"chars": 1},
    "/v1/sessions/{session_id}/hint": {"event": "idle"},
    "/v1/sessions/{session_id}/snapshot": {"include": ["kv"]},
}
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
ODD = [
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, 10**30, 2**63, -(2**63), 299, 300),
    *(float("nan"), float("inf"), "", " ", "a", "0", "\x00", "\ud800", "é" * 50, "{", "😀"),
    *([], {}, [[]], [{}], [None], [1, "a"], {"type": "text"}, {"type": None}, {"": 0}),
    *("auto", "required", "none", "draft_model", "ngram", "json_object", "user", "function"),
    *({"method": "ngram", "width": 3}, {"visibility": "provisional"}, {"5": 100, "a": 1}),
    {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nonsense"}}},
    {"outrider": {"visibility": "provisional", "min_stability": 0, "commit_unit": "line"}},
    *({"json": {"$ref": "#"}}, {"regex": "("}, {"grammar": "root ::= root"}, {"choice": []}),
]
AT_ONCE = 8
USUAL = 300


def paths_of(page):
    return [path for path, operations in page["paths"].items() if "post" in operations]


def names_of(page, path):
    """Fields that the body of a path may have."""
    content = page["paths"][path]["post"].get("requestBody", {}).get("content", {})
    schema = content.get("application/json", {}).get("schema", {})
    name = schema.get("$ref", "").rpartition("/")[2]
    found = page["components"]["schemas"].get(name, schema).get("properties", {})
    return [*found, "unheard_of"]


def mutated(rng, body, names):
    """The bytes of a body with one to three things wrong with it."""
    found = json.loads(json.dumps(body))
    for _ in range(rng.randint(1, 3)):
        mutate(rng, found, names)
    if rng.random() < 0.99:  # a few may run as long as they like
        for name in LIMITS:
            if name in body or isinstance(found.get(name), int):
                found[name] = min(3, found[name]) if isinstance(found.get(name), int) else 3
    data = json.dumps(found).encode()
    return torn(rng, data) if rng.random() < 0.1 else data


def mutate(rng, found, names):
    """Sets a field, removes one, or does either somewhere inside."""
    inner = [value for value in found.values() if isinstance(value, dict | list) and value]
    kind = rng.random()
    if inner and kind < 0.4:
        mutate_inside(rng, rng.choice(inner))
    elif found and kind < 0.5:
        del found[rng.choice(list(found))]
    elif names and found and kind < 0.6:
        found[rng.choice(names)] = deepcopy(rng.choice(list(found.values())))
    else:
        found[rng.choice(names)] = deepcopy(rng.choice(ODD))


def mutate_inside(rng, value):
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(keys)
    if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.7:
        mutate_inside(rng, value[key])
    else:
        value[key] = deepcopy(rng.choice(ODD))


def torn(rng, data):
    """Bytes that are hardly JSON any more."""
    place = rng.randrange(len(data) + 1)
    return rng.choice(
        [
            data[:place],
            data[:place] + bytes([rng.randrange(256)]) + data[place:],
            b"\xff\xfe" + data,
            b"[" * 5000,
            b"[" + data + b"]",
            b'"text"',
            data.replace(b'"', b"'"),
        ]
    )


async def bombard(client, path, url, num_bodies):
    """Posts them all, some at a time; every answer must be one."""
    page = client.app.openapi()
    rng = random.Random(path)
    names, body = names_of(page, path), BODIES.get(path, {})
    bodies = [mutated(rng, body, names) for _ in range(num_bodies)]
    for start in range(0, num_bodies, AT_ONCE):
        batch = bodies[start : start + AT_ONCE]
        answers = await asyncio.gather(*(post(client, url, data) for data in batch))
        for data, answer in zip(batch, answers, strict=True):
            assert answer.status_code < 500 or answer.status_code == 503, (data, answer.text)
            if answer.status_code >= 400:
                assert answer.json()["error"]["message"], data


def post(client, url, data):
    return client.post(url, content=data, headers={"content-type": "application/json"})


async def survive(client, path, num_bodies):
    """Fuzzes one endpoint; an answer before and after must be the same."""
    before = await text_of(client)
    session = (await client.post("/v1/sessions", json={"token_ids": [5, 6, 7]})).json()["id"]
    said = await client.post(f"/v1/sessions/{session}/responses", json=RESPONSE)
    assert said.status_code == 200, said.text
    url = path.format(session_id=session, response_id=said.json()["id"])
    await bombard(client, path, url, num_bodies)
    assert (await client.get("/health")).status_code == 200
    assert await text_of(client) == before


async def text_of(client):
    answer = await client.post("/v1/chat/completions", json=CHAT)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


async def test_every_endpoint_is_fuzzed(client):
    without_body = {"/v1/responses/{response_id}/cancel"}
    assert set(paths_of(client.app.openapi())) == set(BODIES) | without_body


@pytest.mark.parametrize("path", BODIES)
async def test_mutated_bodies_are_answered(client, path):
    await survive(client, path, USUAL)


@pytest.mark.slow
@pytest.mark.parametrize("path", BODIES)
async def test_many_mutated_bodies_are_answered(client, path):
    await survive(client, path, 10_000)
