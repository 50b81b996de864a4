"""Training-time test against the recursion of serving, by a reference without any cache."""

import pytest
import torch

from outrider.models.heads.load import load_head
from outrider.models.heads.spec import Head
from outrider.train.heads import layers
from outrider.train.heads.eagle3 import Eagle3
from outrider.train.heads.pieces import Packed
from outrider.train.heads.shape import feature_layers
from tests.models.heads.layouts import H, L, V, random_eagle3, write_speculators
from tests.models.heads.reference import ReferenceEagle3
from tests.train.heads.conftest import make_teacher, piece, random_pieces, settings

DEPTHS = 4
TOLERANCE = 1e-5
FLAGS = [
    {},
    {"flags": {"norm_before_residual": True}},
    {"flags": {"norm_output": True}},
    {"input_norm": "all", "num_layers": 2},
    {"input_norm": "each", "is_qwen": True, "flags": {"norm_output": True}},
]


def recursion(reference, inputs_TD, tokens, row, depth):
    """Logits of a draft at `depth` from `row`, whose tokens are those of the text."""
    rows = reference.rows(inputs_TD[: row + 1], tokens[1 : row + 2])
    for step in range(depth):
        inputs_TD = torch.cat((inputs_TD[: row + 1 + step], rows.feedback_TD[-1:]))
        rows = reference.rows(inputs_TD, tokens[1 : row + 3 + step])
    return rows.logits_TV[-1]


def largest_difference(student, teacher, head, pieces):
    """Over all rows, depths and pieces."""
    batch = Packed(pieces, "cpu")
    taught = teacher.teach(batch, student.boundaries)
    tokens_N = batch.tokens_N
    reference = ReferenceEagle3(head, teacher.embed(torch.arange(teacher.target.vocab_size)))
    worst = 0.0
    for depth, states_ND in enumerate(student.states(batch, taught, DEPTHS)):
        logits_ND = student.logits(depth, states_ND)
        for start, length in zip(batch.starts, batch.lengths, strict=True):
            stop = start + length
            features = taught.feature(student.boundaries)[start:stop].float()
            inputs = reference.fuse(features)
            for row in range(length - 1 - depth):
                expected = recursion(reference, inputs, tokens_N[start:stop], row, depth)
                worst = max(worst, float((logits_ND[start + row] - expected).abs().max()))
    return worst


@pytest.mark.parametrize("options", FLAGS, ids=str)
@torch.no_grad()
def test_step_k_is_the_recursion_at_depth_k(tmp_path, options):
    """Of heads with every convention, as they are loaded; pieces are packed side by side."""
    teacher = make_teacher_of_layouts()
    folder = write_speculators(tmp_path, random_eagle3(**options))
    student = Eagle3.load(folder, teacher)
    head = load_head(folder, teacher.target)
    pieces = [piece([t % V for t in p.text.tokens]) for p in random_pieces(9, 3, 12)]
    assert largest_difference(student, teacher, head, pieces) <= TOLERANCE


@torch.no_grad()
def test_chunks_change_nothing(teacher, monkeypatch):
    student = Eagle3.fresh(teacher, settings("eagle3", num_layers=2), None)
    batch = Packed(random_pieces(30, 7, 20), "cpu")
    taught = teacher.teach(batch, student.boundaries)
    whole = torch.stack(list(student.states(batch, taught, DEPTHS)))
    monkeypatch.setattr(layers, "CHUNK", 8)
    chunked = torch.stack(list(student.states(batch, taught, DEPTHS)))
    inside = batch.rows(1, DEPTHS - 1)  # rows whose tokens are all of their piece
    assert torch.allclose(whole[:, inside], chunked[:, inside], atol=TOLERANCE)


@torch.no_grad()
def test_a_fresh_head_is_its_reference_too(teacher):
    ids = torch.arange(3, 250, 5)
    student = Eagle3.fresh(teacher, settings("eagle3"), ids)
    head = Head(student.spec, dict(student.head().tensors))
    assert student.logits(0, torch.zeros(1, 32)).shape == (1, len(ids))
    assert largest_difference(student, teacher, head, random_pieces(8)) <= TOLERANCE


@pytest.mark.parametrize("mutant", ["sees all rows of later steps", "stays at its position"])
@torch.no_grad()
def test_mutants_are_found(teacher, monkeypatch, mutant):
    if mutant == "stays at its position":
        monkeypatch.setattr(layers.Course, "begin", lambda self, step: None)
    else:
        monkeypatch.setattr(layers, "attend", attend_later_rows)
    student = Eagle3.fresh(teacher, settings("eagle3"), None)
    assert largest_difference(student, teacher, student.head(), random_pieces(8)) > 1e-3


def attend_later_rows(query_NHE, seen, chunks):
    """Causal over the last step's rows instead of the first's: an easy mistake."""
    last = layers.Seen(seen.keys[-1:], seen.values[-1:])
    return ORIGINAL_ATTEND(query_NHE, last, chunks)


ORIGINAL_ATTEND = layers.attend


def test_gradients_reach_every_weight(teacher):
    student = Eagle3.fresh(teacher, settings("eagle3"), None)
    batch = Packed(random_pieces(12), "cpu")
    taught = teacher.teach(batch, student.boundaries)
    states = list(student.states(batch, taught, 3))
    student.logits(2, states[2]).square().mean().backward()
    assert [n for n, w in student.named_parameters() if w.grad is None or not w.grad.any()] == []


def test_published_choice_of_features_and_small_targets():
    assert feature_layers(32) == (2, 16, 29)
    assert feature_layers(8) == (2, 4, 5)
    assert feature_layers(7) == (1, 4, 7)
    assert feature_layers(2) == (1, 2)
    assert feature_layers(4, (0, 4)) == (0, 4)


def make_teacher_of_layouts():
    """A target of the widths that the writers of layouts use."""
    return make_teacher(hidden_size=H, vocab_size=V, num_hidden_layers=L)
