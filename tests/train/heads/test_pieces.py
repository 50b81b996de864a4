"""Pieces: what is learned, what is held out, and batches that go on where they stopped."""

import pytest
import torch

from outrider.errors import ConfigError
from outrider.train.heads.pieces import Packed, PieceBatches, batches_of, cut, split
from outrider.train.heads.texts import Text
from tests.train.heads.conftest import piece, random_pieces

YES, NO = True, False


def texts(count, length=20):
    return [
        Text(f"t{i}", [(701 * i + j * j) % 9973 for j in range(length)], [YES] * length, 4)
        for i in range(count)
    ]


def test_long_texts_are_cut_and_repeated_ones_come_once():
    long = Text("long", list(range(50)), [YES] * 50, 10)
    pieces = cut([long, long], window=20)
    assert [len(p.text.tokens) for p in pieces] == [20, 20, 10]
    assert [p.unit for p in pieces] == ["long#0", "long#1", "long#2"]
    assert [t for p in pieces for t in p.text.tokens] == list(range(50))


def test_pieces_of_one_document_are_held_out_together():
    pieces = cut(texts(40, length=60), window=20)
    parts = split(pieces, share=0.2)
    held_out = {p.unit for p in parts.held_out}
    assert len(held_out) >= 4
    assert not held_out & {p.unit for p in parts.training}
    assert len(parts.held_out) == 3 * len(held_out)


def test_what_is_held_out_does_not_depend_on_other_documents():
    few, many = (split(cut(texts(n), 20), share=0.3) for n in (30, 60))
    kept = {p.unit for p in few.held_out}
    assert kept == {p.unit for p in many.held_out} & {f"t{i}" for i in range(30)}


def test_one_piece_cannot_be_split():
    with pytest.raises(ConfigError, match="1 pieces"):
        split(cut(texts(1), 20))


def test_rows_are_those_whose_guesses_are_all_learned():
    batch = Packed(
        [piece([5] * 6, learned=[NO, NO, YES, YES, YES, NO]), piece([6] * 4), piece([7] * 3)]
    )
    # Row t guesses token t + 2 at depth 0 and t + 3 at depth 1.
    assert batch.rows(1, 0).tolist() == [0, 1, 2, 6, 7, 10]
    assert batch.rows(1, 1).tolist() == [0, 1, 6]
    assert batch.rows(0, 0).tolist() == [1, 2, 3, 6, 7, 8, 10, 11]
    assert batch.run_N.tolist() == [0, 0, 3, 2, 1, 0, 4, 3, 2, 1, 3, 2, 1]


def test_positions_begin_anew_in_every_piece():
    batch = Packed(random_pieces(3, 2))
    assert batch.positions_N.tolist() == [0, 1, 2, 0, 1]
    assert (batch.start_N.tolist(), batch.end_N.tolist()) == ([0] * 3 + [3] * 2, [3] * 3 + [5] * 2)


def test_every_piece_comes_once_before_any_comes_again():
    pieces = random_pieces(*range(8, 20))
    batches = PieceBatches(pieces, tokens_per_step=40, seed=3)
    seen = []
    while batches.epochs < 1.0:
        batch = batches.next_batch()
        assert len(batch) <= 40
        seen += batch.units
    assert sorted(seen) == sorted(p.unit for p in pieces)


def test_batches_go_on_from_a_position():
    pieces = random_pieces(*range(8, 20))
    whole = PieceBatches(pieces, tokens_per_step=40, seed=3)
    for _ in range(9):
        whole.next_batch()
    parts = PieceBatches(pieces[::-1], tokens_per_step=40, seed=3)  # their order does not matter
    parts.load_state_dict(whole.state_dict())
    for _ in range(9):
        assert torch.equal(whole.next_batch().tokens_N, parts.next_batch().tokens_N)


@pytest.mark.parametrize("changed", [{"seed": 4}, {"tokens_per_step": 41}, {"data": 1}])
def test_a_position_in_other_data_is_refused(changed):
    pieces = random_pieces(*range(8, 20))
    state = PieceBatches(pieces, tokens_per_step=40, seed=3).state_dict()
    given = {"seed": 3, "tokens_per_step": 40, **changed}
    others = PieceBatches(pieces[given.pop("data", 0) :], **given)
    with pytest.raises(ConfigError, match="resume with the data"):
        others.load_state_dict(state)


def test_portions_hold_what_fits_but_at_least_one():
    pieces = random_pieces(10, 30, 5, 5, 5)
    assert [len(p) for p in batches_of(pieces, 15)] == [1, 1, 3]
