"""SyntheticVerifier: acceptance lengths follow the schedule, whatever the tokens."""

import statistics

import pytest

from outrider.errors import RequestError
from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.sampling.rng import RootStream
from outrider.step import EMPTY_TREE, DraftTree, Verdict
from outrider.testing import (
    ScriptedDrafter,
    ToyLaws,
    ToyModel,
    check_verifier,
    events,
    exact_law,
    expected_accepted,
    junk,
    pick_chain,
    speculate,
    tiny_engine,
)
from outrider.verify.base import Exactness
from outrider.verify.synthetic import SyntheticVerifier

K = 5
SCHEDULES = [
    ({"rates": "0.8,0.6,0.4"}, [0.8, 0.6, 0.4, 0.0, 0.0]),
    ({"rates": " 1, 1, .5 ,0"}, [1.0, 1.0, 0.5, 0.0, 0.0]),
    ({"rates": "0"}, [0.0] * 5),
    ({"rates": "0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3"}, [0.9, 0.8, 0.7, 0.6, 0.5]),
    ({"length": 1.0}, [0.0] * 5),
    ({"length": 1.25}, [0.25, 0.0, 0.0, 0.0, 0.0]),
    ({"length": 3.4}, [1.0, 1.0, 0.4, 0.0, 0.0]),
    ({"length": 6.0}, [1.0] * 5),
    ({"length": 9.5}, [1.0] * 5),  # a tree of depth 5 gives no more
    ({"geometric": 0.5}, [0.5, 0.25, 0.125, 0.0625, 0.03125]),
    ({"geometric": 1.0}, [1.0] * 5),
    ({}, [0.7**i for i in range(1, 6)]),
]


def accepted_law(verifier, length=K):
    """{number accepted: probability}, enumerated; p and q are made to disagree."""
    call = speculate(verifier, ToyModel("p", 3), pick_chain(ToyModel("q", 3), length))
    return exact_law(lambda stream: call(stream)[1])


def test_it_passes_what_every_verifier_must():
    assert SyntheticVerifier().exactness is Exactness.SYNTHETIC
    check_verifier(SyntheticVerifier())


@pytest.mark.parametrize(("options", "rates"), SCHEDULES)
def test_each_prefix_stands_with_its_joint_rate(options, rates):
    law = accepted_law(SyntheticVerifier(**options))
    joint = [sum(w for n, w in law.items() if n >= i) for i in range(1, K + 1)]
    assert joint == pytest.approx(rates, abs=1e-12)


@pytest.mark.parametrize(("options", "rates"), SCHEDULES)
def test_the_mean_length_is_one_and_the_sum_of_the_rates(options, rates):
    verifier = SyntheticVerifier(**options)
    call = speculate(verifier, ToyModel("p", 3), pick_chain(ToyModel("q", 3), K))
    assert 1.0 + expected_accepted(call) == pytest.approx(1.0 + sum(rates), abs=1e-12)


@pytest.mark.parametrize("length", [1.0, 1.5, 2.0, 3.7, 6.0])
def test_a_length_has_the_least_variance_of_its_mean(length):
    law = accepted_law(SyntheticVerifier(length=length))
    fraction = length % 1.0
    mean = sum(n * w for n, w in law.items())
    assert mean == pytest.approx(length - 1.0)
    variance = sum((n - mean) ** 2 * w for n, w in law.items())
    assert variance == pytest.approx(fraction * (1.0 - fraction), abs=1e-12)


@pytest.mark.parametrize(("options", "rates"), SCHEDULES)
def test_production_streams_keep_the_mean(options, rates):
    verifier, p = SyntheticVerifier(**options), ToyModel("p", 3)
    tree = DraftTree.chain((0,) * K, "test")
    laws = ToyLaws(p, (), tree)
    lengths = [
        1 + len(verifier.verify(tree, laws, RootStream(seed, 9, "verify")).accepted)
        for seed in range(1500)
    ]
    error = max(statistics.stdev(lengths), 1e-9) / len(lengths) ** 0.5
    assert abs(statistics.mean(lengths) - 1.0 - sum(rates)) < 4 * error + 1e-9


def test_the_path_goes_down_the_first_children_and_ends_in_the_argmax():
    tree = DraftTree(tokens=(0, 1, 2, 0, 1, 2), parents=(-1, -1, 1, 0, 3, 3))
    p = ToyModel("p", 3)
    verdict = SyntheticVerifier(rates="1,1,1").verify(
        tree, ToyLaws(p, (), tree), RootStream(0, 0, "verify")
    )
    assert verdict == Verdict((0, 3, 4), int(p((0, 0, 1)).argmax()))
    verdict = SyntheticVerifier().verify(
        EMPTY_TREE, ToyLaws(p, (), EMPTY_TREE), RootStream(0, 0, "verify")
    )
    assert verdict == Verdict((), int(p(()).argmax()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 2.0, "geometric": 0.5}, "set one of them only"),
        ({"rates": "0.5", "length": 2.0}, "rates='0.5', length=2.0, geometric=0.0: set one"),
        ({"rates": "0.5,0.6"}, "falling numbers"),
        ({"rates": "1.5"}, "falling numbers"),
        ({"rates": "0.5,-0.1"}, "falling numbers"),
        ({"rates": "nan"}, "falling numbers"),
        ({"rates": "0.5;0.4"}, "rates='0.5;0.4': give falling numbers"),
        ({"rates": "0.5,,0.4"}, "falling numbers"),
        ({"length": 0.5}, "length=0.5: .*use 1 or more"),
    ],
)
def test_what_is_no_schedule_is_refused(options, message):
    with pytest.raises(RequestError, match=message):
        SyntheticVerifier(**options)


def serve(options, sampling=None, count=1):
    """Events and counters of sequences whose drafts are junk."""
    engine = tiny_engine(drafters=[ScriptedDrafter(junk(256))], draft_seed=None)
    speculation = SpeculationParams(
        method="scripted", num_draft_tokens=4, verifier="synthetic", verifier_options=options
    )
    sampling = SamplingParams(max_tokens=60, ignore_eos=True, **(sampling or {}))
    requests = [
        Request(
            id=f"r{i}",
            prompt_token_ids=(40, 50, 60),
            sampling=sampling,
            speculation=speculation,
            seed=i,
        )
        for i in range(count)
    ]
    return events(engine, requests), engine.stats


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_in_the_engine_junk_is_accepted_by_the_schedule(temperature):
    told, stats = serve({"rates": "1,1,1"}, {"temperature": temperature})
    whole = [e for e in told["r0", 0] if len(e.token_ids) == 4]
    assert len(whole) == 60 // 4
    assert stats.num_accepted_tokens == 3 * 15


def test_in_the_engine_sequences_draw_on_their_own():
    told, _ = serve({"geometric": 0.6}, count=4)
    lengths = {tuple(len(e.token_ids) for e in told[f"r{i}", 0]) for i in range(4)}
    assert len(lengths) == 4


def test_in_the_engine_a_bad_schedule_is_refused_with_its_request():
    with pytest.raises(RequestError, match="set one of them only"):
        serve({"length": 2.0, "geometric": 0.5})
