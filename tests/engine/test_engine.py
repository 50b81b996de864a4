"""Engine: requests come, leave early, fail alone, fork, and are counted."""

import pytest
import torch

from outrider.errors import PairError, RequestError
from outrider.request import Request, SamplingParams, SpeculationParams, StreamParams
from outrider.stream.events import Committed, Tail
from outrider.testing import ScriptedDrafter, events, junk, run, tiny_decoder, tiny_engine

OFF = SpeculationParams(method="off")
K3 = SpeculationParams(method="draft_model", num_draft_tokens=3)
NOTHING_ALLOWED = {token: float("-inf") for token in range(256)}


def sampling(**settings):
    return SamplingParams(**{"max_tokens": 12, "ignore_eos": True, **settings})


def request(name="r", *, speculation=K3, length=9, first=40, **settings):
    outer = {key: settings.pop(key) for key in ("priority", "tenant", "stream") if key in settings}
    return Request(
        id=name,
        prompt_token_ids=tuple(first + (3 * j) % 50 for j in range(length)),
        sampling=sampling(**settings),
        speculation=speculation,
        seed=7,
        **outer,
    )


def tokens_of(told):
    return {key: [t for e in found for t in e.token_ids] for key, found in told.items()}


def drain(engine):
    """Steps to the end; the events by completion."""
    told = {}
    while engine.has_work():
        for event in engine.step():
            told.setdefault((event.request_id, event.index), []).append(event)
    return told


def assert_empty(engine):
    """Nothing is held for anyone any more."""
    assert not engine.has_work()
    assert engine.step() == []
    assert engine.manager.num_used == 0
    assert engine.drafters["draft_model"].manager.num_used == 0
    assert engine._groups == engine._unforked == engine.streamer._told == {}
    engine.check_integrity()


def test_an_idle_engine_does_nothing():
    engine = tiny_engine()
    assert not engine.has_work()
    assert engine.step() == []
    assert engine.stats.num_steps == 0


def test_abort_while_waiting():
    engine = tiny_engine(options={"max_num_seqs": 1})
    engine.add(request("first"))
    engine.add(request("second"))
    engine.step()
    engine.abort("second")
    told = drain(engine)
    (farewell,) = told["second", 0]
    assert (farewell.finish_reason, farewell.token_ids) == ("abort", ())
    assert farewell.metrics.num_generated_tokens == 0
    assert tokens_of(told)["first", 0] == run(tiny_engine(), [request("first")])["first", 0][4:]
    assert_empty(engine)


def test_abort_while_running_keeps_what_was_said():
    engine = tiny_engine()
    engine.add(request("gone", max_tokens=100))
    engine.add(request("here", first=90))
    before = [e for _ in range(2) for e in engine.step() if e.request_id == "gone"]
    held = engine.manager.num_used
    engine.abort("gone")
    assert engine.manager.num_used < held, "its blocks are free at once"
    told = drain(engine)
    (farewell,) = told["gone", 0]
    assert (farewell.finish_reason, farewell.token_ids) == ("abort", ())
    assert farewell.offset == farewell.metrics.num_generated_tokens == 8
    assert sum(len(e.token_ids) for e in before) == 8
    assert told["here", 0][-1].finish_reason == "length"
    assert_empty(engine)


def test_abort_in_the_middle_of_a_prompt():
    engine = tiny_engine(options={"max_num_batched_tokens": 16})
    engine.add(request("long", length=60))
    engine.step()
    engine.abort("long")
    told = drain(engine)
    assert [e.finish_reason for e in told["long", 0]] == ["abort"]
    assert_empty(engine)


@pytest.mark.parametrize("seats", [2, 8])
@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_abort_ends_all_completions_of_a_request(num_steps, seats):
    """Before the first ran (0), when it has just forked (1), and later; running and waiting."""
    engine = tiny_engine(options={"max_num_seqs": seats})
    engine.add(request("r", n=4, temperature=1.0, max_tokens=60))
    engine.add(request("other", max_tokens=60))
    for _ in range(num_steps):
        engine.step()
    engine.abort("r")
    engine.abort("r")
    told = drain(engine)
    for index in range(4):
        assert [e.finish_reason for e in told["r", index]] == ["abort"]
    assert told["other", 0][-1].finish_reason == "length"
    assert_empty(engine)


def test_abort_of_a_stranger_or_of_a_finished_request_is_nothing():
    engine = tiny_engine()
    engine.abort("nobody")
    run(engine, [request("r")])
    engine.abort("r")
    assert_empty(engine)


def test_an_id_is_in_use_until_its_last_event():
    engine = tiny_engine()
    engine.add(request("r"))
    with pytest.raises(RequestError, match="request id 'r' is in use: choose another"):
        engine.add(request("r"))
    engine.abort("r")
    with pytest.raises(RequestError, match="in use"):
        engine.add(request("r"))
    engine.step()
    engine.add(request("r"))
    assert drain(engine)["r", 0][-1].finish_reason == "length"


def test_ids_that_look_like_those_of_completions_do_not_collide():
    asked = [request("a", n=2, temperature=1.0), request("a#1", first=60), request("a#0", first=70)]
    engine = tiny_engine()
    told = events(engine, asked)
    alone = {}
    for one in asked:
        alone |= run(tiny_engine(), [one])
    assert tokens_of(told) == alone
    assert_empty(engine)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt_token_ids": ()}, "the prompt is empty"),
        ({"prompt_token_ids": (5, 256)}, "prompt token id 256: tiny-0 knows ids 0 to 255"),
        ({"prompt_token_ids": (5, -1)}, "prompt token id -1"),
        ({"prompt_token_ids": (5,) * 256}, "256 tokens; at most 255 leave room"),
        ({"sampling": sampling(bad_words=("x",))}, "bad_words=.* needs a tokenizer"),
        ({"sampling": sampling(logit_bias={999: 1.0})}, "999"),
        ({"sampling": sampling(stop_token_ids=(256,))}, "256"),
        ({"sampling": sampling(regex="a+")}, "constrained output needs a tokenizer"),
        ({"speculation": SpeculationParams(method="nonsense")}, "unknown method 'nonsense'"),
    ],
)
def test_a_request_that_cannot_be_served_changes_nothing(wrong, message):
    engine = tiny_engine(grammars=None)
    with pytest.raises(RequestError, match=message):
        engine.add(Request(**{**vars(request("r", n=3)), **wrong}))
    assert_empty(engine)
    assert len(run(engine, [request("r")])["r", 0]) == 12


def test_a_pair_that_would_be_wrong_is_refused():
    engine = tiny_engine()
    spec = SpeculationParams(method="draft_model", verifier="greedy")
    with pytest.raises(PairError, match="temperature 0 only"):
        engine.add(request("r", speculation=spec, temperature=1.0))
    assert_empty(engine)


def test_stop_texts_need_a_tokenizer():
    engine = tiny_engine(tokenizer=None)
    with pytest.raises(RequestError, match=r"stop=\('x',\): needs a tokenizer"):
        engine.add(request(stop=("x",)))
    told = events(engine, [request()])["r", 0]
    assert "".join(e.text for e in told) == ""


@pytest.mark.parametrize("speculation", [OFF, K3], ids=["plain", "drafting"])
@pytest.mark.parametrize("n", [1, 3])
def test_an_error_in_one_request_leaves_the_others(speculation, n):
    engine = tiny_engine()
    good = [request("one", first=30), request("two", first=60, temperature=0.8)]
    bad = request("bad", speculation=speculation, logit_bias=NOTHING_ALLOWED, n=n)
    told = events(engine, [good[0], bad, good[1]])
    for index in range(n):
        (event,) = told["bad", index]
        assert (event.finish_reason, event.token_ids) == ("error", ())
        assert "no token is allowed" in event.error
    alone = run(tiny_engine(), [good[0]]) | run(tiny_engine(), [good[1]])
    assert {key: tokens_of(told)[key] for key in alone} == alone
    assert_empty(engine)


def test_completions_share_the_blocks_of_their_prompt():
    engine = tiny_engine()
    engine.add(request("r", n=3, temperature=1.0, length=13))
    engine.step()
    tables = [seq.table.blocks for seq in engine.scheduler.running]
    assert [blocks[:3] for blocks in tables] == [tables[0][:3]] * 3
    assert len({blocks[3] for blocks in tables if len(blocks) > 3}) == len(
        [blocks for blocks in tables if len(blocks) > 3]
    ), "a block that is not full is nobody else's"
    assert {seq.num_cached for seq in engine.scheduler.running[1:]} == {12}
    told = drain(engine)
    assert [told["r", i][-1].metrics.num_cached_tokens for i in range(3)] == [0, 12, 12]
    assert_empty(engine)


@pytest.mark.parametrize("length", [12, 13, 14, 16])
@pytest.mark.parametrize("options", [{}, {"max_num_seqs": 2}, {"enable_prefix_caching": False}])
def test_a_fork_says_what_a_request_of_its_own_would(length, options):
    """Wherever the prompt ends in its block, with seats for all or not, shared or not."""
    engine = tiny_engine(options=options)
    forked = run(engine, [request("r", n=3, temperature=1.0, length=length)])
    engine = tiny_engine(options=options)
    engine.add(request("r", n=3, temperature=1.0, length=length))
    (seq,) = engine.scheduler.waiting()
    for sibling in engine._unforked.pop(seq.id):
        engine.scheduler.add(sibling)
    assert tokens_of(drain(engine)) == forked


def test_completions_end_on_their_own():
    engine = tiny_engine()
    told = events(engine, [request("r", n=4, temperature=1.5, stop_token_ids=tuple(range(64)))])
    lengths = [len(found) for found in tokens_of(told).values()]
    assert len(set(lengths)) > 1, "the test must let some go on"
    assert_empty(engine)


def test_tenants_do_not_share_the_cache():
    engine = tiny_engine()
    prompt = {"length": 17, "speculation": OFF}
    run(engine, [request("a", tenant="one", **prompt)])
    hits = {}
    for name, tenant in (("b", "two"), ("c", "one"), ("d", "")):
        told = events(engine, [request(name, tenant=tenant, **prompt)])
        hits[name] = told[name, 0][-1].metrics.num_cached_tokens
    assert hits == {"b": 0, "c": 16, "d": 0}


def test_the_draft_models_cache_keeps_tenants_apart_too():
    engine = tiny_engine()
    manager = engine.drafters["draft_model"].manager
    run(engine, [request("a", tenant="one", length=17)])
    run(engine, [request("b", tenant="two", length=17)])
    assert manager.hits == 0
    run(engine, [request("c", tenant="one", length=17)])
    assert manager.hits == 16


def test_urgent_requests_are_served_first():
    engine = tiny_engine(options={"max_num_seqs": 1})
    told = events(engine, [request(f"r{p}", priority=p) for p in (2, 0, 1)])
    assert [name for name, _ in told] == ["r0", "r1", "r2"]


def test_stats_count_what_was_run():
    engine = tiny_engine(draft_seed=0)
    asked = [request(f"r{i}", length=9 + i, first=40 + 9 * i) for i in range(3)]
    asked.append(request("plain", speculation=OFF, length=5, first=90))
    told = events(engine, asked)
    stats = engine.stats
    metrics = [found[-1].metrics for found in told.values()]
    assert stats.num_finished == 4
    assert stats.num_generated_tokens == 48 == sum(m.num_generated_tokens for m in metrics)
    assert stats.num_prompt_tokens == 9 + 10 + 11 + 5
    assert stats.num_drafts == sum(m.num_drafts for m in metrics)
    assert stats.num_draft_tokens == sum(m.num_draft_tokens for m in metrics) == 3 * 9
    assert stats.num_accepted_tokens == sum(m.num_accepted_tokens for m in metrics) == 3 * 9
    num_decoded = sum(m.num_steps - 1 for m in metrics)
    assert stats.num_rows == stats.num_prompt_tokens + num_decoded + stats.num_draft_tokens
    assert stats.num_steps == max(m.num_steps for m in metrics) == 12
    assert stats.num_preemptions == 0


def test_prompt_tokens_are_run_or_found_in_the_cache():
    engine = tiny_engine(options={"max_num_batched_tokens": 16})
    num_found = 0
    for i in range(3):
        told = events(engine, [request(f"r{i}", speculation=OFF, length=30)])
        num_found += told[f"r{i}", 0][-1].metrics.num_cached_tokens
    assert num_found == 28 + 28
    assert engine.stats.num_prompt_tokens + num_found == 3 * 30


def test_preemptions_are_counted_and_told():
    engine = tiny_engine(num_blocks=12, options={"max_model_len": 40, "max_num_seqs": 3})
    told = events(engine, [request(f"r{i}", first=40 + i, max_tokens=20) for i in range(3)])
    metrics = [found[-1].metrics for found in told.values()]
    assert engine.stats.num_preemptions == sum(m.num_preemptions for m in metrics) > 0
    assert [m.num_generated_tokens for m in metrics] == [20, 20, 20]
    assert_empty(engine)


def test_answers_end_at_the_models_context():
    engine = tiny_engine(options={"max_model_len": 20})
    told = events(engine, [request(max_tokens=None)])["r", 0]
    assert sum(len(e.token_ids) for e in told) == 11
    assert told[-1].finish_reason == "length"


def test_drafts_that_could_not_be_committed_are_not_made():
    """K is cut to what is left beside the bonus token."""
    engine = tiny_engine(draft_seed=0)
    told = events(engine, [request(max_tokens=6)])["r", 0]
    assert [(e.num_drafted, len(e.token_ids)) for e in told] == [(3, 4), (1, 2)]
    short = events(tiny_engine(draft_seed=0), [request(max_tokens=1)])["r", 0]
    assert [(e.num_drafted, len(e.token_ids)) for e in short] == [(0, 1)]


def test_a_request_that_says_nothing_gets_the_engines_drafter():
    engine = tiny_engine(default_drafter="draft_model")
    told = events(engine, [request(speculation=SpeculationParams())])["r", 0]
    assert told[-1].metrics.drafter == "draft_model"
    assert max(e.num_drafted for e in told) == 4
    told = events(tiny_engine(), [request(speculation=SpeculationParams())])["r", 0]
    assert told[-1].metrics.drafter == ""


def test_tails_come_before_the_tokens_that_replace_them():
    shown = request("shown", stream=StreamParams(visibility="provisional", min_stability=0.0))
    engine = tiny_engine(draft_seed=0, tokenizer=None)
    engine.add(shown)
    engine.add(request("hidden", first=60))
    seen = [event for _ in range(3) for event in engine.step()]
    assert {e.request_id for e in seen if isinstance(e, Tail)} == {"shown"}
    mine = [e for e in seen if e.request_id == "shown"]
    assert [type(e) for e in mine] == [Tail, Committed] * 3
    assert all(
        t.token_ids == c.token_ids[:-1] for t, c in zip(mine[::2], mine[1::2], strict=True)
    ), "a perfect drafter's tail is what is then committed"


def test_eos_of_the_model_ends_an_answer_wherever_it_stands():
    """The plain answer's third token, made the end of sequence, ends the drafted answer there."""
    truth = run(tiny_engine(), [request(speculation=OFF)])["r", 0]
    target = tiny_decoder()
    object.__setattr__(target.spec, "eos_token_ids", (truth[2],))
    engine = tiny_engine(target=target)
    told = events(engine, [request(ignore_eos=False)])["r", 0]
    assert [t for e in told for t in e.token_ids] == truth[: truth.index(truth[2]) + 1]
    assert (told[-1].finish_reason, told[-1].stop_reason) == ("stop", None)


def test_a_drafters_own_error_is_not_taken_for_the_requests():
    """What breaks in our code stops the engine loudly."""

    def broken(seq, plan):
        raise ZeroDivisionError

    engine = tiny_engine(drafters=[ScriptedDrafter(broken)])
    engine.add(request(speculation=SpeculationParams(method="scripted")))
    with pytest.raises(ZeroDivisionError):
        engine.step()


def test_the_integrity_check_sees_a_lost_block():
    engine = tiny_engine(drafters=[ScriptedDrafter(junk(256))])
    engine.add(request())
    engine.step()
    (seq,) = engine.scheduler.running
    seq.table.cut(1)
    with pytest.raises(AssertionError):
        engine.check_integrity()


def test_large_drafts_do_not_wipe_the_prefix_cache():
    """Room for drafts is taken from empty blocks first, and from few cached prefixes at most."""
    hits = {}
    for name, params in {
        "off": {"method": "off"},
        "wide": {"method": "ngram", "num_draft_tokens": 16, "width": 16, "prompt_lookup_min": 1},
    }.items():
        engine = tiny_engine(num_blocks=64, draft_seed=None)
        kept = Request(
            id="kept", prompt_token_ids=tuple(range(10, 70)), sampling=sampling(max_tokens=4)
        )
        run(engine, [kept])
        busy = Request(
            id="busy",
            prompt_token_ids=tuple([80, 81, 82, 83] * 6),
            sampling=SamplingParams(max_tokens=40, ignore_eos=True),
            speculation=SpeculationParams(**params),
        )
        run(engine, [busy])
        before = engine.manager.hits
        run(engine, [kept])
        hits[name] = engine.manager.hits - before
    assert hits["off"] - hits["wide"] <= 4, "one block at most"
    assert hits["wide"] > 0


def test_logits_that_are_no_numbers_fail_the_request_at_temperature_0(monkeypatch):
    engine = tiny_engine(draft_seed=None)
    forward = engine.runner.network.forward
    monkeypatch.setattr(
        engine.runner.network, "forward", lambda *args: forward(*args) * float("nan")
    )
    told = events(
        engine, [Request(id="r", prompt_token_ids=(9, 8), sampling=sampling(max_tokens=4))]
    )
    assert told["r", 0][-1].finish_reason == "error"
    assert "nan" in told["r", 0][-1].error


@pytest.mark.parametrize("verifier", ["gbv", "spectr", "tree", "sampled"])
def test_a_row_of_no_numbers_ends_that_request_alone(verifier, monkeypatch):
    """Rules that want a certain kind of tree are not asked about one that is none."""
    engine = tiny_engine(draft_noise=0.01)
    forward = engine.runner.forward

    def broken(batch, drafts, taps=()):
        output = forward(batch, drafts, taps)
        nothing_NV = torch.full_like(output.logits_NV, float("nan"))
        return output._replace(logits_NV=nothing_NV, argmax_N=[-1] * len(output.argmax_N))

    monkeypatch.setattr(engine.runner, "forward", broken)
    spec = SpeculationParams(method="draft_model", width=3, verifier=verifier)
    request = Request(id="r", prompt_token_ids=(40, 50, 60), speculation=spec)
    (told,) = events(engine, [request]).values()
    assert told[-1].finish_reason == "error"
    assert "nan" in told[-1].error
    assert not engine.has_work()
