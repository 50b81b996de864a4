"""Vocabulary maps: ranges, duplicates, order, sizes, and whether they are offsets or ids."""

from typing import Any

import pytest
import torch

from outrider.errors import ModelError
from outrider.models.heads.vocabulary import target_ids
from tests.models.heads.layouts import DRAFT_IDS, VD, V, maps

MAPS = maps()


def read(**changes: Any) -> Any:
    arguments = {"num_draft": VD, "num_target": V, "kind": "offset", **MAPS, **changes}
    return target_ids(arguments.pop("d2t"), arguments.pop("t2d"), **arguments)


def test_offsets_become_ids() -> None:
    assert read().tolist() == list(DRAFT_IDS)
    assert read(t2d=None).tolist() == list(DRAFT_IDS)
    assert read(d2t=None).tolist() == list(DRAFT_IDS)
    assert read(d2t=MAPS["d2t"].int()).dtype is torch.int64


def test_a_vocabulary_of_the_targets_own_size_needs_no_map() -> None:
    whole = maps(tuple(range(V)))
    assert read(**whole, num_draft=V) is None
    assert read(d2t=None, t2d=None, num_draft=V) is None


def other(values: list[int]) -> torch.Tensor:
    """Offsets that say these ids."""
    return torch.tensor(values) - torch.arange(VD)


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"d2t": other([*DRAFT_IDS[:-1], 40])},
        "maps draft token 9 to 40, outside the 40 of the target",
    ),
    (
        {"d2t": other([-1, *DRAFT_IDS[1:]])},
        "maps draft token 0 to -1, outside the 40 of the target",
    ),
    ({"d2t": other([2, *DRAFT_IDS[1:]])}, "maps draft tokens 0 and 1 both to 2"),
    ({"d2t": other([3, *DRAFT_IDS[1:]])}, "does not ascend: draft token 1 is 2"),
    ({"d2t": other([0, *DRAFT_IDS[1:]])}, "says draft token 0 is 0, t2d says 1: the maps belong"),
    ({"d2t": torch.tensor(DRAFT_IDS)}, 'read as absolute it is valid.*"vocabulary_map": "abso'),
    ({"kind": "absolute"}, "d2t, read as absolute, .*read as offset it is valid"),
    ({"d2t": MAPS["d2t"][:-1]}, r"d2t is torch.int64 \[9\], expected whole numbers \[10\]"),
    ({"d2t": MAPS["d2t"].float()}, r"d2t is torch.float32"),
    ({"t2d": MAPS["t2d"][:-1]}, r"t2d is torch.bool \[39\], expected bool \[40\]"),
    ({"t2d": MAPS["t2d"].long()}, r"t2d is torch.int64"),
    ({"t2d": torch.ones(V, dtype=torch.bool)}, "t2d marks 40 tokens, the head has 10"),
    ({"d2t": None, "t2d": None}, "10 draft tokens of 40, but neither d2t nor t2d"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_every_fault_has_its_own_message(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read(**changes)


def test_without_marks_a_list_of_ids_is_told_where_offsets_would_leave_the_target() -> None:
    with pytest.raises(ModelError, match="read as absolute it is valid"):
        read(d2t=torch.tensor(DRAFT_IDS), t2d=None)
    # Small ids are valid offsets too: only a measurement can tell.
    assert read(d2t=torch.arange(VD), t2d=None).tolist() == list(range(0, 2 * VD, 2))
