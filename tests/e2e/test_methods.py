"""Every way to draft beside every way to verify: the same tokens, alone and mixed in one batch."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from outrider.draft.datastore import Datastore
from outrider.errors import PairError
from outrider.registry import DRAFTERS, VERIFIERS
from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.testing import ByteTokenizer, events, run, tiny_engine
from outrider.verify.base import Exactness

VOCAB = 256
GREEDY = SamplingParams(max_tokens=32, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=32, temperature=0.8, ignore_eos=True)
SHAPED = SamplingParams(
    max_tokens=32,
    temperature=1.1,
    top_k=40,
    top_p=0.95,
    repetition_penalty=1.2,
    frequency_penalty=0.2,
    logit_bias={65: 1.5, 70: float("-inf")},
    min_tokens=8,
)
GRAMMAR = SamplingParams(max_tokens=32, temperature=0.7, regex="[a-z]{3,40}( [a-z]{1,9})*")
SAMPLINGS = {"greedy": GREEDY, "sampled": SAMPLED, "shaped": SHAPED, "constrained": GRAMMAR}
GUESS = tuple((5 * j) % 90 + 30 for j in range(40))
COMPOSED = ("cascade", "auto")
# Those that run a head have a suite of their own, with targets that heads were fitted to.
HEADS = {part.name for part in DRAFTERS if "head" in DRAFTERS.load(part.name).needs}
METHODS = {
    "ngram": {"method": "ngram", "prompt_lookup_min": 1},
    "suffix": {"method": "suffix", "drafter_options": {"min_probability": 0.0}},
    "suffix tree": {"method": "suffix", "width": 4, "drafter_options": {"offset": 2.0}},
    "suffix, longest": {"method": "suffix", "drafter_options": {"mode": "longest"}},
    "recycle": {"method": "recycle"},
    "retrieval": {"method": "retrieval"},
    "rest": {"method": "rest"},
    "lookahead": {"method": "lookahead"},
    "prediction": {"method": "prediction", "prediction_token_ids": GUESS},
    "early_exit": {"method": "early_exit", "num_draft_tokens": 3},
    "early_exit, own noise": {"method": "early_exit", "draft_sample_method": "probabilistic"},
    "draft_model": {"method": "draft_model"},
    "draft_model tree": {"method": "draft_model", "width": 3, "num_nodes": 7},
    "draft_model, greedy tree": {
        "method": "draft_model",
        "width": 3,
        "num_nodes": 7,
        "draft_sample_method": "greedy",
    },
    "draft_model, drawn tree": {
        "method": "draft_model",
        "width": 3,
        "draft_sample_method": "probabilistic",
    },
    "draft_model, drawn chains": {
        "method": "draft_model",
        "width": 2,
        "draft_sample_method": "independent",
    },
    "cascade": {"method": "cascade"},
    "auto": {"method": "auto"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    made: Path = tmp_path_factory.mktemp("store")
    text = [(7 * i + i // 9) % 90 + 30 for i in range(400)]
    Datastore.build(
        [text, list(GUESS)], fingerprint=ByteTokenizer().fingerprint(), vocab_size=VOCAB
    ).save(made)
    return str(made)


@pytest.fixture
def engine(folder):
    """Engines with every drafter that is registered here (`translate` has its own test)."""

    def make(**more):
        built_in = [part.name for part in DRAFTERS if part.source == "outrider"]
        elsewhere = {"ngram", "draft_model", "translate", *COMPOSED, *HEADS}
        others = [name for name in built_in if name not in elsewhere]
        return tiny_engine(
            drafters=[*others, *COMPOSED], draft_noise=0.01, datastore=folder, **more
        )

    return make


def requests(sampling, speculations):
    return [
        Request(
            id=f"r{i}",
            prompt_token_ids=tuple((11 * i + j * j) % 90 + 30 for j in range(5 + i % 7)),
            sampling=sampling,
            speculation=SpeculationParams(**speculation),
            seed=1000 + i,
        )
        for i, speculation in enumerate(speculations)
    ]


def texts(tokens):
    """What is read, end tokens left out."""
    return [ByteTokenizer().decode(ids) for ids in tokens.values()]


def test_no_drafter_is_forgotten():
    built_in = {part.name for part in DRAFTERS if part.source == "outrider"}
    tested = {setting["method"] for setting in METHODS.values()}
    assert tested == built_in - {"translate"} - HEADS


@pytest.mark.parametrize("kind", SAMPLINGS)
@pytest.mark.parametrize("name", METHODS)
def test_tokens_are_those_of_plain_decoding(engine, name, kind):
    plain = run(engine(), requests(SAMPLINGS[kind], [{"method": "off"}] * 4))
    if kind == "constrained":
        assert all(re.fullmatch(r"[a-z]{3}[a-z ]*", text) for text in texts(plain))
    drafted = engine()
    assert run(drafted, requests(SAMPLINGS[kind], [METHODS[name]] * 4)) == plain
    assert drafted.manager.num_used == 0
    assert drafted.stats.num_draft_tokens > 0, "nothing was drafted: nothing was tested"


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_all_methods_in_one_batch_under_pressure(engine, kind):
    settings = list(METHODS.values())
    plain = run(engine(), requests(SAMPLINGS[kind], [{"method": "off"}] * len(settings)))
    pressed = engine(
        num_blocks=48,
        options={
            "max_num_batched_tokens": 100,
            "max_num_seqs": 7,
            "max_model_len": 120,
            "long_prefill_token_threshold": 5,
        },
    )
    assert run(pressed, requests(SAMPLINGS[kind], settings)) == plain
    assert pressed.stats.num_preemptions > 0, "the test must press hard enough to preempt"
    assert pressed.manager.num_used == 0


def test_n_completions_with_every_method(engine):
    sampling = SamplingParams(max_tokens=12, temperature=0.9, n=3, ignore_eos=True)
    plain = run(engine(), requests(sampling, [{"method": "off"}] * len(METHODS)))
    told = events(engine(), requests(sampling, METHODS.values()))
    assert {key: [t for e in mine for t in e.token_ids] for key, mine in told.items()} == plain
    for i, name in enumerate(METHODS):
        drafted = sum(told[f"r{i}", index][-1].metrics.num_draft_tokens for index in range(3))
        assert drafted > 0, f"{name} drafted nothing: nothing was tested"


EXACT = [
    name
    for name in VERIFIERS.names()
    if VERIFIERS.load(name).exactness in (Exactness.EXACT, Exactness.EXACT_GREEDY)
]


CHAINS = {
    "ngram", "suffix", "suffix, longest", "prediction", "early_exit", "early_exit, own noise",
    "draft_model", "cascade", "auto",
}  # fmt: skip
DRAWN_CHAINS = {
    "early_exit", "early_exit, own noise", "draft_model", "draft_model tree",
    "draft_model, drawn chains",
}  # fmt: skip


def is_refused(made, sampling, name, verifier):
    """Whether the pair is refused, as it must be where the rule does not take such drafts."""
    setting = {**METHODS[name], "verifier": verifier}
    chains_only = verifier in ("rejection", "block", "fly")
    drawn_only = verifier in ("spectr", "gbv")
    greedy_only = verifier == "greedy" and sampling.temperature > 0
    if not (
        (chains_only and name not in CHAINS)
        or (drawn_only and name not in DRAWN_CHAINS)
        or greedy_only
    ):
        return False
    with pytest.raises(PairError, match="use "):
        run(made, requests(sampling, [setting]))
    return True


@pytest.mark.parametrize("verifier", EXACT)
@pytest.mark.parametrize("name", METHODS)
def test_every_exact_rule_is_greedy_decoding_at_temperature_zero(engine, name, verifier):
    setting, made = {**METHODS[name], "verifier": verifier}, engine()
    if not is_refused(made, GREEDY, name, verifier):
        plain = run(engine(), requests(GREEDY, [{"method": "off"}] * 2))
        assert run(made, requests(GREEDY, [setting] * 2)) == plain
        assert made.stats.num_draft_tokens > 0, "nothing was drafted: nothing was tested"


@pytest.mark.parametrize("verifier", VERIFIERS.names())
@pytest.mark.parametrize("name", METHODS)
def test_every_rule_serves_every_kind_it_declares(engine, name, verifier):
    """Whatever the pair, a request ends with all its tokens, labelled with the rule's promise."""
    rule = VERIFIERS.load(verifier)
    setting = {**METHODS[name], "verifier": verifier}
    made = engine()
    if is_refused(made, SHAPED, name, verifier):
        return
    told = events(made, requests(SHAPED, [setting] * 2))
    for (request_id, _), mine in told.items():
        tokens = [token for event in mine for token in event.token_ids]
        last = mine[-1]
        assert last.finish_reason in ("length", "stop"), f"{request_id}: {last}"
        assert 0 < len(tokens) <= SHAPED.max_tokens
        assert last.metrics.exactness == rule.exactness.value
        if rule.exactness in (Exactness.EXACT, Exactness.EXACT_GREEDY):
            assert 70 not in tokens, "a forbidden token came out"


@pytest.mark.parametrize("verifier", VERIFIERS.names())
def test_every_rule_keeps_to_a_grammar_with_every_kind_it_declares(engine, verifier):
    """The lossy ones too; the one that cannot says so."""
    rule, made = VERIFIERS.load(verifier), engine()
    if rule.exactness is Exactness.SYNTHETIC:
        with pytest.raises(PairError, match="grammar"):
            run(made, requests(GRAMMAR, [{"method": "ngram", "verifier": verifier}]))
        return
    sampling = replace(GRAMMAR, temperature=0.0) if rule.greedy_only else GRAMMAR
    settings = [
        {**setting, "verifier": verifier}
        for name, setting in METHODS.items()
        if not is_refused(made, sampling, name, verifier)
    ]
    told = run(made, requests(sampling, settings))
    assert len(told) == len(settings) > 4
    assert all(re.fullmatch(r"[a-z]{3}[a-z ]*", text) for text in texts(told))
    assert made.stats.num_draft_tokens > 0
