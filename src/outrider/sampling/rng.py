"""Random numbers as a function of (seed, position, purpose, index): streams that can be replayed.

The words are those of Philox4x64-10 (Salmon et al., 2011, "Parallel random numbers: as easy as
1, 2, 3") with key (seed, lane) and counter (block, position, 0, 0); blocks count from 1 and give
four 64-bit words each, so word i is word i % 4 of block i // 4 + 1. A word w is the uniform
((w >> 12) + 1/2) * 2**-52, which lies in (0, 1), ends excluded. Tokens depend on this definition:
changing it changes what every seed stands for.

Shape legend: V vocabulary, C contenders.
"""

import math
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray
from torch import Tensor

Purpose: TypeAlias = Literal["verify", "draft"]

# The second half of the Philox key: streams of different lanes are independent.
_LANES = {"verify": 1, "draft": 2}
_NOISE_LANE = 3
_FOLD_LANE = 4

Words: TypeAlias = NDArray[np.uint64]
Floats: TypeAlias = NDArray[np.float64]


class Stream(Protocol):
    """The two verbs by which drafters and verifiers draw; having no others, they are enumerable."""

    def flip(self, probability: float) -> bool:
        """True with this probability."""
        ...

    def pick(self, law_V: Tensor) -> int:
        """A token drawn from a law that sums to one; never one of zero probability."""
        ...


class RootStream:
    """Fresh uniforms for one call, keyed by the position of its root: no key is ever used twice.

    The root advances in every call and each draw uses the next word, so the uniform of draw i is
    a function of (seed, root position, purpose, i) alone. The law of the tokens is reproducible
    under this stream; the tokens are not, for they change with every draft.
    """

    def __init__(self, seed: int, root_position: int, purpose: Purpose) -> None:
        self._generator = _generator(seed, _LANES[purpose], root_position)

    def flip(self, probability: float) -> bool:
        return self._uniform() < probability

    def pick(self, law_V: Tensor) -> int:
        """Inverse of the cumulated law at one uniform."""
        cumulated_V = np.cumsum(_host(law_V))
        total = cumulated_V[-1]
        point = min(self._uniform() * total, np.nextafter(total, 0.0))  # below the total, rounded
        return int(np.searchsorted(cumulated_V, point, side="right"))

    def _uniform(self) -> float:
        return float(_uniforms(self._generator.random_raw(1))[0])


class PositionStream:
    """Sampling as a function of the seed: the token at a position, whatever was drafted for it.

    Pick i decides the token at `first_position + i`, which is the argmax of its log law plus
    Gumbel noise keyed by (seed, position, token id); ties go to the lower id. The noise is
    independent over positions, so the law is the one given (Gumbel-max), and the token is the
    same with speculation on or off.

    Args:
        first_position: index in the sequence of the first token to be picked: one after the root.
    """

    def __init__(self, seed: int, first_position: int) -> None:
        self._seed = seed
        self._position = first_position

    def flip(self, probability: float) -> bool:
        raise AssertionError("a coupled stream has no coins: verify by exact match, or key by root")

    def pick(self, law_V: Tensor) -> int:
        host_V = _host(law_V)
        words_V = self._words(self._position, len(host_V))
        self._position += 1
        token_C = _contenders(host_V, words_V)
        if len(token_C) == 1:
            return int(token_C[0])
        return int(token_C[np.argmax(np.log(host_V[token_C]) + _gumbel(words_V[token_C]))])

    def noise(self, position: int, size: int) -> Tensor:
        """Gumbel noise of token ids [0, size) at a position, float64; a longer one begins alike."""
        return torch.from_numpy(_gumbel(self._words(position, size)))

    def _words(self, position: int, size: int) -> Words:
        words: Words = _generator(self._seed, _NOISE_LANE, position).random_raw(size)
        return words


def fold(seed: int, index: int) -> int:
    """The seed of the index-th completion or fork, in [0, 2**63); index 0 is the seed itself."""
    if index == 0:
        return seed
    return int(_generator(seed, _FOLD_LANE, index).random_raw(1)[0]) >> 1


def _generator(seed: int, lane: int, position: int) -> Any:
    """Philox at the start of one stream; typed Any because `random_raw` has no precise type."""
    counter = np.array([0, position, 0, 0], dtype=np.uint64)
    key: Any = _Key(seed, lane)  # numpy's stub forgets ISeedSequence
    return np.random.Philox(key, counter=counter)


class _Key(ISeedSequence):
    """The key as a seed that is already mixed: given as `key`, numpy would draw a seed besides."""

    def __init__(self, seed: int, lane: int) -> None:
        self._words = np.array([seed, lane], dtype=np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Words:
        return self._words


def _uniforms(words: Words) -> Floats:
    uniforms = (words >> np.uint64(12)).astype(np.float64)
    uniforms += 0.5
    uniforms *= 2.0**-52
    return uniforms


def _gumbel(words: Words) -> Floats:
    """-log(-log u) of each word's uniform; numpy's, for torch starts threads at 2,048 logs."""
    return -np.log(-np.log(_uniforms(words)))


def _contenders(law_V: Floats, words_V: Words) -> NDArray[np.intp]:
    """Tokens that can be the argmax of log p + noise, in order: few, so that few logs are taken.

    exp(log p - log(-log u)) = p / -log u is at most p / (1 - u), since -log u >= 1 - u. So whoever
    stays below the score of one token by that bound has lost; the best by the bound is that token.
    """
    rest_V = ~words_V
    rest_V >>= np.uint64(12)
    bound_V = law_V / (rest_V + 0.5)  # p / (1 - u), times 2**-52
    best = int(bound_V.argmax())
    u = ((int(words_V[best]) >> 12) + 0.5) * 2.0**-52
    score = float(law_V[best]) / -math.log(u)
    # Rounding is of the order of 1e-15.
    tokens_C: NDArray[np.intp] = (bound_V >= score * 2.0**-52 * (1.0 - 1e-9)).nonzero()[0]
    return tokens_C


def _host(law_V: Tensor) -> Floats:
    return np.asarray(law_V.numpy(force=True), dtype=np.float64)
