"""Losses by hand, and the alignment of labels, by heads whose laws are known beforehand."""

import math

import pytest
import torch

from outrider.errors import ConfigError
from outrider.train.heads import objective as objective_module
from outrider.train.heads.losses import LOSSES, find_loss, kl, overlap, tv
from outrider.train.heads.medusa import Medusa
from outrider.train.heads.objective import DEPTH_WEIGHT, Objective
from outrider.train.heads.pieces import Packed
from tests.train.heads.conftest import law, piece, random_pieces, settings

P, Q = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.2, 0.2, 0.6]]).log()
OVERLAP = 0.2 + 0.2 + 0.2
KL = 0.5 * math.log(2.5) + 0.3 * math.log(1.5) + 0.2 * math.log(1 / 3)
SHARE = math.exp(-3 * OVERLAP)
BY_HAND = {
    "kl": KL,
    "ce": -math.log(0.2),
    "tv": 1 - OVERLAP,
    "nla": -math.log(OVERLAP),
    "lk_hybrid": SHARE * KL + (1 - SHARE) * (1 - OVERLAP),
}


def test_every_loss_has_a_value_by_hand():
    assert BY_HAND.keys() == LOSSES.keys()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_by_hand(name):
    loss = find_loss(name)
    assert float(loss(P, Q)) == pytest.approx(BY_HAND[name], abs=1e-6)
    least = 0.0 if name != "ce" else -math.log(0.5)
    assert float(loss(P, P)) == pytest.approx(least, abs=1e-6)


def test_nla_has_the_gradient_of_tv_over_acceptance():
    logits = torch.tensor([[0.1, -0.4, 1.2]], requires_grad=True)
    gradients = [
        torch.autograd.grad(LOSSES[name](P, logits.log_softmax(-1)).sum(), logits)[0]
        for name in ("nla", "tv")
    ]
    kept = float(overlap(P, logits.log_softmax(-1)).detach())
    assert torch.allclose(gradients[0], gradients[1] / kept, atol=1e-6)


def test_the_share_of_the_hybrid_is_no_part_of_its_gradient():
    logits = torch.tensor([[0.1, -0.4, 1.2]], requires_grad=True)
    log_q = logits.log_softmax(-1)
    share = float((-3 * overlap(P, log_q)).exp().detach())
    mixed = share * kl(P, log_q) + (1 - share) * tv(P, log_q)
    ours = torch.autograd.grad(LOSSES["lk_hybrid"](P, log_q).sum(), logits, retain_graph=True)[0]
    assert torch.allclose(ours, torch.autograd.grad(mixed.sum(), logits)[0], atol=1e-6)


def test_an_unknown_loss_is_told():
    with pytest.raises(ConfigError, match="did you mean 'kl'"):
        find_loss("kll")


def losses_by_hand(teacher, pieces, depth, loss, ids=None, learned=None):
    """Of an untrained Medusa, which says at row t what the target says at t: text by text."""
    values = []
    for number, one in enumerate(pieces):
        log_p = law(teacher, one.text.tokens)
        marks = one.text.is_learned if learned is None else learned[number]
        likeliest = log_p.argmax(-1)
        narrowed = log_p if ids is None else log_p[:, ids]
        laws = narrowed.log_softmax(-1)
        for row in range(len(laws) - 2 - depth):
            is_learned = all(marks[row + 2 : row + 3 + depth])
            is_known = ids is None or int(likeliest[row + 1 + depth]) in ids.tolist()
            if is_learned and is_known:
                values.append(float(loss(laws[row + 1 + depth, None], laws[row, None])))
    return values


MASK = [False] * 4 + [True] * 5 + [False] * 2 + [True] * 4


@pytest.mark.parametrize("ids", [None, torch.arange(0, 256, 2)], ids=["all", "half"])
@pytest.mark.parametrize("chunked", [False, True])
def test_labels_lie_where_serving_verifies(teacher, monkeypatch, ids, chunked):
    """The objective is the mean, by depth, of what is computed text by text from the definition.

    A label shifted by one, or a mask, gives another value.
    """
    if chunked:
        monkeypatch.setattr(objective_module, "HELD_VALUES", 0)
        monkeypatch.setattr(objective_module, "LOSS_ROWS", 4)
    first, second = random_pieces(15, 9)
    pieces = [piece(first.text.tokens, learned=MASK), second]
    student = Medusa.fresh(teacher, settings("medusa", depths=3), ids)
    batch = Packed(pieces)
    taught = teacher.teach(batch, student.boundaries)
    value = float(Objective(teacher, kl)(student, batch, taught).detach())
    expected = 0.0
    for depth in range(3):
        values = losses_by_hand(teacher, pieces, depth, kl, ids)
        expected += DEPTH_WEIGHT**depth * sum(values) / len(values)
    assert value == pytest.approx(expected, rel=1e-4)
    for lead in (0, 2):
        monkeypatch.setattr(Medusa, "lead", lead)
        shifted = float(Objective(teacher, kl)(student, batch, taught).detach())
        assert shifted != pytest.approx(expected, rel=1e-3)


def test_a_batch_without_anything_to_learn_costs_nothing(teacher):
    student = Medusa.fresh(teacher, settings("medusa"), None)
    batch = Packed([piece([5, 6, 7, 8], learned=[False] * 4)])
    taught = teacher.teach(batch, student.boundaries)
    assert float(Objective(teacher, kl)(student, batch, taught)) == 0.0
