"""Whatever a draft head guesses, tokens are those of plain decoding: one suite for all heads.

A head enters with a line in `HEADS`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import count
from typing import Any, NamedTuple

import pytest

from outrider.control.base import Facts
from outrider.control.policies import make_controller
from outrider.draft.medusa import MedusaDrafter
from outrider.models.decoder import Decoder
from outrider.models.heads.spec import Head
from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.step import EMPTY_TREE
from outrider.testing import events, tiny_decoder, tiny_engine
from tests.draft.test_medusa import fitted_head


class Entry(NamedTuple):
    """One kind of head in this suite.

    Attributes:
        drafter: class that has `build`; the engine hands it the head under its name.
        head: made for the target of this suite: 256 tokens, 32 wide, two layers.
        is_often_right: so that what a rejection, and what an acceptance leaves behind is seen. A
            random head is next to never right; one fitted or trained a little, or made from parts
            of the target, is.
    """

    drafter: Any
    head: Callable[[Decoder], Head]
    is_often_right: bool = True


# Every drafter that runs a head has its line here.
HEADS = {
    "medusa": Entry(MedusaDrafter, fitted_head),
}

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
WAYS: dict[str, dict[str, Any]] = {
    "chain": {"num_draft_tokens": 3, "width": 1},
    "one token": {"num_draft_tokens": 1, "width": 1},
    "beyond the head": {"num_draft_tokens": 9, "width": 1},
    "tree": {"num_draft_tokens": 3, "width": 4, "num_nodes": 10},
    "as it comes": {},
    "greedy chain": {"num_draft_tokens": 3, "width": 1, "draft_sample_method": "greedy"},
    "greedy tree": {"num_draft_tokens": 3, "width": 3, "draft_sample_method": "greedy"},
}
FEW = {
    "num_blocks": 28,
    "options": {
        "max_num_batched_tokens": 24,
        "max_num_seqs": 5,
        "max_model_len": 80,
        "long_prefill_token_threshold": 7,
    },
}


@cache
def target() -> Decoder:
    return tiny_decoder(max_position_embeddings=1024)


@cache
def head(name):
    return HEADS[name].head(target())


def engine(name, **options):
    return tiny_engine(
        target=target(),
        drafters=[HEADS[name].drafter],
        heads={name: head(name)},
        draft_seed=None,
        **options,
    )


def asks(name, way):
    return SpeculationParams(method=name, policy="fixed", **WAYS[way])


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
    used = tiny_engine(target=target(), draft_seed=None, num_blocks=1024)
    return served(used, requests(sampling, OFF, num, length))


def assert_useful(name, used):
    assert used.stats.num_draft_tokens > 0
    assert used.stats.num_accepted_tokens > 0 or not HEADS[name].is_often_right
    assert used.stats.num_accepted_tokens < used.stats.num_draft_tokens


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["greedy", "sampled"])
@pytest.mark.parametrize("name", HEADS)
def test_same_tokens_in_a_batch(name, kind, way):
    used = engine(name)
    assert served(used, requests(KINDS[kind], asks(name, way))) == plain(kind)
    if kind == "greedy":
        assert_useful(name, used)


@pytest.mark.parametrize("way", ["chain", "tree"])
@pytest.mark.parametrize("kind", ["penalized", "shaped", "stopped", "constrained"])
@pytest.mark.parametrize("name", HEADS)
def test_same_tokens_under_all_settings(name, kind, way):
    used = engine(name)
    assert served(used, requests(KINDS[kind], asks(name, way), 4)) == plain(kind, 4)
    assert used.stats.num_draft_tokens > 0


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
@pytest.mark.parametrize("name", HEADS)
def test_same_tokens_when_a_policy_goes_as_far_as_pays(name, kind):
    """It plans deeper than a head may reach, less deep, and not at all."""
    ticks = count()
    facts = Facts(clock=lambda: next(ticks) * 1e-3)
    used = engine(name, controller=make_controller(1024, facts), clock=facts.clock)
    asked = SpeculationParams(method=name, policy="adaptive")
    assert served(used, requests(KINDS[kind], asked)) == plain(kind)
    assert used.stats.num_draft_tokens > 0


@pytest.mark.parametrize("way", ["chain", "tree"])
@pytest.mark.parametrize("kind", ["greedy", "sampled"])
@pytest.mark.parametrize("name", HEADS)
def test_same_tokens_alone(name, kind, way):
    (_, _, asked) = requests(KINDS[kind], asks(name, way), 3)
    assert served(engine(name), [asked])["r2", 0] == plain(kind)["r2", 0]


@pytest.mark.parametrize("way", ["chain", "tree"])
@pytest.mark.parametrize("kind", ["greedy", "sampled", "penalized", "stopped"])
@pytest.mark.parametrize("name", HEADS)
def test_same_tokens_with_preemption_chunks_and_few_seats(name, kind, way):
    used = engine(name, **FEW)
    assert served(used, requests(KINDS[kind], asks(name, way))) == plain(kind)
    assert used.stats.num_preemptions > 0 or kind == "stopped"


@pytest.mark.parametrize("way", ["chain", "tree"])
@pytest.mark.parametrize("kind", ["greedy", "sampled"])
@pytest.mark.parametrize("has_few_blocks", [False, True], ids=["room", "few blocks"])
@pytest.mark.parametrize("name", HEADS)
def test_same_tokens_for_two_completions_each(name, kind, way, has_few_blocks):
    used = engine(name, **(FEW if has_few_blocks else {}))
    asked = requests(replace(KINDS[kind], n=2), asks(name, way), 5)
    assert served(used, asked) == plain(kind, 5, n=2)
    assert (used.stats.num_preemptions > 0) == has_few_blocks


@pytest.mark.parametrize("way", ["chain", "tree"])
@pytest.mark.parametrize("first", ["head", "off"])
@pytest.mark.parametrize("kind", ["greedy", "sampled"])
@pytest.mark.parametrize("name", HEADS)
def test_same_tokens_with_a_warm_prefix_cache(name, kind, first, way):
    """Left there by requests that drafted with the head, or by such that did not."""
    used = engine(name, num_blocks=600)
    before = requests(KINDS[kind], asks(name, way) if first == "head" else OFF, 4, length=14)
    served(used, before)
    hits = used.manager.hits
    after = requests(KINDS[kind], asks(name, way), 4, length=14)
    assert served(used, after) == plain(kind, 4, length=14)
    assert used.manager.hits > hits


@pytest.mark.parametrize("way", ["chain", "tree"])
@pytest.mark.parametrize("chunk", [0, 37], ids=["whole", "chunks"])
@pytest.mark.parametrize("name", HEADS)
def test_same_tokens_after_long_prompts(name, chunk, way):
    """Longer than what a head lets wait."""
    used = engine(name, num_blocks=1024, options={"long_prefill_token_threshold": chunk})
    asked = requests(KINDS["sampled"], asks(name, way), 3, length=300)
    assert served(used, asked) == plain("sampled", 3, length=300)
    assert used.stats.num_draft_tokens > 0


@pytest.mark.parametrize("way", ["chain", "tree"])
@pytest.mark.parametrize("kind", ["greedy", "sampled"])
@pytest.mark.parametrize("name", HEADS)
def test_same_tokens_when_drafting_rests_for_a_while(name, kind, way):
    """Steps without a draft leave features that nobody has used."""
    used = engine(name)
    drafter, calls = used.drafters[name], 0
    draft = drafter.draft

    def resting(rows, plan):
        nonlocal calls
        calls += 1
        return [EMPTY_TREE for _ in rows] if 3 <= calls < 12 else draft(rows, plan)

    drafter.draft = resting
    assert served(used, requests(KINDS[kind], asks(name, way))) == plain(kind)
    assert calls > 12


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
@pytest.mark.parametrize("name", HEADS)
def test_same_tokens_beside_other_methods(name, kind):
    others = [OFF, SpeculationParams(method="ngram", prompt_lookup_min=1)]
    ways = [*(asks(name, way) for way in ("chain", "tree", "one token")), *others]
    asked = [
        replace(request, speculation=ways[i % len(ways)])
        for i, request in enumerate(requests(KINDS[kind], OFF))
    ]
    assert served(engine(name), asked) == plain(kind)


@pytest.mark.parametrize("rule", ["rejection", "block", "tree", "traversal", "greedy"])
@pytest.mark.parametrize("name", HEADS)
def test_same_greedy_tokens_under_every_rule(name, rule):
    """At temperature 0 rules with coins have none to throw."""
    width = 3 if rule in ("tree", "traversal") else 1
    asked = SpeculationParams(
        method=name, num_draft_tokens=3, width=width, verifier=rule, policy="fixed"
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
