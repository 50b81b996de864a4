"""What is written is read by our loader and run by our engine's networks with the same logits."""

import json

import pytest
import torch
from safetensors.torch import load_file

from outrider.errors import ConfigError, ModelError
from outrider.models.heads.eagle_network import EagleNetwork
from outrider.models.heads.load import load_head
from outrider.models.heads.medusa_network import MedusaNetwork
from outrider.models.heads.spec import Family
from outrider.models.heads.teacher_forcing import teacher_forced
from outrider.models.loader import load_decoder
from outrider.train.heads import roundtrip
from outrider.train.heads.eagle3 import Eagle3
from outrider.train.heads.kinds import KINDS, find_kind, load_student
from outrider.train.heads.medusa import Medusa
from outrider.train.heads.pieces import Packed
from outrider.train.heads.roundtrip import compared, write_checked
from outrider.train.heads.shape import decoder_shape, rope_values
from outrider.train.heads.small import Small
from tests.train.heads.conftest import VALUES, make_teacher, random_pieces, settings

DEPTHS = 3
IDS = torch.arange(1, 256, 3)
LAYOUTS = [
    ("eagle3", "speculators"),
    ("eagle3", "eagle"),
    ("medusa", "medusa"),
    ("kv", "outrider"),
    ("draft_model", "llama"),
]


def perturbed(kind, teacher, ids=None, **options):
    """A head none of whose weights is what it begins as."""
    student = find_kind(kind).fresh(teacher, settings(kind, depths=DEPTHS, **options), ids)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return student


@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
@pytest.mark.parametrize("ids", [None, IDS], ids=["all", "some"])
def test_every_layout_comes_back_to_the_bit(teacher, tmp_path, kind, layout, ids):
    if kind == "draft_model" and ids is not None:
        pytest.skip("it has the target's vocabulary")
    student = perturbed(kind, teacher, ids)
    pieces = random_pieces(14, 9)
    trip = write_checked(student, teacher, tmp_path, layout, {"steps": 3}, pieces)
    assert trip.difference == 0.0
    assert trip.scale > 0.1
    assert json.loads((tmp_path / "outrider.json").read_text())["training"] == {"steps": 3}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".writing")]


@pytest.mark.parametrize("layout", ["speculators", "eagle"])
@pytest.mark.parametrize("ids", [None, IDS], ids=["all", "some"])
@torch.no_grad()
def test_the_engine_says_what_the_trainer_says(teacher, tmp_path, layout, ids):
    """Over all positions and depths, by the network that serves EAGLE-3."""
    student = perturbed("eagle3", teacher, ids, num_layers=2)
    student.write(tmp_path, layout, {}, torch.float32)
    network = EagleNetwork(load_head(tmp_path, teacher.target), teacher.shown)
    (piece,) = random_pieces(13)
    batch = Packed([piece])
    taught = teacher.teach(batch, student.boundaries)
    tapped = torch.stack([taught.tapped[layer] for layer in network.boundaries])
    served = teacher_forced(network, piece.text.tokens, tapped, DEPTHS)
    said = slice(None) if ids is None else ids
    for depth, states_ND in enumerate(student.states(batch, taught, DEPTHS)):
        ours = student.logits(depth, states_ND)[: len(served[depth])]
        assert torch.allclose(ours, served[depth][:, said], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("ids", [None, IDS], ids=["all", "some"])
def test_the_engine_says_what_the_trained_medusa_says(teacher, tmp_path, ids):
    student = perturbed("medusa", teacher, ids, num_layers=2)
    student.write(tmp_path, "medusa", {}, torch.float32)
    network = MedusaNetwork(load_head(tmp_path, teacher.target), teacher.shown, teacher.network.ops)
    batch = Packed(random_pieces(9))
    taught = teacher.teach(batch, student.boundaries)
    served_NKV = network.forward(taught.tapped[teacher.spec.num_layers], DEPTHS)
    said = slice(None) if ids is None else ids
    for depth, states_NH in enumerate(student.states(batch, taught, DEPTHS)):
        ours = student.logits(depth, states_NH)
        assert torch.allclose(ours, served_NKV[:, depth, said], atol=1e-4)


@torch.no_grad()
def test_a_draft_model_is_a_model(teacher, tmp_path):
    student = perturbed("draft_model", teacher)
    student.write(tmp_path, "llama", {}, torch.float32)
    decoder = load_decoder(tmp_path, ops=teacher.network.ops)
    batch = Packed(random_pieces(14, 9))
    (states,) = student.states(batch, teacher.teach(batch, ()), 1)
    ours = student.logits(0, states)
    theirs = teacher_of(decoder).teach(batch, ())
    assert torch.allclose(ours, decoder.head(theirs.final_NH), atol=1e-4)


def teacher_of(decoder):
    teacher = make_teacher()
    teacher.network = teacher.shown = decoder
    return teacher


def test_every_flag_is_written(teacher, tmp_path):
    student = perturbed("eagle3", teacher, IDS)
    for layout in ("speculators", "eagle"):
        student.write(tmp_path / layout, layout, {}, torch.float32)
        config = json.loads((tmp_path / layout / "config.json").read_text())
        flags = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
        assert [config[flag] for flag in flags] == [False] * 4
        assert config["draft_vocab_size"] == len(IDS)
        head = load_head(tmp_path / layout, teacher.target)
        assert head.spec.family is Family.EAGLE3
        assert head.spec.assumed == frozenset(), "a reader has nothing to guess"
        assert head.spec.conventions.feature_layers == student.boundaries


def test_names_and_maps_of_the_layouts(teacher, tmp_path):
    student = perturbed("eagle3", teacher, IDS)
    for layout in ("speculators", "eagle"):
        student.write(tmp_path / layout, layout, {}, torch.float32)
    theirs = load_file(tmp_path / "eagle" / "model.safetensors")
    ours = load_file(tmp_path / "speculators" / "model.safetensors")
    assert "midlayer.self_attn.q_proj.weight" in theirs
    assert "layers.0.self_attn.q_proj.weight" in ours
    for tensors in (ours, theirs):
        assert tensors["d2t"].dtype == torch.int64
        assert torch.equal(tensors["d2t"] + torch.arange(len(IDS)), IDS)
        assert torch.equal(tensors["t2d"].nonzero().flatten(), IDS)
    nested = json.loads((tmp_path / "eagle" / "config.json").read_text())["eagle_config"]
    written = nested["eagle_aux_hidden_state_layer_ids"]
    assert written == [layer - 1 for layer in student.boundaries], "outputs of layers"


def test_medusa_has_its_own_names(teacher, tmp_path):
    perturbed("medusa", teacher).write(tmp_path, "medusa", {}, torch.float32)
    tensors = load_file(tmp_path / "medusa_lm_head.safetensors")
    assert tensors.keys() == {
        f"{head}.{part}"
        for head in range(DEPTHS)
        for part in ("0.linear.weight", "0.linear.bias", "1.weight")
    }


def test_the_embedding_has_no_name_in_the_layout_of_eagle(teacher, tmp_path):
    student = perturbed("eagle3", teacher, feature_layers=(0, 2))
    with pytest.raises(ConfigError, match="choose others, or layout 'speculators'"):
        student.write(tmp_path, "eagle", {}, torch.float32)
    student.write(tmp_path, "speculators", {}, torch.float32)
    assert Eagle3.load(tmp_path, teacher).boundaries == (0, 2)


def test_a_wrong_file_never_arrives(teacher, tmp_path, monkeypatch):
    student = perturbed("medusa", teacher)
    other = perturbed("medusa", teacher)
    with torch.no_grad():
        other.heads[1].blocks[0].weight.mul_(1.5)
    monkeypatch.setattr(roundtrip, "load_student", lambda folder, teacher: other)
    with pytest.raises(ModelError, match="not the trained one"):
        write_checked(student, teacher, tmp_path / "out", "medusa", {}, random_pieces(12))
    assert list((tmp_path / "out").iterdir()) == []


def test_half_the_bits_are_told(teacher, tmp_path):
    student = perturbed("eagle3", teacher)
    student.write(tmp_path, "speculators", {}, torch.bfloat16)
    trip = compared(student, load_student(tmp_path, teacher), teacher, random_pieces(12))
    assert 0.0 < trip.difference < 0.1 * trip.scale
    assert f"{trip.difference:.2g}" in trip.told()


def test_another_kind_in_the_same_folder_leaves_nothing_behind(teacher, tmp_path):
    for kind in ("medusa", "eagle3", "medusa"):
        student = perturbed(kind, teacher)
        write_checked(student, teacher, tmp_path, student.layouts[0], {}, random_pieces(12))
        assert load_student(tmp_path, teacher).kind == kind


ROPES = [
    {"rope_type": "default", "rope_theta": 5e5},
    {"rope_type": "linear", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "longrope", "short_factor": [1.5] * 4, "long_factor": [1.5] * 4, "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_the_ropes_of_targets_come_back(teacher, tmp_path, rope):
    shape = decoder_shape({**VALUES, "rope_parameters": rope}, 1)
    values = {**VALUES, "max_position_embeddings": shape.rope.max_positions}
    again = decoder_shape({**values, "rope_parameters": rope_values(shape.rope)}, 1)
    assert again.rope == shape.rope


def test_kinds_are_told():
    assert [find_kind(name).kind for name in KINDS] == list(KINDS)
    assert {find_kind(name) for name in ("eagle3", "medusa", "draft_model")} == {
        Eagle3,
        Medusa,
        Small,
    }
    with pytest.raises(ConfigError, match="did you mean 'eagle3'"):
        find_kind("eagle4")
