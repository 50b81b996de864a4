"""Whatever draft an engine runs can be the one in use that a new head has to beat."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from outrider.errors import ConfigError, OutriderError, PairError
from outrider.train.heads import run, session
from outrider.train.heads.incumbent import load_incumbent
from outrider.train.heads.serving import tally_served
from outrider.train.heads.session import train_draft
from outrider.train.heads.teacher import Teacher
from tests.engine.tiny_checkpoint import VOCAB, write_checkpoint
from tests.models.heads import layouts
from tests.models.heads.layouts import H, L, Random
from tests.train.heads.checkpoint import small_run, write_target, write_texts
from tests.train.heads.conftest import piece

SPOKEN = {"vocab_size": VOCAB}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """As wide and deep as the layouts' heads want it, with a tokenizer."""
    folder = tmp_path_factory.mktemp("target")
    return write_target(folder, hidden_size=H, num_hidden_layers=L)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "texts.jsonl")


def eagle1(folder, target):
    return layouts.write_eagle1(folder, layouts.random_eagle1(), bias=False, **SPOKEN)


def eagle3(folder, target, kind="eagle3", **more):
    """In a rope style that only serving turns into the usual one."""
    made = layouts.random_eagle3(own_embedding=False)
    made.decoder.update(SPOKEN)
    layouts.write_speculators(folder, made, kind, is_neox_style=False, **more)
    path = folder / "model.safetensors"
    tensors = load_file(path) | layouts.maps(made.ids, VOCAB)
    if kind == "peagle":
        tensors["mask_hidden"] = Random(1)(1, 1, 3 * H)
    layouts.save(path, tensors)
    return folder


def peagle(folder, target):
    return eagle3(folder, target, "peagle", mask_token_id=39)


def block(folder, target):
    config = {**layouts.zlab_config(), **SPOKEN, "block_size": 4}
    return layouts.write(folder, config, layouts.random_block())


def mtp(folder, target):
    random, start = Random(2), f"model.layers.{L - 1}."
    own = load_file(target / "model.safetensors")
    tensors = {f"{name}_layernorm.weight": random.gain(H) for name in ("token", "hidden", "final")}
    tensors["input_proj.weight"] = random(H, 2 * H)
    tensors |= {n.removeprefix(start): t for n, t in own.items() if n.startswith(start)}
    config = {"speculators_model_type": "mtp", "num_nextn_predict_layers": 1}
    return layouts.write(folder, config, layouts.prefixed("mtp_layers.0.", tensors))


def model(folder, target):
    """The target again, which no trainer here has written: it guesses whatever comes."""
    return shutil.copytree(target, folder)


def stranger(folder, target):
    """A model of other words, whose drafts are translated."""
    return write_checkpoint(folder, "other words entirely, and more of them\n" * 3)


KINDS = (eagle1, eagle3, peagle, block, mtp, model, stranger)


@pytest.fixture(params=KINDS, ids=[kind.__name__ for kind in KINDS])
def in_use(request, target, tmp_path):
    return request.param(tmp_path / "use", target)


def test_any_draft_can_be_in_use(target, data, tmp_path, in_use):
    lines = []
    settings = small_run(target, data, tmp_path / "out", promote=in_use)
    found = train_draft(settings, lines.append).promotion
    assert any(line.endswith("both draft in the engine now") for line in lines)
    assert found.num_documents >= 4
    assert found.old_length >= 1.0
    assert found.low <= found.difference <= found.high
    assert (tmp_path / "use.previous").exists() is found.is_better


def test_no_head_beats_a_draft_that_always_stands(target, data, tmp_path):
    in_use = model(tmp_path / "use", target)
    settings = small_run(target, data, tmp_path / "out", promote=in_use)
    found = train_draft(settings).promotion
    assert found.old_length > 4.5, "5 of 5 and the target's own, less the last steps of a text"
    assert found.high < -1.0
    assert (in_use / "tokenizer.json").exists()


def test_a_head_that_always_stands_beats_a_random_one(target, data, tmp_path, monkeypatch):
    in_use, out = eagle1(tmp_path / "use", target), tmp_path / "out"
    tally = run.tally_served

    def with_a_copy(name, folder, *args, **options):
        return tally(name, target if folder == out else folder, *args, **options)

    monkeypatch.setattr(run, "tally_served", with_a_copy)
    assert train_draft(small_run(target, data, out, promote=in_use)).promotion.is_better
    assert json.loads((in_use / "config.json").read_text())["speculators_model_type"] == "eagle3"
    assert (tmp_path / "use.previous" / "pytorch_model.bin").exists()


def test_both_are_held_against_the_same_text(target, tmp_path):
    """Of depth 3 all stand, but where a text ends; drafts count by their documents."""
    pieces = [piece(list(range(10 + i, 40 + i)), f"d{i // 2}") for i in range(6)]
    found = tally_served(str(target), target, pieces, num_draft_tokens=3, device="cpu")
    assert found.accepted.keys() == found.num_drafts.keys() == {"d0", "d1", "d2"}
    for unit, accepted in found.accepted.items():
        assert 2.5 < accepted / found.num_drafts[unit] <= 3.0
    again = tally_served(str(target), target, pieces, num_draft_tokens=3, device="cpu")
    assert again == found


@pytest.mark.parametrize(("kind", "depth"), [(block, 3), (mtp, None), (stranger, None)])
def test_depths_of_what_the_engine_runs(target, tmp_path, kind, depth):
    teacher = Teacher.load(str(target))
    found = load_incumbent(kind(tmp_path / "use", target), teacher, device="cpu")
    assert (found.student, found.max_depth) == (None, depth)


def test_what_no_engine_runs_is_told_at_once(target, data, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "HeadTrainer", lambda *args, **options: pytest.fail("trained"))
    with pytest.raises(ConfigError, match="the target itself"):
        train_draft(small_run(target, data, tmp_path / "out", promote=target))
    hydra = {"hydra_num_heads": 1}
    folder = layouts.write(
        tmp_path / "hydra", hydra, {"hydra_mlp.0.0.linear.weight": torch.ones(H, 2 * H)}
    )
    with pytest.raises(ConfigError, match="not served"):
        train_draft(small_run(target, data, tmp_path / "out", promote=folder))
    other = layouts.write_eagle1(tmp_path / "other", layouts.random_eagle1(), bias=False)
    with pytest.raises(PairError, match="vocab_size 40"):
        train_draft(small_run(target, data, tmp_path / "out", promote=other))
    mute = write_checkpoint(tmp_path / "mute", vocab_size=VOCAB + 10)
    for path in mute.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(OutriderError, match="token"):
        train_draft(small_run(target, data, tmp_path / "out", promote=mute))
