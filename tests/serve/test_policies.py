"""Policies, latency targets and a session's past: from the bodies of all dialects to the engine."""

import pytest

SPECULATION = {"method": "draft_model", "policy": "adaptive", "slo": {"tpot_ms": 50}}
SAMPLED = {"temperature": 0, "ignore_eos": True}
MESSAGES = [{"role": "user", "content": "one two"}]
BODIES = {
    "/v1/chat/completions": {**SAMPLED, "messages": MESSAGES, "max_tokens": 12},
    "/v1/completions": {**SAMPLED, "prompt": "one two", "max_tokens": 12},
    "/v1/responses": {**SAMPLED, "input": "one two", "max_output_tokens": 12},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 12, "temperature": 0},
}


@pytest.fixture
def taken(llm, monkeypatch):
    """Every request that the engine is given, with what is in force for it."""
    found = []
    add = llm.engine.add

    def noted(request):
        add(request)
        found.append((request, llm.engine._groups[request.id][0].speculation))

    monkeypatch.setattr(llm.engine, "add", noted)
    return found


async def post(client, path, body, status=200):
    answer = await client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


@pytest.mark.parametrize("path", BODIES)
async def test_policy_and_targets_reach_the_engine_and_are_told(client, taken, path):
    made = await post(client, path, {**BODIES[path], "speculation": SPECULATION})
    assert made["metrics"]["speculative_decoding"]["policy"] == "adaptive"
    ((_, in_force),) = taken
    assert (in_force.policy, in_force.tpot_s, in_force.ttft_s) == ("adaptive", 0.05, None)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"method": "draft_model"}, "fixed"),
        ({"policy": "table", "policy_options": {"table": "1-:2"}}, "table"),
        ("off", None),
    ],
    ids=str,
)
async def test_the_policy_in_force_is_told(client, path, given, told):
    made = await post(client, path, {**BODIES[path], "speculation": given})
    assert made["metrics"]["speculative_decoding"]["policy"] == told


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"policy": "adaptiv"}, "did you mean 'adaptive'"),
        ({"policy": "fixed", "slo": {"tpot_ms": 5}}, "keeps no latency targets"),
        ({"policy": "adaptive", "slo": {"tpot_ms": 0}}, "milliseconds above 0"),
        ({"policy": "adaptive", "slo": {"tpot": 5}}, "must be tpot_ms or ttft_ms"),
        ({"policy": "adaptive", "policy_options": {"table": "1-:2"}}, "unknown policy_options key"),
        ({"policy": "table", "policy_options": {"table": "x"}}, "is not FROM-TO:K"),
    ],
    ids=str,
)
async def test_what_cannot_be_honoured_is_refused(client, path, given, words):
    found = await post(client, path, {**BODIES[path], "speculation": given}, 400)
    assert words in found["error"]["message"]


async def test_a_policy_of_a_session_is_no_method(client, taken):
    body = {"speculation": {"policy": "adaptive", "slo": {"ttft_ms": 900}}}
    session = (await post(client, "/v1/sessions", body))["id"]
    turn = {**BODIES["/v1/responses"], "outrider": {"session": session}}
    await post(client, "/v1/responses", turn)
    ((_, in_force),) = taken
    assert (in_force.policy, in_force.drafter, in_force.ttft_s) == ("adaptive", "draft_model", 0.9)


async def test_auto_is_left_to_the_engine_in_a_session_and_is_a_method_by_name(client, taken):
    for given in ("auto", {"policy": "auto"}, {"method": "auto"}):
        session = (await post(client, "/v1/sessions", {"speculation": given}))["id"]
        turn = {**BODIES["/v1/responses"], "outrider": {"session": session}}
        await post(client, "/v1/responses", turn)
    assert [in_force.drafter for _, in_force in taken] == ["draft_model", "draft_model", "auto"]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions"])
async def test_a_turn_brings_how_drafts_fared_in_its_session(client, taken, path):
    session = (await post(client, "/v1/sessions", {}))["id"]
    turn = {**BODIES[path], "outrider": {"session": session}}
    await post(client, path, turn)
    hot = await post(client, path, {**turn, "temperature": 0.9, "seed": 1})
    await post(client, path, turn)
    (first, _), (second, _), (third, _) = taken
    assert first.experience == {}
    assert second.experience == {}, "of another temperature"
    stats = client.app.state.server.sessions.log.stats.get("", session)["draft_model"]["0"]
    assert hot["metrics"]["speculative_decoding"]["num_spec_steps"] > 0
    past = third.experience["draft_model"]
    assert set(past) == {"drafted", "accepted"}
    assert 0 < past["drafted"][0] < stats["drafted"][0]
    (branch,) = (await post(client, f"/v1/sessions/{session}/fork", {}))["data"]
    await post(client, path, {**turn, "outrider": {"session": branch["id"]}})
    assert taken[-1][0].experience["draft_model"]["drafted"] == stats["drafted"]


async def test_requests_without_a_session_bring_no_past(client, taken):
    for path, body in BODIES.items():
        await post(client, path, body)
    assert [request.experience for request, _ in taken] == [{}] * len(BODIES)
