"""Suffix decoding: propose what most often followed the text's ending, here or in other answers.

Oliaro et al. 2024.10, and 4.11 for `mode="longest"`. Two trees are asked: one of
the sequence's own prompt and output, one of all outputs of its tenant, past and in flight.
"""

import logging
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence as Items
from dataclasses import dataclass
from functools import cache
from weakref import WeakKeyDictionary

from outrider.draft.base import Snapshot, Warmth
from outrider.draft.native.library import library
from outrider.draft.native.suffix_tree import NativeSuffixTree
from outrider.draft.ngram import continuation
from outrider.draft.suffix_tree import NO_GUESS, Guess, PlainSuffixTree, Search, SuffixTree
from outrider.errors import ConfigError, RequestError
from outrider.request import Option, Speculation
from outrider.sequence import Sequence
from outrider.step import EMPTY_TREE, Commit, DraftTree, Plan, Row, RowPlan, TargetOutput

DEPTH = 64
MAX_SHARED_TOKENS, MAX_TENANTS = 1_000_000, 64
MAX_PLAIN_TOKENS = 50_000  # held by a shared tree without C++, where a draft costs O(tokens)
logger = logging.getLogger(__name__)


class SuffixDrafter:
    """Drafts from counts of what was written before; the score says how sure it is.

    Of the two trees' drafts the better score wins, then the longer match, then the sequence's own.

    Args:
        max_shared_tokens: outputs held for all tenants together, at some 80 bytes a token. A tenant
            forgets its oldest outputs; where there are several, the one longest without a request
            goes first.
        max_tenants: whose outputs are held; the tenant longest without a request is forgotten.
        depth: length of the longest string counted, match and draft together.

    Raises:
        ConfigError: a number below 1 (below 2 for the depth).
    """

    name = "suffix"
    needs: tuple[str, ...] = ()
    warmth = Warmth.R0
    default_draft_tokens = 8
    default_width = min_width = 1
    max_width = 16
    default_num_nodes: int | None = None
    sample_methods: tuple[str, ...] = ("greedy",)
    options: Mapping[str, Option] = {
        "alpha": Option(1.0, "draft tokens per matched token", low=0.0, high=64.0),
        "offset": Option(0.0, "draft tokens beside those", low=-64.0, high=64.0),
        "min_probability": Option(0.1, "least estimated probability of a path", low=0.0, high=1.0),
        "shared": Option("tenant", "whose other answers are looked up", choices=("tenant", "none")),
        "mode": Option(
            "frequency",
            "the most frequent continuation, or that of the longest match",
            choices=("frequency", "longest"),
        ),
    }
    settings: Mapping[str, Option] = {
        "max_shared_tokens": Option(MAX_SHARED_TOKENS, "outputs held, in tokens", 1, 1e9),
        "max_tenants": Option(MAX_TENANTS, "tenants whose outputs are held", 1, 1e6),
        "depth": Option(DEPTH, "longest string counted, match and draft", 2, 4096),
    }

    def __init__(
        self,
        *,
        max_shared_tokens: int = MAX_SHARED_TOKENS,
        max_tenants: int = MAX_TENANTS,
        depth: int = DEPTH,
    ) -> None:
        _check("max_shared_tokens", max_shared_tokens)
        _check("max_tenants", max_tenants)
        _check("depth", depth)
        self.max_shared_tokens = max_shared_tokens
        self.max_tenants = max_tenants
        self.depth = depth
        self._shared: OrderedDict[str, SharedTexts] = OrderedDict()

    def check(self, spec: Speculation) -> None:
        """What follows the longest match is one chain, and has no frequencies to set."""
        if spec.options.get("mode") != "longest":
            return
        for name in ("alpha", "offset", "min_probability"):
            value = spec.options[name]
            if value != self.options[name].default:
                raise RequestError(
                    f"drafter_options[{name!r}]={value}: is for mode 'frequency' of {self.name}, "
                    "not 'longest'; drop one of them"
                )
        if spec.width > 1 and len(spec.parts) < 2:  # beside others, another may draft as wide
            raise RequestError(
                f"width={spec.width}: mode 'longest' of {self.name} drafts chains; use width=1 or "
                "mode 'frequency'"
            )

    def open(self, seq: Sequence) -> None:
        is_alone = seq.speculation.options.get("shared") == "none"
        shared = None if is_alone else self._tenant(seq.request.tenant)
        seq.drafter_state[self.name] = SuffixState(shared=shared)

    def draft(self, rows: Items[Row], plan: Plan) -> list[DraftTree]:
        return [self._tree(row.seq, part) for row, part in zip(rows, plan, strict=True)]

    def confidence(self, seq: Sequence) -> float:
        """How many tokens of the last draft are expected to be right; 0.0 without one.

        The longest match has no probabilities. A match of 5, from which SAM-Decoding trusts it,
        counts as 2 tokens, and others in proportion.
        """
        state: SuffixState | None = seq.drafter_state.get(self.name)
        if state is None:
            return 0.0
        is_length = seq.speculation.options.get("mode") == "longest"
        return state.guess.score * (2 / 5 if is_length else 1.0)

    def observe(self, commits: Items[Commit], output: TargetOutput) -> None:
        """Answers in flight are there for others at once."""
        for commit in commits:
            if commit.tokens and self.name in commit.seq.drafter_state:
                self._share(commit.seq)

    def close(self, seq: Sequence) -> None:
        """The output stays in the tenant's tree; a sequence that comes back goes on there."""
        if self.name in seq.drafter_state:
            self._share(seq)
            del seq.drafter_state[self.name]

    def snapshot(self, seq: Sequence) -> Snapshot | None:
        return None

    def restore(self, seq: Sequence, snapshot: Snapshot) -> int:
        self.open(seq)
        return len(seq.tokens)

    def remember(self, tenant: str, answer: Items[int]) -> int:
        """Enters a past answer of a tenant, as from a log; returns how many tokens were new.

        0 where the answer's end is known: it was given, or remembered, here before.
        """
        return self._tenant(tenant).remember(answer)

    def _tenant(self, name: str) -> "SharedTexts":
        if name not in self._shared:
            self._shared[name] = SharedTexts(self.max_shared_tokens, self.depth)
        self._shared.move_to_end(name)
        while len(self._shared) > self.max_tenants or (
            len(self._shared) > 1
            and sum(texts.num_tokens for texts in self._shared.values()) > self.max_shared_tokens
        ):
            self._shared.popitem(last=False)  # sequences in flight keep theirs to their end
        return self._shared[name]

    def _share(self, seq: Sequence) -> None:
        state: SuffixState = seq.drafter_state[self.name]
        if state.shared is not None:
            state.shared.follow(seq)

    def _tree(self, seq: Sequence, plan: RowPlan) -> DraftTree:
        state: SuffixState = seq.drafter_state[self.name]
        own = state.read(seq, self.depth)
        state.guess = NO_GUESS
        if plan.depth < 1 or plan.num_nodes < 1:
            return EMPTY_TREE
        trees = [own]
        if state.shared is not None:
            state.shared.follow(seq)
            trees.append(state.shared.tree)
        context = array("i", seq.tokens[1 - self.depth :])
        state.guess = best(trees, context, seq.speculation.options, plan)
        return _as_tree(state.guess, self.name)


def best(
    trees: Items[SuffixTree], context: Items[int], options: Mapping[str, object], plan: RowPlan
) -> Guess:
    """The draft of the best score, then of the longest match, then of the first tree."""
    if options.get("mode") == "longest":
        most = min(plan.depth, plan.num_nodes)
        guesses = [tree.longest(context, most) for tree in trees]
        guesses[0] = in_a_loop(guesses[0], most)
    else:
        search = _search(options, plan)
        guesses = [tree.speculate(context, search) for tree in trees]
    return max(guesses, key=lambda guess: (bool(guess.tokens), guess.score, guess.match))


def in_a_loop(guess: Guess, most: int) -> Guess:
    """Past the end of the sequence's own text the draft goes on with what it has just proposed."""
    wanted = min(most, 4 * guess.match)
    if not 0 < len(guess.tokens) < wanted:
        return guess
    tokens = tuple(continuation(guess.tokens, 0, wanted))
    parents = tuple(range(-1, wanted - 1))
    return guess._replace(tokens=tokens, parents=parents, probabilities=(1.0,) * wanted)


@dataclass(eq=False)
class SuffixState:
    """What is kept for one open sequence.

    Attributes:
        shared: the outputs of its tenant; None looks up and leaves nothing there.
        own: its prompt and output as `text`, of which `num_read` tokens are entered.
        guess: the last draft.
    """

    shared: "SharedTexts | None"
    own: SuffixTree | None = None
    text: int = -1
    num_read: int = 0
    guess: Guess = NO_GUESS

    def read(self, seq: Sequence, depth: int) -> SuffixTree:
        """Enters what is new in the token log."""
        if self.own is None:
            self.own = new_tree(depth)
            self.text = self.own.open()
        if self.num_read < len(seq.tokens):
            self.own.extend(self.text, array("i", seq.tokens[self.num_read :]))
            self.num_read = len(seq.tokens)
        return self.own


@dataclass(eq=False)
class SharedText:
    """One answer in a shared tree.

    Attributes:
        text: its number in the tree; None once it was forgotten.
        num_read: generated tokens of its sequence that were entered, here or before.
        num_tokens: those that are in this text.
    """

    text: int | None
    num_read: int
    num_tokens: int = 0


class SharedTexts:
    """Outputs of one tenant's sequences in one tree, oldest first; the oldest are forgotten."""

    def __init__(self, max_tokens: int, depth: int) -> None:
        self.tree = new_tree(depth)
        self.max_tokens = max_tokens
        if isinstance(self.tree, PlainSuffixTree):
            self.max_tokens = min(max_tokens, MAX_PLAIN_TOKENS)
        self.num_tokens = 0
        self._texts: OrderedDict[int, SharedText] = OrderedDict()
        # A sequence that was preempted comes back as the same object, and finds its text.
        self._of: WeakKeyDictionary[Sequence, SharedText] = WeakKeyDictionary()

    def follow(self, seq: Sequence) -> None:
        """Enters what the sequence has generated since the last time."""
        entry = self._of.get(seq)
        num_read = entry.num_read if entry is not None else 0
        count = seq.num_generated - num_read
        if count < 1:
            return
        if entry is None or entry.text is None:
            entry = self._begin(seq, num_read)
        assert entry.text is not None
        self.tree.extend(entry.text, array("i", seq.tokens[seq.num_prompt + num_read :]))
        entry.num_read += count
        entry.num_tokens += count
        self.num_tokens += count
        self._forget()

    def remember(self, answer: Items[int]) -> int:
        """Enters a whole answer, unless its last `depth` tokens stand in the tree."""
        if not answer or self.tree.count(array("i", answer[-self.tree.depth :])):
            return 0
        text, count = self.tree.open(), len(answer)
        self._texts[text] = SharedText(text=text, num_read=count, num_tokens=count)
        self.tree.extend(text, array("i", answer))
        self.num_tokens += count
        self._forget()
        return count

    def _begin(self, seq: Sequence, num_read: int) -> SharedText:
        """A new text, also for an answer whose beginning was forgotten while it went on."""
        text = self.tree.open()
        entry = SharedText(text=text, num_read=num_read)
        self._of[seq] = self._texts[text] = entry
        return entry

    def _forget(self) -> None:
        while self.num_tokens > self.max_tokens:
            text, entry = self._texts.popitem(last=False)
            self.tree.remove(text)
            self.num_tokens -= entry.num_tokens
            entry.text = None


@cache
def _say_plain() -> None:
    logger.warning(
        "suffix trees in plain Python hold at most %d shared tokens each", MAX_PLAIN_TOKENS
    )


def new_tree(depth: int) -> SuffixTree:
    """In C++ where that can be compiled, else in Python."""
    compiled = library()
    if compiled is not None:
        return NativeSuffixTree(compiled, depth)
    _say_plain()
    return PlainSuffixTree(depth)


def _search(options: Mapping[str, object], plan: RowPlan) -> Search:
    usual = {name: option.default for name, option in SuffixDrafter.options.items()}
    given = {**usual, **options}
    alpha, offset, least = (given[name] for name in ("alpha", "offset", "min_probability"))
    return Search(plan.depth, plan.width, plan.num_nodes, alpha, offset, least)  # type: ignore[arg-type]


def _as_tree(guess: Guess, source: str) -> DraftTree:
    if not guess.tokens:
        return EMPTY_TREE
    return DraftTree(tokens=guess.tokens, parents=guess.parents, source=source)


def _check(name: str, value: int) -> None:
    least = SuffixDrafter.settings[name].low
    if value < least:
        raise ConfigError(f"{name}={value}: must be >= {least:g}")
