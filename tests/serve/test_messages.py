"""/v1/messages: Anthropic's shapes, its events in order, its errors; streamed equal to whole."""

import json
from copy import deepcopy

import pytest

from outrider.serve import messages
from outrider.serve.schemas_messages import MessagesBody
from outrider.serve.steps import Steps
from outrider.stream.events import Committed, RequestMetrics, Tail
from tests.serve.wire import frames

PATH = "/v1/messages"
MESSAGES = [{"role": "user", "content": "the quick brown fox"}]
ASK = {"messages": MESSAGES, "max_tokens": 20, "seed": 7}
SCHEMA = {
    "type": "object",
    "properties": {"one": {"enum": ["left", "right"]}},
    "required": ["one"],
    "additionalProperties": False,
}
TOOLS = [{"name": "pick", "description": "Picks one.", "input_schema": SCHEMA}]
CALL = '<tool_call>{"name": "pick", "arguments": {"one": "left"}}</tool_call>'


async def told(client, **fields):
    response = await client.post(PATH, json={**ASK, **fields})
    assert response.status_code == 200, response.text
    return response.json()


async def streamed(client, **fields):
    response = await client.post(PATH, json={**ASK, "stream": True, **fields})
    found = frames(response)
    assert all(frame.event == frame.data["type"] for frame in found)
    return [frame.data for frame in found]


async def refused(client, status=400, **fields):
    response = await client.post(PATH, json={**ASK, **fields})
    assert response.status_code == status, response.text
    assert response.json()["type"] == "error"
    return response.json()["error"]


def put_together(events):
    """The message that a client of Anthropic's events ends up with; checks their order."""
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    message, is_open = events[0]["message"], False
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert not is_open
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
            is_open, partial = True, ""
        elif event["type"] == "content_block_delta":
            assert is_open
            assert event["index"] == len(message["content"]) - 1
            block, delta = message["content"][-1], event["delta"]
            if delta["type"] == "text_delta":
                block["text"] += delta["text"]
            else:
                partial += delta["partial_json"]
                block["input"] = partial
        elif event["type"] == "content_block_stop":
            assert is_open
            is_open = False
    assert not is_open
    for block in message["content"]:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block["input"] or "{}")
    return {**message, **events[-2]["delta"], "usage": events[-2]["usage"]}


@pytest.fixture(scope="module")
def ban(llm):
    """Tokens that are blanks alone: a random model may fill JSON with them for ever."""
    ids = range(llm.tokenizer.vocab_size)
    return [i for i in ids if llm.tokenizer.decode([i]).isspace()]


async def test_shape_of_a_message(client):
    message = await told(client)
    assert message["id"].startswith("msg_")
    assert (message["type"], message["role"]) == ("message", "assistant")
    assert [block["type"] for block in message["content"]] == ["text"]
    assert message["stop_reason"] == "max_tokens"
    assert message["stop_sequence"] is None
    assert message["usage"]["output_tokens"] == 20
    assert message["outrider"]["exactness"]["mode"] == "exact"


@pytest.mark.parametrize("speculation", ["off", "ngram", "draft_model"])
async def test_streamed_message_is_the_whole_one(client, speculation):
    fields = {"speculation": speculation, "temperature": 0.8}
    whole = await told(client, **fields)
    found = put_together(await streamed(client, **fields))
    for key in ("content", "stop_reason", "stop_sequence"):
        assert found[key] == whole[key]
    assert found["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


async def test_input_tokens_are_those_that_were_counted(client):
    response = await client.post(f"{PATH}/count_tokens", json={"messages": MESSAGES})
    count = response.json()["input_tokens"]
    await told(client)
    usage = (await told(client))["usage"]
    assert usage["cache_read_input_tokens"] > 0
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == count
    first = (await streamed(client))[0]["message"]["usage"]
    assert first == {
        **usage,
        "input_tokens": count,
        "cache_read_input_tokens": 0,
        "output_tokens": 0,
    }


async def test_counting_needs_no_max_tokens_and_refuses_it(client):
    response = await client.post(f"{PATH}/count_tokens", json=ASK)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_system_and_tools_are_part_of_the_prompt(client):
    async def count(**fields):
        body = {"messages": MESSAGES, **fields}
        return (await client.post(f"{PATH}/count_tokens", json=body)).json()["input_tokens"]

    plain = await count()
    assert await count(system="Be brief.") > plain
    blocks = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    assert await count(system=blocks) == await count(system="Be brief.")
    assert await count(tools=TOOLS) > plain + 50
    assert await count(tools=TOOLS, tool_choice={"type": "none"}) == plain


async def test_stop_sequences_are_named(client):
    text = (await told(client))["content"][0]["text"]
    stop = text[5:8]
    message = await told(client, stop_sequences=[stop])
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", stop)
    assert message["content"][0]["text"] == text[: text.index(stop)]
    found = put_together(await streamed(client, stop_sequences=[stop], speculation="draft_model"))
    assert found["content"] == message["content"]
    assert found["stop_sequence"] == stop


async def test_turns_of_calls_and_results_are_read(client):
    conversation = [
        *MESSAGES,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "I pick."},
                {"type": "tool_use", "id": "t1", "name": "pick", "input": {"one": "left"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t1",
                    "content": [{"type": "text", "text": "ok"}],
                },
                {"type": "text", "text": "and now?"},
            ],
        },
    ]
    found = MessagesBody(**{**ASK, "messages": conversation}).template_messages()
    assert [message["role"] for message in found] == ["user", "assistant", "tool", "user"]
    assert found[1]["tool_calls"][0]["function"] == {"name": "pick", "arguments": {"one": "left"}}
    assert found[2] == {"role": "tool", "tool_call_id": "t1", "content": "ok"}
    await told(client, messages=conversation, tools=TOOLS)


async def test_a_forced_call_is_a_block(client):
    fields = {
        "tools": TOOLS,
        "tool_choice": {"type": "tool", "name": "pick"},
        "max_tokens": 120,
        "temperature": 0.7,
    }
    message = await told(client, **fields)
    (block,) = message["content"]
    assert (block["type"], block["name"]) == ("tool_use", "pick")
    if message["stop_reason"] == "tool_use":  # else the random model wrote blanks for ever
        assert block["input"]["one"] in ("left", "right")
        assert (
            put_together(await streamed(client, **fields))["content"][0]["input"] == block["input"]
        )


async def test_blocks_open_and_close_in_order_whatever_the_commits(client):
    text = f"Sure. {CALL} Then {CALL}"
    body = MessagesBody(**{**ASK, "tools": TOOLS, "stream": True})
    server = client.app.state.server
    turn = messages.turn_of(server, body, "")
    metrics = RequestMetrics(num_prompt_tokens=9, num_generated_tokens=5)
    end = Committed("r", finish_reason="stop", metrics=metrics)
    for size in (1, 3, 7, len(text)):
        writer = messages.Writer(server, turn)
        parts = [text[at : at + size] for at in range(0, len(text), size)]
        commits = [*(Committed("r", text=part) for part in parts), end]
        found = put_together([data for commit in commits for data in writer.take(commit)])
        whole = messages.blocks(turn.pieces().take(Committed("r", text=text, finish_reason="stop")))
        without_ids = [{k: v for k, v in b.items() if k != "id"} for b in found["content"]]
        assert without_ids == [{k: v for k, v in b.items() if k != "id"} for b in whole]
        assert [b["type"] for b in whole] == ["text", "tool_use", "text", "tool_use"]
        assert whole[1]["input"] == {"one": "left"}
        assert found["stop_reason"] == "tool_use"


async def test_each_step_is_told_once_and_in_order(client):
    """Also those whose text is held back, for it may begin a call, and those of a call."""
    body = MessagesBody(**{**ASK, "tools": TOOLS, "stream": True})
    server = client.app.state.server
    turn = messages.turn_of(server, body, "", "verified; steps=true")
    for text in (f"Sure. {CALL} Then {CALL}", "", "<tool_call>", "Sure."):
        parts = ["", *(text[at : at + 4] for at in range(0, len(text), 4)), ""]
        commits = [Committed("r", 0, i, (40 + i,), part) for i, part in enumerate(parts)]
        commits[-1] = commits[-1]._replace(finish_reason="stop", metrics=RequestMetrics())
        writer = messages.Writer(server, turn)
        found = [data for commit in commits for data in writer.take(commit)]
        put_together(deepcopy(found))
        steps = [event["outrider"]["step"] for event in found[1:-2] if "outrider" in event]
        steps += found[-2]["outrider"].get("steps", [])
        detail = Steps(server.tokenizer, turn.ask.prompt).detail
        assert steps == [detail(commit) for commit in commits]


async def test_shape_of_a_tail(client):
    body = MessagesBody(**{**ASK, "stream": True})
    server = client.app.state.server
    turn = messages.turn_of(server, body, "", "provisional")
    tail = Tail(
        request_id="r", index=0, token_ids=(5, 6), text=" is", committed_chars=1,
        stability=0.9, source="draft", version=1,
    )  # fmt: skip
    writer = messages.Writer(server, turn)
    (start,) = writer.take(tail)  # no text yet that it could continue
    opened, _ = writer.take(Committed("r", text="a"))
    (told_tail,) = writer.take(tail)
    assert start["message"]["outrider"]["stream"]["visibility"] == "provisional"
    assert opened["type"] == "content_block_start"
    assert told_tail["type"] == "outrider_tail"
    assert (told_tail["index"], told_tail["text"], told_tail["v"]) == (0, " is", 1)


async def test_tails_change_nothing_that_is_committed(client):
    fields = {"temperature": 0, "speculation": "draft_model"}
    plain = put_together(await streamed(client, **fields))
    body = {**ASK, "stream": True, **fields}
    header = {"X-Outrider-Stream": "provisional; stability=0"}
    found = [frame.data for frame in frames(await client.post(PATH, json=body, headers=header))]
    assert put_together(found)["content"] == plain["content"]
    assert "stream" in found[-2]["usage"]["outrider"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "So"}]}, "not continued"),
        ({"tool_choice": {"type": "any"}}, "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "other"}}, "pick"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "input_schema"),
        ({"stop_sequences": [""]}, "stop"),
        ({"temperature": -1}, "temperature"),
    ],
    ids=str,
)
async def test_errors_are_in_anthropics_envelope(client, fields, named):
    error = await refused(client, **fields)
    assert error["type"] == "invalid_request_error"
    assert named in error["message"]


async def test_wrong_keys_and_models_have_anthropics_kinds(serve):
    client = await serve(api_keys={"secret": "a"})
    assert (await refused(client, 401))["type"] == "authentication_error"
    response = await client.post(PATH, json=ASK, headers={"x-api-key": "secret"})
    assert response.status_code == 200
    response = await client.post(
        PATH, json={**ASK, "model": "other"}, headers={"x-api-key": "secret"}
    )
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "not_found_error"
