"""Drafters that tests register as a plug-in would: trees of junk with some true guesses in them."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from outrider.registry import DRAFTERS
from outrider.sequence import Sequence
from outrider.step import DraftTree, RowPlan
from outrider.testing import ScriptedDrafter, junk_tree

JUNK_TREE = "junk_tree"
VOCAB = 4096


class JunkTree(ScriptedDrafter):
    """Random trees over the demo's vocabulary.

    Attributes:
        truths: prompts with their outputs; a sequence that begins like one is guessed right in
            some nodes.
    """

    def __init__(self) -> None:
        super().__init__(self._grow, name=JUNK_TREE)
        self.truths: list[list[int]] = []

    def _grow(self, seq: Sequence, plan: RowPlan) -> DraftTree:
        known = (truth for truth in self.truths if truth[: len(seq.tokens)] == seq.tokens)
        return junk_tree(VOCAB, next(known, ()), seed=len(seq.tokens))(seq, plan)


@contextmanager
def registered() -> Iterator[None]:
    """Engines loaded meanwhile have the junk tree."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DRAFTERS._builtins, JUNK_TREE, f"{__name__}:{JunkTree.__name__}")
        yield
