"""Statistics of paired blocks: a ratio, how sure it is, what noise alone would give, a verdict.

Everything is computed on natural logarithms of ratios and told as ratios. A cluster is a prompt
(or a batch of prompts) and holds one logarithm per block that was measured on it.
"""

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000
INTERVAL = 0.95
MIN_PROMPTS = 10
MIN_FREEDOM = 10  # repeated blocks below which their noise is not known
EPS = 0.02
MARK = 3.0  # deviations from which on a block is marked as disturbed
MIN_MARKED = 20  # of fewer blocks no deviation is known well enough to mark any
POWER = 2.8  # 1.96 + 0.84: found four times out of five

FASTER, SLOWER, EQUAL, UNDECIDED = "faster", "slower", "equal", "undecided"
NORMAL = NormalDist()

Clusters: TypeAlias = Items[Items[float]]
Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times as fast: geometric mean over clusters, and its 95 % interval.

    Attributes:
        low, high: ends of the interval; not a number where a single cluster says nothing of others.
        num_clusters: prompts, or batches of prompts; num_blocks: all of their blocks together.
        noise: half-width, on logarithms, that repeating the same blocks would still narrow; 0
            where no cluster was measured twice.
        detectable: the smallest difference that these data would find four times out of five.
    """

    ratio: float
    low: float
    high: float
    num_clusters: int
    num_blocks: int
    noise: float = 0.0
    detectable: float = math.inf

    @property
    def is_known(self) -> bool:
        """Whether there is an interval: it takes two clusters."""
        return not math.isnan(self.low)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Its ends; None where it is not known."""
        return (self.low, self.high) if self.is_known else None

    @property
    def half_width(self) -> float:
        """On logarithms; close to a share for small ones. Infinite where it is not known."""
        return (math.log(self.high) - math.log(self.low)) / 2 if self.is_known else math.inf

    @property
    def reach(self) -> float:
        """How far from 1 the interval goes, on logarithms: what noise may pass for, of a null.

        Infinite where it is not known.
        """
        if not self.is_known:
            return math.inf
        return max(abs(math.log(self.low)), abs(math.log(self.high)))


class Share(NamedTuple):
    """A share of counts with its 95 % interval."""

    value: float
    low: float
    high: float


class Spread(NamedTuple):
    """Variance of the mean over clusters, and the part of it that is noise within clusters.

    Attributes:
        within: variance of one block about its cluster; None where no cluster has two.
    """

    total: float
    noise: float
    within: float | None


def paired_ratio(clusters: Clusters, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> Ratio:
    """Geometric mean over clusters of blocks' log ratios, with a bootstrap interval.

    Two stages: prompts are resampled, then blocks within prompts. Means of prompts hold the noise
    of their blocks already, so they are first drawn together until only the variance between
    prompts is left in them, and what the second stage adds is counted once (Davison and Hinkley
    1997, section 3.8). Percentiles are taken further out as Student's t asks for that many
    clusters (Hesterberg 2015, section 5.3), or few prompts would cover less than 95 %. A single
    cluster has no interval, however often it was measured: nobody knows how others differ from it.

    Raises:
        ValueError: there is no block at all.
    """
    kept = [np.asarray(cluster, dtype=float) for cluster in clusters if len(cluster)]
    if not kept:
        raise ValueError("no prompt was measured: give at least one")
    means = np.array([cluster.mean() for cluster in kept])
    told = spread(kept)
    low = high = math.nan
    if len(kept) > 1:
        logs = _resample(kept, means, told, np.random.default_rng(seed), num_resamples)
        ends = np.quantile(logs, _tails(len(kept)))
        low, high = min(ends[0], means.mean()), max(ends[1], means.mean())
    return Ratio(
        ratio=math.exp(means.mean()),
        low=math.exp(low),
        high=math.exp(high),
        num_clusters=len(kept),
        num_blocks=sum(map(len, kept)),
        noise=_z() * math.sqrt(told.noise),
        detectable=math.expm1(POWER * math.sqrt(told.total)) if len(kept) > 1 else math.inf,
    )


def half_width(clusters: Clusters) -> float:
    """Of the interval, on logarithms, without resampling: quick enough to ask after every block.

    Infinite for fewer than two clusters.
    """
    kept = [np.asarray(cluster, dtype=float) for cluster in clusters if len(cluster)]
    if len(kept) < 2:
        return math.inf
    return student(1 - (1 - INTERVAL) / 2, len(kept) - 1) * math.sqrt(spread(kept).total)


def noise(clusters: Clusters) -> float:
    """Of that half-width, what more blocks on the same clusters would narrow.

    Infinite while too few clusters were measured twice.
    """
    kept = [np.asarray(cluster, dtype=float) for cluster in clusters if len(cluster)]
    if sum(len(cluster) - 1 for cluster in kept) < MIN_FREEDOM:
        return math.inf
    return _z() * math.sqrt(spread(kept).noise)


def spread(clusters: Items[Floats]) -> Spread:
    """Components of the variance of the mean over clusters, from clusters of any sizes."""
    sizes = np.array([len(cluster) for cluster in clusters])
    means = np.array([cluster.mean() for cluster in clusters])
    total = float(means.var(ddof=1)) / len(means) if len(means) > 1 else 0.0
    freedom = int((sizes - 1).sum())
    if not freedom:
        return Spread(total, 0.0, None)
    within = float(sum(((c - c.mean()) ** 2).sum() for c in clusters)) / freedom
    noise = within * float((1 / sizes).mean()) / len(sizes)
    return Spread(max(total, noise), noise, within)


def verdict(ratio: Ratio, null: Ratio | None = None, *, eps: float = EPS) -> str:
    """ "equal", "faster", "slower" or "undecided".

    Equal: the interval lies within [1 - eps, 1 + eps]. Faster or slower: it leaves out 1, and the
    ratio is farther from 1 than the null arm's interval reaches. Fewer than 10 prompts decide
    nothing.
    """
    if ratio.num_clusters < MIN_PROMPTS:
        return UNDECIDED
    if 1 - eps <= ratio.low and ratio.high <= 1 + eps:
        return EQUAL
    if null is not None and abs(math.log(ratio.ratio)) <= null.reach:
        return UNDECIDED
    if ratio.low > 1.0:
        return FASTER
    return SLOWER if ratio.high < 1.0 else UNDECIDED


def sign_test(values: Items[float]) -> float:
    """Two-sided p that gains and losses are equally likely; ties are left out."""
    num_up, num_down = sum(v > 0 for v in values), sum(v < 0 for v in values)
    count, few = num_up + num_down, min(num_up, num_down)
    tail: float = sum(math.comb(count, i) for i in range(few + 1)) / 2**count
    return min(1.0, 2 * tail)


def marked(values: Items[float]) -> list[bool]:
    """Blocks whose value is more than 3 deviations off: something else ran just then.

    The deviation is 1.4826 medians of absolute differences: the outliers themselves would widen
    the usual one until nothing stands out.
    """
    logs = np.asarray(values, dtype=float)
    if len(logs) < MIN_MARKED:
        return [False] * len(logs)
    off = np.abs(logs - np.median(logs))
    return [bool(far) for far in off > MARK * 1.4826 * np.median(off)]


def is_stationary(values: Items[float]) -> bool:
    """Whether the slope of logarithms over their order has an interval that contains 0."""
    y = np.asarray(values, dtype=float)
    if len(y) < 4:
        return False
    x = np.arange(len(y)) - (len(y) - 1) / 2
    slope = float(x @ y / (x @ x))
    rest = y - y.mean() - slope * x
    error = math.sqrt(float(rest @ rest) / (len(y) - 2) / float(x @ x))
    return abs(slope) <= student(1 - (1 - INTERVAL) / 2, len(y) - 2) * error


def wilson(count: int, total: int) -> Share:
    """A share of counts by Wilson's score interval; of nothing, anywhere from 0 to 1."""
    if not total:
        return Share(0.0, 0.0, 1.0)
    z, share = _z(), count / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    half /= 1 + z * z / total
    return Share(share, max(0.0, centre - half), min(1.0, centre + half))


@cache
def student(p: float, freedom: int) -> float:
    """Quantile of Student's t for p >= 0.5, by halving an interval of angles."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_mass(middle, freedom) < 2 * p - 1 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _student_mass(angle: float, freedom: int) -> float:
    """Probability of |t| < sqrt(freedom) tan(angle) (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    sine, square = math.sin(angle), math.cos(angle) ** 2
    is_odd = freedom % 2 == 1
    term, total = (math.cos(angle) if freedom > 1 else 0.0, 0.0) if is_odd else (1.0, 0.0)
    for i in range(2 - (not is_odd), freedom, 2):
        total += term
        term *= square * i / (i + 1)
    return 2 / math.pi * (angle + sine * total) if is_odd else sine * total


def _resample(
    clusters: Items[Floats], means: Floats, told: Spread, rng: np.random.Generator, count: int
) -> Floats:
    """Means over clusters of so many resamples: prompts first, then blocks within them."""
    centres = _drawn_together(clusters, means, told)
    pick_RN = rng.integers(len(means), size=(count, len(means)))
    logs_R: Floats = centres[pick_RN].mean(axis=1)
    if told.within is not None:
        logs_R += _within(clusters, pick_RN, rng)
    return logs_R


def _drawn_together(clusters: Items[Floats], means: Floats, told: Spread) -> Floats:
    """Means with the noise of their blocks taken out of their spread; of single blocks, as is."""
    if told.within is None:
        return means
    noise_N = np.array([told.within / len(cluster) for cluster in clusters])
    between = max(0.0, float(means.var(ddof=1)) - noise_N.mean()) if len(means) > 1 else 0.0
    keep_N = np.sqrt(between / np.maximum(between + noise_N, 1e-300))
    keep_N[[len(cluster) == 1 for cluster in clusters]] = 1.0
    middle: Floats = means.mean() + keep_N * (means - means.mean())
    return middle


def _within(clusters: Items[Floats], pick_RN: NDArray[np.int64], rng: Any) -> Floats:
    """Of each resample, the mean deviation of blocks drawn within the prompts picked."""
    sizes_N = np.array([len(cluster) for cluster in clusters])
    off_NM = np.zeros((len(clusters), sizes_N.max()))
    for row, cluster in zip(off_NM, clusters, strict=True):
        size = len(cluster)
        if size > 1:  # deviations from a mean of themselves are too small by this factor
            row[:size] = (cluster - cluster.mean()) * math.sqrt(size / (size - 1))
    total_R = np.zeros(len(pick_RN))
    for block in range(sizes_N.max()):
        sizes_RN = sizes_N[pick_RN]
        at_RN = (rng.random(pick_RN.shape) * sizes_RN).astype(np.int64)
        drawn_RN = np.where(block < sizes_RN, off_NM[pick_RN, at_RN] / sizes_RN, 0.0)
        total_R += drawn_RN.mean(axis=1)
    return total_R


def _tails(count: int) -> tuple[float, float]:
    """Where percentiles are taken for so many clusters, two or more."""
    reach = student(1 - (1 - INTERVAL) / 2, count - 1) * math.sqrt(count / (count - 1))
    tail = NORMAL.cdf(-reach)
    return tail, 1 - tail


def _z() -> float:
    return NORMAL.inv_cdf(1 - (1 - INTERVAL) / 2)
