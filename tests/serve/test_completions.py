"""/v1/completions: many prompts, echo, legacy logprobs; streamed equal to whole."""

import asyncio

import pytest

from outrider.serve.completions import merged, together
from tests.serve.wire import chunks

PATH = "/v1/completions"
ASK = {"prompt": "def main(", "max_tokens": 16, "seed": 3, "ignore_eos": True}


async def told(client, **fields):
    response = await client.post(PATH, json={**ASK, **fields})
    assert response.status_code == 200, response.text
    return response.json()


async def streamed(client, **fields):
    return chunks(await client.post(PATH, json={**ASK, "stream": True, **fields}))


async def refused(client, **fields):
    response = await client.post(PATH, json={**ASK, **fields})
    assert response.status_code == 400, response.text
    return response.json()["error"]


def texts_of(found):
    texts = {}
    for chunk in found:
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return texts


async def test_shape_of_an_answer(client):
    answer = await told(client)
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    usage = answer["usage"]
    assert usage["completion_tokens"] == 16
    assert usage["total_tokens"] == usage["prompt_tokens"] + 16
    assert answer["outrider"]["exactness"]["mode"] == "exact"


async def test_sixteen_tokens_unless_said_otherwise(client):
    assert (await told(client, max_tokens=None))["usage"]["completion_tokens"] == 16


async def test_text_and_token_ids_are_the_same_prompt(client, llm):
    ids = llm.tokenizer.encode(ASK["prompt"])
    first, second = await told(client), await told(client, prompt=ids)
    assert first["choices"] == second["choices"]
    assert first["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize("speculation", ["off", "draft_model"])
async def test_prompts_and_choices_have_their_indices_streamed_or_not(client, speculation):
    prompts = ["the quick", "brown fox", "return"]
    fields = {"prompt": prompts, "n": 2, "temperature": 1, "speculation": speculation}
    whole = await told(client, **fields)
    assert [choice["index"] for choice in whole["choices"]] == list(range(6))
    alone = [await told(client, **{**fields, "prompt": prompt}) for prompt in prompts]
    expected = [choice["text"] for answer in alone for choice in answer["choices"]]
    assert [choice["text"] for choice in whole["choices"]] == expected
    total = sum(answer["usage"]["total_tokens"] for answer in alone)
    assert whole["usage"]["total_tokens"] == total
    found = await streamed(client, stream_options={"include_usage": True}, **fields)
    assert texts_of(found) == dict(enumerate(expected))
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["total_tokens"] == total
    ends = [c["finish_reason"] for chunk in found for c in chunk["choices"] if c["finish_reason"]]
    assert ends == ["length"] * 6


async def test_a_list_of_token_lists_is_many_prompts(client):
    answer = await told(client, prompt=[[5, 6, 7], [8, 9]])
    assert len(answer["choices"]) == 2
    assert answer["usage"]["prompt_tokens"] == 5


async def test_echo_puts_the_prompt_before_the_text(client):
    text = (await told(client))["choices"][0]["text"]
    assert (await told(client, echo=True))["choices"][0]["text"] == ASK["prompt"] + text
    assert texts_of(await streamed(client, echo=True)) == {0: ASK["prompt"] + text}


@pytest.mark.parametrize("stream", [False, True])
async def test_legacy_logprobs(client, stream):
    fields = {"logprobs": 2, "temperature": 0, "speculation": "draft_model"}
    whole = await told(client, **fields)
    text, found = whole["choices"][0]["text"], whole["choices"][0]["logprobs"]
    if stream:
        parts = [c["logprobs"] for x in await streamed(client, **fields) for c in x["choices"]]
        parts = [part for part in parts if part is not None]
        joined = {key: [v for part in parts for v in part[key]] for key in found}
        assert joined["tokens"] == found["tokens"]
        assert joined["text_offset"] == found["text_offset"]
        assert joined["token_logprobs"] == pytest.approx(found["token_logprobs"], abs=1e-4)
        return
    assert len(found["tokens"]) == len(found["token_logprobs"]) == 16
    assert found["text_offset"] == sorted(found["text_offset"])
    for token, offset, logprob, top in zip(
        found["tokens"],
        found["text_offset"],
        found["token_logprobs"],
        found["top_logprobs"],
        strict=True,
    ):
        if not token.startswith("bytes:"):
            assert text[offset : offset + len(token)] == token
        assert top[token] == logprob == max(top.values())  # greedy
        assert 2 <= len(top) <= 3


async def test_stop_texts_end_it(client):
    text = (await told(client))["choices"][0]["text"]
    answer = await told(client, stop=text[6:8])
    assert answer["choices"][0]["text"] == text[: text.index(text[6:8])]
    assert answer["choices"][0]["finish_reason"] == "stop"
    found = await streamed(client, stop=text[6:8], speculation="draft_model")
    assert texts_of(found)[0] == answer["choices"][0]["text"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [999999]}, "prompt"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"messages": [{}]}, "messages"),
        ({"stream_options": {}}, "stream_options"),
    ],
    ids=str,
)
async def test_what_is_not_honoured_is_refused_by_name(client, fields, named):
    assert named in (await refused(client, **fields))["message"]


async def test_best_of_n_is_n(client):
    answer = await told(client, best_of=2, n=2, temperature=1)
    assert len(answer["choices"]) == 2


async def test_the_first_chunk_says_what_is_in_force(client):
    first, *others = await streamed(client)
    assert first["outrider"]["stream"]["visibility"] == "verified"
    assert all("stream" not in chunk.get("outrider", {}) for chunk in others)
    assert others[-1]["outrider"]["exactness"]["mode"] == "exact"
    assert "speculative_decoding" in others[-1]["metrics"]


async def test_one_bad_prompt_refuses_all_and_leaves_nothing_behind(client):
    """The fixture checks that the engine is empty again."""
    fields = {"prompt": [[5, 6], [7, 999999]], "max_tokens": 200}
    assert "999999" in (await refused(client, **fields))["message"]
    assert "999999" in (await refused(client, stream=True, **fields))["message"]


async def test_a_failure_ends_what_runs_beside_it():
    ended = []

    async def forever():
        try:
            while True:
                yield 1
                await asyncio.sleep(0)
        finally:
            ended.append("forever")

    async def failing():
        yield 2
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        async for _ in merged([forever(), failing()]):
            pass
    assert ended == ["forever"]


async def test_leaving_early_ends_all_streams():
    ended = []

    async def counting(name):
        try:
            for number in range(1000):
                yield number
                await asyncio.sleep(0)
        finally:
            ended.append(name)

    items = merged([counting("a"), counting("b")])
    assert await anext(items) == (0, 0)
    await items.aclose()
    assert sorted(ended) == ["a", "b"]


async def test_together_cancels_the_rest_of_a_failure():
    async def failing():
        raise ValueError("no")

    waiting = asyncio.get_running_loop().create_future()
    with pytest.raises(ValueError, match="no"):
        await together([waiting, failing()])
    assert waiting.cancelled()


@pytest.mark.parametrize("speculation", ["off", "draft_model"])
async def test_steps_are_told_on_request(client, speculation):
    options = {"outrider": {"steps": True}}
    fields = {"n": 2, "temperature": 0.8, "speculation": speculation}
    found = await streamed(client, stream_options=options, **fields)
    assert found[0]["outrider"]["stream"]["steps"] is True
    told = {0: "", 1: ""}
    for chunk in found:
        if "step" in chunk.get("outrider", {}):
            told[chunk["choices"][0]["index"]] += "".join(chunk["outrider"]["step"]["tokens"])
    assert told == texts_of(found)
    plain = await streamed(client, **fields)
    assert texts_of(plain) == told
    assert not any("step" in chunk.get("outrider", {}) for chunk in plain)


async def test_an_answer_of_one_chunk_says_what_is_in_force(client):
    (chunk,) = await streamed(client, max_tokens=1)
    assert set(chunk["outrider"]) == {"stream", "exactness"}
