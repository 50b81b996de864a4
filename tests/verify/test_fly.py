"""FlyVerifier: the anchors of each reading, its definition, and the gate."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from outrider.errors import RequestError
from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.sampling.laws import TargetLaws
from outrider.sampling.rng import RootStream
from outrider.sampling.shaper import Shaper
from outrider.step import EMPTY_TREE, DraftTree, Verdict
from outrider.testing import (
    ToyLaws,
    ToyModel,
    bias,
    check_verifier,
    draw_chain,
    exact_law,
    pick_chain,
    run,
    speculate,
    tiny_engine,
)
from outrider.verify.fly import READINGS, FlyVerifier
from outrider.verify.rejection import RejectionVerifier, acceptance

V = 8
DRAFT, OTHER = 0, 5  # the drafted token everywhere, and the target's where they differ


def row(matches, is_unsure):
    """Logits that prefer DRAFT or OTHER, by little or by much."""
    logits_V = torch.zeros(V)
    logits_V[DRAFT if matches else OTHER] = 0.1 if is_unsure else 20.0
    return logits_V


def target(matches, gate, tree, **sampling):
    """The target's laws at a chain; row i says whether draft i matches and whether it is unsure."""
    rows = [row(*pair) for pair in zip(matches, gate, strict=True)]
    logits_NV = torch.stack([*rows, row(True, False)])
    shaper = Shaper(
        SamplingParams(**sampling),
        vocab_size=V,
        eos_token_ids=(),
        bad_words_ids=(),
        num_prompt=1,
    )
    argmax_N = logits_NV.argmax(dim=1).tolist()
    return TargetLaws(shaper, logits_NV, argmax_N, [1], tree.path_tokens)


def verify(matches, gate, sampling=None, **options):
    tree = DraftTree.chain((DRAFT,) * len(matches), "test")
    laws = target(matches, gate, tree, **(sampling or {}))
    return FlyVerifier(**options).verify(tree, laws, RootStream(0, 0, "verify"))


def all_but(*mismatches, length=12):
    return [i not in mismatches for i in range(length)]


def test_it_passes_what_every_verifier_must():
    check_verifier(FlyVerifier())


def test_the_defaults_are_the_options():
    verifier = FlyVerifier()
    assert {name: about.default for name, about in verifier.options.items()} == {
        "reading": verifier.reading,
        "theta": verifier.theta,
        "window": verifier.window,
    }
    assert (verifier.reading, verifier.theta, verifier.window) == ("strict", 0.3, 6)


@pytest.mark.parametrize(
    ("reading", "mismatches", "accepted"),
    [
        ("strict", (2, 9), 9),
        ("released", (2, 9), 9),
        ("paper", (2, 9), 9),
        ("strict", (1, 7), 1),
        ("released", (1, 7), 7),
        ("paper", (1, 7), 1),
        ("strict", (), 12),
        ("strict", (5,), 12),
        ("strict", (6,), 6),  # 6 + W reaches the end of the draft
        ("released", (0, 6), 6),  # six after the first: behind its window, but too late itself
    ],
)
def test_the_anchors(reading, mismatches, accepted):
    found = verify(all_but(*mismatches), [True] * 12, reading=reading)
    is_whole = accepted == 12
    relaxed = tuple(place for place in mismatches if place < accepted)
    assert found == Verdict(tuple(range(accepted)), DRAFT if is_whole else OTHER, relaxed=relaxed)


@pytest.mark.parametrize("reading", READINGS)
def test_a_shut_gate_is_exact_match(reading):
    assert len(verify(all_but(2, 9), [False] * 12, reading=reading).accepted) == 2
    assert len(verify(all_but(2, 9), [True] * 12, reading=reading, theta=math.inf).accepted) == 2


def by_definition(match, gate, window, followers):
    """The accepted length, as the definition has it."""
    n = 0
    while n < len(match):
        is_late = n + window >= len(match)
        if match[n]:
            n += 1
        elif gate[n] and not is_late and all(match[n + 1 : n + 1 + followers]):
            n += 1 + followers
        else:
            break
    return n


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_accepted_length_is_that_of_the_definition(data):
    length = data.draw(st.integers(1, 10))
    match = data.draw(
        st.lists(st.sampled_from([True, True, False]), min_size=length, max_size=length)
    )
    gate = data.draw(
        st.lists(st.sampled_from([True, True, False]), min_size=length, max_size=length)
    )
    reading = data.draw(st.sampled_from(READINGS))
    window = data.draw(st.integers(2, 4))
    capped = max(1, min(window, length - 1)) if reading == "strict" else window
    followers = capped - 1 if reading == "released" else capped
    found = verify(match, gate, reading=reading, window=window)
    assert len(found.accepted) == by_definition(match, gate, capped, followers)
    assert found.token == (DRAFT if len(found.accepted) == length else OTHER)


def test_short_drafts_have_short_windows_in_the_strict_reading_only():
    match = all_but(0, length=4)
    assert len(verify(match, [True] * 4).accepted) == 4
    assert len(verify(match, [True] * 4, reading="released").accepted) == 0
    assert len(verify([False], [True]).accepted) == 0, "nothing could confirm it"


@pytest.mark.parametrize(
    ("own_V", "reading", "entropy"),
    [
        ([0.25] * 4, "strict", 3 * 0.25 * math.log(4)),
        ([0.25] * 4, "released", 3 * 0.25 * math.log(4)),
        ([0.25] * 4, "paper", 1.0),
        ([0.5, 0.5, 0.0, 0.0], "strict", math.log(2)),
        ([0.5, 0.5, 0.0, 0.0], "paper", 0.5),
        ([0.5, 0.5], "strict", math.log(2)),
        ([1.0, 0.0, 0.0], "strict", 0.0),
    ],
)
def test_the_entropy_of_each_reading(own_V, reading, entropy):
    own_V = torch.tensor(own_V, dtype=torch.float64)
    assert FlyVerifier(reading=reading, theta=max(0.0, entropy - 1e-9)).is_unsure(own_V)
    assert not FlyVerifier(reading=reading, theta=entropy + 1e-9).is_unsure(own_V)


def test_the_gate_reads_the_targets_own_law_not_the_shaped_one():
    """At temperature 0 the shaped law is a point mass: its entropy would shut every gate."""
    assert len(verify(all_but(2), [True] * 12, {"temperature": 0.0}).accepted) == 12
    assert len(verify(all_but(2), [False] * 12, {"temperature": 0.0}).accepted) == 2


@pytest.mark.parametrize(
    ("sampling", "num_accepted"),
    [
        ({"logit_bias": {DRAFT: -math.inf}}, 0),
        ({"repetition_penalty": 1.5}, 4),
        ({"logit_bias": {3: 0.01}}, 4),
    ],
)
def test_what_a_setting_forbids_never_stands(sampling, num_accepted):
    """At temperature 0 too, where the law is a point mass and does not tell."""
    match = all_but(2, length=4)
    assert len(verify(match, [True] * 4).accepted) == 2
    match = all_but(0, length=4)
    assert len(verify(match, [True] * 4).accepted) == 4
    assert len(verify(match, [True] * 4, sampling).accepted) == num_accepted


def test_a_token_without_a_finite_logit_never_stands():
    tree = DraftTree.chain((DRAFT,) * 4, "test")
    laws = target(all_but(0, length=4), [True] * 4, tree)
    laws._logits_NV[0, DRAFT] = -math.inf
    assert FlyVerifier().verify(tree, laws, RootStream(0, 0, "verify")) == Verdict((), OTHER)


@pytest.mark.parametrize("sampling", [{"temperature": 1.0, "top_k": 1}])
def test_a_filtered_token_never_stands(sampling):
    assert len(verify(all_but(0, length=4), [True] * 4, sampling).accepted) == 0


@pytest.mark.parametrize("zeros", [0.0, 0.4])
def test_a_shut_gate_is_token_rejection_at_any_temperature(zeros):
    shut = FlyVerifier(theta=math.inf)
    for i in range(4):
        p, q = ToyModel(f"p{i}", 3, zeros), ToyModel(f"q{i}", 3, zeros)
        for draft in (draw_chain(q, 3), pick_chain(q, 3)):
            seen = exact_law(speculate(shut, p, draft))
            assert seen == exact_law(speculate(RejectionVerifier(), p, draft))


@pytest.mark.parametrize("zeros", [0.0, 0.4])
def test_sampled_mismatches_are_confirmed_by_native_acceptance(zeros):
    """K = 2, window 1, gate open: both stand if the second does and the first may."""
    verifier = FlyVerifier(theta=0.0, window=1)
    for i in range(6):
        p, q = ToyModel(f"p{i}", 3, zeros), ToyModel(f"q{i}", 3, zeros)
        both = 0.0
        for x, q_x in enumerate(q(()).tolist()):
            for y, q_y in enumerate(q((x,)).tolist()):
                if q_x and q_y and float(p(())[x]) > 0:
                    both += q_x * q_y * acceptance(p((x,)).log(), q((x,)), y)
        law = exact_law(speculate(verifier, p, draw_chain(q, 2)))
        seen = sum(weight for (_, accepted), weight in law.items() if accepted == 2)
        assert seen == pytest.approx(both, abs=1e-12)


def test_no_accepted_token_is_forbidden():
    verifier = FlyVerifier(theta=0.0, window=2)
    for i in range(6):
        p, q = ToyModel(f"p{i}", 3, 0.5), ToyModel(f"q{i}", 3)
        for tokens, _ in exact_law(speculate(verifier, p, draw_chain(q, 3))):
            assert all(float(p(tokens[:d])[token]) > 0 for d, token in enumerate(tokens))


class Counted:
    """A stream that counts its coins."""

    def __init__(self, stream):
        self.stream, self.num_flips = stream, 0

    def flip(self, probability):
        self.num_flips += 1
        return self.stream.flip(probability)

    def pick(self, law_V):
        return self.stream.pick(law_V)


def test_a_position_has_one_coin():
    p, q = ToyModel("p", 3), ToyModel("q", 3)

    def call(stream):
        tree = draw_chain(q, 4)((), stream)
        counted = Counted(stream)
        verdict = FlyVerifier(theta=0.0, window=1).verify(tree, ToyLaws(p, (), tree), counted)
        return counted.num_flips, len(verdict.accepted)

    for num_flips, num_accepted in exact_law(call):
        assert num_accepted <= num_flips <= 4
        assert num_flips <= num_accepted + 2, "the mismatch, and what failed to confirm it"


def test_it_is_lossy_with_an_open_gate():
    p, q = ToyModel("p", 3), ToyModel("q", 3)
    call = speculate(FlyVerifier(theta=0.0, window=1), p, draw_chain(q, 3))
    assert bias(call, p, 5) > 0.02


def test_without_drafts_it_draws_from_the_target():
    p = ToyModel("p", 3)
    assert bias(speculate(FlyVerifier(), p, lambda c, s: EMPTY_TREE), p, 2) < 1e-12


def test_branches_are_refused():
    tree = DraftTree(tokens=(0, 1), parents=(-1, -1))
    with pytest.raises(AssertionError, match="chains"):
        FlyVerifier().verify(tree, ToyLaws(ToyModel("p", 2), (), tree), RootStream(0, 0, "verify"))


def test_settings_that_make_no_rule_are_refused():
    with pytest.raises(RequestError, match=r"window=1.*use 2 or more"):
        FlyVerifier(reading="released", window=1)
    with pytest.raises(RequestError, match="reading='loose': must be one of strict"):
        FlyVerifier(reading="loose")


@pytest.mark.parametrize(
    ("sampling", "options"),
    [({}, {"theta": 100.0}), ({"repetition_penalty": 1.3}, {"theta": 100.0, "window": 1})],
)
def test_in_the_engine_exact_matches_are_plain_greedy_decoding(sampling, options):
    assert decode(sampling, "fly", options) == decode(sampling, None, {})


def test_in_the_engine_an_open_gate_changes_the_text():
    open_gate = {"theta": 0.0, "window": 1}
    assert decode({}, "fly", open_gate, noise=0.003) != decode({}, None, {})


def decode(sampling, rule, options, noise=0.01):
    """20 tokens of the tiny engine, plain without a rule."""
    speculation = (
        SpeculationParams(
            method="draft_model", num_draft_tokens=6, verifier=rule, verifier_options=options
        )
        if rule
        else SpeculationParams(method="off")
    )
    request = Request(
        id="r",
        prompt_token_ids=(40, 50, 60),
        sampling=SamplingParams(max_tokens=20, ignore_eos=True, **sampling),
        speculation=speculation,
        seed=1,
    )
    return run(tiny_engine(draft_noise=noise), [request])
