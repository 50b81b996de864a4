"""How the laws of a pass feed drafts in the making, whatever network ran it.

Shape legend: N rows of a pass, R of them that somebody asks about, V vocabulary of the target, W
width of the widest tree.
"""

from collections.abc import Mapping, Sequence as Items
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from outrider.draft.drawing import draft_law
from outrider.draft.growth import Growth, Line
from outrider.draft.tree_search import BestFirst, ProductTree
from outrider.sampling.shaper import Shaper, laws_together
from outrider.sequence import Sequence
from outrider.step import TargetOutput

NO_PEAKS: Mapping[int, float] = {}


class Grower:
    """The draft of one row in the making: what it asks of the rows of a pass.

    Args:
        shaper: makes the laws that the growth is fed with.
    """

    def __init__(self, seq: Sequence, growth: Growth, shaper: Shaper) -> None:
        self.seq = seq
        self.growth = growth
        self.shaper = shaper

    @property
    def is_done(self) -> bool:
        return not self.growth.wanted()

    @property
    def ranks(self) -> ProductTree | None:
        """Its growth, if the likeliest tokens of each depth are all that it is made of."""
        return None

    @property
    def takes_all(self) -> bool:
        """Whether it takes the laws of all its rows at once, which a temperature alone shapes."""
        return False

    @property
    def is_argmax(self) -> bool:
        """Whether it grows by argmax tokens."""
        return False

    @property
    def needs_peaks(self) -> bool:
        """Whether, growing by argmax tokens, it asks how likely they are."""
        return False

    def follow_argmax(
        self, argmax_N: Items[int], first: int, peaks: Mapping[int, float] = NO_PEAKS
    ) -> bool:
        """Grows by argmax tokens where no law is needed; whether this pass has no more to say.

        Args:
            argmax_N: of the rows of the pass; this one's begin at `first`.
            peaks: largest probability of its rows, where it needs them.
        """
        return False

    def asks(self) -> list[tuple[int, Items[int]]]:
        """The laws it needs: a row of its own part of the pass, and the path that leads there."""
        raise NotImplementedError

    def take(self, laws: Items[Tensor | None]) -> bool:
        """Grows by the laws it asked for; whether the same pass has answers to its next asks."""
        self.growth.take(laws)
        return False


class MarginalGrower(Grower):
    """Grows by one pass whose row d gives the law at depth d + 1, whatever was drafted before it.

    The draft's law is a product of laws, each shaped along the path. It asks for one law per depth
    where no setting of the request looks at the path. Trees come as `by_depth` makes them.

    Attributes:
        vocab_size: of the target; set by whoever makes one.
    """

    vocab_size: int

    @property
    def ranks(self) -> ProductTree | None:
        tree = self.growth
        if not isinstance(tree, ProductTree) or tree.noise is not None:
            return None
        return tree if self.shaper.is_only_scaled else None

    @property
    def takes_all(self) -> bool:
        if self.is_argmax or not self.shaper.is_only_scaled or self._is_by_path:
            return False
        # A chain that may end early would have later laws made for nothing.
        return not isinstance(self.growth, Line) or self.growth.stop is None

    @property
    def is_argmax(self) -> bool:
        return self._line is not None

    @cached_property
    def _is_by_path(self) -> bool:
        return is_by_path(self.seq)

    @cached_property
    def _line(self) -> Line | None:
        return argmax_line(self.seq, self.growth)

    @property
    def needs_peaks(self) -> bool:
        return self._line is not None and self._line.stop is not None

    def follow_argmax(
        self, argmax_N: Items[int], first: int, peaks: Mapping[int, float] = NO_PEAKS
    ) -> bool:
        line = self._line
        if line is None:
            return False
        rows = range(first, first + line.depth)
        if not all(0 <= argmax_N[row] < self.vocab_size for row in rows):
            return False
        for row in rows:
            if not self.is_done:
                line.add(argmax_N[row], peaks.get(row, 1.0))
        return True

    def asks(self) -> list[tuple[int, Items[int]]]:
        nodes = self.growth.wanted()
        asking = nodes if self._is_by_path else nodes[:1]
        paths = [self.growth.path_tokens(node) for node in asking]
        return [(len(path), path) for path in paths]

    def take(self, laws: Items[Tensor | None]) -> bool:
        if not self._is_by_path:
            laws = list(laws) * len(self.growth.wanted())
        self.growth.take(laws)
        return not self.is_done


class Fed(NamedTuple):
    """One draft, and its rows of the logits of a pass: `num_rows` from `first` on."""

    grower: Grower
    first: int
    num_rows: int


def feed(fed: list[Fed], output: TargetOutput, vocab_size: int) -> None:
    """Lets drafts grow by all that a pass can tell them.

    Args:
        vocab_size: of the target; logits of another width are cut, or padded with -inf.
    """
    ranked = [(part, tree) for part in fed if (tree := part.grower.ranks) is not None]
    if ranked:
        _rank(ranked, output.logits_NV, vocab_size)
        fed = [part for part in fed if part.grower.ranks is None]
    together = [part for part in fed if part.grower.takes_all]
    if together:
        _take_all(together, output.logits_NV, vocab_size)
        fed = [part for part in fed if not part.grower.takes_all]
    peaks = _peaks(fed, output, vocab_size)
    asking = [
        (grower, first)
        for grower, first, _ in fed
        if not grower.follow_argmax(output.argmax_N, first, peaks)
    ]
    while asking:
        asking = _grow(asking, output.logits_NV, vocab_size)


def by_depth(seq: Sequence, growth: Growth) -> Growth:
    """What grows as this does, of fewer laws if it can, where the law at a depth is but one."""
    if not isinstance(growth, BestFirst) or is_by_path(seq):
        return growth
    return ProductTree.like(growth)


def is_by_path(seq: Sequence) -> bool:
    """Whether settings make laws depend on the tokens above, not only on how many they are."""
    sampling = seq.request.sampling
    penalties = (sampling.presence_penalty, sampling.frequency_penalty)
    is_counting = sampling.repetition_penalty != 1.0 or any(penalties)
    return seq.grammar is not None or bool(seq.request.bad_words_ids) or is_counting


def argmax_line(seq: Sequence, growth: Growth) -> Line | None:
    """The growth, if it is a chain of argmax tokens that no transform can change.

    A temperature changes none, but how likely they are.
    """
    if not isinstance(growth, Line) or growth.stream is not None:
        return None
    is_scaled = seq.shaper.is_only_scaled and growth.stop is None
    return growth if is_scaled or seq.shaper.is_plain_greedy else None


def needs_ranker(seq: Sequence, growth: Growth) -> bool:
    """Whether probabilities are asked for where the request's own law has one token only."""
    return seq.shaper.is_greedy and (not isinstance(growth, Line) or growth.stop is not None)


def make_ranker(seq: Sequence, vocab_size: int, eos_token_ids: Items[int]) -> Shaper:
    """Shapes what greedy drafts rank by.

    Args:
        eos_token_ids: of whoever drafts: only minimum length asks for them.
    """
    sampling = replace(seq.request.sampling, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    return Shaper(
        sampling,
        vocab_size=vocab_size,
        eos_token_ids=[token for token in eos_token_ids if token < vocab_size],
        bad_words_ids=seq.request.bad_words_ids,
        num_prompt=seq.num_prompt,
    )


def fit(logits: Tensor, vocab_size: int) -> Tensor:
    """Rows (or one row) cut, or padded with -inf, to the target's vocabulary."""
    missing = vocab_size - logits.shape[-1]
    if missing <= 0:
        return logits[..., :vocab_size]
    return torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))


def _rank(ranked: list[tuple[Fed, ProductTree]], logits_NV: Tensor, vocab_size: int) -> None:
    """Trees get the likeliest tokens of all depths; no more than those leave the device."""
    rows = [row for (_, first, count), _ in ranked for row in range(first, first + count)]
    logits_RV = fit(logits_NV if len(rows) == len(logits_NV) else logits_NV[rows], vocab_size)
    temperatures = [
        [part.grower.shaper.sampling.temperature]
        for part, _ in ranked
        for _ in range(part.num_rows)
    ]
    scaled_RV = logits_RV / torch.tensor(temperatures, device=logits_RV.device)
    best_RW = scaled_RV.topk(min(max(tree.width for _, tree in ranked), vocab_size))
    values_RW = best_RW.values - scaled_RV.logsumexp(dim=1, keepdim=True)
    levels = zip(best_RW.indices.tolist(), values_RW.tolist(), strict=True)
    for part, tree in ranked:
        for _ in range(part.num_rows):
            tree.add(*next(levels))


def _take_all(together: list[Fed], logits_NV: Tensor, vocab_size: int) -> None:
    """Drafts grow by the laws of all their rows, made in one go."""
    rows = [row for _, first, count in together for row in range(first, first + count)]
    shapers = [part.grower.shaper for part in together for _ in range(part.num_rows)]
    logits_RV = logits_NV if len(rows) == len(logits_NV) else logits_NV[rows]
    laws = iter(laws_together(fit(logits_RV, vocab_size), shapers))
    for grower, _, count in together:
        for law_V in islice(laws, count):
            if not grower.is_done:
                grower.take([law_V])


def _peaks(fed: list[Fed], output: TargetOutput, vocab_size: int) -> Mapping[int, float]:
    """By row, the largest probability, for drafts that grow without laws but ask for it."""
    asking = [part for part in fed if part.grower.needs_peaks]
    if not asking:
        return NO_PEAKS
    rows = [row for _, first, num_rows in asking for row in range(first, first + num_rows)]
    logits_NV = output.logits_NV
    logits_RV = logits_NV if len(rows) == len(logits_NV) else logits_NV[rows]
    peaks_R = fit(logits_RV, vocab_size).float().softmax(dim=1).amax(dim=1)
    return dict(zip(rows, peaks_R.tolist(), strict=True))


def _grow(
    asking: list[tuple[Grower, int]], logits_NV: Tensor, vocab_size: int
) -> list[tuple[Grower, int]]:
    """Hands drafts the laws they ask for; returns those that this pass can tell more."""
    asked = [grower.asks() for grower, _ in asking]
    asks = [
        (grower, first + row, path)
        for (grower, first), rows in zip(asking, asked, strict=True)
        for row, path in rows
    ]
    made = _laws_together(asks, logits_NV, vocab_size)
    laws = iter(
        made[row]
        if row in made
        else draft_law(grower.seq, fit(logits_NV[row], vocab_size), path, grower.shaper)
        for grower, row, path in asks
    )
    return [
        (grower, first)
        for (grower, first), rows in zip(asking, asked, strict=True)
        if grower.take([next(laws) for _ in rows])
    ]


def _laws_together(
    asks: list[tuple[Grower, int, Items[int]]], logits_NV: Tensor, vocab_size: int
) -> dict[int, Tensor | None]:
    """By row, the laws that a temperature alone shapes, made in one go."""
    shapers = {row: g.shaper for g, row, _ in asks if g.shaper.is_only_scaled}
    if not shapers:
        return {}
    rows = list(shapers)
    logits_RV = logits_NV if rows == list(range(len(logits_NV))) else logits_NV[rows]
    laws = laws_together(fit(logits_RV, vocab_size), list(shapers.values()))
    return dict(zip(rows, laws, strict=True))
