"""The draft vocabulary: which token of the target each row of a head's logits stands for.

Shape legend: V vocabulary of the target, D of the head.
"""

import torch
from torch import Tensor

from outrider.errors import ModelError

WHOLE_DTYPES = (torch.int64, torch.int32)


def target_ids(
    d2t_D: Tensor | None, t2d_V: Tensor | None, *, num_draft: int, num_target: int, kind: str
) -> Tensor | None:
    """Token of the target for each draft id, ascending int64; None where they are the same.

    Args:
        d2t_D: offsets (target id - draft id) as everybody writes them, or ids if `kind` says so.
        t2d_V: which tokens of the target are in the draft vocabulary.
        kind: "offset" or "absolute".

    Raises:
        ModelError: the maps have other sizes or kinds than the vocabularies, leave the target's,
            name a token twice, are out of order, or contradict each other.
    """
    if t2d_V is not None:
        _check_marks(t2d_V, num_draft, num_target)
    if d2t_D is None:
        ids_D = None if t2d_V is None else t2d_V.nonzero().flatten()
    else:
        ids_D = _read(d2t_D, t2d_V, num_draft, num_target, kind)
    if ids_D is None:
        if num_draft != num_target:
            raise ModelError(
                f"the head has {num_draft} draft tokens of {num_target}, but neither d2t nor t2d "
                "to say which: its weights are incomplete, download it again"
            )
        return None
    return None if num_draft == num_target else ids_D


def take_map(
    tensors: dict[str, Tensor], *, num_draft: int, num_target: int, kind: str
) -> Tensor | None:
    """Replaces d2t and t2d among a head's tensors by `target_ids`, and returns them."""
    ids_D = target_ids(
        tensors.pop("d2t", None),
        tensors.pop("t2d", None),
        num_draft=num_draft,
        num_target=num_target,
        kind=kind,
    )
    if ids_D is not None:
        tensors["target_ids"] = ids_D
    return ids_D


def check_token_map(ids_D: Tensor, *, num_draft: int, num_target: int) -> Tensor:
    """A list of token ids in any order, as int64. ModelError if it is no such list."""
    _check_whole("token_map", ids_D, num_draft)
    ids_D = ids_D.long()
    fault = _range_fault(ids_D, num_target)
    if not fault and ids_D.unique().numel() != num_draft:
        fault = "names a token twice"
    if fault:
        raise ModelError(f"token_map {fault}: it belongs to another head or is corrupt")
    return ids_D


def _read(
    d2t_D: Tensor, t2d_V: Tensor | None, num_draft: int, num_target: int, kind: str
) -> Tensor:
    _check_whole("d2t", d2t_D, num_draft)
    readings = {"offset": torch.arange(num_draft) + d2t_D.long(), "absolute": d2t_D.long()}
    faults = {name: _fault(ids_D, t2d_V, num_target) for name, ids_D in readings.items()}
    if faults[kind] is None:
        return readings[kind]
    other = "absolute" if kind == "offset" else "offset"
    remedy = "the maps belong to another head or are corrupt"
    if faults[other] is None:
        remedy = (
            f"read as {other} it is valid, so the file was written that way: "
            f'pin "vocabulary_map": "{other}" in outrider.json'
        )
    raise ModelError(f"d2t, read as {kind}, {faults[kind]}: {remedy}")


def _fault(ids_D: Tensor, t2d_V: Tensor | None, num_target: int) -> str | None:
    """What is wrong with ascending token ids, or None."""
    outside = _range_fault(ids_D, num_target)
    if outside:
        return outside
    steps = ids_D.diff()
    if (steps == 0).any():
        draft = int((steps == 0).nonzero()[0])
        return f"maps draft tokens {draft} and {draft + 1} both to {int(ids_D[draft])}"
    if (steps < 0).any():
        draft = int((steps < 0).nonzero()[0])
        return f"does not ascend: draft token {draft + 1} is {int(ids_D[draft + 1])}"
    if t2d_V is not None and not torch.equal(ids_D, t2d_V.nonzero().flatten()):
        ours, theirs = ids_D, t2d_V.nonzero().flatten()
        draft = int((ours != theirs).nonzero()[0])
        return f"says draft token {draft} is {int(ours[draft])}, t2d says {int(theirs[draft])}"
    return None


def _range_fault(ids_D: Tensor, num_target: int) -> str | None:
    outside = (ids_D < 0) | (ids_D >= num_target)
    if not outside.any():
        return None
    draft = int(outside.nonzero()[0])
    return (
        f"maps draft token {draft} to {int(ids_D[draft])}, outside the {num_target} of the target"
    )


def _check_whole(name: str, values_D: Tensor, num_draft: int) -> None:
    if values_D.dtype not in WHOLE_DTYPES or tuple(values_D.shape) != (num_draft,):
        raise ModelError(
            f"{name} is {values_D.dtype} {list(values_D.shape)}, expected whole numbers "
            f"[{num_draft}]: one per row of the draft lm_head"
        )


def _check_marks(t2d_V: Tensor, num_draft: int, num_target: int) -> None:
    if t2d_V.dtype != torch.bool or tuple(t2d_V.shape) != (num_target,):
        raise ModelError(
            f"t2d is {t2d_V.dtype} {list(t2d_V.shape)}, expected bool [{num_target}]: one per "
            "token of the target"
        )
    if int(t2d_V.sum()) != num_draft:
        raise ModelError(
            f"t2d marks {int(t2d_V.sum())} tokens, the head has {num_draft} draft tokens: "
            "the maps belong to another head"
        )
