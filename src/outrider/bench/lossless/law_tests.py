"""Law tests: a rule in every choice it can make, and counts of drawn tokens, against a law."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import product
from typing import NamedTuple

import torch

from outrider.step import EMPTY_TREE, DraftTree, Kind
from outrider.testing.enumerate import Context, ToyModel, bias, speculate
from outrider.testing.verdicts import Judged, propose
from outrider.verify.base import Exactness, Verifier

SIZES = ((2, 2), (3, 2), (2, 3))  # vocabulary, depth
ZEROS = (0.0, 0.4)  # share of tokens that the toy target forbids
POINT_MASSES = 1.0
TOLERANCE = 1e-10
FEWEST = 5.0  # expected draws that a cell of its own needs


class Enumerated(NamedTuple):
    """The worst of all toy cases: total variation from the target's law, and where.

    Attributes:
        broken: what else was wrong with a verdict; "" for nothing.
    """

    num_cases: int
    bias: float
    where: str
    broken: str = ""

    @property
    def passes(self) -> bool:
        return not self.broken and self.bias < TOLERANCE


class GTest(NamedTuple):
    """Counts of tokens after each context against the law they should have.

    Attributes:
        statistic: 2 sum O ln(O / E), of `degrees` degrees of freedom. p: of a larger one.
    """

    statistic: float
    degrees: int
    num_draws: int
    p: float


def enumerate_rule(rule: Verifier) -> Enumerated:
    """Runs the rule through every random choice, on all kinds of proposal that it accepts.

    Toy targets and drafters with random laws over 2 and 3 tokens; a right rule is off by rounding
    only (algorithms.md, section 2).
    """
    worst = Enumerated(0, 0.0, "")
    for told, size, depth, zeros, kind in _cases(rule):
        p, q = ToyModel("p", size, zeros), ToyModel("q", size, min(zeros, ZEROS[-1]))
        draft = propose(kind, q, depth) if kind else _nothing
        try:
            off = bias(speculate(Judged(rule), p, draft), p, depth + 2)
        except AssertionError as error:
            return Enumerated(worst.num_cases + 1, math.inf, told, str(error))
        where = told if off > worst.bias else worst.where
        worst = Enumerated(worst.num_cases + 1, max(off, worst.bias), where)
    return worst


def g_test(seen: Mapping[Context, int], law: Mapping[Context, float]) -> GTest:
    """Of drawn token sequences against the law of such sequences, context by context.

    Given how often a context came up, the tokens after it are draws from its law, so statistics
    and degrees of freedom of all contexts add up. Rare tokens of a context share a cell. What can
    never come and did makes p 0.
    """
    if impossible := [path for path in seen if not law.get(path)]:
        return GTest(math.inf, 1, sum(seen.values()), 0.0 if impossible else 1.0)
    statistic, degrees = 0.0, 0
    expected_by_context, found = _by_context(law), _by_context(seen)
    for context, counts in found.items():
        num_draws, weights = sum(counts.values()), expected_by_context[context]
        total = sum(weights.values())
        cells = _pooled([(counts[t], num_draws * weight / total) for t, weight in weights.items()])
        if len(cells) > 1:
            statistic += 2 * sum(o * math.log(o / e) for o, e in cells if o)
            degrees += len(cells) - 1
    return GTest(statistic, degrees, sum(seen.values()), chi_square_tail(statistic, degrees))


def chi_square_tail(statistic: float, degrees: int) -> float:
    """Probability that a chi-square variable is larger: the regularised upper gamma function."""
    if degrees < 1:
        return 1.0
    halves = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(halves[0], halves[1]))


def _cases(rule: Verifier) -> Iterator[tuple[str, int, int, float, Kind | None]]:
    is_greedy = rule.exactness is Exactness.EXACT_GREEDY
    for kind in (None, *sorted(rule.accepts)):
        for (size, depth), zeros in product(SIZES, (POINT_MASSES,) if is_greedy else ZEROS):
            told = f"{kind.value if kind else 'nothing drafted'}, {size} tokens, depth {depth}"
            yield told, size, depth, zeros, kind


def _nothing(context: Context, stream: object) -> DraftTree:
    return EMPTY_TREE


def _by_context(weights: Mapping[Context, float]) -> dict[Context, Counter[int]]:
    """For every proper prefix, the weights of the tokens after it."""
    found: dict[Context, Counter[int]] = {}
    for path, weight in weights.items():
        for at, token in enumerate(path):
            found.setdefault(path[:at], Counter())[token] += weight  # type: ignore[assignment]
    return found


def _pooled(cells: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """(observed, expected) of which each expects enough: the rarest ones are put together."""
    cells = sorted(cells, key=lambda cell: cell[1])
    while len(cells) > 1 and cells[0][1] < FEWEST:
        (found, expected), (found_2, expected_2), *rest = cells
        cells = sorted([(found + found_2, expected + expected_2), *rest], key=lambda cell: cell[1])
    return cells
