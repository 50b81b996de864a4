"""Every registered drafter and every registered rule, put through the conformance suite."""

from pathlib import Path

import pytest

from outrider.draft.base import ModelParts, Surroundings
from outrider.draft.datastore import Datastore
from outrider.draft.draft_model import ModelDrafter
from outrider.draft.translate import TranslateDrafter
from outrider.registry import DRAFTERS, VERIFIERS
from outrider.testing import ByteTokenizer, check_drafter, check_verifier, tiny_decoder, tiny_engine
from tests.draft.heads import KINDS, head, loud_target
from tests.draft.vocabularies import letters, speaker

VOCAB = 256
GUESS = tuple((7 * i + i // 9) % 40 + 10 for i in range(60))
OURS = [part.name for part in DRAFTERS if part.source == "outrider"]
RULES = [part.name for part in VERIFIERS if part.source == "outrider"]
# Beside each with its defaults: what else a drafter or a rule can be asked for.
DRAFTER_SETTINGS = {
    "ngram": [{"prompt_lookup_min": 1}, {"num_draft_tokens": 9}],
    "suffix": [
        {"drafter_options": {"mode": "longest"}, "width": 1},
        {"drafter_options": {"shared": "none", "min_probability": 0.0, "offset": 2.0}},
    ],
    "lookahead": [{"num_draft_tokens": 10}],
    "early_exit": [{"drafter_options": {"num_layers": 1}, "num_draft_tokens": 6}],
    "draft_model": [
        {"drafter_options": {"inner": "ngram"}, "width": 1},
        {"width": 3, "num_nodes": 7},
    ],
    "cascade": [
        {"drafter_options": {"parts": "ngram"}, "draft_sample_method": "greedy"},
        {"drafter_options": {"parts": "draft_model,suffix", "min_score": 9.0}},
    ],
}
COSTLY = ("draft_model", "cascade")
# Of each drafter that runs a head, the kinds of heads it runs.
HEADS = {name: [k for k, v in KINDS.items() if v.drafter.name == name] for name in OURS}
RULE_OPTIONS = {
    "gbv": [{"rule": "recursive"}],
    "typical": [{"epsilon": 1.0, "delta": 0.0}],
    "fly": [{"reading": "released"}, {"reading": "paper", "window": 1, "theta": 0.0}],
    "synthetic": [{"length": 2.5}, {"rates": "1, 0.5"}, {"geometric": 1.0}],
}


def with_head(kind):
    """What else an engine with a head is made of."""
    return {"target": loud_target(), "heads": {KINDS[kind].drafter.name: head(kind)}}


def with_defaults(names, settings):
    return [
        pytest.param(
            name,
            setting,
            id=" ".join([name, *map(str, setting.items())]),
            marks=[pytest.mark.slow] if setting and name in COSTLY else [],
        )
        for name in names
        for setting in ({}, *settings.get(name, ()))
    ]


@pytest.fixture(scope="module")
def datastore(tmp_path_factory) -> str:
    made: Path = tmp_path_factory.mktemp("store")
    text = [(7 * i + i // 9) % 40 + 10 for i in range(400)]
    fingerprint = ByteTokenizer().fingerprint()
    Datastore.build([text, [*range(10, 60)]], fingerprint=fingerprint, vocab_size=VOCAB).save(made)
    return str(made)


def translate() -> TranslateDrafter:
    """One model under two orders of the alphabet, and not quite the same in the second."""
    ours, theirs = letters(1), letters(2)
    parts = tiny_engine(draft_seed=None)
    draft = tiny_engine(target=speaker(theirs, noise=0.01), draft_seed=None)
    return TranslateDrafter.build(
        Surroundings(
            target=ModelParts(runner=parts.runner, manager=parts.manager, tokenizer=ours),
            draft=ModelParts(runner=draft.runner, manager=draft.manager, tokenizer=theirs),
            shares_vocabulary=False,
        )
    )


def in_parallel() -> ModelDrafter:
    """A draft model that says all depths in one pass (PARD)."""
    parts = tiny_engine(target=tiny_decoder(0, noise=0.01), draft_seed=None)
    return ModelDrafter(parts.runner, parts.manager, VOCAB, mask_token_id=9)


@pytest.mark.parametrize(("name", "setting"), with_defaults(OURS, DRAFTER_SETTINGS))
def test_drafters(name, setting, datastore):
    needs = DRAFTERS.load(name).needs
    more = {"prediction_token_ids": GUESS} if "prediction" in needs else {}
    made = with_head(HEADS[name][0]) if "head" in needs else {}
    check_drafter(
        translate if name == "translate" else name,
        speculation={**more, **setting},
        beside=("suffix",) if name == "cascade" else (),
        datastore=datastore,
        **made,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kinds in HEADS.values() for kind in kinds[1:]])
def test_further_kinds_of_heads(kind):
    check_drafter(KINDS[kind].drafter, **with_head(kind))


@pytest.mark.slow
def test_translation_as_text():
    asked = {"drafter_options": {"by": "strings"}, "draft_sample_method": "greedy"}
    check_drafter(translate, speculation=asked)


@pytest.mark.slow
def test_drafting_in_parallel():
    check_drafter(in_parallel)


@pytest.mark.parametrize(("name", "options"), with_defaults(RULES, RULE_OPTIONS))
def test_rules(name, options):
    check_verifier(VERIFIERS.load(name)(**options))
