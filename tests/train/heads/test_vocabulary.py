"""The draft vocabulary holds the most frequent learned tokens, rising, and the special ones."""

import pytest
import torch

from outrider.errors import ConfigError
from outrider.train.heads.vocabulary import draft_vocabulary
from tests.train.heads.conftest import piece

PIECES = [
    piece([9, 9, 9, 4, 4, 7, 5, 5], learned=[True] * 6 + [False] * 2),
    piece([5, 7, 7, 7, 7, 2], learned=[False, True, False, False, False, True]),
]
# Learned: 9 three times, 4 and 7 twice, 2 once, 5 never.


def ids(size, **options):
    found = draft_vocabulary(PIECES, size=size, num_target=12, **options)
    return None if found is None else found.tolist()


def test_the_most_frequent_of_the_learned_tokens_in_rising_order():
    assert [ids(size) for size in (1, 2, 3, 4)] == [[9], [4, 9], [4, 7, 9], [2, 4, 7, 9]]


def test_tokens_that_never_came_fill_up_by_the_lower_id():
    assert ids(6) == [0, 1, 2, 4, 7, 9]


def test_special_tokens_are_always_there():
    assert ids(3, always={11, 0, 99}) == [0, 9, 11]


def test_special_tokens_need_room():
    with pytest.raises(ConfigError, match="2 special tokens"):
        ids(1, always=(0, 11))


def test_the_whole_vocabulary_has_no_map():
    assert ids(12) is None
    assert ids(20) is None
    assert draft_vocabulary(PIECES, size=11, num_target=12).dtype == torch.long
