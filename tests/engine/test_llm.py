"""LLM: the contract of the blocking front, its prompts, streams, and what is left behind."""

import gc

import pytest

from outrider import LLM, RequestOutput, SamplingParams, SpeculationParams
from outrider.errors import ConfigError, PairError, RequestError
from outrider.request import StreamParams
from outrider.stream.events import Committed, Tail
from tests.engine.tiny_checkpoint import MAX_POSITIONS, write_checkpoint

SHORT = SamplingParams(max_tokens=12, temperature=0.9, seed=5, ignore_eos=True)
OFF = SpeculationParams(method="off")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("draft"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def loaded(folder, draft):
    return LLM(folder, draft_model=draft, policy="fixed", check_integrity=True)


@pytest.fixture
def llm(loaded):
    yield loaded
    assert not loaded.engine.has_work(), "a call has left requests behind"
    assert loaded.engine.manager.num_used == 0
    assert not loaded._inboxes


@pytest.fixture(scope="module")
def demo():
    return LLM("demo")


def test_the_contract(demo):
    sampling = SamplingParams(max_tokens=64, temperature=0.8, seed=1)
    out = demo.generate(
        ["def main("], sampling, SpeculationParams(method="draft_model", num_draft_tokens=4)
    )
    assert len(out) == 1
    assert isinstance(out[0], RequestOutput)
    assert 0 < len(out[0].token_ids) <= 64
    assert out[0].text == demo.tokenizer.decode(out[0].token_ids)
    assert out[0].finish_reason == ("length" if len(out[0].token_ids) == 64 else "stop")
    metrics = out[0].metrics
    assert metrics.drafter == "draft_model"
    assert metrics.num_drafts > 0
    assert 1.0 <= metrics.acceptance_length <= 5.0
    plain = demo.generate(["def main("], sampling, SpeculationParams(method="off"))
    assert plain[0].token_ids == out[0].token_ids
    assert plain[0].metrics.num_drafts == 0
    assert plain[0].metrics.acceptance_length == 1.0


def test_a_prompt_is_text_token_ids_or_messages(demo):
    sampling = SamplingParams(max_tokens=8)
    text = "def main("
    ids = demo.tokenizer.encode(text)
    messages = [{"role": "user", "content": "Hello"}]
    chat_ids = demo.tokenizer.apply_chat_template(messages)
    outputs = demo.generate([text, ids, tuple(ids), messages, chat_ids], sampling)
    assert [out.prompt_token_ids for out in outputs] == [ids, ids, ids, chat_ids, chat_ids]
    answers = [out.token_ids for out in outputs]
    assert answers[0] == answers[1] == answers[2]
    assert answers[3] == answers[4] == demo.chat(messages, sampling).token_ids
    assert answers[0] != answers[3]


@pytest.mark.parametrize("one", ["def", [5, 6, 7], [{"role": "user", "content": "x"}]])
def test_one_prompt_need_not_be_in_a_list(llm, one):
    (bare,), (listed,) = llm.generate(one, SHORT), llm.generate([one], SHORT)
    assert bare.token_ids == listed.token_ids
    assert bare.prompt_token_ids == listed.prompt_token_ids


def test_outputs_come_in_the_order_of_the_prompts(llm):
    prompts = [[7] * (20 - 3 * i) for i in range(5)]
    outputs = llm.generate(prompts, SHORT)
    assert [out.prompt_token_ids for out in outputs] == prompts
    assert [out.token_ids for out in outputs] == [
        llm.generate([prompt], SHORT)[0].token_ids for prompt in prompts
    ]


def test_sampling_and_speculation_for_each_prompt(llm):
    samplings = [SHORT, SamplingParams(max_tokens=3), SamplingParams(max_tokens=5, n=2)]
    outputs = llm.generate([[9, 8]] * 3, samplings, ["off", "ngram", {"num_draft_tokens": 2}])
    assert [len(out.token_ids) for out in outputs[1:]] == [3, 5]
    assert [len(out.completions) for out in outputs] == [1, 1, 2]
    assert [out.metrics.drafter for out in outputs] == ["", "ngram", "draft_model"]
    assert outputs[2].metrics.num_draft_tokens <= 2 * outputs[2].metrics.num_drafts


def test_an_output_tells_why_its_first_answer_broke_off(demo):
    stuck = SamplingParams(max_tokens=8, regex="[a-z]{3}", min_tokens=6)
    (output,) = demo.generate("def", stuck)
    assert output.finish_reason == "error"
    assert output.error == output.completions[0].error
    assert output.error.startswith("no token is allowed: min_tokens=6")
    assert demo.generate("def", SamplingParams(max_tokens=2))[0].error == ""


def test_lists_must_match_the_prompts(llm):
    with pytest.raises(RequestError, match="sampling: 2 were given for 3 prompts"):
        llm.generate([[1], [2], [3]], [SHORT, SHORT])
    with pytest.raises(RequestError, match="speculation: 1 were given for 2 prompts"):
        llm.generate([[1], [2]], SHORT, ["off"])


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_a_seed_decides_and_its_absence_does_not(llm, seed):
    def tokens(value):
        sampling = SamplingParams(max_tokens=20, temperature=1.0, seed=value, ignore_eos=True)
        return llm.generate([[3, 4, 5]], sampling)[0].token_ids

    assert tokens(seed) == tokens(seed)
    assert tokens(None) != tokens(None)
    assert tokens(seed) != tokens(seed // 2 + 1)


def test_the_default_speculation_is_the_draft_model_and_requests_override_it(folder, draft, llm):
    assert llm.generate([[5, 6]], SHORT)[0].metrics.drafter == "draft_model"
    other = LLM(folder, draft_model=draft, speculation={"method": "ngram", "num_draft_tokens": 2})
    assert other.generate([[5, 6]], SHORT)[0].metrics.drafter == "ngram"
    assert other.generate([[5, 6]], SHORT, "off")[0].metrics.drafter == ""
    assert LLM(folder).generate([[5, 6]], SHORT)[0].metrics.drafter == ""


@pytest.mark.parametrize("wrong", [False, 4, ["off"]])
def test_a_default_speculation_of_the_wrong_kind_is_refused(folder, wrong):
    with pytest.raises(RequestError, match="speculation="):
        LLM(folder, speculation=wrong)


@pytest.mark.parametrize(
    ("speculation", "error", "match"),
    [
        ("ngrm", RequestError, "did you mean 'ngram'"),
        ("draft_model", RequestError, "no draft model is loaded"),
        ({"method": "ngram", "width": 2, "verifier": "rejection"}, PairError, "takes .*chain"),
    ],
)
def test_a_default_speculation_that_cannot_work_is_refused_at_once(
    folder, speculation, error, match
):
    with pytest.raises(error, match=match):
        LLM(folder, speculation=speculation)


def test_one_drafter_may_be_named_without_a_list(folder):
    assert LLM(folder, drafters="ngram").engine.drafters.names() == ["ngram"]
    assert LLM(folder, drafters=[]).engine.drafters.names() == []
    with pytest.raises(ConfigError, match="do not list it"):
        LLM(folder, drafters=["draft_model"])


def test_times_are_filled_in(llm):
    first, second = llm.generate([[5, 6], [6, 7]], [SHORT, SamplingParams(max_tokens=40)])
    for out in (first, second):
        assert 0 < out.time_to_first_token_s <= out.latency_s
    assert second.time_to_first_token_s < second.latency_s


def test_tokens_without_a_tokenizer(folder, draft, llm):
    bare = LLM(folder, draft_model=draft, load_tokenizer=False)
    out = bare.generate([[5, 6]], SHORT)[0]
    assert out.token_ids == llm.generate([[5, 6]], SHORT)[0].token_ids
    assert out.text == ""
    for prompt, sampling, what in [
        ("text", SHORT, "a text prompt needs a tokenizer"),
        ([{"role": "user", "content": "x"}], SHORT, "a chat prompt needs a tokenizer"),
        ([5, 6], SamplingParams(stop=("x",)), "stop_token_ids"),
        ([5, 6], SamplingParams(bad_words=("x",)), "bad_words needs a tokenizer"),
        ([5, 6], SamplingParams(regex="a"), "constrained output needs a tokenizer"),
    ]:
        with pytest.raises(RequestError, match=what):
            bare.generate([prompt], sampling)


@pytest.mark.parametrize("wrong", [None, 5, {"role": "user", "content": "x"}])
def test_what_is_no_prompt_is_refused(llm, wrong):
    with pytest.raises(RequestError, match="prompts="):
        llm.generate(wrong)


def test_sampling_must_be_sampling_params(llm):
    with pytest.raises(RequestError, match="give SamplingParams"):
        llm.generate([[5]], {"max_tokens": 3})


@pytest.mark.parametrize(
    ("prompts", "speculation", "error"),
    [
        ([[5], [10**6]], None, RequestError),
        ([[5], [6]], ["off", {"method": "ngram", "width": 2, "verifier": "rejection"}], PairError),
    ],
    ids=["token id", "pair"],
)
def test_one_refused_prompt_leaves_none_of_the_others_behind(llm, prompts, speculation, error):
    with pytest.raises(error):
        llm.generate(prompts, SHORT, speculation)
    assert not llm.engine.has_work()
    assert len(llm.generate([[5]], SHORT)[0].token_ids) == 12


def test_stream_tells_the_same_as_generate(llm):
    sampling = SamplingParams(max_tokens=20, temperature=0.9, seed=5, n=2)
    (whole,) = llm.generate([[5, 6, 7]], sampling)
    told = list(llm.stream([[5, 6, 7]], sampling))
    for completion in whole.completions:
        mine = [event for event in told if event.index == completion.index]
        assert [t for event in mine for t in event.token_ids] == completion.token_ids
        assert "".join(event.text for event in mine) == completion.text
        assert mine[0].offset == 0
        assert [event.finish_reason for event in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == completion.finish_reason
        assert mine[-1].metrics == completion.metrics
    assert len({event.request_id for event in told}) == 1


def test_only_those_who_ask_get_provisional_tails(llm):
    plain = list(llm.stream([[5, 6, 7]], SHORT))
    asked = list(llm.stream([[5, 6, 7]], SHORT, stream=StreamParams(visibility="provisional")))
    assert all(isinstance(event, Committed) for event in plain)
    tails = [event for event in asked if isinstance(event, Tail)]
    assert tails
    assert all(0 < len(tail.token_ids) <= 4 for tail in tails)
    assert [t for e in asked if isinstance(e, Committed) for t in e.token_ids] == [
        t for e in plain for t in e.token_ids
    ]
    off = StreamParams(visibility="provisional")
    assert all(isinstance(e, Committed) for e in llm.stream([[5, 6]], SHORT, "off", stream=off))


def test_leaving_a_stream_aborts_it(llm):
    events = llm.stream([[5, 6], [7, 8]], SamplingParams(max_tokens=100, ignore_eos=True))
    next(events)
    assert llm.engine.has_work()
    events.close()
    assert not llm.engine.has_work()


def test_a_stream_that_is_never_read_does_nothing(llm):
    events = llm.stream([[5, 6]], SHORT)
    assert not llm.engine.has_work()
    del events
    gc.collect()
    assert len(llm.generate([[5, 6]], SHORT)) == 1


def test_streams_may_be_read_in_turns(llm):
    expected = [llm.generate([[5 + i]], SHORT)[0].token_ids for i in range(3)]
    streams = [llm.stream([[5 + i]], SHORT) for i in range(2)]
    told = [[next(stream)] for stream in streams]
    assert llm.generate([[7]], SHORT)[0].token_ids == expected[2]
    for stream, events in zip(streams, told, strict=True):
        events += stream
        assert len({event.request_id for event in events}) == 1
    assert [[t for e in events for t in e.token_ids] for events in told] == expected[:2]


def test_after_a_failing_step_the_engine_serves_again(llm, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llm.generate([[5, 6], [7, 8]], SHORT)
    assert not llm.engine.has_work()
    assert len(llm.generate([[5, 6]], SHORT)[0].token_ids) == 12


def test_tenants_share_no_prefix(folder):
    fresh = LLM(folder, block_size=4)
    prompt = list(range(10, 40))
    hits = [
        fresh.generate([prompt], SHORT, tenant=tenant)[0].metrics.num_cached_tokens
        for tenant in ("a", "b", "a")
    ]
    assert hits[:2] == [0, 0]
    assert hits[2] > 0


def test_smaller_priorities_run_first(folder):
    one_seat = LLM(folder, max_num_seqs=1)
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)
    late = one_seat.stream([[5]], sampling, priority=1)
    later = one_seat.stream([[6], [7]], sampling, priority=2)
    next(later)  # seated before the others came
    next(late)
    assert len(one_seat.generate([[8]], sampling, priority=0)[0].token_ids) == 2
    assert one_seat.engine.has_work(), "the two of lower rank still wait or run"
    assert [e.finish_reason for e in late][-1] == "length"
    assert [e.finish_reason for e in later].count("length") >= 1
    assert not one_seat.engine.has_work()


def test_max_tokens_none_goes_to_the_end_of_the_context(llm):
    out = llm.generate([[5, 6]], SamplingParams(max_tokens=None, ignore_eos=True))[0]
    assert len(out.token_ids) == MAX_POSITIONS - 2
    assert out.finish_reason == "length"


def test_a_prediction_may_be_text_by_default_and_per_request():
    llm = LLM(
        "demo",
        speculation={"method": "prediction", "prediction": "import os\nimport sys\n"},
        policy="fixed",
    )
    sampling = SamplingParams(max_tokens=8)
    plain = llm.generate("import", sampling, "off")[0]
    for speculation in (None, {"method": "prediction", "prediction": plain.text}):
        output = llm.generate("import", sampling, speculation)[0]
        assert output.token_ids == plain.token_ids
        assert output.metrics.num_draft_tokens > 0


def test_a_response_names_the_reading_of_a_lossy_rule():
    llm = LLM("demo")
    speculation = {"method": "draft_model", "verifier": "fly"}
    for options, reading in (({}, "strict"), ({"reading": "paper"}, "paper")):
        asked = {**speculation, "verifier_options": options}
        metrics = llm.generate("import", SamplingParams(max_tokens=8), asked)[0].metrics
        assert (metrics.exactness, metrics.verifier) == ("lossy", "fly")
        assert metrics.verifier_options["reading"] == reading
