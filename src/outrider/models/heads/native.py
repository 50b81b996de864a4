"""Heads that lie among their target's own tensors."""

from collections.abc import Iterable

from outrider.models.heads.mtp import module_names

MEDUSA = "medusa_head."


def native_names(names: Iterable[str]) -> set[str]:
    """Names in a target's files that are none of the target's layers but of heads on it."""
    names = list(names)
    return {name for name in names if name.startswith(MEDUSA)} | module_names(names)
