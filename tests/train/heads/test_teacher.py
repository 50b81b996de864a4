"""The teacher says of packed text what the target says of each piece alone."""

import pytest
import torch

from outrider.errors import ConfigError
from outrider.train.heads import teacher as teacher_module
from outrider.train.heads.pieces import Packed
from outrider.train.heads.teacher import Teacher
from tests.train.heads.conftest import VALUES, law, random_pieces


def test_pieces_do_not_see_each_other(teacher):
    pieces = random_pieces(5, 17, 40)
    taught = teacher.teach(Packed(pieces), (0, 2))
    alone = torch.cat([law(teacher, piece.text.tokens) for piece in pieces])
    assert torch.allclose(teacher.logits(taught.final_NH), alone, atol=1e-5)
    assert torch.equal(taught.tapped[0], teacher.embed(Packed(pieces).tokens_N))


def test_kv_lies_where_it_says(teacher):
    """A second piece's KV is that of the same piece alone."""
    first, second = random_pieces(5, 9)
    both = teacher.teach(Packed([first, second]), ())
    kept = both.kv[1].keys[both.slots_N[5:]].clone()
    alone = teacher.teach(Packed([second]), ())
    assert torch.allclose(kept, alone.kv[1].keys[alone.slots_N], atol=1e-6)


def test_laws_on_some_tokens(teacher, monkeypatch):
    monkeypatch.setattr(teacher_module, "HEAD_ROWS", 4)
    taught = teacher.teach(Packed(random_pieces(11)), ())
    whole = teacher.logits(taught.final_NH)
    ids = torch.tensor([3, 8, 200])
    some, likeliest = teacher.laws_on(taught.final_NH, ids)
    assert torch.allclose(some, whole[:, ids], atol=1e-6)
    assert torch.equal(likeliest, whole.argmax(-1))


def test_weights_are_recovered_by_asking(teacher):
    states = torch.randn(3, 32)
    assert torch.allclose(states @ teacher.head_weight().T, teacher.logits(states), atol=1e-5)
    normed = states / states.square().mean(-1, keepdim=True).add(1e-5).sqrt()
    shown = teacher.shown.final_norm(states)
    assert torch.allclose(normed * teacher.final_gain(), shown, atol=1e-4)


def test_a_network_without_states_is_refused(teacher):
    class Closed:
        spec = teacher.spec
        ops = teacher.network.ops

        def forward(self, *args):
            raise NotImplementedError

    with pytest.raises(ConfigError, match="hands out no hidden states"):
        Teacher(Closed(), VALUES, name="closed")
