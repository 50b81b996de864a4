"""Training of KV heads: each step is what serving does at that depth, and it learns.

Shape legend: N tokens of a batch.
"""

import pytest
import torch

from outrider.errors import ConfigError
from outrider.models.heads.kv_network import KVNetwork
from outrider.models.heads.load import load_head
from outrider.testing import tiny_decoder
from outrider.testing.tiny import TINY
from outrider.train.heads.kv import KVHead, new_spec
from outrider.train.heads.losses import kl, overlap
from outrider.train.heads.objective import Objective
from outrider.train.heads.pieces import Packed, Piece
from outrider.train.heads.settings import DraftTraining
from outrider.train.heads.teacher import Teacher
from outrider.train.heads.texts import Text
from tests.models.heads.kv_heads import (
    DRAFT_IDS,
    Prefilled,
    Twin,
    copied_pair,
    random_head,
    target_spec,
)

LENGTHS = (17, 9, 30)
DEPTHS = 4
VARIANTS = {
    "as trained": {},
    "queries only": {"sees_drafts": False},
    "other layers": {"kv_layers": (1, 0)},
    "conventions": {"concatenation": "feature-first", "input_state": "raw", "feedback": "pre-norm"},
    "narrow": {"hidden": 20},
    "draft vocabulary": {"ids": DRAFT_IDS},
}


def teacher_of(target):
    return Teacher(target, {**TINY, "vocab_size": target.spec.vocab_size}, name="tiny")


def packed(lengths=LENGTHS, seed=1):
    pieces = []
    for number, length in enumerate(lengths):
        tokens = [(seed * 7 + 13 * number + 5 * i * i) % 200 + 4 for i in range(length)]
        text = Text(f"t{number}", tokens, [True] * length, 2)
        pieces.append(Piece(text, text.name, text.name))
    return Packed(pieces)


def student_of(head, target):
    student = KVHead(head.spec, teacher_of(target), head.tensors.get("target_ids"))
    weights = {name: t for name, t in head.tensors.items() if name != "target_ids"}
    student.load_state_dict(weights)
    return student


def guesses(student, batch, depths=DEPTHS):
    """Per depth, logits of all rows."""
    taught = student._teacher.teach(batch, student.boundaries)
    return [
        student.logits(depth, states_ND)
        for depth, states_ND in enumerate(student.states(batch, taught, depths))
    ]


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_step_k_of_a_row_is_serving_at_depth_k(options):
    """Of pieces packed side by side, against the twin that serving is compared with."""
    target = tiny_decoder(3)
    head = random_head(target, **options)
    check_against_twin(target, head)


def test_so_it_is_over_a_target_with_normed_heads():
    target = tiny_decoder(3, model_type="qwen3", head_dim=8)
    check_against_twin(target, random_head(target))


@torch.no_grad()
def check_against_twin(target, head):
    batch, student = packed(), student_of(head, target)
    found = guesses(student, batch)
    ids_D = head.tensors.get("target_ids")
    for start, length in zip(batch.starts, batch.lengths, strict=True):
        tokens = batch.tokens_N[start : start + length].tolist()
        for row in (0, 3, length - DEPTHS - 2):
            twin = Twin(head, target, Prefilled(target, tokens[: row + 1]))
            wanted = twin.path(tokens[row + 1 : row + 1 + DEPTHS])
            for depth in range(DEPTHS):
                wanted_D = wanted[depth] if ids_D is None else wanted[depth][ids_D]
                off = (found[depth][start + row] - wanted_D).abs().max()
                assert off <= 1e-5 * wanted_D.abs().max(), (row, depth, float(off))


@torch.no_grad()
def test_no_row_knows_a_token_before_it_is_given():
    """Row t, step k: tokens behind t + 1 + k change nothing, and that one does."""
    target = tiny_decoder(3)
    student, batch = student_of(random_head(target), target), packed((12,))
    before = guesses(student, batch)
    batch.tokens_N[8] = 99
    after = guesses(student, batch)
    for depth in range(DEPTHS):
        is_same_N = [torch.equal(a, b) for a, b in zip(before[depth], after[depth], strict=True)]
        assert is_same_N[: 8 - depth - 1] == [True] * (7 - depth)
        assert not is_same_N[8 - depth - 1]


def test_a_copy_of_the_target_has_nothing_to_learn():
    """So step, row and law belong together: moved by one, the same head is far off."""
    target, head = copied_pair()
    student, batch = student_of(head, target), packed()
    objective = Objective(student._teacher, kl)
    taught = student._teacher.teach(batch, student.boundaries)
    assert objective(student, batch, taught).item() < 1e-4
    student.lead = 0
    assert objective(student, batch, taught).item() > 1.0


def test_only_the_head_learns_and_all_of_it():
    target = tiny_decoder(3)
    for options in ({}, {"sees_drafts": False, "hidden": 20}, {"ids": DRAFT_IDS}):
        student = student_of(random_head(target, **options), target)
        batch = packed()
        taught = student._teacher.teach(batch, student.boundaries)
        Objective(student._teacher, kl)(student, batch, taught).backward()
        for name, weight in student.named_parameters():
            assert weight.grad is not None, name
            assert float(weight.grad.abs().max()) > 0.0, name
        assert len(list(student.parameters())) == len(student.state_dict())


def test_one_text_is_learned_by_heart():
    """Loss falls, and what is drafted from the text is what the target says of it."""
    target = tiny_decoder(3)
    teacher = teacher_of(target)
    student = fresh(teacher, depths=3)
    batch = packed((40,))
    losses = learn(student, batch, num_steps=140)
    assert losses[-1] < 0.1 * losses[0]
    taught = teacher.teach(batch, student.boundaries)
    with torch.no_grad():
        law_NV = teacher.logits(taught.final_NH).log_softmax(-1)
        for depth, logits_NV in enumerate(guesses(student, batch, 3)):
            rows_R = batch.rows(student.lead, depth)
            log_q_RV = logits_NV[rows_R].log_softmax(-1)
            kept = overlap(law_NV[rows_R + 1 + depth], log_q_RV).mean()
            assert float(kept) > 0.95, (depth, float(kept))


def fresh(teacher, ids_D=None, **settings):
    asked = DraftTraining(kind="kv", target="tiny", data=("x",), out="x", **settings)
    return KVHead.fresh(teacher, asked, ids_D)


def learn(student, batch, num_steps):
    taught = student._teacher.teach(batch, student.boundaries)
    objective = Objective(student._teacher, kl)
    optimizer = torch.optim.Adam(student.parameters(), lr=4e-3)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = objective(student, batch, taught)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_new_head_reads_the_last_layers():
    teacher = teacher_of(tiny_decoder(3, num_hidden_layers=5))
    spec = fresh(teacher).spec
    assert spec.kv.kv_layers == (3, 4)
    assert spec.kv.sees_drafts
    assert spec.conventions.lm_head == "target"
    assert fresh(teacher, num_layers=1).spec.kv.kv_layers == (4,)
    with pytest.raises(ConfigError, match="num_layers=6"):
        new_spec(teacher, 6, None)


def test_its_layers_begin_as_copies():
    target = tiny_decoder(3)
    student = fresh(teacher_of(target))
    tensors = {
        f"model.layers.{layer}.{name}.weight": torch.full_like(weight, layer + 2.0)
        for layer in (0, 1)
        for name, weight in [
            ("self_attn.q_proj", student.layers[0].self_attn.q_proj.weight),
            ("mlp.up_proj", student.layers[0].mlp.up_proj.weight),
            ("post_attention_layernorm", student.layers[0].post_attention_layernorm.weight),
        ]
    }
    tensors["model.layers.0.self_attn.o_proj.weight"] = torch.zeros(3, 3)
    before = student.layers[0].self_attn.o_proj.weight.clone()
    student.copy_layers(tensors)
    for layer in (0, 1):
        assert bool((student.layers[layer].self_attn.q_proj.weight == layer + 2.0).all())
        assert bool((student.layers[layer].mlp.up_proj.weight == layer + 2.0).all())
    assert torch.equal(student.layers[0].self_attn.o_proj.weight, before), "of another shape"


def test_a_draft_vocabulary_begins_with_the_targets_rows():
    target = tiny_decoder(3)
    teacher, ids_D = teacher_of(target), torch.tensor(DRAFT_IDS)
    student = fresh(teacher, ids_D)
    assert student.spec.conventions.lm_head == "own"
    assert torch.allclose(student.lm_head.weight, teacher.head_weight(ids_D), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"ids": DRAFT_IDS}], ids=["all tokens", "some tokens"])
def test_what_was_trained_is_what_is_served(options, tmp_path):
    """Written, read back, and compared law by law."""
    target = tiny_decoder(3)
    student = student_of(random_head(target, **options), target)
    student.write(tmp_path / "head", "outrider", {"steps": 3}, torch.float32)
    head = load_head(tmp_path / "head", target_spec(target))
    assert head.spec == student.spec
    KVNetwork(head, target)
    check_against_twin(target, head)
    again = KVHead.load(tmp_path / "head", teacher_of(target))
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), student.state_dict().values(), strict=True)
    )


def test_windows_cannot_be_trained_over():
    target = tiny_decoder(3, model_type="mistral", sliding_window=6)
    spec = new_spec(teacher_of(target), 1, None)
    with pytest.raises(ConfigError, match="has a window"):
        KVHead(spec, teacher_of(target), None)
