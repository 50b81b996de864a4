"""/tokenize, /detokenize and /v1/models."""

import pytest

from outrider.serve import chat
from outrider.serve.schemas_chat import ChatBody

TEXT = "def main(argv): é€🙂"


async def test_text_goes_there_and_back(client, llm):
    made = (await client.post("/tokenize", json={"prompt": TEXT})).json()
    assert made["tokens"] == llm.tokenizer.encode(TEXT)
    assert made["count"] == len(made["tokens"])
    assert made["max_model_len"] == llm.engine.max_model_len
    assert made["token_strs"] is None
    back = (await client.post("/detokenize", json={"tokens": made["tokens"]})).json()
    assert back == {"prompt": TEXT}


async def test_token_strings(client, llm):
    body = {"prompt": "def main", "return_token_strs": True, "model": llm.engine.spec.name}
    made = (await client.post("/tokenize", json=body)).json()
    assert made["token_strs"] == [llm.tokenizer.token_text(i) for i in made["tokens"]]


async def test_messages_go_through_the_template(client, llm):
    messages = [{"role": "user", "content": "def"}]
    made = (await client.post("/tokenize", json={"messages": messages})).json()
    assert made["tokens"] == llm.tokenizer.apply_chat_template(messages)
    back = (await client.post("/detokenize", json={"tokens": made["tokens"]})).json()
    assert back["prompt"].endswith("assistant: ")


USER = {"role": "user", "content": [{"type": "text", "text": "def"}]}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TALK = [
    {"role": "developer", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "found"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
KNOWS_TOOLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{{ mood }}{% for m in messages %}"
    "{{ m.role }}: {{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}\n{% endfor %}"
)


@pytest.mark.parametrize("template", [None, KNOWS_TOOLS])
@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [USER]},
        {"messages": [USER], "tools": TOOLS},
        {"messages": [USER], "tools": TOOLS, "tool_choice": "none"},
        {"messages": TALK, "tools": TOOLS, "tool_choice": "required"},
        {"messages": TALK, "chat_template_kwargs": {"mood": "calm"}},
    ],
)
async def test_messages_become_the_prompt_of_chat(client, llm, monkeypatch, template, fields):
    if template is not None:
        monkeypatch.setattr(llm.tokenizer.backend, "chat_template", template)
    here = client.app.state.server
    tokens = (await client.post("/tokenize", json=fields)).json()["tokens"]
    assert tuple(tokens) == chat.turn_of(here, ChatBody(**fields), "").ask.prompt
    said = {**fields, "max_tokens": 1}
    if fields.get("tool_choice") != "required":  # whose grammar wants more than a token
        answer = (await client.post("/v1/chat/completions", json=said)).json()
        assert answer["usage"]["prompt_tokens"] == len(tokens)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, "prompt"),
        ("/tokenize", {"prompt": 4}, "prompt"),
        ("/tokenize", {"prompt": "a", "prmopt": "b"}, "prmopt"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
        ("/tokenize", {"prompt": "a", "tool_choice": "none"}, "tool_choice"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user"}]}, None),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]},
         "tools.0.type"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}],
                       "tool_choice": "required"}, "tool_choice"),
        ("/tokenize", {"messages": [{"role": 4}]}, None),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}],
                       "chat_template_kwargs": {"tokenize": True}}, None),
        ("/detokenize", {"tokens": [300]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0"),
    ],
)  # fmt: skip
async def test_wrong_bodies(client, path, body, param):
    response = await client.post(path, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert param is None or error["param"] == param


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_another_model_is_not_served(client, path):
    body = {"model": "other", "prompt": "a", "tokens": [5]}
    del body["tokens" if path == "/tokenize" else "prompt"]
    response = await client.post(path, json=body)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


async def test_models(serve, llm):
    client = await serve(served_model_name="org/tiny")
    page = (await client.get("/v1/models")).json()
    (card,) = page["data"]
    assert page["object"] == "list"
    assert card["id"] == "org/tiny"
    assert card["root"] == llm.engine.spec.name
    assert card["max_model_len"] == llm.engine.max_model_len
    assert (await client.get("/v1/models/org/tiny")).json() == card
    missing = await client.get("/v1/models/gpt-4")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_half_a_character_is_refused(client):
    answer = await client.post(
        "/tokenize",
        content=b'{"prompt": "\\ud800"}',
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 400
    assert "surrogate" in answer.json()["error"]["message"]
