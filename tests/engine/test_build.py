"""build: which draft model, drafters, tokenizer and KV an engine gets; which pairs it refuses."""

import json
import re
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from outrider import SpeculationParams, models, registry
from outrider.draft.base import Warmth
from outrider.engine.build import LoadConfig, build, speculation_params
from outrider.errors import ConfigError, ModelError, PairError, RequestError
from outrider.registry import DRAFTERS
from outrider.request import Option
from outrider.testing import ScriptedDrafter, junk
from tests.engine.tiny_checkpoint import MAX_POSITIONS, VOCAB, write_checkpoint


class Stranger(ScriptedDrafter):
    """A plug-in that needs nothing but tokens."""

    def __init__(self):
        super().__init__(junk(VOCAB), name="stranger")


class Tuned(Stranger):
    """A plug-in with a setting."""

    settings: ClassVar = {"size": Option(5, "how large", 1, 9)}

    def __init__(self, size=5):
        super().__init__()
        self.size = size


class NeedsHiddenStates(Stranger):
    """A plug-in that cannot be made without more."""

    warmth = Warmth.R2

    def __init__(self, model):
        raise AssertionError("nobody asked for it")


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("target")))


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("draft"), num_hidden_layers=1))


def install(monkeypatch, name, target):
    """A plug-in in both groups, as `name`."""
    monkeypatch.setattr(
        registry,
        "entry_points",
        lambda *, group: (
            []
            if group == registry.POLICIES.group
            else [EntryPoint(name=name, value=target, group=group)]
        ),
    )


def engine(model, options=None, **load):
    return build(LoadConfig(model=model, **load), options or {})[0]


def test_demo_brings_its_draft_model_unless_declined():
    pair = engine("demo")
    assert (pair.draft_model, pair.default_drafter) == ("demo-draft", "draft_model")
    alone = engine("demo", draft_model="off")
    assert (alone.draft_model, alone.default_drafter) == ("", "")
    assert "draft_model" not in alone.drafters


def test_other_models_bring_none(target, draft):
    assert engine(target).draft_model == ""
    assert engine(target, draft_model=draft).draft_model == draft
    assert engine(target, draft_model="off").draft_model == ""


def test_drafters_that_need_only_tokens_are_there_unasked(target, monkeypatch):
    usual = engine(target).drafters.names()
    assert "ngram" in usual
    assert not {"draft_model", "translate", "rest"} & set(usual)
    monkeypatch.setitem(DRAFTERS._builtins, "Stranger", f"{__name__}:Stranger")
    assert sorted(engine(target).drafters.names()) == sorted([*usual, "stranger"])
    assert engine(target, drafters=("Stranger",)).drafters.names() == ["stranger"]
    assert engine(target, drafters=()).drafters.names() == []


def test_a_plug_in_that_needs_more_is_there_only_when_it_is_named(target, monkeypatch):
    install(monkeypatch, "needy", f"{__name__}:NeedsHiddenStates")
    assert "needy" not in engine(target).drafters
    with pytest.raises(TypeError, match="model"):
        engine(target, drafters=("needy",))


@pytest.mark.parametrize(
    ("name", "reason"), [("broken", "no_such_module"), ("ngram", "takes the name of the built-in")]
)
def test_a_broken_plug_in_is_skipped_with_a_warning(target, monkeypatch, caplog, name, reason):
    install(monkeypatch, name, "no_such_module:Thing")
    made = engine(target)
    assert name not in made.drafters or name == "ngram"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert reason in record.getMessage()


def test_settings_reach_the_drafters(target):
    settings = {"suffix": {"max_shared_tokens": 70, "depth": 9}, "recycle": {"max_tenants": 2}}
    built = engine(target, drafter_settings=settings)
    suffix, recycle = built.drafters["suffix"], built.drafters["recycle"]
    assert (suffix.max_shared_tokens, suffix.max_tenants, suffix.depth) == (70, 64, 9)
    for tenant in "abc":
        recycle.successors(tenant)
    assert set(recycle.tables) == {"b", "c"}
    narrow = engine(target, drafter_settings={"recycle": {"num_successors": 3}})
    assert narrow.drafters["recycle"].successors().shape == (narrow.spec.vocab_size + 1, 3)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"sufix": {}}, "unknown drafter 'sufix'; did you mean 'suffix'"),
        ({"suffix": {"budget": 3}}, r"unknown setting .*'suffix'.* 'budget' \(known: depth, max_"),
        ({"suffix": {"alpha": 3.0}}, "unknown setting"),
        ({"suffix": {"max_tenants": 0}}, r"\['max_tenants'\]=0: must lie in \[1, "),
        ({"suffix": {"depth": "deep"}}, r"\['depth'\]='deep': must be a whole number"),
        ({"recycle": {"num_successors": 9}}, r"=9: must lie in \[1, 8\]"),
        ({"ngram": {"depth": 3}}, "ngram has no settings; drop it"),
        (["suffix"], r"drafter_settings=\['suffix'\]: must map drafters to their settings"),
        ({"suffix": 3}, r"drafter_settings\['suffix'\]=3: must map names"),
    ],
)
def test_settings_are_honoured_or_refused(target, settings, match):
    with pytest.raises(ConfigError, match=match):
        engine(target, drafter_settings=settings)


def test_settings_of_a_drafter_that_is_not_here_are_refused(target):
    with pytest.raises(ConfigError, match=r"\['suffix'\]: that drafter is not set up here; name"):
        engine(target, drafters=("ngram",), drafter_settings={"suffix": {"depth": 9}})
    with pytest.raises(ConfigError, match="'rest' needs a datastore"):
        engine(target, drafter_settings={"rest": {}})


def test_a_plug_in_may_have_settings_and_reads_them(target, monkeypatch):
    monkeypatch.setitem(DRAFTERS._builtins, "Tuned", f"{__name__}:Tuned")
    assert engine(target, drafters=("Tuned",)).drafters["stranger"].size == 5
    built = engine(target, drafters=("Tuned",), drafter_settings={"Tuned": {"size": 7}})
    assert built.drafters["stranger"].size == 7


def test_a_broken_plug_in_that_is_named_is_an_error(target, monkeypatch):
    install(monkeypatch, "broken", "no_such_module:Thing")
    with pytest.raises(ConfigError, match=r"'broken' .* repair or uninstall"):
        engine(target, drafters=("broken",))


@pytest.mark.parametrize(
    ("name", "match"),
    [("ngrm", "unknown drafter 'ngrm'; did you mean 'ngram'"), ("draft_model", "draft_model=...")],
)
def test_drafters_that_cannot_be_listed(target, name, match):
    with pytest.raises(ConfigError, match=match):
        engine(target, drafters=(name,))


def test_options_reach_the_engine(target):
    built = engine(target, {"max_num_seqs": 3, "block_size": 4, "max_model_len": 64})
    assert built.config.max_num_seqs == 3
    assert built.max_model_len == 64
    assert built.manager.num_free == 3 * 64 // 4


def test_kv_memory_counts_for_each_of_the_two_pools(target, draft):
    options = {"block_size": 16, "max_num_seqs": 64}
    one_sequence = 2 * 2 * 2 * 8 * MAX_POSITIONS * 4  # layers, K and V, kv heads, width, float32
    built = engine(target, options | {"kv_cache_memory_bytes": 3 * one_sequence}, draft_model=draft)
    assert built.manager.num_free == 3 * MAX_POSITIONS // 16
    # The draft model has half the layers, so the same memory holds twice the blocks.
    assert built.drafters["draft_model"].manager.num_free == 6 * MAX_POSITIONS // 16
    scarce = options | {"kv_cache_memory_bytes": one_sequence - 1}
    with pytest.raises(ConfigError, match=f"kv_cache_memory_bytes={one_sequence - 1}"):
        engine(target, scarce | {"max_model_len": MAX_POSITIONS})


def test_a_length_nobody_asked_for_gives_way_to_memory(target, caplog):
    """A model of many positions loads; the log says how many can be used."""
    one_sequence = 2 * 2 * 2 * 8 * MAX_POSITIONS * 4
    built = engine(target, {"block_size": 16, "kv_cache_memory_bytes": one_sequence // 2})
    assert built.max_model_len == MAX_POSITIONS // 2
    assert "raise kv_cache_memory_bytes" in caplog.text


def test_a_short_draft_model_serves_a_longer_target(target, tmp_path):
    short = write_checkpoint(tmp_path, max_position_embeddings=32)
    built = engine(target, draft_model=str(short))
    assert built.max_model_len == MAX_POSITIONS
    assert built.drafters["draft_model"].runner.network.spec.max_positions == 32


def test_dtype_and_device_reach_both_models(target, draft):
    built = engine(target, draft_model=draft, dtype="bfloat16", device="cpu")
    drafter = built.drafters["draft_model"]
    for runner in (built.runner, drafter.runner):
        assert runner.network.spec.dtype == torch.bfloat16
        assert runner.pool.layers[0].keys.dtype == torch.bfloat16


def test_without_a_tokenizer_the_widths_must_agree(target, tmp_path):
    wide = str(write_checkpoint(tmp_path, vocab_size=VOCAB + 20))
    assert engine(target, draft_model=wide).draft_model == wide, "padding is no other vocabulary"
    with pytest.raises(PairError, match=f"has {VOCAB + 20} tokens instead of {VOCAB}"):
        engine(target, draft_model=wide, load_tokenizer=False)


def test_a_draft_model_without_a_tokenizer_is_taken_at_its_width(target, draft, tmp_path):
    bare = write_checkpoint(tmp_path / "bare")
    other = write_checkpoint(tmp_path / "other", vocab_size=VOCAB + 20)
    for folder in (bare, other):
        for path in folder.glob("tokenizer*"):
            path.unlink()
    assert engine(target, draft_model=str(bare)).draft_model == str(bare)
    with pytest.raises(PairError, match=r"does not share .* without the tokenizers of both"):
        engine(target, draft_model=str(other))


def test_another_vocabulary_is_translated_and_said_so(target, draft, tmp_path, caplog):
    other = write_checkpoint(tmp_path, text="zyx wvu tsr qpo zyx wvu tsr qpo " * 3)
    assert engine(target, draft_model=draft).default_drafter == "draft_model"
    assert caplog.records == []
    built = engine(target, draft_model=str(other))
    assert built.default_drafter == "translate"
    assert "draft_model" not in built.drafters
    (record,) = caplog.records
    assert re.search(r"token '.*' is id \d+ here and .* there.*translated", record.getMessage())
    with pytest.raises(ConfigError, match=r"'translate' comes with draft_model=\.\.\."):
        engine(target, drafters=("translate",))


def test_a_grammar_needs_a_tokenizer(target):
    assert engine(target).grammars is not None
    assert engine(target, load_tokenizer=False).grammars is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_said_so(target):
    with pytest.raises(ConfigError, match="device='cuda:1': torch sees no GPU; use device='cpu'"):
        engine(target, device="cuda:1")


@pytest.mark.parametrize(
    ("load", "match"),
    [
        ({"device": "toaster"}, "device 'toaster' cannot be used here"),
        ({"dtype": "float31"}, "unknown dtype 'float31'; did you mean 'float32'"),
        ({"network": "fat"}, "network='fat': must be one of auto, lean, adapter"),
        ({"revision": "main"}, "revision 'main' is for models on the hub"),
    ],
)
def test_how_to_load_is_checked(target, load, match):
    with pytest.raises(ModelError, match=match):
        engine(target, **load)


def test_the_revision_is_of_the_model_alone(target, draft, monkeypatch):
    asked = {}

    def load_network(name, *, revision, **options):
        asked[name] = revision
        return models.network.load_network(name, **options)

    monkeypatch.setattr("outrider.engine.build.load_network", load_network)
    monkeypatch.setattr("outrider.engine.build.resolve", lambda name, revision: Path(name))
    engine(target, draft_model=draft, revision="v1")
    assert asked == {target: "v1", draft: None}


def test_end_tokens_come_from_the_generation_config(target, tmp_path):
    assert engine(target).spec.eos_token_ids == (0,)
    folder = write_checkpoint(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3]}))
    assert engine(str(folder)).spec.eos_token_ids == (0, 3)


def test_speculation_from_a_name_keys_or_the_thing_itself():
    params = SpeculationParams(method="ngram", num_draft_tokens=3)
    assert speculation_params(params) is params
    assert speculation_params("off").is_off
    assert speculation_params({"method": "ngram", "num_speculative_tokens": 3}) == params
    assert speculation_params({}) == SpeculationParams()
    with pytest.raises(RequestError, match="num_draft_token'; did you mean 'num_draft_tokens'"):
        speculation_params({"num_draft_token": 3})


def test_an_adapted_model_can_keep_its_own_linear_layers(target):
    load = LoadConfig(model=target, network="adapter", load_tokenizer=False)
    swapped, _ = build(load, {})
    kept, _ = build(replace(load, swap_linear=False), {})
    modules = [engine.runner.network.model.modules() for engine in (swapped, kept)]
    assert [any("forward" in vars(module) for module in part) for part in modules] == [True, False]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "swap_linear=False.*lean decoder.*network='adapter'"),
        ({"network": "adapter", "quantization": "int8"}, "swap_linear=False with quantization"),
    ],
)
def test_swap_linear_is_refused_where_it_cannot_be_honoured(target, options, text):
    load = LoadConfig(model=target, swap_linear=False, load_tokenizer=False, **options)
    with pytest.raises(ConfigError, match=text):
        build(load, {})
