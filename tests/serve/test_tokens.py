"""/tokenize, /detokenize and /v1/models."""

import pytest

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


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": 4}, "prompt"),
        ("/tokenize", {"prompt": "a", "prmopt": "b"}, "prmopt"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
        ("/tokenize", {"messages": []}, "messages"),
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
