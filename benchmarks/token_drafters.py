"""Drafters that read tokens alone: nanoseconds to enter a token and to draft, by tokens indexed.

python -m benchmarks.token_drafters --text FILE
"""

import argparse
import lzma
import random
import re
import time
from array import array
from collections.abc import Callable, Sequence as Items
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np

from outrider.bench.provenance import as_markdown, provenance
from outrider.draft.base import Drafter
from outrider.draft.datastore import Datastore
from outrider.draft.lookahead import LookaheadDrafter, LookaheadState
from outrider.draft.native.library import library
from outrider.draft.native.suffix_tree import NativeSuffixTree
from outrider.draft.ngram import NgramIndex, continuation
from outrider.draft.prediction import PredictionState
from outrider.draft.recycle import RecycleDrafter
from outrider.draft.rest import CPU_NODES, new_votes
from outrider.draft.retrieval import RetrievalDrafter, RetrievalState
from outrider.draft.suffix_tree import PlainSuffixTree, Search, SuffixTree
from outrider.draft.votes import Ask, PlainVotes, Votes
from outrider.request import Request, Speculation
from outrider.sequence import Sequence
from outrider.step import Row, RowPlan

TEXT_TOKENS = 1000  # an answer
STEP_TOKENS = 4  # entered at once, as a step commits them
NUM_DRAFTS = 2000
K, WIDTH, DEPTH = 8, 4, 64
PLAIN_TOKENS = 40_000  # no more for what is not meant for more

Learn: TypeAlias = Callable[[Sequence], None]


class Index(Protocol):
    """What one drafter keeps, and how it drafts."""

    def extend(self, tokens: Items[int]) -> None: ...

    def begin(self) -> None:
        """Another text."""
        ...

    def draft(self, context: Items[int]) -> Items[int]: ...

    @property
    def num_bytes(self) -> int: ...


class Ngram:
    """All texts as one, as prompt lookup knows one text only."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.index = NgramIndex(2, 4)

    def begin(self) -> None:
        pass

    def extend(self, tokens: Items[int]) -> None:
        self.tokens += tokens
        self.index.extend(self.tokens)

    def draft(self, context: Items[int]) -> Items[int]:
        starts = self.index.matches
        return continuation(self.tokens, starts[0], K) if starts else []

    @property
    def num_bytes(self) -> int:
        return 0


class Suffix:
    """One shared tree of many answers."""

    def __init__(self, tree: SuffixTree, width: int = 1, mode: str = "frequency") -> None:
        self.tree = tree
        self.search = Search(K, width, K * width)
        self.mode = mode
        self.texts: list[int] = []

    def begin(self) -> None:
        self.texts.append(self.tree.open())

    def extend(self, tokens: Items[int]) -> None:
        self.tree.extend(self.texts[-1], array("i", tokens))

    def draft(self, context: Items[int]) -> Items[int]:
        given = array("i", context)
        if self.mode == "longest":
            return self.tree.longest(given, K).tokens
        return self.tree.speculate(given, self.search).tokens

    def forget(self) -> None:
        self.tree.remove(self.texts.pop(0))

    @property
    def num_bytes(self) -> int:
        return self.tree.num_bytes


class Corpus:
    """The datastore of `rest`, sorted when the last token is in; it drafts a tree of 8."""

    def __init__(self, votes: Callable[[Datastore], Votes] = new_votes) -> None:
        self.documents: list[list[int]] = []
        self.make_votes = votes
        self.ask = Ask(K, CPU_NODES, CPU_NODES, 2)

    def begin(self) -> None:
        self.documents.append([])

    def extend(self, tokens: Items[int]) -> None:
        self.documents[-1] += tokens

    def build(self) -> None:
        self.datastore = Datastore.build(self.documents, fingerprint="", vocab_size=1 << 30)
        self.votes = self.make_votes(self.datastore)

    def draft(self, context: Items[int]) -> Items[int]:
        return self.votes.draft(context, self.ask).tokens

    @property
    def num_bytes(self) -> int:
        return self.datastore.tokens.nbytes + self.datastore.positions.nbytes


def native() -> NativeSuffixTree:
    compiled = library()
    if compiled is None:
        raise SystemExit("no C++ compiler: nothing to measure")
    return NativeSuffixTree(compiled, DEPTH)


INDEXES: dict[str, Callable[[], Index]] = {
    "ngram": Ngram,
    "suffix": lambda: Suffix(native()),
    "suffix, width 4": lambda: Suffix(native(), WIDTH),
    "suffix, longest": lambda: Suffix(native(), mode="longest"),
    "rest": Corpus,
    "rest, plain Python": lambda: Corpus(PlainVotes),
    "prediction": Ngram,  # has no index of its own until the answer strays: see `predicted`
    "suffix, plain Python": lambda: Suffix(PlainSuffixTree(DEPTH)),
}


def read_tokens(path: Path | None) -> list[int]:
    """Words, blanks and signs of a text as numbers; without one, words by Zipf's law."""
    if path is None:
        rng = random.Random(0)
        return [int(rng.paretovariate(1.0)) % 50_000 for _ in range(1_100_000)]
    packed = path.read_bytes()
    text = (lzma.decompress(packed) if path.suffix == ".xz" else packed).decode()
    numbers: dict[str, int] = {}
    words = re.findall(r"\w+|\s+|[^\w\s]", text)
    return [numbers.setdefault(word, len(numbers)) for word in words]


def fill(index: Index, tokens: list[int]) -> float:
    """Seconds per token, over the last tenth of them, a step's tokens at a time."""
    start, measured_from = 0.0, len(tokens) * 9 // 10 // TEXT_TOKENS * TEXT_TOKENS
    for at in range(0, len(tokens), STEP_TOKENS):
        if at == measured_from:
            start = time.perf_counter()
        if at % TEXT_TOKENS == 0:
            index.begin()
        index.extend(tokens[at : at + STEP_TOKENS])
    return (time.perf_counter() - start) / (len(tokens) - measured_from)


def drafts(index: Index, tokens: list[int]) -> tuple[float, float]:
    """Seconds per draft (least of three rounds) and its tokens; contexts from all over a text."""
    step = max(1, (len(tokens) - DEPTH) // NUM_DRAFTS)
    contexts = [tokens[at : at + DEPTH - 1] for at in range(0, len(tokens) - DEPTH, step)]
    spent, count = [], 0
    for _ in range(3):
        start, count = time.perf_counter(), 0
        for context in contexts:
            count += len(index.draft(context))
        spent.append(time.perf_counter() - start)
    return min(spent) / len(contexts), count / len(contexts)


def ngram_drafts(index: Ngram, tokens: list[int]) -> tuple[float, float]:
    """The context must be its text's end: entering one token is left out of the time."""
    spent, count = 0.0, 0
    for token in tokens[:NUM_DRAFTS]:
        index.extend([token])
        start = time.perf_counter()
        count += len(index.draft(()))
        spent += time.perf_counter() - start
    return spent / len(tokens[:NUM_DRAFTS]), count / len(tokens[:NUM_DRAFTS])


def predicted(tokens: list[int]) -> str:
    """A prediction of so many tokens, followed by an answer that changes every 64th of them."""
    answer = list(tokens[: 4 * NUM_DRAFTS])
    answer[63::64] = [-1] * len(answer[63::64])
    state = PredictionState(tuple(tokens), 2, 0, 0, 0)
    log: list[int] = []
    longest, spent, count, first = 0.0, 0.0, 0, True
    for at in range(0, len(answer), STEP_TOKENS):
        log += answer[at : at + STEP_TOKENS]
        start = time.perf_counter()
        state.follow(log)
        count += sum(map(len, state.chains(K, 1)))
        took = time.perf_counter() - start
        if first and -1 in log:  # this call makes the index
            longest, first = took, False
        else:
            spent += took
    calls = len(answer) // STEP_TOKENS
    enter = longest / len(tokens) * 1e9
    return f"{enter:,.0f} | {spent / calls * 1e9:,.0f} | {count / calls:.1f} |  |  |  | "


def sequence_drafts(name: str, tokens: list[int], num_tokens: int) -> str:
    """Drafts after a prompt of so many tokens (the median), as the engine asks for them.

    What the target says is drawn from the text.
    """
    rng = random.Random(0)
    drafter, learn = SEQUENCE_DRAFTERS[name](max(tokens) + 1, lambda: rng.choice(tokens))
    seq = sequence(drafter, tokens[:num_tokens])
    drafter.open(seq)
    size = seq.speculation
    plan = [RowPlan(name, size.num_draft_tokens, size.width, size.num_nodes)]
    spent, count = [], 0
    for at in range(num_tokens, num_tokens + STEP_TOKENS * NUM_DRAFTS, STEP_TOKENS):
        seq.tokens += tokens[at : at + STEP_TOKENS]
        learn(seq)
        start = time.perf_counter()
        (tree,) = drafter.draft([Row(seq, 1, size.num_nodes)], plan)
        spent.append(time.perf_counter() - start)
        count += len(tree)
    usual = sorted(spent)[NUM_DRAFTS // 2]
    return f" | {usual * 1e9:,.0f} | {count / NUM_DRAFTS:.1f} |  |  |  | "


def sequence(drafter: Drafter, tokens: list[int]) -> Sequence:
    """With the drafter's own settings."""
    depth, width = drafter.default_draft_tokens, drafter.default_width
    speculation = Speculation(
        drafter=drafter.name,
        num_draft_tokens=depth,
        width=width,
        num_nodes=drafter.default_num_nodes or depth * width,
        options={option: value.default for option, value in drafter.options.items()},
    )
    request = Request(id="r", prompt_token_ids=tuple(tokens))
    return Sequence(
        id="r", request=request, index=0, tokens=list(tokens), seed=0, speculation=speculation
    )


def retrieval(vocab_size: int, draw: Callable[[], int]) -> tuple[Drafter, Learn]:
    def learn(seq: Sequence) -> None:
        state: RetrievalState = seq.drafter_state["retrieval"]
        state.ranked = list({draw(): 0 for _ in range(1 + CPU_NODES)})
        state.num_tokens = len(seq.tokens)

    return RetrievalDrafter(), learn


def lookahead(vocab_size: int, draw: Callable[[], int]) -> tuple[Drafter, Learn]:
    def learn(seq: Sequence) -> None:
        state: LookaheadState = seq.drafter_state["lookahead"]
        state.learn([draw() for _ in state.tips])

    return LookaheadDrafter(), learn


def recycle(vocab_size: int, draw: Callable[[], int]) -> tuple[Drafter, Learn]:
    drafter = RecycleDrafter(vocab_size)
    table = drafter.successors()
    table[:-1] = np.random.default_rng(0).integers(0, vocab_size, table[:-1].shape)
    return drafter, lambda seq: None


SEQUENCE_DRAFTERS: dict[str, Callable[[int, Callable[[], int]], tuple[Drafter, Learn]]] = {
    "retrieval": retrieval,
    "lookahead": lookahead,
    "recycle": recycle,
}


def forgetting(index: Suffix) -> float:
    """Seconds per token of the oldest answers; what is left is a tenth smaller."""
    count = max(1, len(index.texts) // 10)
    before, start = index.tree.num_tokens, time.perf_counter()
    for _ in range(count):
        index.forget()
    return (time.perf_counter() - start) / (before - index.tree.num_tokens)


def measure(name: str, tokens: list[int], num_tokens: int) -> str:
    known, new = tokens[:num_tokens], tokens[num_tokens : num_tokens + 20_000]
    if name == "prediction":
        return predicted(known)
    if name in SEQUENCE_DRAFTERS:
        return sequence_drafts(name, tokens, num_tokens)
    spent = []
    for _ in range(9 if num_tokens < 10_000 else 3):
        index = INDEXES[name]()
        spent.append(fill(index, known))
        if isinstance(index, Corpus):
            start = time.perf_counter()
            index.build()
            spent[-1] = (time.perf_counter() - start) / num_tokens
    cells = [f"{min(spent) * 1e9:,.0f}"]
    if isinstance(index, Suffix):
        held = index.num_bytes / num_tokens
        for text in (new, known):
            seconds, length = drafts(index, text)
            cells += [f"{seconds * 1e9:,.0f}", f"{length:.1f}"]
        cells += [f"{forgetting(index) * 1e9:,.0f}", f"{held:,.0f}"]
    elif isinstance(index, Corpus):
        for text in (new, known):
            seconds, length = drafts(index, text)
            cells += [f"{seconds * 1e9:,.0f}", f"{length:.1f}"]
        cells += ["", f"{index.num_bytes / num_tokens:,.0f}"]
    elif isinstance(index, Ngram):
        seconds, length = ngram_drafts(index, new)
        cells += [f"{seconds * 1e9:,.0f}", f"{length:.1f}", "", "", "", ""]
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="a text, may be .xz; else words by Zipf's law")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 32_000, 1_000_000])
    names = [*INDEXES, *SEQUENCE_DRAFTERS]
    parser.add_argument("--index", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    facts, tokens = provenance(), read_tokens(args.text)
    print("| index | tokens | enter | draft, new text | K | draft, known | K | forget | bytes |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in args.index:
        for num_tokens in args.tokens:
            if name == "suffix, plain Python" and num_tokens > PLAIN_TOKENS:
                continue
            if num_tokens + max(DEPTH, STEP_TOKENS * NUM_DRAFTS) > len(tokens):
                raise SystemExit(f"the text has {len(tokens)} tokens: --tokens must be less")
            print(f"| {name} | {num_tokens:,} | {measure(name, tokens, num_tokens)} |", flush=True)
    print("\n" + as_markdown(facts))


if __name__ == "__main__":
    main()
