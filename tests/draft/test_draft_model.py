"""The draft model: its KV follows the log, its drafts cost what they should, its laws are right."""

import math
from collections import Counter
from itertools import product

import pytest
import torch

from outrider.draft.draft_model import MAX_CATCH_UP_TOKENS, ModelDrafter
from outrider.draft.feeding import fit
from outrider.engine.config import EngineConfig
from outrider.engine.engine import Engine
from outrider.errors import RequestError
from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.step import Commit
from outrider.testing import (
    ScriptedDrafter,
    events,
    junk,
    junk_tree,
    oracle,
    run,
    tiny_decoder,
    tiny_engine,
)
from tests.draft import draft_models
from tests.draft.draft_models import (
    OFF,
    drafter_of,
    exact_output_law,
    kv,
    last_logits,
    pooled,
    prefilled,
)

K4 = SpeculationParams(method="draft_model", num_draft_tokens=4)
GREEDY = SamplingParams(max_tokens=30, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=30, temperature=0.9, ignore_eos=True)


def request(name="r", speculation=K4, sampling=GREEDY, **more):
    return draft_models.request(name, speculation, sampling, **more)


def pair(target, draft, *, num_draft_blocks=256, **options):
    """An engine of these two models, without text; its draft model has a pool of its own size."""
    drafter = ModelDrafter(*pooled(draft, num_draft_blocks), target.spec.vocab_size)
    config = EngineConfig(block_size=4, check_integrity=True, **{"max_num_seqs": 16, **options})
    return Engine(*pooled(target), config, drafters=[drafter], default_drafter="draft_model")


def assert_kv_follows_the_log(engine) -> int:
    """Both models' KV is that of the committed tokens; returns how much of it was compared."""
    drafter, num_compared = drafter_of(engine), 0
    for seq in engine.scheduler.running:
        state = seq.drafter_state.get("draft_model")
        held = [(engine.runner, seq.table, seq.num_cached)]
        if state is not None:
            held.append((drafter.runner, state.table, state.num_cached))
        for a_runner, table, count in held:
            if count:
                fresh = prefilled(a_runner, seq.tokens[:count])
                found = kv(a_runner, table, count)
                assert all(torch.equal(a, b) for a, b in zip(found, fresh, strict=True)), seq.id
                num_compared += count
    return num_compared


def step_through(engine, requests, check):
    for asked in requests:
        engine.add(asked)
    told = []
    while engine.has_work():
        told += engine.step()
        check(engine)
    return told


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("draft_seed", [0, 2], ids=["right drafts", "wrong drafts"])
def test_after_every_step_both_kvs_are_those_of_a_fresh_prefill(sampling, draft_seed):
    engine = tiny_engine(draft_seed=draft_seed)
    counts = []
    asked = [
        request(f"r{i}", SpeculationParams(method="draft_model", num_draft_tokens=k), sampling,
                seed=i, length=6 + i)
        for i, k in enumerate((1, 4, 7))
    ]  # fmt: skip
    step_through(engine, asked, lambda e: counts.append(assert_kv_follows_the_log(e)))
    assert sum(counts) > 300


def test_kv_is_right_under_preemption_chunks_and_branches():
    prompt = request(length=9, seed=0).prompt_token_ids
    truth = [*prompt, *run(tiny_engine(), [request("r", OFF, seed=0)])["r", 0]]
    trees = ScriptedDrafter(junk_tree(256, truth), name="scripted")
    engine = tiny_engine(
        num_blocks=18,
        draft_seed=2,
        drafters=[trees],
        options={
            "max_num_batched_tokens": 12,
            "max_num_seqs": 4,
            "max_model_len": 60,
            "long_prefill_token_threshold": 5,
        },
    )
    wide = SpeculationParams(method="scripted", num_draft_tokens=3, width=3)
    asked = [request("r", wide, seed=0)]
    asked += [request(f"r{i}", K4, SAMPLED, seed=i, length=9 + i) for i in range(1, 4)]
    counts = []
    step_through(engine, asked, lambda e: counts.append(assert_kv_follows_the_log(e)))
    assert sum(counts) > 300
    assert engine.stats.num_preemptions > 0
    assert engine.manager.num_used == drafter_of(engine).manager.num_used == 0


@pytest.mark.parametrize(("draft_seed", "lag"), [(0, 2), (2, 1)], ids=["right", "wrong"])
def test_the_last_draft_is_caught_up_with_only_when_all_were_accepted(draft_seed, lag):
    """It was never run: the next draft begins with two tokens; otherwise with the bonus token."""
    engine = tiny_engine(draft_seed=draft_seed)
    engine.add(request())
    for count in range(1, 3):
        engine.step()
        (seq,) = engine.scheduler.running
        assert len(seq.tokens) == 9 + (5 if lag == 2 else 1) * count
        assert seq.drafter_state["draft_model"].num_cached == len(seq.tokens) - lag


@pytest.mark.parametrize("spec", [OFF, SpeculationParams(method="draft_model", num_draft_tokens=0)])
def test_a_drafter_that_is_not_asked_runs_nothing_and_holds_nothing(spec):
    engine = tiny_engine(draft_seed=0)
    run(engine, [request(speculation=spec)])
    drafter = drafter_of(engine)
    assert drafter.num_forwards == 0
    assert len(drafter.manager.tree) == 0


def test_k_forwards_per_step_for_all_sequences_together():
    engine = tiny_engine(draft_seed=0)
    for i in range(5):
        engine.add(request(f"r{i}", seed=i))
    for count in range(1, 4):
        engine.step()
        assert drafter_of(engine).num_forwards == 4 * count


def test_catch_up_after_plain_steps():
    """A drafter that was absent for a while reads the whole log in one pass."""
    engine = tiny_engine(draft_seed=0, options={"max_num_batched_tokens": 16})
    asked = request(length=12)
    engine.add(asked)
    engine.step()
    (seq,) = engine.scheduler.running
    drafting, seq.speculation = seq.speculation, engine_off(engine)
    for _ in range(6):
        engine.step()
    behind = seq.drafter_state["draft_model"].num_cached
    assert behind < len(seq.tokens) - 2
    seq.speculation = drafting
    before = drafter_of(engine).num_forwards
    engine.step()
    assert drafter_of(engine).num_forwards == before + 4
    assert_kv_follows_the_log(engine)
    told = []
    while engine.has_work():
        told += engine.step()
    plain = run(tiny_engine(), [request(speculation=OFF, length=12)])["r", 0]
    assert seq.tokens[12:] == plain


def engine_off(engine):
    """Plain decoding, resolved."""
    probe = tiny_engine(draft_seed=None)
    probe.add(request("probe", OFF))
    (seq,) = probe.scheduler.waiting()
    return seq.speculation


def test_catch_up_is_cut_into_passes_of_bounded_size(monkeypatch):
    monkeypatch.setattr("outrider.draft.draft_model.MAX_CATCH_UP_TOKENS", 10)
    assert MAX_CATCH_UP_TOKENS > 10
    engine = tiny_engine(draft_seed=0)
    sizes = []
    drafter, forward = drafter_of(engine), drafter_of(engine).runner.run

    def noted(pieces):
        sizes.append(sum(len(piece.chain) for piece in pieces))
        return forward(pieces)

    drafter.runner.run = noted
    asked = [request(f"r{i}", length=length, seed=i) for i, length in enumerate((25, 4, 13))]
    told = events(engine, asked)
    assert max(sizes) == 10
    assert sizes[:5] == [10, 10, 10, 10, 2], "42 tokens in turn, then chains"
    assert all(es[-1].metrics.acceptance_length == 5.0 for es in told.values())
    off = [request(f"r{i}", OFF, length=n, seed=i) for i, n in enumerate((25, 4, 13))]
    assert {key: [t for e in es for t in e.token_ids] for key, es in told.items()} == run(
        tiny_engine(), off
    )


def test_after_preemption_the_draft_kv_is_found_in_its_prefix_cache():
    engine = tiny_engine(draft_seed=0)
    engine.add(request(length=12))
    for _ in range(3):
        engine.step()
    (seq,) = engine.scheduler.running
    engine.scheduler._preempt(seq)
    engine.drafters.close(seq)
    engine.drafters.open(seq)
    assert seq.drafter_state == {}
    engine.step()
    state = seq.drafter_state["draft_model"]
    assert state.num_cached >= len(seq.tokens) - 6
    assert_kv_follows_the_log(engine)


def test_a_pool_too_small_for_all_means_plain_decoding_for_some():
    target = tiny_decoder()
    engine = pair(target, tiny_decoder(), num_draft_blocks=14)
    asked = [request(f"r{i}", length=14, seed=i) for i in range(4)]
    told = events(engine, asked)
    plain = run(tiny_engine(), [request(f"r{i}", OFF, length=14, seed=i) for i in range(4)])
    assert {key: [t for e in es for t in e.token_ids] for key, es in told.items()} == plain
    drafts = [es[-1].metrics.num_drafts for es in told.values()]
    assert sum(drafts) > 0
    steps = [es[-1].metrics.num_steps for es in told.values()]
    assert sum(drafts) < sum(steps)
    assert drafter_of(engine).manager.num_used == 0


def test_a_pool_too_small_for_any_draft_means_plain_decoding():
    engine = pair(tiny_decoder(), tiny_decoder(), num_draft_blocks=2)
    told = events(engine, [request()])["r", 0]
    assert told[-1].metrics.num_drafts == 0
    assert [t for e in told for t in e.token_ids] == run(tiny_engine(), [request(speculation=OFF)])[
        "r", 0
    ]


def test_a_drafter_of_a_shorter_context_stops_at_its_window():
    target = tiny_decoder()
    draft = tiny_decoder(max_position_embeddings=22)
    engine = pair(target, draft)
    told = events(engine, [request(length=9, sampling=SamplingParams(max_tokens=40))])["r", 0]
    plain = run(
        pair(target, draft), [request(speculation=OFF, sampling=SamplingParams(max_tokens=40))]
    )["r", 0]
    assert [t for e in told for t in e.token_ids] == plain
    drafted = [(9 + e.offset, e.num_drafted) for e in told]
    assert all(num == 4 for end, num in drafted if end + 3 <= 22)
    assert all(num == 0 for end, num in drafted if end + 3 > 22)
    assert any(num for _, num in drafted)
    assert any(num == 0 for _, num in drafted)


def test_logits_are_cut_or_padded_to_the_targets_vocabulary():
    logits_V = torch.tensor([1.0, 2.0, 3.0])
    assert fit(logits_V, 2).tolist() == [1.0, 2.0]
    assert fit(logits_V, 3).tolist() == [1.0, 2.0, 3.0]
    assert fit(logits_V, 5).tolist() == [1.0, 2.0, 3.0, -math.inf, -math.inf]


@pytest.mark.parametrize("draft_size", [100, 250, 256, 300])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("method", ["coupled", "probabilistic", "greedy"])
def test_padded_vocabularies_of_other_sizes(draft_size, sampling, method):
    """The prompt and the output hold ids that a smaller draft model does not have."""
    target = tiny_decoder()
    spec = SpeculationParams(method="draft_model", num_draft_tokens=3, draft_sample_method=method)
    prompt = (255, 40, 254, 41, 253)
    asked = [
        Request(id="r", prompt_token_ids=prompt, sampling=sampling, speculation=s, seed=3)
        for s in (spec, OFF)
    ]
    engine = pair(target, tiny_decoder(1, vocab_size=draft_size))
    told = events(engine, asked[:1])["r", 0]
    assert told[-1].metrics.num_drafts > 5
    plain = run(pair(target, tiny_decoder()), asked[1:])["r", 0]
    assert [t for e in told for t in e.token_ids] == plain


def trees_of(engine):
    """The drafts of one step for what runs now."""
    made = []
    draft = drafter_of(engine).draft

    def noted(rows, plan):
        made.extend(draft(rows, plan))
        return made[-len(rows) :]

    drafter_of(engine).draft = noted
    return made


SHAPED = SamplingParams(
    max_tokens=20, temperature=1.3, top_k=20, top_p=0.9, repetition_penalty=1.3, ignore_eos=True
)


def test_probabilistic_drafts_record_the_law_they_were_drawn_from():
    engine = tiny_engine(draft_seed=2)
    made = trees_of(engine)
    spec = SpeculationParams(
        method="draft_model", num_draft_tokens=3, draft_sample_method="probabilistic"
    )
    run(engine, [request(speculation=spec, sampling=SHAPED)])
    assert sum(len(tree) for tree in made) > 10
    for tree in made:
        for node, law_V in enumerate(tree.laws):
            assert law_V.shape == (256,)
            assert float(law_V.sum()) == pytest.approx(1.0, abs=1e-12)
            assert int((law_V > 0).sum()) <= 20, "the request's own top-k shapes the draft's law"
            assert float(law_V[tree.tokens[node]]) > 0


def test_a_recorded_law_is_that_of_the_draft_model_after_that_path():
    engine = tiny_engine(draft_seed=2)
    made = trees_of(engine)
    spec = SpeculationParams(
        method="draft_model", num_draft_tokens=3, draft_sample_method="probabilistic"
    )
    asked = request(speculation=spec, sampling=SAMPLED)
    engine.add(asked)
    engine.step()
    (tree,) = made
    for node in range(3):
        context = [*asked.prompt_token_ids, *tree.path_tokens(node)[:-1]]
        logits_V = last_logits(tiny_decoder(2), context)
        law_V = (logits_V.double() / 0.9).softmax(dim=0)
        assert torch.allclose(tree.law(node), law_V, atol=1e-9)


@pytest.mark.parametrize("method", ["coupled", "greedy"])
def test_other_methods_record_none(method):
    engine = tiny_engine(draft_seed=2)
    made = trees_of(engine)
    spec = SpeculationParams(method="draft_model", draft_sample_method=method)
    run(engine, [request(speculation=spec, sampling=SAMPLED)])
    assert {tree.laws for tree in made} == {()}


def test_draft_noise_is_new_at_every_root_and_for_every_seed():
    """Keying a draft by its own position would draw the same token after a rejection."""
    made = []
    for seed in (1, 2):
        engine = tiny_engine(draft_seed=2)
        trees = trees_of(engine)
        spec = SpeculationParams(
            method="draft_model", num_draft_tokens=2, draft_sample_method="probabilistic"
        )
        prompt = (40,) * 6
        hot = SamplingParams(max_tokens=12, temperature=50.0, ignore_eos=True)
        run(engine, [Request(
            id="r", prompt_token_ids=prompt, sampling=hot, speculation=spec, seed=seed
        )])  # fmt: skip
        made.append([tree.tokens for tree in trees if len(tree) == 2])
    flat = [token for tokens in made[0] for token in tokens]
    assert len(set(flat)) > len(flat) * 0.8
    assert made[0] != made[1]


def test_a_request_that_allows_no_token_fails_alone():
    """The drafter meets the error first; it must leave it to the verifier, who knows the row."""
    engine = tiny_engine(draft_seed=2)
    nothing = SamplingParams(max_tokens=9, logit_bias={t: float("-inf") for t in range(256)})
    asked = [request("bad", sampling=nothing, seed=1), request("good", seed=2)]
    told = events(engine, asked)
    assert told["bad", 0][-1].finish_reason == "error"
    assert "no token is allowed" in told["bad", 0][-1].error
    alone = run(tiny_engine(draft_seed=2), [request("good", seed=2)])
    assert [t for e in told["good", 0] for t in e.token_ids] == alone["good", 0]


def test_a_draft_stops_where_the_small_vocabulary_has_nothing_to_offer():
    """The target may only say ids that the draft model does not know: it proposes nothing."""
    target = tiny_decoder()
    forbidden = {t: float("-inf") for t in range(100)}
    sampling = SamplingParams(max_tokens=8, logit_bias=forbidden, ignore_eos=True)
    engine = pair(target, tiny_decoder(1, vocab_size=100))
    told = events(engine, [request(sampling=sampling)])["r", 0]
    assert told[-1].finish_reason == "length"
    assert told[-1].metrics.num_drafts == 0


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_restored_sequence_drafts_the_same_bit_for_bit(sampling):
    spec = SpeculationParams(
        method="draft_model", num_draft_tokens=4, draft_sample_method="probabilistic"
    )
    engine = tiny_engine(draft_seed=2)
    engine.add(request(speculation=spec, sampling=sampling))
    for _ in range(4):
        engine.step()
    (seq,) = engine.scheduler.running
    drafter = drafter_of(engine)
    snapshot = drafter.snapshot(seq)
    assert (snapshot.drafter, snapshot.num_tokens) == (
        "draft_model",
        seq.drafter_state["draft_model"].num_cached,
    )
    plan = engine.controller.plan(engine.scheduler.schedule())
    (row,) = engine.scheduler.schedule().rows
    (expected,) = drafter.draft([row], plan)

    drafter.close(seq)
    drafter.manager.reset_prefix_cache()
    for layer in drafter.runner.pool.layers:
        for part in layer:
            part.zero_()
    assert drafter.restore(seq, snapshot) == snapshot.num_tokens
    before = drafter.num_forwards
    (again,) = drafter.draft([row], plan)
    assert drafter.num_forwards - before == 4, "restored: nothing to catch up with"
    assert again.tokens == expected.tokens
    assert all(
        torch.equal(a, b) for a, b in zip(again.laws, expected.laws, strict=True) if a is not None
    )


def test_restore_starts_cold_where_there_is_no_room():
    engine = pair(tiny_decoder(), tiny_decoder(), num_draft_blocks=8)
    engine.add(request(length=20))
    engine.step()
    (seq,) = engine.scheduler.running
    drafter = drafter_of(engine)
    snapshot = drafter.snapshot(seq)
    drafter.close(seq)
    drafter.manager.reset_prefix_cache()
    other, _ = drafter.manager.open([1])
    assert drafter.manager.reserve(other, 12)
    assert drafter.restore(seq, snapshot) == 0
    drafter.manager.free(other)
    engine.step()
    assert_kv_follows_the_log(engine)


def test_nothing_to_snapshot_before_the_first_draft():
    engine = tiny_engine(draft_seed=0)
    engine.add(request())
    (seq,) = engine.scheduler.waiting()
    assert drafter_of(engine).snapshot(seq) is None


@pytest.mark.parametrize(
    ("verifier", "method"),
    [("rejection", "probabilistic"), ("rejection", "greedy"), ("sampled", "coupled")],
)
def test_output_has_the_targets_law(verifier, method):
    """Chi-square over all outputs of two tokens, with seeds 0 .. 1,999."""
    num_samples, prompt, temperature = 2000, (1, 0, 2, 1), 2.0
    target, draft = tiny_decoder(9, vocab_size=4), tiny_decoder(7, vocab_size=4)
    spec = SpeculationParams(
        method="draft_model", num_draft_tokens=2, verifier=verifier, draft_sample_method=method
    )
    sampling = SamplingParams(max_tokens=3, temperature=temperature, ignore_eos=True)
    engine = pair(target, draft, max_num_seqs=64)
    engine.config = EngineConfig(max_num_seqs=64)  # without the proof after every step
    seen = run(engine, [
        Request(id=f"{i}", prompt_token_ids=prompt, sampling=sampling, speculation=spec, seed=i)
        for i in range(num_samples)
    ])  # fmt: skip
    counts = Counter(tuple(tokens[:2]) for tokens in seen.values())
    law = exact_output_law(target, prompt, 2, temperature)
    assert math.isclose(sum(law.values()), 1.0)
    cells = [(counts[path], num_samples * law[path]) for path in product(range(4), repeat=2)]
    assert min(expected for _, expected in cells) > 3, "a fair test needs no empty cells"
    statistic = sum((found - expected) ** 2 / expected for found, expected in cells)
    assert statistic < 37.7, "chi-square, 15 degrees of freedom, p = 0.001"
    assert 0.02 < engine.stats.num_accepted_tokens / engine.stats.num_draft_tokens < 0.98


def test_mixed_with_others_in_one_batch_each_keeps_its_own_drafts():
    truth = run(tiny_engine(), [request("a", OFF, seed=1)])["a", 0]
    prompt = request(seed=1).prompt_token_ids
    perfect = ScriptedDrafter(oracle([*prompt, *truth]))
    bad = ScriptedDrafter(junk(256), name="bad")
    engine = tiny_engine(draft_seed=0, drafters=[perfect, bad])
    asked = [
        request("a", SpeculationParams(method="scripted", num_draft_tokens=4), seed=1),
        request("b", SpeculationParams(method="bad", num_draft_tokens=4), seed=1),
        request("c", K4, seed=1),
    ]
    told = events(engine, asked)
    assert all([t for e in es for t in e.token_ids] == truth for es in told.values())
    lengths = {key[0]: es[-1].metrics.acceptance_length for key, es in told.items()}
    assert lengths["a"] == lengths["c"] == 5.0
    assert lengths["b"] < 1.5


def drafted_with(inner, sampling, method, *, draft_noise=0.0):
    """Tokens, drafts and passes with or without n-grams that guess for the draft model."""
    engine = tiny_engine(draft_seed=0, draft_noise=draft_noise)
    made = trees_of(engine)
    spec = SpeculationParams(
        method="draft_model",
        num_draft_tokens=6,
        draft_sample_method=method,
        drafter_options={"inner": inner},
    )
    asked = [request(f"r{i}", spec, sampling, seed=i, length=7 + 5 * i) for i in range(3)]
    seen = run(engine, asked)
    assert drafter_of(engine).manager.num_used == 0
    return seen, [(tree.tokens, tree.laws) for tree in made], drafter_of(engine).num_forwards


ALL_BUT_THREE = {t: float("-inf") for t in range(256) if not 40 <= t < 43}
INNER_KINDS = {
    "greedy": SamplingParams(max_tokens=60, ignore_eos=True),
    "few words": SamplingParams(max_tokens=60, logit_bias=ALL_BUT_THREE, ignore_eos=True),
    "sharp": SamplingParams(max_tokens=60, temperature=0.2, ignore_eos=True),
    "penalized": SamplingParams(max_tokens=40, frequency_penalty=0.1, ignore_eos=True),
    "shaped": SHAPED,
}


@pytest.mark.parametrize("kind", INNER_KINDS)
@pytest.mark.parametrize("method", ["greedy", "coupled", "probabilistic", "independent"])
@pytest.mark.parametrize("draft_noise", [0.0, 0.02])
def test_guesses_for_the_draft_model_change_no_draft(draft_noise, method, kind):
    sampling = INNER_KINDS[kind]
    tokens, drafts, num_passes = drafted_with("", sampling, method, draft_noise=draft_noise)
    same, again, num_fewer = drafted_with("ngram", sampling, method, draft_noise=draft_noise)
    assert same == tokens
    assert len(again) == len(drafts) > 5
    for (path, laws), (other, others) in zip(drafts, again, strict=True):
        assert path == other
        assert all(torch.equal(a, b) for a, b in zip(laws, others, strict=True) if a is not None)
    assert num_fewer <= num_passes


@pytest.mark.parametrize("temperature", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_guesses_save_passes_where_the_text_repeats_itself(temperature, seed):
    """A model of four tokens says the same again and again."""
    sampling = SamplingParams(max_tokens=60, temperature=temperature, ignore_eos=True)
    found = []
    for inner in ("", "ngram"):
        engine = pair(tiny_decoder(9, vocab_size=4), tiny_decoder(9, vocab_size=4))
        spec = SpeculationParams(
            method="draft_model", num_draft_tokens=6, drafter_options={"inner": inner}
        )
        asked = Request(
            id="r", prompt_token_ids=(1, 0, 2), sampling=sampling, speculation=spec, seed=seed
        )
        found.append((run(engine, [asked]), drafter_of(engine).num_forwards))
    (tokens, num_passes), (same, num_fewer) = found
    assert same == tokens
    assert num_passes == 51
    assert num_fewer < 0.8 * num_passes


@pytest.mark.parametrize("draft_noise", [0.0, 0.02])
def test_guesses_leave_the_draft_kv_right(draft_noise):
    engine = tiny_engine(draft_seed=0, draft_noise=draft_noise)
    spec = SpeculationParams(
        method="draft_model", num_draft_tokens=6, drafter_options={"inner": "ngram"}
    )
    counts = []
    asked = [request(f"r{i}", spec, INNER_KINDS["few words"], seed=i) for i in range(3)]
    step_through(engine, asked, lambda e: counts.append(assert_kv_follows_the_log(e)))
    assert sum(counts) > 300


def test_guesses_beyond_the_draft_models_vocabulary_are_not_run():
    target = tiny_decoder()
    prompt = (40, 250, 41, 40, 250, 41, 40, 250, 41, 40)
    spec = SpeculationParams(
        method="draft_model", num_draft_tokens=4, drafter_options={"inner": "ngram"}
    )
    seen = [
        run(pair(target, tiny_decoder(1, vocab_size=100)), [
            Request(id="r", prompt_token_ids=prompt, sampling=GREEDY, speculation=s)
        ])
        for s in (spec, OFF)
    ]  # fmt: skip
    assert seen[0] == seen[1]


def test_guesses_serve_chains_only():
    spec = SpeculationParams(method="draft_model", width=3, drafter_options={"inner": "ngram"})
    with pytest.raises(RequestError, match="serves chains, not width=3"):
        tiny_engine(draft_seed=0).add(request(speculation=spec))


def test_a_draft_that_nobody_verified_is_forgotten():
    """Drafting twice for one log gives the same draft."""
    engine = tiny_engine(draft_seed=2)
    engine.add(request(length=8))
    engine.step()
    plan = engine.controller.plan(engine.scheduler.schedule())
    (row,) = engine.scheduler.schedule().rows
    first = drafter_of(engine).draft([row], plan)
    assert drafter_of(engine).draft([row], plan) == first
    drafter_of(engine).observe([Commit(seq=row.seq)], None)
    assert_kv_follows_the_log(engine)


@pytest.mark.parametrize("width", [1, 2])
def test_kv_of_what_another_drafter_guessed_is_not_taken_for_ones_own(width):
    """Compared token by token: the drafts of both may begin alike."""
    engine = tiny_engine(draft_seed=2)
    spec = SpeculationParams(method="draft_model", num_draft_tokens=4, width=width)
    engine.add(request(speculation=spec))
    engine.step()
    plan = engine.controller.plan(engine.scheduler.schedule())
    (row,) = engine.scheduler.schedule().rows
    (tree,) = drafter_of(engine).draft([row], plan)
    own = tree.tokens[tree.children(-1)[-1]]
    seq, num_before = row.seq, len(row.seq.tokens)
    seq.tokens += [own, (own + 1) % 256, 7]
    drafter_of(engine).observe([Commit(seq=seq, tokens=tuple(seq.tokens[num_before:]))], None)
    assert seq.drafter_state["draft_model"].num_cached == num_before + 1
    seq.num_cached = 0  # the target's KV is not the point
    assert assert_kv_follows_the_log(engine) == num_before + 1
