"""SuffixTree: counts of the substrings of growing texts, and drafts from them; and its plain form.

Oliaro et al. 2024 (SuffixDecoding); Hu et al. 2024 (SAM-Decoding) for the longest match.
`native/` holds the fast one.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence as Items
from heapq import heappop, heappush
from math import floor
from typing import NamedTuple, Protocol, TypeAlias

End: TypeAlias = tuple[int, int]  # (text, position of the last token); larger is more recent


class Search(NamedTuple):
    """How far a draft may go.

    Attributes:
        depth: longest path. width: branches at the root, 1 drafts a chain. num_nodes: of all.
        alpha, offset: a match of m tokens drafts no deeper than floor(m * alpha + offset).
        min_probability: of each token, as the product along its path.
    """

    depth: int
    width: int
    num_nodes: int
    alpha: float = 1.0
    offset: float = 0.0
    min_probability: float = 0.1


class Guess(NamedTuple):
    """A draft, parents before children.

    Attributes:
        parents: -1 for the root.
        probabilities: of each node, as the product of relative frequencies along its path.
        score: their sum, the number of tokens expected to be right; of the text after a longest
            match the length of that match.
        match: how many tokens of the context were found.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    score: float = 0.0
    match: int = 0


NO_GUESS = Guess()


class SuffixTree(Protocol):
    """Texts that grow, and how often each of their substrings of up to `depth` tokens occurs.

    The most recent occurrence is the latest one of the text that was opened last.
    """

    depth: int

    @property
    def num_tokens(self) -> int:
        """In all texts together."""
        ...

    @property
    def num_bytes(self) -> int: ...

    def open(self) -> int:
        """A new text, empty; returns its number, which is good until the text is removed."""
        ...

    def extend(self, text: int, tokens: Items[int]) -> None: ...

    def remove(self, text: int) -> None:
        """Nothing is left of the text; cheapest for the one that was opened first."""
        ...

    def count(self, tokens: Items[int]) -> int:
        """Occurrences of a string of 1 to `depth` tokens."""
        ...

    def speculate(self, context: Items[int], search: Search) -> Guess:
        """The draft of the best score over all lengths of match; of equal ones the longest match.

        A chain follows the most frequent token (of equally frequent ones, that of the most recent
        occurrence); a tree takes the likeliest node that hangs on what it has, at most
        `width * floor(m * alpha + offset)` of them.
        """
        ...

    def longest(self, context: Items[int], most: int) -> Guess:
        """What followed the longest match where that was seen last: up to 4 tokens per matched one.

        An occurrence at the end of a text, which nothing follows, does not count.
        """
        ...


class PlainSuffixTree:
    """Counts substrings by looking at all places where they could stand.

    Entering a token is one look-up; a draft costs as many steps as its last token has occurrences.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._texts: dict[int, list[int]] = {}
        self._ends: defaultdict[int, list[End]] = defaultdict(list)
        self._num_opened = 0

    @property
    def num_tokens(self) -> int:
        return sum(len(tokens) for tokens in self._texts.values())

    @property
    def num_bytes(self) -> int:
        """Roughly: a list's slot, a pair and two numbers."""
        return 128 * self.num_tokens

    def open(self) -> int:
        self._num_opened += 1
        self._texts[self._num_opened] = []
        return self._num_opened

    def extend(self, text: int, tokens: Items[int]) -> None:
        log = self._texts[text]
        for token in tokens:
            self._ends[token].append((text, len(log)))
            log.append(token)

    def remove(self, text: int) -> None:
        for token in set(self._texts.pop(text)):
            self._ends[token] = [end for end in self._ends[token] if end[0] != text]

    def count(self, tokens: Items[int]) -> int:
        if not 1 <= len(tokens) <= self.depth:
            return 0
        ends = self._ends.get(tokens[-1], [])
        return sum(self._stands(tokens, end) for end in ends)

    def speculate(self, context: Items[int], search: Search) -> Guess:
        best = NO_GUESS
        for match, ends in self._matches(context):
            depth = min(search.depth, floor(match * search.alpha + search.offset))
            if depth < 1:
                continue
            grow = self._chain if search.width == 1 else self._branches
            guess = grow(match, ends, depth, search)
            if guess.tokens and guess.score >= best.score:
                best = guess
        return best

    def longest(self, context: Items[int], most: int) -> Guess:
        matches = list(self._matches(context))
        if not matches:
            return NO_GUESS
        match, ends = matches[-1]
        text, position = max(end for end in ends if self._next(end) is not None)
        start = position + 1
        tokens = tuple(self._texts[text][start : start + min(most, 4 * match)])
        parents = tuple(range(-1, len(tokens) - 1))
        return Guess(tokens, parents, (1.0,) * len(tokens), float(match), match)

    def _matches(self, context: Items[int]) -> Iterator[tuple[int, list[End]]]:
        """Lengths of the context's endings that occur and go on somewhere, and where they end."""
        ends = list(self._ends.get(context[-1], [])) if len(context) else []
        for match in range(1, min(len(context), self.depth - 1) + 1):
            ends = [end for end in ends if self._precedes(context[-match], match - 1, end)]
            if all(self._next(end) is None for end in ends):
                return
            yield match, ends

    def _chain(self, match: int, ends: list[End], depth: int, search: Search) -> Guess:
        tokens: list[int] = []
        probabilities: list[float] = []
        probability = 1.0
        while len(tokens) < min(depth, search.num_nodes):
            found = self._continuations(ends, match + len(tokens), probability, search, 1)
            if not found:
                break
            ((token, probability, ends),) = found
            tokens.append(token)
            probabilities.append(probability)
        parents = tuple(range(-1, len(tokens) - 1))
        return Guess(tuple(tokens), parents, tuple(probabilities), _total(probabilities), match)

    def _branches(self, match: int, ends: list[End], depth: int, search: Search) -> Guess:
        nodes: list[tuple[int, int, float]] = []
        most = min(search.num_nodes, search.width * depth)
        waiting: list[tuple[float, int, int, int, int, list[End]]] = []
        order = 0

        def offer(ends: list[End], probability: float, parent: int, below: int) -> None:
            nonlocal order
            width = search.width if parent == -1 else most
            found = self._continuations(ends, match + below, probability, search, width)
            for token, p, further in found:
                heappush(waiting, (-p, order, token, parent, below + 1, further))
                order += 1

        offer(ends, 1.0, -1, 0)
        while waiting and len(nodes) < most:
            negative, _, token, parent, below, further = heappop(waiting)
            nodes.append((token, parent, -negative))
            if below < depth:
                offer(further, -negative, len(nodes) - 1, below)
        if not nodes:
            return NO_GUESS
        tokens, parents, probabilities = zip(*nodes, strict=True)
        return Guess(tokens, parents, probabilities, _total(probabilities), match)

    def _continuations(
        self, ends: list[End], length: int, probability: float, search: Search, most: int
    ) -> list[tuple[int, float, list[End]]]:
        """Next tokens of a string, their probabilities and where they stand; likeliest first."""
        if length == self.depth:
            return []
        further: defaultdict[int, list[End]] = defaultdict(list)
        for text, position in ends:
            token = self._next((text, position))
            if token is not None:
                further[token].append((text, position + 1))
        found = [
            (token, probability * len(group) / len(ends), group) for token, group in further.items()
        ]
        found = [entry for entry in found if entry[1] >= search.min_probability]
        found.sort(key=lambda entry: (len(entry[2]), max(entry[2])), reverse=True)
        return found[:most]

    def _next(self, end: End) -> int | None:
        text, position = end
        tokens = self._texts[text]
        return tokens[position + 1] if position + 1 < len(tokens) else None

    def _precedes(self, token: int, back: int, end: End) -> bool:
        """Whether the token stands `back` positions before an end."""
        text, position = end
        return position >= back and self._texts[text][position - back] == token

    def _stands(self, tokens: Items[int], end: End) -> bool:
        text, position = end
        start = position + 1 - len(tokens)
        return start >= 0 and self._texts[text][start : position + 1] == list(tokens)


def _total(numbers: Items[float]) -> float:
    """One after the other, as C++ adds; `sum` of newer Pythons rounds otherwise."""
    total = 0.0
    for number in numbers:
        total += number
    return total
