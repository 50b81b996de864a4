"""Draft models under a stop rule: where chains end, what they say, and that all else stays."""

from dataclasses import replace

import pytest
import torch

from outrider.draft.draft_model import ModelDrafter
from outrider.engine.config import EngineConfig
from outrider.engine.engine import Engine
from outrider.request import SamplingParams, SpeculationParams
from outrider.step import StopRule
from outrider.testing import run, tiny_decoder, tiny_engine
from tests.draft.draft_models import OFF, drafter_of, kv, last_logits, pooled, prefilled, request

RULE = StopRule(0.3, 1.0, 1.0, 0.2)
TELLS = StopRule(0.0, 1.0, 0.0)
AT_ONCE = StopRule(1.0, 1.0, 0.0)
K = 5
SHARP = 0.6
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
KINDS = {
    "greedy": GREEDY,
    "penalized": SamplingParams(max_tokens=24, repetition_penalty=1.4, ignore_eos=True),
    "sampled": SamplingParams(max_tokens=24, temperature=0.9, ignore_eos=True),
    "shaped": SamplingParams(
        max_tokens=24, temperature=0.8, top_k=20, presence_penalty=0.5, ignore_eos=True
    ),
}
METHODS = ("greedy", "coupled", "probabilistic", "independent")


def asks(method="greedy", k=K, **more):
    return SpeculationParams(
        method="draft_model", num_draft_tokens=k, draft_sample_method=method, policy="fixed", **more
    )


def engine(draft=None, **options):
    """One whose draft model has laws sharp enough for chains to end at all depths."""
    drafter = ModelDrafter(*pooled(draft or tiny_decoder(2, scale=SHARP)), 256)
    return tiny_engine(drafters=[drafter], **options)


def requests(sampling, speculation, count=3):
    return [request(f"r{i}", speculation, sampling, length=5 + i, seed=i) for i in range(count)]


def under(used, *rules):
    """Plans of row i get rule i % len(rules); returns the list of (log, plan, tree) to come."""
    drafter, made = drafter_of(used), []
    draft = drafter.draft

    def ruled(rows, plan):
        plan = [part._replace(stop=rules[i % len(rules)]) for i, part in enumerate(plan)]
        trees = draft(rows, plan)
        for row, part, tree in zip(rows, plan, trees, strict=True):
            tree.check()
            made.append((list(row.seq.tokens), part, tree))
        return trees

    drafter.draft = ruled
    return made


def twice(used, rule):
    """Each draft is made without the rule and with it; returns the list of (log, both) to come."""
    drafter, made = drafter_of(used), []
    draft = drafter.draft

    def compared(rows, plan):
        whole = draft(rows, plan)
        ended = draft(rows, [part._replace(stop=rule) for part in plan])
        logs = [list(row.seq.tokens) for row in rows]
        made.extend(zip(logs, whole, ended, strict=True))
        return ended

    drafter.draft = compared
    return made


def length_by(rule, confidence):
    """Where the rule ends a chain of such tokens, by its definition; one beyond if it does not."""
    survival = 1.0
    for depth, value in enumerate(confidence, start=1):
        survival *= rule.acceptance(value, depth)
        if survival < rule.floor:
            return depth
    return len(confidence) + 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_draft_is_the_beginning_of_the_whole_one(method, kind):
    used = engine()
    made = twice(used, RULE)
    assert run(used, requests(KINDS[kind], asks(method))) == run(
        tiny_engine(), requests(KINDS[kind], OFF)
    )
    lengths = set()
    for _, whole, ended in made:
        count = len(ended)
        assert count >= 1
        assert ended.tokens == whole.tokens[:count]
        assert whole.confidence == ()
        assert len(ended.confidence) == count
        assert len(ended.laws) == (count if whole.laws else 0)
        assert all(torch.equal(a, b) for a, b in zip(ended.laws, whole.laws, strict=False))
        assert len(ended.paths) == len(whole.paths)
        assert min(length_by(RULE, ended.confidence), len(whole)) == count
        lengths.add(count)
    assert len(lengths) > 1, "chains end at one depth only: the rule was not put to the test"


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_confidence_is_the_largest_probability_of_the_draft_models_law(kind):
    used = engine()
    made = under(used, RULE)
    run(used, requests(KINDS[kind], asks("coupled")))
    network, temperature = tiny_decoder(2, scale=SHARP), KINDS[kind].temperature or 1.0
    for log, _, tree in made[:6]:
        for node, told in enumerate(tree.confidence):
            logits_V = last_logits(network, [*log, *tree.tokens[:node]]).double()
            assert told == pytest.approx(float((logits_V / temperature).softmax(0).max()), rel=1e-5)


def test_at_temperature_0_other_settings_shape_it():
    """Only two tokens are allowed: the draft model is as sure as it is of one beside the other."""
    two = SamplingParams(max_tokens=8, logit_bias={40: 200.0, 41: 200.0}, ignore_eos=True)
    used = engine()
    made = under(used, TELLS)
    run(used, requests(two, asks()))
    network = tiny_decoder(2, scale=SHARP)
    for log, _, tree in made[:6]:
        for node, told in enumerate(tree.confidence):
            pair = last_logits(network, [*log, *tree.tokens[:node]]).double()[[40, 41]]
            assert told == pytest.approx(float(pair.softmax(0).max()), rel=1e-6)
    assert {token for _, _, tree in made for token in tree.tokens} <= {40, 41}


@pytest.mark.parametrize("kind", KINDS)
def test_a_floor_of_zero_only_tells(kind):
    plain, used = engine(), engine()
    bare, told = under(plain, None), under(used, TELLS)
    asked = requests(KINDS[kind], asks("coupled"))
    assert run(plain, asked) == run(used, asked)
    assert [tree.tokens for *_, tree in bare] == [tree.tokens for *_, tree in told]
    assert drafter_of(plain).num_forwards == drafter_of(used).num_forwards
    assert all(len(tree.confidence) == len(tree) for *_, tree in told)


def test_who_has_no_rule_pays_nothing(monkeypatch):
    used = engine()
    monkeypatch.setattr("outrider.draft.feeding.fit", lambda *given: pytest.fail("asked"))
    made = under(used, None)
    run(used, requests(GREEDY, asks()))
    assert made
    assert all(tree.confidence == () for *_, tree in made)


def test_a_chain_that_ends_spares_the_passes_after_it():
    used = engine()
    made = under(used, AT_ONCE)
    run(used, requests(GREEDY, asks(), 1))
    assert {len(tree) for *_, tree in made} == {1}
    assert drafter_of(used).num_forwards == len(made)


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_draft_kv_stays_right(kind):
    used, num_compared = engine(), 0
    made = under(used, RULE)
    for asked in requests(KINDS[kind], asks("coupled")):
        used.add(asked)
    drafter = drafter_of(used)
    while used.has_work():
        used.step()
        for seq in used.scheduler.running:
            state = seq.drafter_state["draft_model"]
            fresh = prefilled(drafter.runner, seq.tokens[: state.num_cached])
            found = kv(drafter.runner, state.table, state.num_cached)
            assert all(torch.equal(a, b) for a, b in zip(found, fresh, strict=True))
            num_compared += state.num_cached
    assert num_compared > 200
    assert len({len(tree) for *_, tree in made}) > 1


def test_rows_of_one_step_have_rules_of_their_own():
    used = engine()
    made = under(used, AT_ONCE, None, TELLS)
    asked = [*requests(GREEDY, asks()), *requests(KINDS["sampled"], asks("coupled"))]
    asked = [request(f"m{i}", r.speculation, r.sampling, seed=i) for i, r in enumerate(asked)]
    expected = run(tiny_engine(), [request(r.id, OFF, r.sampling, seed=i) for i, r in
                                   enumerate(asked)])  # fmt: skip
    assert run(used, asked) == expected
    for _, part, tree in made:
        assert len(tree.confidence) == (0 if part.stop is None else len(tree))
        assert len(tree) == (1 if part.stop is AT_ONCE else part.depth)


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_trees_pay_no_heed(kind):
    used = engine()
    made = under(used, AT_ONCE)
    run(used, requests(KINDS[kind], asks("coupled", k=3, width=2)))
    assert all(tree.confidence == () for *_, tree in made)
    assert max(len(tree) for *_, tree in made) > 2


@pytest.mark.parametrize("temperature", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_guesses_for_the_draft_model_change_no_draft(temperature, seed):
    """A model of four tokens repeats itself, so that guesses are right and one pass gives many."""
    sampling = SamplingParams(max_tokens=60, temperature=temperature, ignore_eos=True)
    drafts, num_forwards = [], []
    for inner in ("", "ngram"):
        network = tiny_decoder(seed, vocab_size=4)
        drafter = ModelDrafter(*pooled(network), 4)
        config = EngineConfig(block_size=4, check_integrity=True, max_num_seqs=4)
        used = Engine(*pooled(network), config, drafters=[drafter])
        made = under(used, StopRule(0.5, 1.0, 1.5))
        asked = asks("coupled", k=8, drafter_options={"inner": inner})
        run(used, [replace(request("r", asked, sampling), prompt_token_ids=(1, 0, 2))])
        drafts.append([(log, tree.tokens, tree.confidence) for log, _, tree in made])
        num_forwards.append(drafter.num_forwards)
    assert [draft[:2] for draft in drafts[0]] == [draft[:2] for draft in drafts[1]]
    for (*_, alone), (*_, guessed) in zip(*drafts, strict=True):
        assert guessed == pytest.approx(alone, rel=1e-5)
    assert num_forwards[1] <= num_forwards[0]


@pytest.mark.parametrize("draft_size", [200, 300])
def test_a_vocabulary_of_another_size(draft_size):
    draft = tiny_decoder(2, scale=SHARP, vocab_size=draft_size)
    used = engine(draft)
    made = under(used, TELLS)
    run(used, requests(GREEDY, asks()))
    for log, _, tree in made[:6]:
        for node, told in enumerate(tree.confidence):
            tokens = [min(t, draft_size - 1) for t in [*log, *tree.tokens[:node]]]
            law_V = last_logits(draft, tokens).double()[:256].softmax(0)
            assert told == pytest.approx(float(law_V.max()), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_drafting_in_parallel_is_cut_to_what_may_stand(method, kind):
    used = engine(tiny_decoder(2, scale=SHARP, pard_token=2))
    made = twice(used, RULE)
    assert run(used, requests(KINDS[kind], asks(method))) == run(
        tiny_engine(), requests(KINDS[kind], OFF)
    )
    for _, whole, ended in made:
        assert ended.tokens == whole.tokens[: len(ended)]
        assert len(ended) == min(length_by(RULE, ended.confidence), len(whole))
    assert len({len(ended) for *_, ended in made}) > 1
