"""Whole runs: every kind from files to a folder that the engine serves."""

import json

import pytest
import torch

from outrider.errors import ConfigError, ModelError
from outrider.models.heads.load import load_head
from outrider.models.heads.spec import TargetSpec
from outrider.models.hub import resolve
from outrider.tokenizer import load_tokenizer
from outrider.train.heads import run, session
from outrider.train.heads.pieces import cut
from outrider.train.heads.session import train_draft
from outrider.train.heads.texts import read_texts
from tests.train.heads.checkpoint import small_run, write_chats, write_target, write_texts


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "texts.jsonl")


@pytest.mark.parametrize("kind", ["eagle3", "medusa", "kv", "draft_model"])
def test_a_run_writes_a_draft_with_its_card(target, data, tmp_path, kind):
    lines = []
    settings = small_run(target, data, tmp_path, kind=kind)
    outcome = train_draft(settings, lines.append)
    assert outcome.finished.num_steps == 4
    assert outcome.round_trip.difference < 1e-4
    card = (tmp_path / "README.md").read_text()
    for told in (kind, str(target), "repeat last", "n-gram 3..1", "texts.jsonl", "conditional"):
        assert told in card
    about = json.loads((tmp_path / "outrider.json").read_text())["training"]
    assert about["steps"] == 4
    joint = [round(rate, 4) for rate in outcome.scores.rates().joint]
    assert about["acceptance"]["drawn_joint"] == joint
    first = next(line for line in lines if line.startswith("step 1:"))
    assert "projected" in first
    assert "if every draft stood" in first
    assert outcome.forecast.speedup > 0.0


def test_a_head_says_only_its_vocabulary(target, data, tmp_path):
    settings = small_run(target, data, tmp_path, draft_vocab=50, layout="eagle")
    train_draft(settings)
    values = json.loads((target / "config.json").read_text())
    head = load_head(tmp_path, TargetSpec.from_config(values, name="t"))
    ids = head.tensors["target_ids"]
    assert len(ids) == 50
    assert set(range(5)) <= set(ids.tolist()), "the template's special tokens"


def test_a_stopped_run_goes_on_to_the_same_weights(target, data, tmp_path, monkeypatch):
    whole = small_run(target, data, tmp_path / "whole")
    train_draft(whole)
    parts = small_run(target, data, tmp_path / "parts", resume=True)
    original = session.HeadTrainer.run

    def interrupted(self, **options):
        original(self, max_steps=2)
        raise KeyboardInterrupt

    monkeypatch.setattr(session.HeadTrainer, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_draft(parts)
    monkeypatch.undo()
    lines = []
    train_draft(parts, lines.append)
    assert "resumed from the last checkpoint" in lines
    one, other = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")
    )
    assert one == other


def test_resuming_another_kind_is_refused(target, data, tmp_path):
    train_draft(small_run(target, data, tmp_path))
    with pytest.raises(ConfigError, match="depths is 2"):
        train_draft(small_run(target, data, tmp_path, resume=True, depths=2))
    with pytest.raises(ConfigError, match="kind is 'medusa'"):
        train_draft(small_run(target, data, tmp_path, resume=True, kind="medusa"))


def test_answers_of_the_target_are_learned(target, tmp_path):
    chats = write_chats(tmp_path / "chats.jsonl")
    lines = []
    out = tmp_path / "out"
    settings = small_run(
        target, chats, out, on_policy=True, temperature=0.7, answer_tokens=16, window=100
    )
    train_draft(settings, lines.append)
    assert any("writes 12 answers at temperature 0.7" in line for line in lines)
    card = (out / "README.md").read_text()
    assert "answers of the target at temperature 0.7 to prompts of chats.jsonl" in card
    lines.clear()
    train_draft(settings, lines.append)
    assert not any("writes" in line for line in lines), "they are kept"


def test_prompts_alone_need_answers(target, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"the line {i}"}) for i in range(9)))
    with pytest.raises(ConfigError, match="on_policy"):
        train_draft(small_run(target, path, tmp_path / "out"))
    settings = small_run(target, path, tmp_path / "out", on_policy=True, answer_tokens=24)
    assert train_draft(settings).finished.num_steps == 4


def test_given_text_is_held_out_instead(target, data, tmp_path):
    other = write_texts(tmp_path / "other.jsonl", count=6)
    lines = []
    settings = small_run(target, data, tmp_path / "out", held_out=(other,))
    outcome = train_draft(settings, lines.append)
    assert all(unit.startswith(str(other)) for unit in outcome.scores.units)


def ruin(folder):
    """Makes a trained head worse, file and all."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = torch.randn_like(tensors["lm_head.weight"]) * 3
    save_file(tensors, path)
    (folder / "mark").write_text("ruined")


def test_a_better_head_is_promoted_and_a_worse_one_is_not(target, data, tmp_path):
    in_use = tmp_path / "use"
    train_draft(small_run(target, data, in_use, steps=2))
    ruin(in_use)
    lines = []
    better = small_run(target, data, tmp_path / "new", steps=40, rate=3e-3, promote=in_use)
    outcome = train_draft(better, lines.append)
    assert outcome.promotion.is_better
    assert not (in_use / "mark").exists()
    assert (tmp_path / "use.previous" / "mark").read_text() == "ruined"
    assert any("is the new head now" in line for line in lines)
    before = (in_use / "model.safetensors").read_bytes()
    worse = small_run(target, data, tmp_path / "bad", steps=1, rate=1e-9, promote=in_use)
    assert not train_draft(worse, lines.append).promotion.is_better
    assert (in_use / "model.safetensors").read_bytes() == before
    assert lines[-1] == f"{in_use} stays as it is"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "eagle4"}, "did you mean 'eagle3'"),
        ({"loss": "klx"}, "unknown loss"),
        ({"layout": "medusa"}, "unknown layout of kind 'eagle3'"),
        ({"steps": 0}, "steps=0"),
        ({"window": 256}, "tokens_per_step"),
        ({"rate": 0.0}, "rate"),
        ({"feature_layers": (1, 9)}, "states 0 "),
        ({"kind": "draft_model", "draft_vocab": 9}, "whole vocabulary"),
        ({"draft_vocab": 2}, "need more room"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_mistake_is_told(target, data, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        train_draft(small_run(target, data, tmp_path, **options))


def test_promotion_over_a_strange_head_is_refused_at_once(target, data, tmp_path, monkeypatch):
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "config.json").write_text('{"model_type": "llama", "vocab_size": 300}')
    monkeypatch.setattr(session, "HeadTrainer", lambda *args, **options: pytest.fail("trained"))
    with pytest.raises(ModelError, match="no weights"):
        train_draft(small_run(target, data, tmp_path / "out", promote=strange))


def test_what_is_held_out_is_not_learned(target, data, tmp_path, monkeypatch):
    learned = []
    original = session.PieceBatches

    def batches(pieces, **options):
        learned.extend(piece.digest for piece in pieces)
        return original(pieces, **options)

    monkeypatch.setattr(session, "PieceBatches", batches)
    same = write_texts(tmp_path / "same.jsonl", count=8)
    train_draft(small_run(target, data, tmp_path / "out", held_out=(same,), steps=1))
    tokenizer = load_tokenizer(target)
    held_out = {piece.digest for piece in cut(read_texts([same], tokenizer), 64)}
    assert learned
    assert not held_out & set(learned)


def test_promotion_needs_a_head_before_hours_are_spent(target, data, tmp_path, monkeypatch):
    monkeypatch.setattr(session.Teacher, "load", lambda *args, **options: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match="no head is in use"):
        train_draft(small_run(target, data, tmp_path, promote=tmp_path / "absent"))


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.setattr(session.Teacher, "load", lambda *args, **options: pytest.fail("loaded"))


@pytest.mark.parametrize("out", ["use", "use.previous", "use/next", "."])
def test_writing_over_the_head_in_use_is_refused_at_once(target, data, tmp_path, no_work, out):
    in_use = tmp_path / "use"
    in_use.mkdir()
    (in_use / "config.json").write_text("{}")
    settings = small_run(target, data, tmp_path / out, promote=in_use)
    with pytest.raises(ConfigError, match=r"out='.*' and promote='.*use'"):
        train_draft(settings)
    assert [path.name for path in tmp_path.rglob("*")] == ["use", "config.json"]


def test_writing_over_the_target_is_refused_at_once(target, data, tmp_path, no_work):
    (tmp_path / "link").symlink_to(target)
    before = sorted(path.name for path in target.iterdir())
    for out in (target, tmp_path / "link"):
        with pytest.raises(
            ConfigError, match=f"out='{out}' is the folder of the target .'{target}"
        ):
            train_draft(small_run(target, data, out))
    shipped = small_run("demo", data, resolve("demo"))
    with pytest.raises(ConfigError, match="is the folder of the target"):
        train_draft(shipped)
    assert sorted(path.name for path in target.iterdir()) == before


@pytest.mark.parametrize("out", ["file", "file/head", "head"])
def test_a_file_where_the_folder_is_to_be_is_refused_at_once(target, data, tmp_path, no_work, out):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "work").write_text("kept")
    with pytest.raises(ConfigError, match=rf"no folder can be made at .*{out}.* is a file"):
        train_draft(small_run(target, data, tmp_path / out))


def test_the_peak_of_memory_is_that_of_training(target, data, tmp_path, monkeypatch):
    """What was before is forgotten once all else is ready, and the peak is read before scoring."""
    order = []

    def note(owner, name):
        original = getattr(owner, name)

        def noted(*args, **options):
            order.append(name)
            return original(*args, **options)

        monkeypatch.setattr(owner, name, noted)

    note(session, "gather")
    note(session, "forget_peak")
    note(session.HeadTrainer, "run")
    note(run, "peak_memory")
    train_draft(small_run(target, data, tmp_path))
    assert order == ["gather", "forget_peak", "run", "peak_memory"]
