"""Prediction: the client says what the answer will resemble; what comes next there is drafted.

Known from predicted outputs of hosted models, and made for edits of a text: most of it is copied.
The drafter keeps a place in the prediction and finds it again after replaced, added and left-out
tokens, and where a text is split into tokens otherwise than at the start of an answer.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence as Items
from dataclasses import dataclass, field

from outrider.draft.base import Snapshot, Warmth
from outrider.draft.ngram import merge
from outrider.request import Option
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, Commit, DraftTree, Plan, Row, RowPlan, TargetOutput

TRUSTED_MATCH = 8  # tokens in a row that no coincidence brings about
REACH = 4  # tokens drafted for each that matched, before a place is trusted
DEFAULT_MIN_MATCH = 2
MAX_MATCH = 32  # longer matches count as equal
NUM_NEAREST = 32  # occurrences looked at on either side of where the answer left the prediction
Index = dict[tuple[int, ...], list[int]]


@dataclass(eq=False)
class PredictionState:
    """Where one answer is in its prediction.

    Attributes:
        num_prompt: tokens of the log before the answer.
        num_read: tokens of the log that were followed.
        place: position in the prediction that is guessed to come next; maybe past its end.
        streak: answer tokens before it that agree with the prediction; 0 is a mere guess.
        home, home_at: the last place that was trusted, and the length of the log there.
    """

    prediction: tuple[int, ...]
    min_match: int
    num_prompt: int
    num_read: int
    home_at: int
    home: int = 0
    place: int = 0
    streak: int = TRUSTED_MATCH
    _index: Index = field(default_factory=dict)

    def follow(self, log: Items[int]) -> None:
        """Reads the tokens that are new in the log."""
        for end in range(self.num_read + 1, len(log) + 1):
            self.read(log, end)

    def read(self, log: Items[int], end: int) -> None:
        """Reads one token more: the last of `log[:end]`."""
        is_next = self.place < len(self.prediction)
        if is_next and self.prediction[self.place] == log[end - 1]:
            self.place, self.streak = self.place + 1, self.streak + 1
        else:
            self._search(log, end)
        if self.streak >= TRUSTED_MATCH:
            self.home, self.home_at = self.place, end
        self.num_read = end

    def chains(self, depth: int, width: int) -> list[tuple[int, ...]]:
        """What may come next, likeliest first: from the place that matches; as if as many tokens
        were replaced as were written since; as if they were all added.

        A place that is not trusted yet is followed `REACH` times as far as it matched, a mere guess
        half as far with every token since home.
        """
        num_strayed = self.num_read - self.home_at
        starts: dict[int, int] = {}
        if self.streak:
            is_trusted = self.streak >= TRUSTED_MATCH
            starts[self.place] = depth if is_trusted else min(depth, REACH * self.streak)
        if num_strayed:
            for start in (self.home + num_strayed, self.home):
                starts.setdefault(start, depth >> num_strayed)
        found = [self.prediction[start : start + length] for start, length in starts.items()]
        return [chain for chain in found if chain][:width]

    def _search(self, log: Items[int], end: int) -> None:
        """Finds the place after `log[:end]`, whose last token was not the one expected."""
        length = min(self.min_match, end - self.num_prompt)
        stops: list[int] = []
        if length == self.min_match:
            stops = self._nearest(self._occurrences(tuple(log[end - length : end])))
        if not stops:
            self.place, self.streak = self.home + end - self.home_at, 0
            return
        longest = min(MAX_MATCH, end - self.num_prompt)
        while length < longest:
            longer = [s for s in stops if s > length and self._agrees(log, end, s, length)]
            if not longer:
                break
            stops, length = longer, length + 1
        at = bisect_left(stops, self.home)
        self.place, self.streak = stops[min(at, len(stops) - 1)], length

    def _agrees(self, log: Items[int], end: int, stop: int, length: int) -> bool:
        """Whether the tokens before a match of this length are equal too."""
        return self.prediction[stop - 1 - length] == log[end - 1 - length]

    def _nearest(self, stops: list[int]) -> list[int]:
        at = bisect_left(stops, self.home)
        return stops[max(at - NUM_NEAREST, 0) : at + NUM_NEAREST]

    def _occurrences(self, ngram: tuple[int, ...]) -> list[int]:
        """Positions after an n-gram, ascending; an answer that never strays needs no index."""
        if not self._index:
            for stop in range(self.min_match, len(self.prediction) + 1):
                key = self.prediction[stop - self.min_match : stop]
                self._index.setdefault(key, []).append(stop)
        return self._index.get(ngram, [])


def tokens_taken(prediction: Items[int], answer: Items[int]) -> int:
    """How many tokens of a prediction an answer took, whoever drafted them, if anybody did.

    The answer is followed through the prediction as the drafter follows it. Where it is known to
    be, its tokens take the places that they agree with; each token takes at most one place and each
    place is taken at most once, so this is no more than either of them is long. It costs what
    drafting from the prediction costs for the same answer.
    """
    state = PredictionState(
        prediction=tuple(prediction), min_match=DEFAULT_MIN_MATCH, num_prompt=0, num_read=0,
        home_at=0,
    )  # fmt: skip
    taken, has_taken = bytearray(len(prediction)), bytearray(len(answer))
    num_taken = 0
    for end in range(1, len(answer) + 1):
        if num_taken == len(prediction):
            break
        state.read(answer, end)
        if state.streak:
            num_taken += _take(state, answer, taken, has_taken)
    return num_taken


def _take(
    state: PredictionState, answer: Items[int], taken: bytearray, has_taken: bytearray
) -> int:
    """Marks places from the present one back, as far as the answer agrees and has taken none.

    The tokens of a match that was just found are among them, and so are those before it that had
    been looked for in the wrong place. Returns how many places are new.
    """
    at, place, num_new = state.num_read - 1, state.place - 1, 0
    while min(at, place) >= 0 and not has_taken[at] and answer[at] == state.prediction[place]:
        num_new += not taken[place]
        taken[place] = has_taken[at] = 1
        at, place = at - 1, place - 1
    return num_new


class PredictionDrafter:
    """Drafts the prediction on from where the answer is in it.

    After a token that is not the predicted one, the place is the end of the longest match of the
    answer's ending, of at least `min_match` tokens: of equals the nearest at or after the place
    where the answer left the prediction, else the nearest before. Without a match it is taken that
    as many tokens were replaced as were written since.
    """

    name = "prediction"
    needs: tuple[str, ...] = ("prediction",)
    warmth = Warmth.R0
    default_draft_tokens = 16
    default_width = min_width = 1
    max_width = 3
    default_num_nodes: int | None = None
    sample_methods: tuple[str, ...] = ("greedy",)
    options: Mapping[str, Option] = {
        "min_match": Option(
            DEFAULT_MIN_MATCH,
            "tokens that must agree to find the place in the prediction again",
            low=1,
            high=16,
        )
    }

    def open(self, seq: Sequence) -> None:
        spec = seq.speculation
        min_match = spec.options.get("min_match", self.options["min_match"].default)
        seq.drafter_state[self.name] = PredictionState(
            prediction=spec.prediction,
            min_match=int(min_match),
            num_prompt=seq.num_prompt,
            num_read=seq.num_prompt,
            home_at=seq.num_prompt,
        )

    def draft(self, rows: Items[Row], plan: Plan) -> list[DraftTree]:
        return [self._tree(row.seq, part) for row, part in zip(rows, plan, strict=True)]

    def _tree(self, seq: Sequence, plan: RowPlan) -> DraftTree:
        state: PredictionState = seq.drafter_state[self.name]
        state.follow(seq.tokens)
        chains = state.chains(min(plan.depth, plan.num_nodes), plan.width)
        if not chains:
            return EMPTY_TREE
        if len(chains) == 1:
            return DraftTree.chain(chains[0], self.name)
        return merge([list(chain) for chain in chains], plan.num_nodes, self.name)

    def observe(self, commits: Items[Commit], output: TargetOutput) -> None:
        """Nothing to learn before the next draft: the token log is read then."""

    def close(self, seq: Sequence) -> None:
        seq.drafter_state.pop(self.name, None)

    def snapshot(self, seq: Sequence) -> Snapshot | None:
        return None

    def restore(self, seq: Sequence, snapshot: Snapshot) -> int:
        self.open(seq)
        return len(seq.tokens)
