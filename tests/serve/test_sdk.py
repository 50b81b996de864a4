"""The SDKs of OpenAI and Anthropic read our server as they read their own, tails or no tails."""

from contextlib import AsyncExitStack
from typing import Literal

import pytest
from pydantic import BaseModel

from outrider.serve import response_run
from outrider.serve.base import ServeConfig
from tests.serve.test_responses import TRANSCRIPT, scripted

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")
httpx2 = pytest.importorskip("httpx2")

KEY = "sk-test"
MESSAGES = [{"role": "user", "content": "the quick brown fox"}]
# K is given, so that no policy does without drafts that are hardly ever right.
SPECULATION = {"method": "draft_model", "num_draft_tokens": 4}
EXTRA = {"ignore_eos": True, "speculation": SPECULATION}
CHAT = {"messages": MESSAGES, "max_tokens": 24, "temperature": 0, "extra_body": EXTRA}
RESPONSE = {
    "input": "the quick",
    "max_output_tokens": 24,
    "temperature": 0,
    "extra_body": EXTRA,
}
GREEDY = {
    "temperature": 0,
    "speculation": SPECULATION,
}  # Anthropic's SDK has no argument for it any more
MESSAGE = {"messages": MESSAGES, "max_tokens": 24, "extra_body": GREEDY}
EAGER = {"visibility": "provisional", "min_stability": 0.0, "max_updates_per_s": 100000}
TAILS = {"X-Outrider-Stream": "provisional; stability=0; max_updates_per_s=100000"}
TAIL_HEADERS = pytest.mark.parametrize("headers", [{}, TAILS], ids=["verified", "provisional"])
SCHEMA = {
    "type": "object",
    "properties": {"one": {"enum": ["left", "right"]}},
    "required": ["one"],
    "additionalProperties": False,
}
CHAT_TOOL = {"type": "function", "function": {"name": "pick", "parameters": SCHEMA}}


class Pick(BaseModel):
    """What structured outputs are parsed into."""

    one: Literal["left", "right"]


@pytest.fixture
async def connect(serve):
    """`await connect(Class, key, **config)`: a client of an SDK, wired to a server of its own."""
    async with AsyncExitStack() as stack:

        async def connect(kind, key=KEY, **config):
            raw = await serve(ServeConfig(drain_s=0.0, api_keys={KEY: "alice"}, **config))
            transport = httpx2.ASGITransport(app=raw.app)
            wire = await stack.enter_async_context(httpx2.AsyncClient(transport=transport))
            base = "http://localhost/v1" if kind is openai.AsyncOpenAI else "http://localhost"
            made = kind(base_url=base, api_key=key, http_client=wire, max_retries=0)
            made.server = raw.app.state.server
            made.model_name = made.server.model_name
            return made

        yield connect


@pytest.fixture
async def oai(connect):
    return await connect(openai.AsyncOpenAI)


@pytest.fixture
async def claude(connect):
    return await connect(anthropic.AsyncAnthropic)


@pytest.fixture(scope="module")
def blanks(llm):
    """Bias against blanks: a random model may fill JSON with them for ever."""
    ids = range(llm.tokenizer.vocab_size)
    return {str(i): -100 for i in ids if llm.tokenizer.decode([i]).isspace()}


async def test_openai_lists_the_model(oai):
    names = [model.id async for model in oai.models.list()]
    assert names == [oai.model_name]


@TAIL_HEADERS
async def test_raw_chat_stream_is_the_whole_answer(oai, headers):
    ask = {**CHAT, "model": oai.model_name}
    whole = await oai.chat.completions.create(**ask)
    stream = await oai.chat.completions.create(
        **ask, stream=True, stream_options={"include_usage": True}, extra_headers=headers
    )
    chunks = [chunk async for chunk in stream]
    told = [chunk.choices[0] for chunk in chunks if chunk.choices]
    text = "".join(choice.delta.content or "" for choice in told)
    assert text == whole.choices[0].message.content
    assert told[-1].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24
    tails = [chunk.outrider["tail"] for chunk in chunks if "tail" in extension(chunk)]
    assert bool(tails) == bool(headers)
    for tail in tails:
        assert 0 < tail["stability"] <= 1
        assert tail["committed_chars"] <= len(text)


def extension(chunk):
    """What the SDK keeps of a member that OpenAI does not have."""
    return getattr(chunk, "outrider", None) or {}


async def test_chat_tails_by_the_body(oai):
    stream = await oai.chat.completions.create(
        **CHAT, model=oai.model_name, stream=True, stream_options={"outrider": EAGER}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].outrider["stream"]["visibility"] == "provisional"
    assert any("tail" in extension(chunk) for chunk in chunks)


@TAIL_HEADERS
async def test_chat_stream_helper(oai, headers):
    ask = {**CHAT, "model": oai.model_name}
    longer = (await oai.chat.completions.create(**ask)).choices[0].message.content
    # The helper reads an answer that was cut off as a failure, so this one ends by a stop text.
    ask["stop"] = longer[len(longer) // 2 :][:3]
    whole = await oai.chat.completions.create(**ask)
    assert whole.choices[0].finish_reason == "stop"
    async with oai.chat.completions.stream(**ask, extra_headers=headers) as stream:
        deltas = [event.delta async for event in stream if event.type == "content.delta"]
        final = await stream.get_final_completion()
    assert "".join(deltas) == whole.choices[0].message.content
    assert final.choices[0].message.content == whole.choices[0].message.content


@TAIL_HEADERS
async def test_chat_tools(oai, blanks, headers):
    ask = {
        **CHAT,
        "model": oai.model_name,
        "max_tokens": 200,
        "logit_bias": blanks,
        "tools": [CHAT_TOOL],
        "tool_choice": {"type": "function", "function": {"name": "pick"}},
        "extra_body": {"speculation": SPECULATION},
    }
    whole = await oai.chat.completions.create(**ask)
    (call,) = whole.choices[0].message.tool_calls
    assert call.function.name == "pick"
    Pick.model_validate_json(call.function.arguments)
    async with oai.chat.completions.stream(**ask, extra_headers=headers) as stream:
        done = [e async for e in stream if e.type == "tool_calls.function.arguments.done"]
        final = await stream.get_final_completion()
    assert [(event.name, event.arguments) for event in done] == [("pick", call.function.arguments)]
    assert final.choices[0].message.tool_calls[0].function.arguments == call.function.arguments


async def test_chat_parsed_output(oai, blanks):
    ask = {
        **CHAT,
        "model": oai.model_name,
        "max_tokens": 200,
        "logit_bias": blanks,
        "response_format": Pick,
        "extra_body": {},
    }
    parsed = await oai.chat.completions.parse(**ask)
    assert isinstance(parsed.choices[0].message.parsed, Pick)
    async with oai.chat.completions.stream(**ask) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.parsed == parsed.choices[0].message.parsed


async def test_completions(oai):
    ask = {
        "model": oai.model_name,
        "prompt": "the quick",
        "max_tokens": 16,
        "temperature": 0,
        "extra_body": EXTRA,
    }
    whole = await oai.completions.create(**ask)
    stream = await oai.completions.create(**ask, stream=True)
    text = "".join([chunk.choices[0].text async for chunk in stream])
    assert text == whole.choices[0].text
    assert whole.usage.completion_tokens == 16


@TAIL_HEADERS
async def test_responses(oai, headers):
    ask = {**RESPONSE, "model": oai.model_name}
    whole = await oai.responses.create(**ask)
    assert (await oai.responses.retrieve(whole.id)).output_text == whole.output_text
    stream = await oai.responses.create(**ask, stream=True, extra_headers=headers)
    events = [event async for event in stream]
    durable = [event for event in events if not event.type.startswith("outrider:")]
    assert [event.sequence_number for event in durable] == list(range(len(durable)))
    text = "".join(e.delta for e in durable if e.type == "response.output_text.delta")
    assert text == whole.output_text
    assert durable[-1].response.output_text == text
    tails = [event for event in events if event.type == "outrider:output_text.tail"]
    assert bool(tails) == bool(headers)
    assert all(text[: tail.committed_chars] and tail.v > 0 for tail in tails)


async def test_tails_of_a_response_come_as_they_are(oai, monkeypatch):
    monkeypatch.setattr(response_run, "generate", scripted(TRANSCRIPT))
    ask = {
        **RESPONSE,
        "model": oai.model_name,
        "extra_headers": {"X-Outrider-Stream": "provisional"},
    }
    stream = await oai.responses.create(**ask, stream=True)
    events = [event async for event in stream]
    tails = [event for event in events if event.type == "outrider:output_text.tail"]
    assert [(tail.text, tail.base) for tail in tails] == [
        (" answer is likely no", 4),
        (", with caveats", 5),
    ]
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == "The answer is yes, with caveats." == events[-1].response.output_text


@TAIL_HEADERS
async def test_responses_stream_helper(oai, headers):
    ask = {**RESPONSE, "model": oai.model_name}
    whole = await oai.responses.create(**ask)
    async with oai.responses.stream(**ask, extra_headers=headers) as stream:
        events = [event async for event in stream]
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == whole.output_text


async def test_responses_are_resumed_by_retrieving(oai):
    ask = {**RESPONSE, "model": oai.model_name}
    events = [event async for event in await oai.responses.create(**ask, stream=True)]
    name = events[0].response.id
    again = await oai.responses.retrieve(name, stream=True, starting_after=3)
    assert [event async for event in again] == events[4:]


async def test_previous_response_id(oai):
    ask = {**RESPONSE, "model": oai.model_name}
    first = await oai.responses.create(**ask)
    second = await oai.responses.create(**ask, previous_response_id=first.id)
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    await oai.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        await oai.responses.retrieve(first.id)


async def test_responses_parsed_output(oai, blanks):
    parsed = await oai.responses.parse(
        model=oai.model_name,
        input="left or right?",
        max_output_tokens=200,
        text_format=Pick,
        extra_body={"logit_bias": blanks},
    )
    assert isinstance(parsed.output_parsed, Pick)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model": "another"}, openai.NotFoundError),
        ({"temperature": -1}, openai.BadRequestError),
        ({"extra_body": {"wrong": 1}}, openai.BadRequestError),
    ],
    ids=["model", "value", "field"],
)
async def test_errors_are_openais(oai, fields, error):
    ask = {**CHAT, "model": oai.model_name, **fields}
    with pytest.raises(error) as raised:
        await oai.chat.completions.create(**ask)
    assert raised.value.body["message"]
    assert raised.value.request_id
    with pytest.raises(error):
        await oai.chat.completions.create(**ask, stream=True)


async def test_wrong_keys_and_full_queues_are_openais(connect):
    wrong = await connect(openai.AsyncOpenAI, key="wrong")
    with pytest.raises(openai.AuthenticationError):
        await wrong.chat.completions.create(**CHAT, model=wrong.model_name)
    full = await connect(openai.AsyncOpenAI, max_concurrent=1, max_waiting=0)
    gate = full.server.gate
    async with gate.seat():
        with pytest.raises(openai.RateLimitError) as raised:
            await full.chat.completions.create(**CHAT, model=full.model_name)
    assert "retry-after" in raised.value.response.headers


@TAIL_HEADERS
async def test_raw_anthropic_stream_is_the_whole_message(claude, headers):
    ask = {**MESSAGE, "model": claude.model_name}
    whole = await claude.messages.create(**ask)
    assert whole.content[0].type == "text"
    stream = await claude.messages.create(**ask, stream=True, extra_headers=headers)
    events = [event async for event in stream]
    deltas = [event for event in events if event.type == "content_block_delta"]
    assert "".join(event.delta.text for event in deltas) == whole.content[0].text
    (end,) = (event for event in events if event.type == "message_delta")
    assert end.delta.stop_reason == whole.stop_reason
    assert end.usage.output_tokens == whole.usage.output_tokens


@TAIL_HEADERS
async def test_anthropic_stream_helper(claude, headers):
    ask = {**MESSAGE, "model": claude.model_name}
    whole = await claude.messages.create(**ask)
    async with claude.messages.stream(**ask, extra_headers=headers) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens


async def test_anthropic_tools_and_counting(claude):
    tools = [{"name": "pick", "input_schema": SCHEMA}]
    counted = await claude.messages.count_tokens(
        model=claude.model_name, messages=MESSAGES, tools=tools
    )
    assert counted.input_tokens > 0
    ask = {
        "model": claude.model_name,
        "messages": MESSAGES,
        "max_tokens": 24,
        "tools": tools,
        "tool_choice": {"type": "tool", "name": "pick"},
        "extra_body": GREEDY,
    }
    whole = await claude.messages.create(**ask)
    assert (whole.content[0].type, whole.content[0].name) == ("tool_use", "pick")
    async with claude.messages.stream(**ask) as stream:
        final = await stream.get_final_message()
    assert final.content[0].name == "pick"
    assert final.content[0].input == whole.content[0].input


async def test_errors_are_anthropics(connect, claude):
    ask = {**MESSAGE, "model": claude.model_name}
    with pytest.raises(anthropic.NotFoundError):
        await claude.messages.create(**{**ask, "model": "another"})
    with pytest.raises(anthropic.BadRequestError) as raised:
        await claude.messages.create(**{**ask, "max_tokens": 0})
    assert raised.value.type == "invalid_request_error"
    wrong = await connect(anthropic.AsyncAnthropic, key="wrong")
    with pytest.raises(anthropic.AuthenticationError):
        await wrong.messages.create(**ask)
