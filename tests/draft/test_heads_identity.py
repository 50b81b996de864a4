"""Whatever a draft head guesses, tokens are those of plain decoding: one suite for all heads.

A kind of head enters with a line in `heads.KINDS`. The first one goes through all of it; of what
others are crossed with, half is tried each time, and the other half is slow.
"""

from dataclasses import replace
from functools import cache
from itertools import count, product
from typing import Any

import pytest

from outrider.control.base import Facts
from outrider.control.policies import make_controller
from outrider.draft.head_drafter import HeadDrafter
from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.step import EMPTY_TREE
from outrider.testing import events, tiny_engine
from tests.draft.heads import KINDS as HEADS, head, loud_target

OFF = SpeculationParams(method="off")
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
KINDS = {
    "greedy": GREEDY,
    "sampled": replace(GREEDY, temperature=1.0),
    "penalized": replace(GREEDY, repetition_penalty=1.4, frequency_penalty=0.5),
    "shaped": SamplingParams(
        max_tokens=24,
        temperature=1.1,
        top_k=40,
        top_p=0.95,
        min_p=0.01,
        presence_penalty=0.3,
        logit_bias={65: 1.5, 70: float("-inf")},
        min_tokens=8,
    ),
    "stopped": replace(GREEDY, temperature=0.8, stop=("a", "m", "Q"), stop_token_ids=(50, 51, 99)),
    "constrained": SamplingParams(max_tokens=24, temperature=0.8, regex="[a-z]{2,9}( [a-z]{1,9})*"),
}
SLOW = [pytest.mark.slow]
WAYS: dict[str, dict[str, Any]] = {
    "chain": {"num_draft_tokens": 3, "width": 1},
    "one token": {"num_draft_tokens": 1, "width": 1},
    "deep": {"width": 1},
    "tree": {"num_draft_tokens": 3, "width": 4, "num_nodes": 10},
    "as it comes": {},
    "greedy chain": {"num_draft_tokens": 3, "width": 1, "draft_sample_method": "greedy"},
    "greedy tree": {"num_draft_tokens": 3, "width": 3, "draft_sample_method": "greedy"},
}
FEW = {
    "num_blocks": 24,
    "options": {
        "max_num_batched_tokens": 24,
        "max_num_seqs": 5,
        "max_model_len": 80,
        "long_prefill_token_threshold": 7,
    },
}


def crossed(**axes):
    """All heads with all of these."""
    made = list(product(*axes.values()))
    params = [
        pytest.param(
            name,
            *values,
            marks=[] if not place or (index + place) % min(2, len(made)) == 0 else SLOW,
        )
        for place, name in enumerate(HEADS)
        for index, values in enumerate(made)
    ]
    return pytest.mark.parametrize(("name", *axes), params)


def drafter_of(name):
    return HEADS[name].drafter


def engine(name, **options):
    drafter = drafter_of(name)
    return tiny_engine(
        target=loud_target(),
        drafters=[drafter],
        heads={drafter.name: head(name)},
        draft_seed=None,
        **options,
    )


def asks(name, way):
    settings = {"method": drafter_of(name).name, "policy": "fixed", **WAYS[way]}
    if way == "deep":
        drafter = engine(name).drafters[settings["method"]]
        settings["num_draft_tokens"] = getattr(drafter, "max_draft_tokens", 9)
    return SpeculationParams(**settings)


def requests(sampling, speculation, num=6, length=5):
    return [
        Request(
            id=f"r{i}",
            prompt_token_ids=tuple((11 * i + j * j) % 90 + 30 for j in range(length + 3 * i)),
            sampling=sampling,
            speculation=speculation,
            seed=1000 + i,
        )
        for i in range(num)
    ]


def served(used, asked):
    """Tokens, and how each completion ended."""
    told = events(used, asked)
    assert used.manager.num_used == 0
    return {
        key: ([token for event in answer for token in event.token_ids], answer[-1].finish_reason)
        for key, answer in told.items()
    }


@cache
def plain(kind, num=6, length=5, n=1):
    sampling = replace(KINDS[kind], n=n)
    used = tiny_engine(target=loud_target(), draft_seed=None, num_blocks=1024)
    return served(used, requests(sampling, OFF, num, length))


def assert_useful(used):
    assert used.stats.num_draft_tokens > 0
    assert used.stats.num_accepted_tokens > 0
    assert used.stats.num_accepted_tokens < used.stats.num_draft_tokens


@crossed(kind=["greedy", "sampled"], way=WAYS)
def test_same_tokens_in_a_batch(name, kind, way):
    used = engine(name)
    assert served(used, requests(KINDS[kind], asks(name, way))) == plain(kind)
    if kind == "greedy":
        assert_useful(used)


@crossed(kind=["penalized", "shaped", "stopped", "constrained"], way=["chain", "tree"])
def test_same_tokens_under_all_settings(name, kind, way):
    used = engine(name)
    assert served(used, requests(KINDS[kind], asks(name, way), 4)) == plain(kind, 4)
    assert used.stats.num_draft_tokens > 0


@crossed(kind=["greedy", "sampled"])
def test_same_tokens_when_a_policy_goes_as_far_as_pays(name, kind):
    """It plans deeper than a head may reach, less deep, and not at all."""
    ticks = count()
    facts = Facts(clock=lambda: next(ticks) * 1e-3)
    used = engine(name, controller=make_controller(1024, facts), clock=facts.clock)
    asked = SpeculationParams(method=drafter_of(name).name, policy="adaptive")
    assert served(used, requests(KINDS[kind], asked)) == plain(kind)
    assert used.stats.num_draft_tokens > 0


@crossed(kind=["greedy", "sampled"], way=["chain", "tree"])
def test_same_tokens_alone(name, kind, way):
    (_, _, asked) = requests(KINDS[kind], asks(name, way), 3)
    assert served(engine(name), [asked])["r2", 0] == plain(kind)["r2", 0]


@crossed(kind=["greedy", "sampled", "penalized", "stopped"], way=["chain", "tree"])
def test_same_tokens_with_preemption_chunks_and_few_seats(name, kind, way):
    used = engine(name, **FEW)
    assert served(used, requests(KINDS[kind], asks(name, way))) == plain(kind)
    assert used.stats.num_preemptions > 0 or kind == "stopped"


@crossed(has_few_blocks=[False, True], kind=["greedy", "sampled"], way=["chain", "tree"])
def test_same_tokens_for_two_completions_each(name, kind, way, has_few_blocks):
    used = engine(name, **(FEW if has_few_blocks else {}))
    asked = requests(replace(KINDS[kind], n=2), asks(name, way), 5)
    assert served(used, asked) == plain(kind, 5, n=2)
    assert (used.stats.num_preemptions > 0) == has_few_blocks


@crossed(kind=["greedy", "sampled"], first=["head", "off"], way=["chain", "tree"])
def test_same_tokens_with_a_warm_prefix_cache(name, kind, first, way):
    """Left there by requests that drafted with the head, or by such that did not.

    A head with KV of its own has the prefix run again where its features were not kept.
    """
    used = engine(name, num_blocks=600)
    before = requests(KINDS[kind], asks(name, way) if first == "head" else OFF, 4, length=14)
    served(used, before)
    hits = used.manager.hits
    after = requests(KINDS[kind], asks(name, way), 4, length=14)
    assert served(used, after) == plain(kind, 4, length=14)
    is_run_again = first == "off" and issubclass(drafter_of(name), HeadDrafter)
    assert used.manager.hits > hits or is_run_again


@crossed(chunk=[0, 37], way=["chain", "tree"])
def test_same_tokens_after_long_prompts(name, chunk, way):
    """Longer than what a head lets wait."""
    used = engine(name, num_blocks=1024, options={"long_prefill_token_threshold": chunk})
    asked = requests(KINDS["sampled"], asks(name, way), 3, length=300)
    assert served(used, asked) == plain("sampled", 3, length=300)
    assert used.stats.num_draft_tokens > 0


@crossed(kind=["greedy", "sampled"], way=["chain", "tree"])
def test_same_tokens_when_drafting_rests_for_a_while(name, kind, way):
    """Steps without a draft leave features that nobody has used."""
    used = engine(name)
    drafter, calls = used.drafters[drafter_of(name).name], 0
    draft = drafter.draft

    def resting(rows, plan):
        nonlocal calls
        calls += 1
        return [EMPTY_TREE for _ in rows] if 3 <= calls < 12 else draft(rows, plan)

    drafter.draft = resting
    assert served(used, requests(KINDS[kind], asks(name, way))) == plain(kind)
    assert calls > 12


@crossed(kind=["greedy", "sampled"])
def test_same_tokens_beside_other_methods(name, kind):
    others = [OFF, SpeculationParams(method="ngram", prompt_lookup_min=1)]
    ways = [*(asks(name, way) for way in ("chain", "tree", "one token")), *others]
    asked = [
        replace(request, speculation=ways[i % len(ways)])
        for i, request in enumerate(requests(KINDS[kind], OFF))
    ]
    assert served(engine(name), asked) == plain(kind)


@crossed(rule=["rejection", "block", "tree", "traversal", "greedy"])
def test_same_greedy_tokens_under_every_rule(name, rule):
    """At temperature 0 rules with coins have none to throw."""
    width = 3 if rule in ("tree", "traversal") else 1
    asked = SpeculationParams(
        method=drafter_of(name).name,
        num_draft_tokens=3,
        width=width,
        verifier=rule,
        policy="fixed",
    )
    assert served(engine(name), requests(GREEDY, asked)) == plain("greedy")


@pytest.mark.parametrize("name", HEADS)
def test_tenants_share_nothing_and_get_the_same_tokens(name):
    used = engine(name, num_blocks=600)
    for tenant in ("a", "b"):
        asked = requests(KINDS["sampled"], asks(name, "chain"), 4, length=14)
        told = served(used, [replace(request, tenant=tenant) for request in asked])
        assert told == plain("sampled", 4, length=14)
        assert used.manager.hits == 0
