"""/v1/chat/completions: shapes, streamed equal to whole, fields honoured or refused by name."""

import json

import pytest

from outrider.serve import chat
from outrider.serve.calls import Call, Reply, gather
from outrider.serve.schemas_chat import ChatBody
from outrider.stream.events import Committed, Tail
from tests.serve.streams import Visit
from tests.serve.wire import chunks, frames, put_together

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "the quick brown fox"}]
ASK = {"messages": MESSAGES, "max_tokens": 24, "seed": 7, "ignore_eos": True}
SPECULATIONS = ["off", "ngram", "draft_model", {"method": "draft_model", "width": 2}]
FUNCTION = {
    "name": "pick",
    "description": "Picks one.",
    "parameters": {
        "type": "object",
        "properties": {"one": {"enum": ["left", "right"]}},
        "required": ["one"],
        "additionalProperties": False,
    },
}
TOOLS = [{"type": "function", "function": FUNCTION}]
PROVISIONAL = {"visibility": "provisional", "min_stability": 0.0, "max_updates_per_s": 100000}


async def ask(client, **fields):
    response = await client.post(PATH, json={**ASK, **fields})
    assert response.status_code == 200, response.text
    return response


async def told(client, **fields):
    return (await ask(client, **fields)).json()


async def streamed(client, **fields):
    return chunks(await ask(client, stream=True, **fields))


async def refused(client, status=400, **fields):
    response = await client.post(PATH, json={**ASK, **fields})
    assert response.status_code == status, response.text
    return response.json()["error"]


@pytest.fixture(scope="module")
def blanks(llm):
    """Bias against blanks: a random model may fill JSON with them for ever."""
    ids = range(llm.tokenizer.vocab_size)
    return {str(i): -100.0 for i in ids if llm.tokenizer.decode([i]).isspace()}


async def test_shape_of_an_answer(client):
    answer = await told(client)
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == (
        "chat.completion",
        client.app.state.server.model_name,
    )
    (choice,) = answer["choices"]
    assert choice["index"] == 0
    assert choice["message"]["role"] == "assistant"
    assert isinstance(choice["message"]["content"], str)
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    usage = answer["usage"]
    assert usage["completion_tokens"] == 24
    assert usage["total_tokens"] == usage["prompt_tokens"] + 24
    assert answer["outrider"]["exactness"] == {"mode": "exact", "method": None, "params": {}}


@pytest.mark.parametrize("speculation", SPECULATIONS, ids=str)
@pytest.mark.parametrize("temperature", [0, 0.9])
async def test_streamed_text_is_the_whole_text(client, speculation, temperature):
    fields = {"speculation": speculation, "temperature": temperature}
    whole = (await told(client, **fields))["choices"][0]
    plain = (await told(client, speculation="off", temperature=temperature))["choices"][0]
    parts = put_together(await streamed(client, **fields))[0]
    assert parts.text == whole["message"]["content"] == plain["message"]["content"]
    assert parts.finish_reason == whole["finish_reason"]


async def test_chunks_without_opt_in_are_the_standard_ones(client):
    found = await streamed(client)
    first, *middle, last = found
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first["outrider"]["stream"]["visibility"] == "verified"
    for chunk in found:
        assert chunk["object"] == "chat.completion.chunk"
        assert "usage" not in chunk
        assert {"id", "created", "model"} <= chunk.keys()
    assert all(chunk["choices"][0]["delta"]["content"] for chunk in middle)
    assert all("outrider" not in chunk for chunk in middle)
    assert last["choices"][0]["delta"] == {}
    assert last["outrider"]["exactness"]["mode"] == "exact"
    assert len({chunk["id"] for chunk in found}) == 1


async def test_usage_comes_last_and_equals_the_whole_answers(client):
    *found, last = await streamed(client, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in found)
    assert last["choices"] == []
    usage = (await told(client))["usage"]
    assert last["usage"]["completion_tokens"] == usage["completion_tokens"] == 24
    assert last["usage"]["total_tokens"] == usage["total_tokens"]


async def test_cached_tokens_are_told(client):
    await told(client)
    usage = (await told(client))["usage"]
    assert 0 < usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]


async def test_cache_salt_shares_no_cache(client):
    await told(client)
    usage = (await told(client, cache_salt="mine"))["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0


async def test_seeds_are_reproducible_and_differ(client):
    texts = [
        (await told(client, temperature=1, seed=seed))["choices"][0]["message"]["content"]
        for seed in (1, 1, 2, -1)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


async def test_choices_of_n_have_their_indices_streamed_or_not(client):
    whole = await told(client, n=3, temperature=1)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert len(set(texts)) == 3
    assert whole["usage"]["completion_tokens"] == 72
    parts = put_together(await streamed(client, n=3, temperature=1))
    assert [parts[index].text for index in range(3)] == texts


@pytest.mark.parametrize("speculation", ["off", "draft_model"])
async def test_stop_texts_across_chunks_never_leak(client, speculation):
    full = (await told(client, max_tokens=60))["choices"][0]["message"]["content"]
    stop = full[10:14]
    fields = {"max_tokens": 60, "stop": [stop], "speculation": speculation}
    choice = (await told(client, **fields))["choices"][0]
    assert choice["message"]["content"] == full[: full.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    parts = put_together(await streamed(client, **fields))[0]
    assert (parts.text, parts.finish_reason) == (choice["message"]["content"], "stop")


async def test_characters_are_never_broken(client):
    """A random model writes bytes; joined they must read as one decoding does."""
    for seed in range(2):
        fields = {"temperature": 1.5, "seed": seed, "max_tokens": 48, "speculation": "draft_model"}
        found = await streamed(client, **fields)
        whole = (await told(client, **fields))["choices"][0]["message"]["content"]
        assert put_together(found)[0].text == whole


async def test_logprobs(client):
    answer = await told(client, logprobs=True, top_logprobs=3, max_tokens=8, temperature=0)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 8
    for token in content:
        assert [entry["logprob"] for entry in token["top_logprobs"]] == sorted(
            (entry["logprob"] for entry in token["top_logprobs"]), reverse=True
        )
        assert token["top_logprobs"][0]["bytes"] == token["bytes"]  # greedy
        assert token["logprob"] == token["top_logprobs"][0]["logprob"] <= 0
    joined = bytes(byte for token in content for byte in token["bytes"])
    assert joined.decode(errors="replace") == answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize("speculation", ["off", "draft_model"])
async def test_streamed_logprobs_are_the_whole_ones(client, speculation):
    fields = {"logprobs": True, "top_logprobs": 2, "speculation": speculation, "temperature": 1}
    whole = (await told(client, **fields))["choices"][0]["logprobs"]["content"]
    parts = put_together(await streamed(client, **fields))[0].logprobs
    assert [token["token"] for token in parts] == [token["token"] for token in whole]
    assert len(parts) == 24
    total = sum(token["logprob"] for token in parts)
    assert total == pytest.approx(sum(token["logprob"] for token in whole), abs=1e-3)


async def test_logit_bias_and_bad_words_are_honoured(client, llm):
    token = llm.tokenizer.encode("q", add_special_tokens=False)[0]
    answer = await told(client, logit_bias={str(token): 1000.0}, max_tokens=4)
    assert answer["choices"][0]["message"]["content"] == "qqqq"


async def test_max_completion_tokens_is_the_limit(client):
    answer = await told(client, max_tokens=None, max_completion_tokens=3)
    assert answer["usage"]["completion_tokens"] == 3
    error = await refused(client, max_completion_tokens=3)
    assert "max_completion_tokens" in error["message"]


async def test_null_is_the_same_as_nothing(client):
    nulls = dict.fromkeys(
        ("stop", "n", "temperature", "tools", "tool_choice", "response_format", "logit_bias",
         "functions", "audio", "user", "stream_options", "outrider", "best_of")
    )  # fmt: skip
    first, second = await told(client), await told(client, **nulls)
    assert first["choices"] == second["choices"]


async def test_what_cannot_change_the_answer_is_ignored(client):
    ignored = {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"}
    assert (await told(client, **ignored))["choices"] == (await told(client))["choices"]


@pytest.mark.parametrize(
    ("fields", "param", "remedy"),
    [
        ({"functions": [{}]}, "functions", "tools"),
        ({"audio": {}}, "audio", "text"),
        ({"modalities": ["audio"]}, "modalities", "text"),
        ({"use_beam_search": True}, "use_beam_search", "leave it out"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "chat_template_kwargs"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "leave it out"),
        ({"no_such_field": 1}, "no_such_field", "Unrecognized"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": -1}, "temperature", ">= 0"),
        ({"n": 0}, "n", "1"),
        ({"n": True}, "n", "integer"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
        ({"seed": 2**70}, "seed", "must lie"),
        ({"stop": [""]}, "stop", "non-empty"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"tool_choice": "auto", "tools": [{"type": "web"}]}, "tools.0.type", "function"),
        ({"tool_choice": "required"}, "tool_choice", "tools"),
        ({"chat_template_kwargs": {"tools": []}}, None, "drop it"),
        ({"speculation": "nonsense"}, None, "unknown method"),
        ({"speculation": "off", "outrider": {"speculation": "off"}}, None, "give one"),
        ({"outrider": {"speculation": {"wdith": 2}}}, None, "did you mean 'width'"),
        ({"presence_penalty": 1e300}, "presence_penalty", "less than or equal to 2"),
        ({"frequency_penalty": -1e300}, "frequency_penalty", "greater than or equal to -2"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"logit_bias": {"5": 1e300}}, "logit_bias.5", "less than or equal to"),
        ({"logit_bias": {"99999": 1}}, None, "99999"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user"}]}, None, "content"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages.0.role", "user"),
        ({"response_format": {"type": "xml"}}, None, "json_schema"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, None, "one of them"),
        ({"stream": True, "stream_options": {"outrider": {"visible": 1}}}, None, "visibility"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
async def test_what_is_not_honoured_is_refused_by_name(client, fields, param, remedy):
    error = await refused(client, **fields)
    assert error["type"] == "invalid_request_error"
    assert remedy in error["message"]
    if param is not None:
        assert error["param"] == param


async def test_parts_that_are_no_text_are_refused(client):
    image = {"type": "image_url", "image_url": {"url": "http://x"}}
    error = await refused(client, messages=[{"role": "user", "content": [image]}])
    assert "image_url" in error["message"]
    parts = [{"type": "text", "text": "the quick"}, {"type": "text", "text": "fox"}]
    one = await told(client, messages=[{"role": "user", "content": parts}])
    two = await told(client, messages=[{"role": "user", "content": "the quick\nfox"}])
    assert one["choices"] == two["choices"]


async def test_half_a_surrogate_pair_is_refused(client):
    for fields in ({"stop": ["\ud800"]}, {"messages": [{"role": "user", "content": "\udc00"}]}):
        body = json.dumps({**ASK, **fields})
        headers = {"Content-Type": "application/json"}
        response = await client.post(PATH, content=body, headers=headers)
        assert response.status_code == 400
        assert "surrogate" in response.json()["error"]["message"]


async def test_settings_that_leave_no_token_are_the_requests_own_fault(client):
    error = await refused(client, guided_grammar="root ::= root")
    assert error["code"] == "generation_failed"
    assert "loosen one of these settings" in error["message"]


async def test_other_models_are_not_found(client):
    error = await refused(client, 404, model="gpt-99")
    assert error["code"] == "model_not_found"


async def test_keys_are_asked_for_and_give_the_tenant(serve):
    client = await serve(api_keys={"k1": "chat-one", "k2": "chat-two"})
    await refused(client, 401)
    cached = []
    for key in ("k1", "k1", "k2"):
        response = await client.post(PATH, json=ASK, headers={"Authorization": f"Bearer {key}"})
        cached.append(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached[1] > 0
    assert cached[0] == cached[2] == 0


async def test_lossy_rules_are_labelled_and_can_be_forbidden(client, serve):
    rule = {"method": "draft_model", "num_draft_tokens": 4, "verifier": "typical"}
    answer = await told(client, speculation=rule)
    made = answer["outrider"]["exactness"]
    assert (made["mode"], made["method"]) == ("lossy", "typical")
    assert made["params"]
    found = await streamed(client, speculation=rule)
    assert found[-1]["outrider"]["exactness"] == made
    num_relaxed = made.pop("relaxed_tokens")
    counts = answer["metrics"]["speculative_decoding"]
    assert 0 < num_relaxed <= counts["num_accepted_draft_tokens"]
    assert found[0]["outrider"]["exactness"] == made
    page = (await client.get("/metrics")).text
    assert f'verifier="typical"}} {float(2 * num_relaxed)}' in page
    strict = await serve(allow_lossy=False)
    error = await refused(strict, speculation=rule)
    assert "sampled" in error["message"]
    await told(strict)


async def test_synthetic_rules_must_be_allowed(client, serve):
    rule = {"method": "draft_model", "verifier": "synthetic"}
    error = await refused(client, speculation=rule)
    assert "allow-synthetic" in error["message"]
    answer = await told(await serve(allow_synthetic=True), speculation=rule)
    assert answer["outrider"]["exactness"]["mode"] == "synthetic"


async def test_metrics_have_vllms_names(client):
    answer = await told(client, speculation={"method": "draft_model", "num_draft_tokens": 3})
    found = answer["metrics"]["speculative_decoding"]
    assert found["num_spec_tokens"] == 3
    assert sum(found["acceptance_histogram"]) == found["num_spec_steps"]
    accepted = sum(i * count for i, count in enumerate(found["acceptance_histogram"]))
    assert accepted == found["num_accepted_draft_tokens"]
    assert found["draft_acceptance_rate"] == pytest.approx(accepted / found["num_draft_tokens"])
    assert answer["timings"] == {"draft_n": found["num_draft_tokens"], "draft_n_accepted": accepted}
    plain = (await told(client, speculation="off"))["metrics"]["speculative_decoding"]
    assert (plain["mean_acceptance_length"], plain["num_draft_tokens"]) == (1.0, 0)


@pytest.mark.parametrize(
    "more",
    [
        {"n": 2},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"logprobs": True},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
    ],
    ids=lambda more: next(iter(more)),
)
async def test_what_openai_refuses_beside_a_prediction(client, more):
    error = await refused(client, prediction={"type": "content", "content": "so"}, **more)
    assert error["param"] == next(iter(more))
    assert "prediction" in error["message"]


async def test_each_token_of_a_prediction_is_counted_once(client):
    """However often it was drafted."""
    text = (await told(client, temperature=0))["choices"][0]["message"]["content"]
    halves = [text[: len(text) // 3], text[len(text) // 2 :]]  # what comes between is not foreseen
    prediction = {"type": "content", "content": "".join(halves)}
    drafted = {"num_draft_tokens": 8, "policy": "fixed", "width": 3, "method": "prediction"}
    answer = await told(client, temperature=0, prediction=prediction, speculation=drafted)
    details = answer["usage"]["completion_tokens_details"]
    tokens = (await client.post("/tokenize", json={"prompt": prediction["content"]})).json()
    accepted, drafted = details["accepted_prediction_tokens"], answer["timings"]
    assert 0 < drafted["draft_n_accepted"] <= accepted < tokens["count"]
    assert details["rejected_prediction_tokens"] == tokens["count"] - accepted
    assert drafted["draft_n"] > tokens["count"], "or this shows nothing"


async def test_prediction_of_the_answer_is_accepted(client):
    text = (await told(client, temperature=0))["choices"][0]["message"]["content"]
    prediction = {"type": "content", "content": text}
    answer = await told(client, temperature=0, prediction=prediction)
    details = answer["usage"]["completion_tokens_details"]
    assert answer["choices"][0]["message"]["content"] == text
    assert details["accepted_prediction_tokens"] > 0
    tokens = (await client.post("/tokenize", json={"prompt": text})).json()
    both = details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"]
    assert both == tokens["count"]
    others = (await told(client))["usage"]["completion_tokens_details"]
    assert others["accepted_prediction_tokens"] == others["rejected_prediction_tokens"] == 0


async def test_json_schema_constrains_the_answer(client, blanks):
    schema = FUNCTION["parameters"]
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    fields = {"response_format": form, "logit_bias": blanks, "max_tokens": 60, "ignore_eos": False}
    answer = await told(client, **fields)
    text = answer["choices"][0]["message"]["content"]
    assert json.loads(text)["one"] in ("left", "right")
    assert put_together(await streamed(client, **fields))[0].text == text


async def test_choices_constrain_the_answer(client):
    texts = ['say "yes"\n', "no"]
    answer = await told(client, structured_outputs={"choice": texts}, ignore_eos=False)
    assert answer["choices"][0]["message"]["content"] in texts
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "pick"}}], ids=str
)
async def test_forced_calls_are_valid_streamed_or_not(client, blanks, choice):
    fields = {
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "logit_bias": blanks,
        "max_tokens": 80,
        "ignore_eos": False,
        "speculation": "draft_model",
    }
    made = (await told(client, **fields))["choices"][0]
    assert made["finish_reason"] == "tool_calls"
    assert made["message"]["content"] is None
    (call,) = made["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["function"]["name"] == "pick"
    assert json.loads(call["function"]["arguments"])["one"] in ("left", "right")
    parts = put_together(await streamed(client, **fields))[0]
    assert parts.calls == [("pick", call["function"]["arguments"])]
    assert (parts.text, parts.finish_reason) == ("", "tool_calls")


async def test_calls_in_free_text_are_read(client):
    """Commits of any size, in place of a model that was trained to call."""
    text = 'Sure. <tool_call>{"name": "pick", "arguments": {"one": "left"}}</tool_call>'
    body = ChatBody(**{**ASK, "tools": TOOLS})
    turn = chat.turn_of(client.app.state.server, body, "")
    pieces = turn.pieces()
    deltas = [
        chat.delta_of(piece)
        for start in range(0, len(text), 5)
        for piece in pieces.take(Committed("r", text=text[start : start + 5]))
    ]
    assert "".join(delta.get("content", "") for delta in deltas) == "Sure."
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert calls[0]["function"]["name"] == "pick"
    assert calls[0]["id"].startswith("call_")
    arguments = "".join(call["function"]["arguments"] for call in calls)
    assert json.loads(arguments) == {"one": "left"}
    assert chat.finish_reason("stop", pieces.num_calls) == "tool_calls"
    assert chat.finish_reason("length", pieces.num_calls) == "length"


async def test_one_call_where_parallel_ones_are_off(client):
    call = '<tool_call>{"name": "pick", "arguments": {"one": "left"}}</tool_call>'
    body = ChatBody(**{**ASK, "tools": TOOLS, "parallel_tool_calls": False})
    turn = chat.turn_of(client.app.state.server, body, "")
    pieces = turn.pieces()
    found = pieces.take(Committed("r", text=call * 2 + " and", finish_reason="stop"))
    assert gather(found) == Reply(" and", (Call("pick", '{"one": "left"}'),))


async def test_tools_are_told_of_and_results_read(client):
    """The tiny template knows no tools: they, calls and results come as text."""
    call = {"id": "c1", "type": "function", "function": {"name": "pick", "arguments": '{"one": 1}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "left it is"},
    ]
    with_tools = await told(client, messages=messages, tools=TOOLS)
    without = await told(client, messages=messages, tools=TOOLS, tool_choice="none")
    more = with_tools["usage"]["prompt_tokens"] - without["usage"]["prompt_tokens"]
    assert more > 100
    assert without["usage"]["prompt_tokens"] > (await told(client))["usage"]["prompt_tokens"]


async def test_tails_change_nothing_that_is_committed(client):
    fields = {"max_tokens": 60, "speculation": "draft_model", "temperature": 0}
    plain = put_together(await streamed(client, **fields))[0]
    options = {"include_usage": True, "outrider": PROVISIONAL}
    found = await streamed(client, stream_options=options, **fields)
    assert found[0]["outrider"]["stream"]["visibility"] == "provisional"
    assert put_together(found)[0] == plain
    num_chars, version = 0, 0
    for chunk in found:
        for choice in chunk["choices"]:
            num_chars += len(choice["delta"].get("content") or "")
        tail = chunk.get("outrider", {}).get("tail")
        if tail is not None:
            assert chunk["choices"][0]["delta"] == {}
            assert tail["committed_chars"] == num_chars
            assert tail["v"] > version
            version = tail["v"]
    stats = found[-1]["usage"]["outrider"]["stream"]
    tails = [chunk for chunk in found if "tail" in chunk.get("outrider", {})]
    assert stats["tail_updates"] == len(tails)


async def test_shape_of_a_tail(client):
    options = {"outrider": PROVISIONAL}
    body = ChatBody(**{**ASK, "stream": True, "stream_options": options})
    server = client.app.state.server
    made = chat.Chunks(server, body, chat.turn_of(server, body, ""))
    tail = Tail(
        request_id="r", index=0, token_ids=(5, 6), text=" is", committed_chars=3,
        stability=0.9, source="draft", version=1,
    )  # fmt: skip
    begin, told = [*made.take(tail)]
    assert begin["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    (choice,) = told["choices"]
    assert (choice["index"], choice["delta"], choice["finish_reason"]) == (0, {}, None)
    assert told["outrider"]["tail"] == {
        "committed_chars": 3, "text": " is", "n_tokens": 2, "stability": 0.9, "source": "draft",
        "v": 1,
    }  # fmt: skip


async def test_the_header_opts_in_and_is_echoed(client):
    body = {**ASK, "stream": True}
    header = {"X-Outrider-Stream": "provisional; stability=0.5"}
    first = chunks(await client.post(PATH, json=body, headers=header))[0]
    assert first["outrider"]["stream"]["visibility"] == "provisional"
    assert first["outrider"]["stream"]["min_stability"] == 0.5
    bad = await client.post(PATH, json=body, headers={"X-Outrider-Stream": "loud"})
    assert bad.status_code == 400
    ignored = await client.post(PATH, json=ASK, headers={"X-Outrider-Stream": "loud"})
    assert ignored.status_code == 200


@pytest.mark.parametrize("fields", [{"tools": TOOLS}, {"response_format": {"type": "json_object"}}])
async def test_tails_are_off_where_nobody_may_see_half(client, fields):
    options = {"outrider": PROVISIONAL}
    found = await streamed(client, stream_options=options, **fields)
    assert found[0]["outrider"]["stream"]["visibility"] == "verified"
    assert not any("tail" in chunk.get("outrider", {}) for chunk in found)


async def test_padded_frames_are_of_few_sizes(client):
    options = {"include_obfuscation": True}
    response = await ask(client, stream=True, stream_options=options)
    sizes = {len(block) - len("data: ") for block in response.text.split("\n\n")[:-2]}
    assert sizes <= {512, 1024}
    text = put_together(chunks(response))[0].text
    assert text == (await told(client))["choices"][0]["message"]["content"]


async def test_smooth_pacing_changes_no_text(client):
    options = {"outrider": {"pacing": "smooth"}}
    found = await streamed(client, stream_options=options)
    assert put_together(found)[0].text == put_together(await streamed(client))[0].text


async def test_a_prompt_that_is_too_long_is_refused_before_the_stream(client):
    long = [{"role": "user", "content": "fox " * 2000}]
    error = await refused(client, messages=long, stream=True)
    assert error["type"] == "invalid_request_error"


async def test_a_model_without_template_says_so(client, llm):
    template, llm.tokenizer.backend.chat_template = llm.tokenizer.backend.chat_template, None
    try:
        error = await refused(client)
    finally:
        llm.tokenizer.backend.chat_template = template
    assert "chat template" in error["message"]


async def test_frames_carry_no_names(client):
    response = await ask(client, stream=True)
    assert all(frame.event is None for frame in frames(response))


SAY = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}


async def a_session(client, **fields):
    found = await client.post("/v1/sessions", json=fields)
    assert found.status_code == 200, found.text
    return found.json()["id"]


async def say(client, session, text="one", **fields):
    messages = [{"role": "user", "content": text}]
    outrider = {"session": session, **fields.pop("outrider", {})}
    return await ask(client, **{**SAY, "messages": messages, "outrider": outrider, **fields})


async def log_of(client, session):
    sessions = client.app.state.server.sessions
    found = await sessions.find("", session)
    return list(await sessions.call(sessions.log.tokens, "", found.head))


async def test_a_session_keeps_what_a_chat_says(client):
    """The same log as by the Responses API, streamed or not; each turn brings what is new."""
    chats, streams, by_responses = [await a_session(client) for _ in range(3)]
    for text in ("one", "two"):
        whole = (await say(client, chats, text)).json()
        found = chunks(await say(client, streams, text, stream=True))
        body = {"input": text, "conversation": by_responses, "max_output_tokens": 8}
        body |= {"temperature": 0, "ignore_eos": True}
        response = (await client.post("/v1/responses", json=body)).json()
        assert put_together(found)[0].text == whole["choices"][0]["message"]["content"]
        assert put_together(found)[0].text == response["output"][0]["content"][0]["text"]
        report = whole["outrider"]["session"]
        assert report.keys() == response["outrider"]["session"].keys()
        assert found[-1]["outrider"]["session"].keys() == report.keys()
        assert report["id"] == chats
        assert report["head"] == (await client.get(f"/v1/sessions/{chats}")).json()["head"]
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    log = await log_of(client, chats)
    assert log == await log_of(client, streams) == await log_of(client, by_responses)


async def test_an_answer_of_a_chat_is_a_response_of_its_session(client):
    session = await a_session(client)
    one = (await say(client, session)).json()
    kept = (await client.get(f"/v1/responses/{one['id']}")).json()
    text = one["choices"][0]["message"]["content"]
    assert kept["output"][0]["content"][0]["text"] == text
    items = (await client.get(f"/v1/responses/{one['id']}/input_items")).json()["data"]
    assert [item["content"] for item in items] == ["one"]
    follow = {"previous_response_id": one["id"], "input": "two", "max_output_tokens": 4}
    assert (await client.post("/v1/responses", json=follow)).status_code == 200
    cut = await client.post(f"/v1/sessions/{session}/truncate",
                            json={"response_id": one["id"], "tokens": 2})  # fmt: skip
    assert cut.status_code == 409 or cut.json()["n_tokens"] > 0


async def test_calls_in_a_session_are_read_and_answered(client, blanks):
    session = await a_session(client)
    tools = {"tools": TOOLS, "tool_choice": "required", "logit_bias": blanks, "max_tokens": 60}
    tools |= {"parallel_tool_calls": False, "ignore_eos": False}
    one = (await say(client, session, **tools)).json()
    (call,) = one["choices"][0]["message"]["tool_calls"]
    kept = (await client.get(f"/v1/responses/{one['id']}")).json()
    assert kept["output"][0]["arguments"] == call["function"]["arguments"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "left it is"}
    outrider = {"session": session}
    two = await told(client, **{**SAY, "messages": [result], "outrider": outrider, "tools": TOOLS})
    assert two["usage"]["prompt_tokens"] > one["usage"]["total_tokens"]


async def test_the_settings_of_a_session_hold_for_chats(client):
    session = await a_session(client, speculation={"policy": "ngram", "num_draft_tokens": 3})
    one = (await say(client, session)).json()
    assert one["metrics"]["speculative_decoding"]["num_spec_tokens"] == 3
    two = (await say(client, session, speculation="off")).json()
    assert two["metrics"]["speculative_decoding"]["num_spec_tokens"] == 0


@pytest.mark.parametrize(
    ("fields", "status", "remedy"),
    [
        ({"outrider": {"session": "nowhere"}}, 404, "nowhere"),
        ({"outrider": {"if_head": "head_1"}}, 409, "read it and send again"),
        ({"n": 2}, 400, "fork it"),
        ({"cache_salt": "a"}, 400, "drop it"),
        ({"chat_template_kwargs": {"a": 1}}, 400, "drop it"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"speculation": "nonsense"}, 400, "unknown method"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_a_session_refuses_leaves_it_as_it_was(client, fields, status, remedy, stream):
    session = await a_session(client, token_ids=[5, 6])
    body = {**SAY, "stream": stream, **fields}
    body["outrider"] = {"session": session, **fields.get("outrider", {})}
    error = await refused(client, status=status, **body)
    assert remedy in error["message"]
    assert await log_of(client, session) == [5, 6]
    await say(client, session, stream=stream)


async def test_a_head_without_a_session_is_refused(client):
    assert "outrider.session" in (await refused(client, outrider={"if_head": "h"}))["message"]


async def test_a_client_that_leaves_leaves_its_session_as_it_was(client):
    session = await a_session(client, token_ids=[5, 6])
    body = {**ASK, "max_tokens": 900, "stream": True, "outrider": {"session": session}}
    async with Visit(client.app, "POST", PATH, body) as visit:
        await visit.take(3)
        assert client.app.state.server.sessions.response_in(session) is not None
    assert client.app.state.server.sessions.response_in(session) is None
    assert await log_of(client, session) == [5, 6]
    await say(client, session)
