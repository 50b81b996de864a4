"""Watch: follows a drafter through all that an engine asks of it, and judges the answers.

Shape legend: V vocabulary.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence as Items, Set
from typing import Any, NamedTuple

from torch import Tensor

from outrider.draft.base import Drafter, Snapshot
from outrider.sequence import Sequence
from outrider.step import DraftTree, Plan, Row, RowPlan


class Drafted(NamedTuple):
    """One tree, and what it was drafted for: the log was so long, and the plan was this."""

    seq_id: str
    num_tokens: int
    plan: RowPlan
    tree: DraftTree


class Watch:
    """Judges every call that an engine makes of one drafter, and what the drafter answers.

    AssertionError, at once, for a tree that breaks the plan, and for calls out of turn (a drafter
    that composes others leaves opening and closing to the engine); from `check_released` for what
    is still held when all is over. What the drafter calls of itself is its own affair.

    Attributes:
        drafted: all trees so far, empty ones left out.
    """

    def __init__(self, drafter: Drafter, vocab_size: int, sources: Items[str]) -> None:
        self.drafter = drafter
        self.drafted: list[Drafted] = []
        self._vocab_size = vocab_size
        self._sources = sources
        self._open: set[str] = set()
        self._seen: dict[str, weakref.ref[Sequence]] = {}
        self._is_inside = False
        for name in ("open", "draft", "close", "restore"):
            self._put_between(name, getattr(self, f"_{name}_call"))

    def check_released(self) -> None:
        """After the last request, when nobody else holds its sequences and garbage is collected."""
        name, held = self.drafter.name, vars(self.drafter)
        assert not self._open, f"{name}: open for {sorted(self._open)} after the last request"
        used = getattr(held.get("manager"), "num_used", 0)
        assert not used, f"{name}: {used} KV blocks are still held after the last close"
        for attribute, value in held.items():
            kept = sorted(self._seen.keys() & _keys(value))
            assert not kept, f"{name}.{attribute} still knows {kept} after their close"
        alive = sorted(seq_id for seq_id, seq in self._seen.items() if seq() is not None)
        assert not alive, f"{name} still refers to {alive} after their close"

    def _put_between(self, name: str, judged: Callable[..., Any]) -> None:
        call = getattr(self.drafter, name)

        def watched(*args: Any) -> Any:
            if self._is_inside:
                return call(*args)
            self._is_inside = True
            try:
                return judged(call, *args)
            finally:
                self._is_inside = False

        setattr(self.drafter, name, watched)

    def _open_call(self, call: Callable[[Sequence], None], seq: Sequence) -> None:
        assert seq.id not in self._open, f"{self.drafter.name}: {seq.id} is opened twice"
        self._open.add(seq.id)
        self._seen[seq.id] = weakref.ref(seq)
        call(seq)

    def _close_call(self, call: Callable[[Sequence], None], seq: Sequence) -> None:
        name = self.drafter.name
        assert seq.id in self._open, f"{name}: {seq.id} is closed, but not open"
        call(seq)
        self._open.remove(seq.id)
        assert name not in seq.drafter_state, f"{name}: its state of {seq.id} outlives the close"

    def _restore_call(
        self, call: Callable[[Sequence, Snapshot], int], seq: Sequence, snapshot: Snapshot
    ) -> int:
        name = self.drafter.name
        assert seq.id in self._open, f"{name}: {seq.id} is restored, but not open"
        ready = call(seq, snapshot)
        told = f"{name} is ready for {ready!r} of {len(seq.tokens)} tokens after a restore"
        assert isinstance(ready, int), told
        assert 0 <= ready <= len(seq.tokens), told
        return ready

    def _draft_call(
        self,
        call: Callable[[Items[Row], Plan], list[DraftTree]],
        rows: Items[Row],
        plan: Plan,
    ) -> list[DraftTree]:
        name, before = self.drafter.name, [list(row.seq.tokens) for row in rows]
        assert self._open >= {row.seq.id for row in rows}, f"{name}: drafts for what is not open"
        trees = call(rows, plan)
        assert len(trees) == len(rows), f"{name}: {len(trees)} trees for {len(rows)} rows"
        assert before == [row.seq.tokens for row in rows], f"{name} wrote into the token log"
        for row, part, tree in zip(rows, plan, trees, strict=True):
            if tree.tokens:
                self._check_tree(tree, part)
                self.drafted.append(Drafted(row.seq.id, len(row.seq.tokens), part, tree))
        return trees

    def _check_tree(self, tree: DraftTree, plan: RowPlan) -> None:
        name = self.drafter.name
        tree.check()
        assert len(tree) <= plan.num_nodes, f"{name} drafted more than was planned"
        depth = max(tree.depth(node) for node in range(len(tree)))
        assert depth <= plan.depth, f"{name} drafted {depth} deep; planned were {plan.depth}"
        width = len(tree.children(-1))
        assert width <= plan.width, f"{name} drafted {width} wide; planned were {plan.width}"
        outside = [token for token in tree.tokens if not 0 <= token < self._vocab_size]
        assert not outside, f"{name}: {outside} are outside the vocabulary of {self._vocab_size}"
        told = f"{name}: source={tree.source!r} is no drafter here"
        assert tree.source in self._sources, told
        for node, token in enumerate(tree.tokens):
            self._check_law(tree.law(node), token)
        self._check_paths(tree)

    def _check_law(self, q_V: Tensor | None, token: int) -> None:
        if q_V is None:
            return
        name = self.drafter.name
        told = f"{name}: a law over {list(q_V.shape)}, not over {self._vocab_size} tokens"
        assert q_V.shape == (self._vocab_size,), told
        is_law = bool((q_V >= 0).all()) and abs(float(q_V.double().sum()) - 1.0) < 1e-3
        assert is_law, f"{name}: what is recorded for token {token} is no law"
        told = f"{name}: token {token} has probability 0 in the law recorded with it"
        assert float(q_V[token]) > 0.0, told

    def _check_paths(self, tree: DraftTree) -> None:
        if not tree.paths:
            return
        name = self.drafter.name
        for path in tree.paths:
            assert path == tree.path(path[-1]), f"{name}: {path} is no path down from the root"
        lengths = {len(path) for path in tree.paths}
        assert len(lengths) == 1, f"{name}: independent chains of unequal lengths {sorted(lengths)}"
        told = f"{name}: there are nodes that no chain passes"
        assert {node for path in tree.paths for node in path} == set(range(len(tree))), told


def _keys(value: object) -> set[str]:
    """Names that a mapping or a set holds; lists may be notes of what has been."""
    return {key for key in value if isinstance(key, str)} if isinstance(value, _NAMED) else set()


_NAMED = (Mapping, Set)
