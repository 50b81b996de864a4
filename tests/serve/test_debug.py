"""/debug/controller: why K is what it is, to those who have a key."""

import json
import math

import pytest

from outrider import SamplingParams, SpeculationParams
from outrider.serve.debug import _finite
from outrider.serve.generation import Ask, generate, whole

PATH = "/debug/controller"
ADAPTIVE = SpeculationParams(method="draft_model", policy="adaptive")
SAMPLING = SamplingParams(max_tokens=40, ignore_eos=True)


async def test_the_policies_tell_why(client):
    server = client.app.state.server
    await whole(server, Ask(prompt=(5, 9, 40), sampling=SAMPLING, speculation=ADAPTIVE), "a")
    answer = await client.get(PATH)
    assert answer.status_code == 200
    found = answer.json()
    assert found["default"] == "fixed"
    assert found["num_running"] == 0
    assert set(found["step_seconds"]) == {"draft", "forward", "rest"}
    assert found["step_seconds"]["forward"] > 0
    assert {"adaptive", "fixed", "off", "table"} <= set(found["policies"])
    told = found["policies"]["adaptive"]
    assert told["why"] != "nothing was decided yet"
    assert told["plain_tokens_per_s"] > 0
    assert told["expected_tokens_per_s"] > 0
    assert set(told["guard"]) >= {"advantage", "times_shut", "shut_for_steps"}
    assert "draft_model" in {one["drafter"] for one in told["acceptance"]}
    assert len(told["cost"]["passes"]["rows"]) == len(told["cost"]["passes"]["seconds"])


async def test_it_can_be_asked_while_requests_run(client):
    server = client.app.state.server
    endless = SamplingParams(max_tokens=900, ignore_eos=True)
    events = generate(server, Ask(prompt=(5,), sampling=endless, speculation=ADAPTIVE), "a")
    await anext(events)
    found = (await client.get(PATH)).json()
    assert found["num_running"] == 1
    await events.aclose()


async def test_a_key_is_asked_for_where_there_are_keys(serve):
    client = await serve(api_keys={"secret": "somebody"})
    refused = await client.get(PATH)
    assert refused.status_code == 401
    assert refused.json()["error"]["code"] == "invalid_api_key"
    headers = {"Authorization": "Bearer secret"}
    assert (await client.get(PATH, headers=headers)).status_code == 200


async def test_it_is_documented(client):
    page = client.app.openapi()
    told = page["paths"][PATH]["get"]
    assert "Why K is what it is" in told["description"]
    schema = told["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
    fields = page["components"]["schemas"][schema.rpartition("/")[2]]["properties"]
    assert all("description" in field for field in fields.values())
    answer = (await client.get(PATH)).json()
    assert set(fields) == set(answer)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_has_not_are_null(value):
    found = _finite({"a": [1.5, value, {2: (value, "x")}], "b": True})
    assert found == {"a": [1.5, None, {"2": [None, "x"]}], "b": True}
    json.dumps(found, allow_nan=False)
