"""TypicalVerifier: thresholds on laws made by hand, the choice among paths, greedy at T=0."""

import math
from itertools import product

import pytest
import torch

from outrider.request import SamplingParams, SpeculationParams
from outrider.sampling.laws import TargetLaws
from outrider.sampling.shaper import Shaper
from outrider.step import EMPTY_TREE, DraftTree, Verdict
from outrider.testing import (
    ToyLaws,
    ToyModel,
    bias,
    check_verifier,
    draw_chain,
    junk_tree,
    run,
    speculate,
    tiny_engine,
)
from outrider.testing.drafters import ScriptedDrafter
from outrider.verify.greedy import GreedyVerifier
from outrider.verify.typical import TypicalVerifier
from tests.verify.toy_problems import request


class Untouchable:
    """A stream nobody may draw from."""


def law(*weights):
    return torch.tensor(weights, dtype=torch.float64)


def fixed(*laws):
    """The law at depth d is laws[d], the last one from there on."""
    return lambda context: laws[min(len(context), len(laws) - 1)]


def verify(tree, p, **options):
    return TypicalVerifier(**options).verify(tree, ToyLaws(p, (), tree), Untouchable())


def test_it_passes_what_every_verifier_must():
    check_verifier(TypicalVerifier())


def test_the_defaults_are_those_of_the_paper():
    verifier = TypicalVerifier()
    assert {name: about.default for name, about in verifier.options.items()} == {
        "epsilon": verifier.epsilon,
        "delta": verifier.delta,
    }
    assert (verifier.epsilon, verifier.delta) == (0.09, 0.3)


@pytest.mark.parametrize(
    ("p_V", "expected"),
    [
        (law(1.0, 0.0), 0.09),  # sure: 0.3 e^0, capped
        (law(0.5, 0.5), 0.09),  # 0.3 / 2, capped
        (law(0.25, 0.25, 0.25, 0.25), 0.3 / 4),
        (torch.full((100,), 0.01, dtype=torch.float64), 0.3 / 100),
        (law(0.7, 0.1, 0.1, 0.1), 0.09),
    ],
)
def test_the_threshold_falls_as_the_target_is_less_sure(p_V, expected):
    assert TypicalVerifier().threshold(p_V) == pytest.approx(expected, rel=2e-3)


def test_a_token_at_the_threshold_is_refused():
    p_V = law(0.25, 0.75)
    tree = DraftTree.chain((0,), "test")
    assert verify(tree, fixed(p_V), epsilon=0.25, delta=1.0) == Verdict((), 1)
    assert verify(tree, fixed(p_V), epsilon=0.2499, delta=1.0) == Verdict((0,), 1, relaxed=(0,))


def test_the_two_options_are_not_interchangeable():
    p_V = law(0.2, 0.8)
    tree = DraftTree.chain((0,), "test")
    assert verify(tree, fixed(p_V), epsilon=0.09, delta=0.3).accepted == (0,)
    assert verify(tree, fixed(p_V), epsilon=0.3, delta=0.09).accepted == (0,)
    p_V = law(0.1, 0.9)
    assert verify(tree, fixed(p_V), epsilon=0.09, delta=0.3).accepted == (0,)
    assert verify(tree, fixed(p_V), epsilon=0.3, delta=0.3).accepted == ()


def test_what_the_target_forbids_never_stands():
    tree = DraftTree.chain((0,), "test")
    assert verify(tree, fixed(law(0.0, 1.0)), epsilon=0.0, delta=0.0) == Verdict((), 1)


def test_the_longest_path_is_taken_and_of_these_the_likeliest():
    p = fixed(law(0.5, 0.3, 0.2), law(0.6, 0.3, 0.1), law(0.0, 0.1, 0.9))
    wide = DraftTree(tokens=(0, 1, 2), parents=(-1, -1, -1))
    assert verify(wide, p) == Verdict((0,), 0)
    deep = DraftTree(tokens=(0, 1, 0, 1), parents=(-1, -1, 1, 1))
    assert verify(deep, p) == Verdict((1, 2), 2, relaxed=(1,)), "longer before likelier"
    both = DraftTree(tokens=(1, 0, 1, 0), parents=(-1, -1, 0, 1))
    assert verify(both, p) == Verdict((1, 3), 2), "the likeliest are not relaxed"
    equal = DraftTree(tokens=(0, 0), parents=(-1, -1))
    assert verify(equal, p).accepted == (0,), "the first of equals"


def test_the_whole_path_is_weighed():
    laws = {(): law(0.6, 0.4), (0,): law(0.5, 0.5), (1,): law(0.4, 0.6)}
    tree = DraftTree(tokens=(1, 0, 1, 0), parents=(-1, -1, 0, 1))
    assert verify(tree, lambda c: laws.get(c, law(1.0, 0.0))).accepted == (1, 3), "0.30 before 0.24"


def test_below_a_refused_token_nothing_stands():
    p = fixed(law(0.0, 1.0), law(0.5, 0.5))
    tree = DraftTree(tokens=(0, 0, 1), parents=(-1, 0, 1))
    assert verify(tree, p) == Verdict((), 1)


def test_it_is_lossy():
    p, q = ToyModel("p", 3), ToyModel("q", 3)
    assert bias(speculate(TypicalVerifier(), p, draw_chain(q, 2)), p, 4) > 0.1


def at_zero(logits_NV, tree):
    shaper = Shaper(
        SamplingParams(),
        vocab_size=logits_NV.shape[1],
        eos_token_ids=(),
        bad_words_ids=(),
        num_prompt=1,
    )
    argmax_N = logits_NV.argmax(dim=1).tolist()
    return TargetLaws(shaper, logits_NV, argmax_N, [0], tree.path_tokens)


def bushy(seed):
    """Three levels of distinct siblings over three tokens, a random half of the nodes."""
    generator = torch.Generator().manual_seed(seed)
    nodes = {(): -1}
    for path in product(range(3), repeat=3):
        for end in (1, 2, 3):
            is_in = path[:end] in nodes or bool(torch.rand(1, generator=generator) < 0.6)
            if not is_in or path[: end - 1] not in nodes:
                break
            nodes.setdefault(path[:end], len(nodes) - 1)
    paths = list(nodes)[1:]
    tree = DraftTree(
        tokens=tuple(path[-1] for path in paths),
        parents=tuple(nodes[path[:-1]] for path in paths),
    )
    return tree, torch.randn(len(tree) + 1, 3, generator=generator)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("options", [{}, {"epsilon": 1e-6, "delta": 1.0}])
def test_at_temperature_0_it_is_greedy(seed, options):
    drafted, logits_NV = bushy(seed)
    for tree in (drafted, EMPTY_TREE):
        laws = at_zero(logits_NV, tree)
        found = TypicalVerifier(**options).verify(tree, laws, Untouchable())
        assert found == GreedyVerifier().verify(tree, laws, Untouchable())


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_in_the_engine_greedy_tokens_are_those_of_plain_decoding(penalty):
    sampling = SamplingParams(max_tokens=20, repetition_penalty=penalty, ignore_eos=True)
    asked = [
        SpeculationParams(method="off"),
        SpeculationParams(method="draft_model", verifier="typical"),
        SpeculationParams(method="scripted", width=3, num_draft_tokens=3, verifier="typical"),
    ]
    seen = [
        run(
            tiny_engine(draft_noise=0.01, drafters=[ScriptedDrafter(junk_tree(256))]),
            [request(sampling, speculation)],
        )
        for speculation in asked
    ]
    assert seen[0] == seen[1] == seen[2]


def test_in_the_engine_more_is_accepted_than_by_an_exact_rule():
    sampling = SamplingParams(max_tokens=48, temperature=1.0, ignore_eos=True)
    engines = {}
    for rule in ("rejection", "typical"):
        engine = tiny_engine(draft_noise=0.02)
        asked = SpeculationParams(
            method="draft_model", draft_sample_method="probabilistic", verifier=rule
        )
        run(engine, [request(sampling, asked)])
        engines[rule] = engine.stats
    assert engines["typical"].num_steps < engines["rejection"].num_steps


def test_the_entropy_is_in_nats():
    p_V = law(0.5, 0.25, 0.25)
    entropy = 0.5 * math.log(2) + 0.5 * math.log(4)
    found = TypicalVerifier(epsilon=1.0, delta=1.0).threshold(p_V)
    assert found == pytest.approx(math.exp(-entropy), rel=1e-3)
