"""Lookahead: the pass that verifies guesses further tokens too, many at once; no model drafts.

Fu et al. 2024 (lookahead decoding). A window of W columns holds N-1 rows of
guesses: row 0 a chain of any tokens, each row below what the target said after the row above. When
a pass has run the newest row, what the target says there ends one n-gram per column, which enters
a pool under the token it began with; the oldest row then leaves. Window and the pool's n-grams of
the root are one draft tree, drawn here for W = 3, N = 4:

    root -+- pool n-grams of the root, as a trie
          |
          +- a0 --- a1 --- a2      row 0
             |      |      |
             b0     b1     b2      row 1
             |      |      |
             c0     c1     c2      row 2, the newest; what follows c1 makes the n-gram a1: b1 c1 ..

Nodes of the window may be accepted like any others. The n-grams stand first: of equal siblings the
first is followed. A step moves the window by one token however many were accepted: as in the
authors' code, its columns stay, and stand for later positions than those they were begun for.
"""

from collections.abc import Mapping, Sequence as Items
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from outrider.draft.base import Snapshot, Warmth
from outrider.draft.ngram import merge
from outrider.errors import RequestError
from outrider.request import Option, Speculation
from outrider.sampling.rng import RootStream
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, Commit, DraftTree, Plan, Row, RowPlan, TargetOutput

Pool: TypeAlias = dict[int, list[tuple[int, ...]]]

USUAL = {"window": 7, "ngram": 5, "guesses": 7}


@dataclass(eq=False)
class LookaheadState:
    """Window and pool of one sequence.

    Attributes:
        num_columns, num_rows: of the whole window. While rows are being filled it has more columns,
            and loses the first with each row: the text moves on meanwhile.
        num_guesses: n-grams kept per first token.
        columns: per column its tokens from row 0 down; those that a small tree left out lag behind.
        pool: first token -> the `num_rows` tokens after it, most recent n-gram first.
        tree: what was drafted last; `tips` are the newest nodes of the columns in it.
    """

    num_columns: int
    num_rows: int
    num_guesses: int
    columns: list[list[int]] = field(default_factory=list)
    pool: Pool = field(default_factory=dict)
    tree: DraftTree = EMPTY_TREE
    tips: list[int] = field(default_factory=list)

    def begin(self, seq: Sequence) -> None:
        """Row 0 of tokens drawn from the prompt, the same whenever it begins at this position."""
        prompt = seq.tokens[: seq.num_prompt]
        law_P = torch.full((len(prompt),), 1 / len(prompt), dtype=torch.float64)
        stream = RootStream(seq.seed, len(seq.tokens) - 1, "draft")
        count = self.num_columns + self.num_rows - 1
        self.columns = [[prompt[stream.pick(law_P)]] for _ in range(count)]

    def learn(self, said: list[int]) -> None:
        """Takes what the target said after the newest row of the first columns."""
        for column, token in zip(self.columns, said, strict=False):
            if token < 0:
                continue  # the logits were no numbers
            if len(column) == self.num_rows:
                self._keep(column[0], (*column[1:], token))
                del column[0]
            column.append(token)
        if said and len(self.columns) > self.num_columns:
            del self.columns[0]

    def fitting(self, plan: RowPlan) -> list[list[int]]:
        """The leading columns that a plan leaves room for."""
        num_nodes = 0
        for j, column in enumerate(self.columns):
            num_nodes += len(column)
            if num_nodes > plan.num_nodes or j + len(column) > plan.depth:
                return self.columns[:j]
        return self.columns

    def guesses(self, root: int, depth: int, width: int) -> list[tuple[int, ...]]:
        """What followed `root` in the pool: at most `width` different first tokens."""
        found: list[tuple[int, ...]] = []
        begun: set[int] = set()
        for ngram in self.pool.get(root, ()):
            if ngram[0] in begun or len(begun) < width:
                begun.add(ngram[0])
                found.append(ngram[:depth])
        return found

    def _keep(self, first: int, ngram: tuple[int, ...]) -> None:
        known = self.pool.setdefault(first, [])
        if ngram in known:
            known.remove(ngram)
        known.insert(0, ngram)
        del known[self.num_guesses :]


class LookaheadDrafter:
    """Trees of window and n-grams; of the target's pass it reads the argmax of each row.

    Where a plan has no room for the whole tree, n-grams go first, then columns from the right; a
    window that could never be run whole is begun smaller.
    """

    name = "lookahead"
    needs: tuple[str, ...] = ("logits",)
    warmth = Warmth.R0
    default_draft_tokens = 10  # window + ngram - 2, the longest path
    min_width = 2
    default_width = max_width = 33
    default_num_nodes: int | None = 56  # (window + guesses) * (ngram - 1)
    sample_methods: tuple[str, ...] = ("greedy",)
    options: Mapping[str, Option] = {
        "window": Option(0, "columns; 0: 7, or as many as K and num_nodes leave room for", 0, 32),
        "ngram": Option(0, "n-gram length; 0: 5, or as long as there is room for", 0, 9),
        "guesses": Option(7, "n-grams kept and drafted per first token", low=1, high=32),
    }

    def check(self, spec: Speculation) -> None:
        """A window that was asked for must fit; the usual one begins smaller where it does not."""
        window, ngram = _setting(spec, "window"), _setting(spec, "ngram")
        if not (spec.options.get("window") or spec.options.get("ngram")):
            return
        if ngram == 1:
            raise RequestError("ngram=1: one token is no n-gram to verify; use 2 to 9")
        for name, least in (
            ("num_draft_tokens", window + ngram - 2),
            ("num_nodes", window * (ngram - 1)),
        ):
            if getattr(spec, name) < least:
                raise RequestError(
                    f"{name}={getattr(spec, name)}: a window of {window} with n-grams of {ngram} "
                    f"needs {name}={least} or more"
                )

    def open(self, seq: Sequence) -> None:
        spec = seq.speculation
        longest, most = max(spec.num_draft_tokens, 1), max(spec.num_nodes, 1)
        num_rows = min(_setting(spec, "ngram") - 1, longest, most)
        window = _setting(spec, "window")
        seq.drafter_state[self.name] = LookaheadState(
            num_columns=min(window, longest - num_rows + 1, most // num_rows),
            num_rows=num_rows,
            num_guesses=_setting(spec, "guesses"),
        )

    def draft(self, rows: Items[Row], plan: Plan) -> list[DraftTree]:
        return [self._tree(row.seq, part) for row, part in zip(rows, plan, strict=True)]

    def _tree(self, seq: Sequence, plan: RowPlan) -> DraftTree:
        state: LookaheadState = seq.drafter_state[self.name]
        if not state.columns:
            state.begin(seq)
        columns = state.fitting(plan)
        width = plan.width - bool(columns)
        guesses = state.guesses(seq.tokens[-1], plan.depth, width)
        room = plan.num_nodes - sum(len(column) for column in columns)
        trie = merge([list(ngram) for ngram in guesses], room, self.name)
        state.tree, state.tips = with_window(trie, columns)
        return state.tree

    def observe(self, commits: Items[Commit], output: TargetOutput) -> None:
        """Moves the windows whose own tree was run; another drafter's tree tells nothing here."""
        for commit, first in zip(commits, output.first, strict=True):
            state = commit.seq.drafter_state.get(self.name)
            if isinstance(state, LookaheadState) and first >= 0 and commit.tree is state.tree:
                state.learn([output.argmax_N[first + 1 + tip] for tip in state.tips])

    def close(self, seq: Sequence) -> None:
        seq.drafter_state.pop(self.name, None)

    def snapshot(self, seq: Sequence) -> Snapshot | None:
        """The pool; a window is begun anew."""
        state: LookaheadState | None = seq.drafter_state.get(self.name)
        if state is None or not state.pool:
            return None
        pool = {first: list(ngrams) for first, ngrams in state.pool.items()}
        return Snapshot(drafter=self.name, num_tokens=len(seq.tokens), state=pool)

    def restore(self, seq: Sequence, snapshot: Snapshot) -> int:
        self.open(seq)
        pool = {first: list(ngrams) for first, ngrams in snapshot.state.items()}
        seq.drafter_state[self.name].pool = pool
        return len(seq.tokens)


def _setting(spec: Speculation, name: str) -> int:
    """As asked for, else the usual; as a part of another drafter the usual too."""
    return int(spec.options.get(name) or USUAL[name])


def with_window(trie: DraftTree, columns: list[list[int]]) -> tuple[DraftTree, list[int]]:
    """The tree with the window beside the trie, and the last node of each column."""
    tokens, parents = list(trie.tokens), list(trie.parents)
    above, tips = -1, []  # above: the node of row 0 in the column before
    for column in columns:
        top = len(tokens)
        tokens += column
        parents += [above, *range(top, top + len(column) - 1)]
        above = top
        tips.append(len(tokens) - 1)
    tree = DraftTree(tokens=tuple(tokens), parents=tuple(parents), source=trie.source)
    return tree, tips
