"""Usage of a prediction: tokens that the answer took, whoever drafted them; whole and streamed."""

import pytest

from outrider import SamplingParams
from tests.serve.wire import chunks

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MAX = 24
ASK = {"max_tokens": MAX, "temperature": 0, "ignore_eos": True}
PROMPT = "def main("
MESSAGES = [{"role": "user", "content": "the quick brown fox"}]
OTHER = 7  # a token that stands in neither answer
METHODS = [
    {"method": "prediction", "num_draft_tokens": 1},
    {"method": "prediction", "num_draft_tokens": 8, "width": 3},
    {"method": "prediction", "num_draft_tokens": 8, "policy": "off"},
    {
        "method": "cascade",
        "num_draft_tokens": 3,
        "drafter_options": {"parts": "ngram,prediction,draft_model"},
    },
]


@pytest.fixture(scope="module")
def answer(llm):
    """What the model says without speculation."""
    params = SamplingParams(max_tokens=MAX, ignore_eos=True)
    found = llm.generate(PROMPT, params, "off")[0].token_ids
    assert OTHER not in found
    return found


def edits(answer):
    """Name -> (prediction, how much of it the answer takes)."""
    return {
        "the answer": (answer, MAX),
        "one token replaced": ([*answer[:9], OTHER, *answer[10:]], MAX - 1),
        "more than the answer": ([*answer, *[OTHER] * 30], MAX),
        "its first half": (answer[: MAX // 2], MAX // 2),
        "nothing of it": ([OTHER] * 5, 0),
    }


async def details(client, path, stream=False, **fields):
    """The prediction's (accepted, rejected)."""
    body = {**ASK, "stream": stream, **fields}
    body |= {"prompt": PROMPT} if path == COMPLETIONS else {"messages": MESSAGES}
    if stream:
        body["stream_options"] = {"include_usage": True}
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    made = chunks(response)[-1] if stream else response.json()
    found = made["usage"]["completion_tokens_details"]
    return found["accepted_prediction_tokens"], found["rejected_prediction_tokens"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("name", edits([0] * MAX))
async def test_what_the_answer_took_is_counted_however_it_was_drafted(
    client, answer, name, method, stream
):
    prediction, taken = edits(answer)[name]
    speculation = {**method, "prediction_token_ids": prediction}
    found = await details(client, COMPLETIONS, stream, speculation=speculation)
    assert found == (taken, len(prediction) - taken)


@pytest.mark.parametrize("stream", [False, True])
async def test_each_choice_of_each_prompt_takes_and_rejects(client, answer, stream):
    prediction, taken = edits(answer)["more than the answer"]
    speculation = {**METHODS[0], "prediction_token_ids": prediction}
    fields = {"n": 2, "prompt": [PROMPT, PROMPT], "speculation": speculation}
    body = {**ASK, **fields, "stream": stream, "temperature": 0}
    if stream:
        body["stream_options"] = {"include_usage": True}
    response = await client.post(COMPLETIONS, json=body)
    assert response.status_code == 200, response.text
    made = chunks(response)[-1] if stream else response.json()
    found = made["usage"]["completion_tokens_details"]
    assert found["accepted_prediction_tokens"] == 4 * taken
    assert found["rejected_prediction_tokens"] == 4 * (len(prediction) - taken)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("unit", ["token", "line"])
async def test_a_chat_counts_the_same_streamed_and_in_units(client, stream, unit):
    prediction = [OTHER, 8, 9]
    speculation = {"method": "prediction", "prediction_token_ids": prediction}
    fields = {"logit_bias": {"7": 100, "8": 100, "9": 100}, "temperature": 1.0, "seed": 3}
    found = await details(client, CHAT, stream, speculation=speculation, **fields)
    assert found == (3, 0), "all are sampled again and again; each is taken once"
    assert await details(client, CHAT, stream) == (0, 0)


async def test_the_end_of_the_answer_ends_what_is_taken(client, answer):
    speculation = {**METHODS[1], "prediction_token_ids": answer}
    for max_tokens in (1, 5, 17):
        fields = {"max_tokens": max_tokens, "speculation": speculation}
        found = await details(client, COMPLETIONS, **fields)
        assert found == (max_tokens, MAX - max_tokens)
