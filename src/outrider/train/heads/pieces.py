"""Documents cut into pieces, a part of them held out, and batches of pieces packed side by side.

Shape legend: N tokens of a batch, piece after piece.
"""

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from outrider.errors import ConfigError
from outrider.train.heads.texts import PROMPT_OF_TEXT, Text

LEAST_PIECE = 8  # tokens; shorter ones have no room for a draft
HELD_OUT_SHARE = 0.05
LEAST_HELD_OUT = 4
MANY_DOCUMENTS = 20


class Piece(NamedTuple):
    """A text no longer than a window.

    Attributes:
        unit: what is held out, and resampled, as one: the document, or the piece where there are
            few documents.
        digest: of its tokens.
    """

    text: Text
    unit: str
    digest: str


class Split(NamedTuple):
    """Pieces to learn from, and those never learned from."""

    training: list[Piece]
    held_out: list[Piece]


def cut(texts: Sequence[Text], window: int) -> list[Piece]:
    """Pieces of at most `window` tokens that have something to learn; repeated texts once."""
    by_document = len(texts) >= MANY_DOCUMENTS
    pieces: dict[str, Piece] = {}
    for text in texts:
        for number, start in enumerate(range(0, len(text.tokens), window)):
            part = _part(text, number, start, start + window)
            if len(part.tokens) >= LEAST_PIECE and (any(part.is_learned) or _asks(part)):
                digest = digest_of(part.tokens)
                unit = text.name if by_document else part.name
                pieces.setdefault(digest, Piece(part, unit, digest))
    return list(pieces.values())


def split(pieces: Sequence[Piece], *, share: float = HELD_OUT_SHARE) -> Split:
    """Holds out the units whose first piece hashes lowest: the same ones whatever comes beside.

    Raises:
        ConfigError: there are fewer than two units.
    """
    keys: dict[str, str] = {}
    for piece in pieces:
        keys.setdefault(piece.unit, piece.digest)
    if len(keys) < 2:
        raise ConfigError(
            f"the data has {len(keys)} pieces of text: give more, for some are held out"
        )
    ranked = sorted(keys, key=lambda unit: keys[unit])
    num_low = sum(int(keys[unit][:8], 16) < share * 16**8 for unit in ranked)
    held_out = set(ranked[: min(max(num_low, LEAST_HELD_OUT), len(ranked) // 2)])
    return Split(
        [piece for piece in pieces if piece.unit not in held_out],
        [piece for piece in pieces if piece.unit in held_out],
    )


def digest_of(tokens: Sequence[int]) -> str:
    return hashlib.sha256(array("q", tokens).tobytes()).hexdigest()


class Packed:
    """Pieces side by side; a token sees those of its own piece only.

    Attributes:
        tokens_N, is_learned_N: of all pieces. lengths: of each.
        positions_N: within the piece. start_N, end_N: where its piece begins and ends.
        units: of each piece.
    """

    def __init__(self, pieces: Sequence[Piece], device: torch.device | str = "cpu") -> None:
        self.lengths = tuple(len(piece.text.tokens) for piece in pieces)
        self.units = tuple(piece.unit for piece in pieces)
        tokens = [token for piece in pieces for token in piece.text.tokens]
        is_learned = [mark for piece in pieces for mark in piece.text.is_learned]
        self.tokens_N = torch.tensor(tokens, device=device)
        self.is_learned_N = torch.tensor(is_learned, device=device)
        lengths = torch.tensor(self.lengths, device=device)
        ends = lengths.cumsum(0)
        self.end_N = ends.repeat_interleave(lengths)
        self.start_N = (ends - lengths).repeat_interleave(lengths)
        self.index_N = torch.arange(len(tokens), device=device)
        self.positions_N = self.index_N - self.start_N

    def __len__(self) -> int:
        return sum(self.lengths)

    @property
    def device(self) -> torch.device:
        return self.tokens_N.device

    @property
    def starts(self) -> Iterator[int]:
        """Where each piece begins."""
        at = 0
        for length in self.lengths:
            yield at
            at += length

    def tokens_after(self, offset: int) -> Tensor:
        """The token `offset` places on; past the piece's end some token that nobody may use."""
        return self.tokens_N[(self.index_N + offset).clamp_max(len(self) - 1)]

    @cached_property
    def run_N(self) -> Tensor:
        """How many tokens from here on are learned, without a gap, within the piece."""
        stops_N = torch.where(self.is_learned_N, len(self), self.index_N)
        next_N = stops_N.flip(0).cummin(0).values.flip(0)
        return torch.minimum(next_N, self.end_N) - self.index_N

    def rows(self, lead: int, depth: int) -> Tensor:
        """Rows whose guesses at depths 0 to `depth` are all learned.

        Row t guesses, at depth k, the token at t + lead + 1 + k, from the law of the target at
        t + lead + k.
        """
        first_N = self.index_N + lead + 1
        is_inside_N = first_N < self.end_N
        run_N = self.run_N[first_N.clamp_max(len(self) - 1)]
        return (is_inside_N & (run_N > depth)).nonzero().flatten()


class PieceBatches:
    """Batches of whole pieces, every piece once before any comes again.

    Args:
        tokens_per_step: at most in a batch.
    """

    def __init__(self, pieces: Sequence[Piece], *, tokens_per_step: int, seed: int) -> None:
        if not pieces:
            raise ConfigError("there is nothing to learn from: give more text")
        self._pieces = sorted(pieces, key=lambda piece: piece.digest)
        self._tokens_per_step = tokens_per_step
        self._seed = seed
        self._epoch = self._rank = 0
        self._order = self._shuffled()

    @property
    def num_tokens(self) -> int:
        """Of all pieces."""
        return sum(len(piece.text.tokens) for piece in self._pieces)

    @property
    def epochs(self) -> float:
        """How often every piece has come so far."""
        return self._epoch + self._rank / len(self._pieces)

    def next_batch(self, device: torch.device | str = "cpu") -> Packed:
        """The next pieces; at least one."""
        batch: list[Piece] = []
        room = self._tokens_per_step
        while True:
            piece = self._pieces[self._order[self._rank]]
            room -= len(piece.text.tokens)
            if batch and room < 0:
                return Packed(batch, device)
            batch.append(piece)
            self._rank += 1
            if self._rank == len(self._pieces):
                self._epoch, self._rank = self._epoch + 1, 0
                self._order = self._shuffled()
                return Packed(batch, device)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {"epoch": self._epoch, "rank": self._rank, "settings": self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a position. ConfigError if it is one in other data."""
        for name, value in self._settings().items():
            if state["settings"][name] != value:
                raise ConfigError(
                    f"{name} is {value!r}, in the checkpoint {state['settings'][name]!r}: resume "
                    "with the data and settings it began with, or start anew without resume"
                )
        self._epoch, self._rank = state["epoch"], state["rank"]
        self._order = self._shuffled()

    def _settings(self) -> dict[str, Any]:
        digests = "".join(piece.digest for piece in self._pieces)
        return {
            "data": hashlib.sha256(digests.encode()).hexdigest()[:16],
            "tokens_per_step": self._tokens_per_step,
            "seed": self._seed,
        }

    def _shuffled(self) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order: list[int] = torch.randperm(len(self._pieces), generator=generator).tolist()
        return order


def batches_of(pieces: Sequence[Piece], num_tokens: int) -> Iterator[list[Piece]]:
    """The pieces in their order, as many at a time as have `num_tokens`, but at least one."""
    batch: list[Piece] = []
    room = num_tokens
    for piece in pieces:
        room -= len(piece.text.tokens)
        if batch and room < 0:
            yield batch
            batch, room = [], num_tokens - len(piece.text.tokens)
        batch.append(piece)
    if batch:
        yield batch


def _part(text: Text, number: int, start: int, stop: int) -> Text:
    if len(text.tokens) <= stop - start:
        return text
    tokens, marks = text.tokens[start:stop], text.is_learned[start:stop]
    is_all = all(text.is_learned)
    num_prompt = min(PROMPT_OF_TEXT, len(tokens) // 2) if is_all else text.num_prompt - start
    return Text(f"{text.name}#{number}", tokens, marks, num_prompt, text.domain)


def _asks(text: Text) -> bool:
    """Whether it is a prompt that an answer may be written to."""
    return text.num_prompt == len(text.tokens)
