"""The promise: tokens are the same with speculation off, on, and however the engine is pressed."""

import pytest

from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.testing import (
    ScriptedDrafter,
    check_drafter,
    events,
    junk,
    junk_tree,
    run,
    tiny_decoder,
    tiny_engine,
)

OFF = SpeculationParams(method="off")
GREEDY = SamplingParams(max_tokens=40, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=40, temperature=0.8, ignore_eos=True)
SHAPED = SamplingParams(
    max_tokens=40,
    temperature=1.1,
    top_k=40,
    top_p=0.95,
    min_p=0.01,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    logit_bias={65: 1.5, 66: -2.0, 70: float("-inf")},
    min_tokens=8,
)
PENALIZED_GREEDY = SamplingParams(max_tokens=40, repetition_penalty=1.4, frequency_penalty=0.5)
SPECULATIONS = {
    "ngram": SpeculationParams(method="ngram", num_draft_tokens=4, prompt_lookup_min=1),
    "ngram tree": SpeculationParams(
        method="ngram", num_draft_tokens=3, width=3, prompt_lookup_min=1
    ),
    "draft model": SpeculationParams(method="draft_model", num_draft_tokens=4),
    "draft model, K=1": SpeculationParams(method="draft_model", num_draft_tokens=1),
    "draft model, K=7, greedy": SpeculationParams(
        method="draft_model", num_draft_tokens=7, draft_sample_method="greedy"
    ),
    "draft model, own noise": SpeculationParams(
        method="draft_model", draft_sample_method="probabilistic"
    ),
    "junk": SpeculationParams(method="scripted", num_draft_tokens=5),
    "junk tree": SpeculationParams(method="scripted tree", num_draft_tokens=3, width=3),
}


def requests(sampling, speculation, count):
    return [
        Request(
            id=f"r{i}",
            prompt_token_ids=tuple((11 * i + j * j) % 90 + 30 for j in range(5 + 3 * i)),
            sampling=sampling,
            speculation=speculation,
            seed=1000 + i,
        )
        for i in range(count)
    ]


HALF_RIGHT = 0.01  # noise on the target's weights that makes a draft model err half of the time


def engine(draft_seed=0, draft_noise=HALF_RIGHT, truth=(), **options):
    """By default a draft model that is near the target: its KV is rolled back all the time."""
    tree = ScriptedDrafter(junk_tree(256, truth), name="scripted tree")
    return tiny_engine(
        drafters=[ScriptedDrafter(junk(256)), tree],
        draft_seed=draft_seed,
        draft_noise=draft_noise,
        **options,
    )


def perfect_engine():
    """The draft model is the target itself."""
    return engine(draft_noise=0.0)


@pytest.fixture(scope="module")
def plain():
    """Tokens of plain decoding, 16 sequences side by side, by sampling settings."""
    kinds = {"greedy": GREEDY, "sampled": SAMPLED, "shaped": SHAPED, "penalized": PENALIZED_GREEDY}
    return {name: (s, run(engine(), requests(s, OFF, 16))) for name, s in kinds.items()}


@pytest.mark.parametrize("kind", ["greedy", "sampled", "shaped", "penalized"])
@pytest.mark.parametrize("name", SPECULATIONS)
def test_same_tokens_in_a_batch_of_16(plain, kind, name):
    sampling, expected = plain[kind]
    assert run(engine(), requests(sampling, SPECULATIONS[name], 16)) == expected


@pytest.mark.parametrize("kind", ["greedy", "shaped"])
@pytest.mark.parametrize("name", ["ngram tree", "draft model", "junk tree"])
def test_same_tokens_alone(plain, kind, name):
    sampling, expected = plain[kind]
    request = requests(sampling, SPECULATIONS[name], 3)[2]
    assert run(engine(), [request])["r2", 0] == expected["r2", 0]


@pytest.mark.parametrize("kind", ["greedy", "shaped"])
@pytest.mark.parametrize("name", SPECULATIONS)
def test_same_tokens_with_preemption_chunks_and_few_seats(plain, kind, name):
    sampling, expected = plain[kind]
    pressed = engine(
        num_blocks=40,
        options={
            "max_num_batched_tokens": 24,
            "max_num_seqs": 5,
            "max_model_len": 100,
            "long_prefill_token_threshold": 7,
        },
    )
    told = events(pressed, requests(sampling, SPECULATIONS[name], 16))
    assert {key: [t for e in es for t in e.token_ids] for key, es in told.items()} == expected
    assert pressed.stats.num_preemptions > 0, "the test must press hard enough to preempt"
    assert pressed.manager.num_used == 0


@pytest.mark.parametrize("name", ["ngram", "draft model", "junk tree"])
def test_same_tokens_with_a_warm_prefix_cache(plain, name):
    sampling, expected = plain["shaped"]
    warm = engine(num_blocks=600)
    run(warm, requests(sampling, OFF, 16))
    told = events(warm, requests(sampling, SPECULATIONS[name], 16))
    assert {key: [t for e in es for t in e.token_ids] for key, es in told.items()} == expected
    assert all(es[-1].metrics.num_cached_tokens > 0 for es in told.values() if es[0].index == 0)


def test_prefix_hits_do_not_shrink_when_speculation_is_on():
    hits = {}
    for name in ("off", "draft model", "junk tree"):
        spec = SPECULATIONS.get(name, OFF)
        used = engine(num_blocks=600)
        for _ in range(2):
            run(used, requests(GREEDY, spec, 8))
        hits[name] = used.manager.hits
    assert hits["draft model"] == hits["off"] == hits["junk tree"] > 0


def test_another_draft_model_changes_speed_but_not_tokens(plain):
    sampling, expected = plain["sampled"]
    near, other = engine(), engine(draft_seed=5)
    for used in (near, other):
        assert run(used, requests(sampling, SPECULATIONS["draft model"], 16)) == expected
    assert 0 < acceptance(other) < acceptance(near)


@pytest.mark.parametrize("kind", ["greedy", "sampled", "shaped", "penalized"])
@pytest.mark.parametrize("name", [name for name in SPECULATIONS if "draft model" in name])
def test_the_draft_model_of_these_tests_is_sometimes_right(plain, kind, name):
    """Otherwise they would not see what a rejection leaves in the draft model's KV."""
    used = engine()
    run(used, requests(plain[kind][0], SPECULATIONS[name], 16))
    assert 0 < acceptance(used) < 1


def acceptance(used):
    return used.stats.num_accepted_tokens / used.stats.num_draft_tokens


def test_mixed_methods_in_one_batch(plain):
    sampling, expected = plain["sampled"]
    names = [*SPECULATIONS, None, None]
    mixed = [
        requests(sampling, SPECULATIONS.get(names[i % len(names)], OFF), 16)[i] for i in range(16)
    ]
    assert run(engine(), mixed) == expected


def test_trees_are_really_accepted_off_the_first_branch(plain, monkeypatch):
    """The compaction of KV is exercised: true paths run through nodes that are not leftmost."""
    sampling, expected = plain["greedy"]
    request = requests(sampling, SPECULATIONS["junk tree"], 1)[0]
    truth = [*request.prompt_token_ids, *expected["r0", 0]]
    used = engine(truth=truth)
    pool, moved = used.runner.pool, []
    copy_slots = pool.copy_slots

    def noting(sources, destinations):
        moved.extend(zip(sources, destinations, strict=True))
        copy_slots(sources, destinations)

    monkeypatch.setattr(pool, "copy_slots", noting)
    assert run(used, [request])["r0", 0] == expected["r0", 0]
    assert used.stats.num_accepted_tokens >= 10
    assert len(moved) > 0
    assert all(source != destination for source, destination in moved)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_perfect_drafter_is_accepted_in_full(temperature):
    """Drafter equal to the target: K accepted in every step that is not cut short."""
    sampling = SamplingParams(max_tokens=41, temperature=temperature, ignore_eos=True)
    told = events(perfect_engine(), requests(sampling, SPECULATIONS["draft model"], 4))
    for answer in told.values():
        metrics = answer[-1].metrics
        assert metrics.num_accepted_tokens == metrics.num_draft_tokens > 0
        assert metrics.acceptance_length == 5.0


def test_rejection_with_a_perfect_drafter_accepts_all():
    sampling = SamplingParams(max_tokens=41, temperature=1.0, ignore_eos=True)
    spec = SpeculationParams(method="draft_model", num_draft_tokens=4, verifier="rejection")
    told = events(perfect_engine(), requests(sampling, spec, 4))
    assert all(es[-1].metrics.acceptance_length == 5.0 for es in told.values())


def test_greedy_verifier_gives_greedy_tokens(plain):
    sampling, expected = plain["greedy"]
    spec = SpeculationParams(method="draft_model", verifier="greedy")
    told = events(engine(), requests(sampling, spec, 16))
    assert {key: [t for e in es for t in e.token_ids] for key, es in told.items()} == expected
    assert told["r0", 0][-1].metrics.exactness == "exact-greedy"


@pytest.mark.parametrize("name", ["draft model", "ngram tree"])
def test_completions_of_one_prompt_share_kv_and_differ(name):
    sampling = SamplingParams(max_tokens=30, temperature=1.0, n=4, ignore_eos=True)
    plain_tokens = run(engine(), requests(sampling, OFF, 2))
    used = engine()
    seen = run(used, requests(sampling, SPECULATIONS[name], 2))
    assert seen == plain_tokens
    assert len({tuple(tokens) for tokens in seen.values()}) == 8
    alone = run(
        engine(), requests(SamplingParams(max_tokens=30, temperature=1.0, ignore_eos=True), OFF, 2)
    )
    assert seen["r0", 0] == alone["r0", 0], "completion 0 has the seed itself"


def test_different_seeds_give_different_tokens():
    first, second = requests(SAMPLED, OFF, 1)[0], requests(SAMPLED, OFF, 1)[0]
    second = Request(
        id="other", prompt_token_ids=first.prompt_token_ids, sampling=SAMPLED, seed=first.seed + 1
    )
    seen = run(tiny_engine(draft_seed=None), [first, second])
    assert seen["r0", 0] != seen["other", 0]


def test_sliding_window_models_too():
    config = {"model_type": "mistral", "sliding_window": 9}
    target = tiny_decoder(4, **config)
    plain_tokens = run(tiny_engine(target=target, draft_seed=None), requests(GREEDY, OFF, 4))
    for name in ("ngram tree", "junk tree"):
        trees = ScriptedDrafter(junk_tree(256), name="scripted tree")
        used = tiny_engine(target=tiny_decoder(4, **config), draft_seed=None, drafters=[trees])
        assert run(used, requests(GREEDY, SPECULATIONS[name], 4)) == plain_tokens


def test_the_conformance_check_passes_ours_and_catches_a_bad_drafter():
    check_drafter(lambda: ScriptedDrafter(junk_tree(256)))

    def too_many(seq, plan):
        return junk(256)(seq, plan._replace(depth=plan.depth + 1, num_nodes=plan.num_nodes + 1))

    with pytest.raises(AssertionError, match="more than was planned"):
        check_drafter(lambda: ScriptedDrafter(too_many))
