"""Documents packed into windows of tokens, drawn by domain, from a position that can be restored.

Shape legend: B sequences, T window length.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from outrider.train.corpus import Document
from outrider.train.vocabulary import END, token_id


def pack(tokenizer: Tokenizer, documents: Sequence[Document]) -> Tensor:
    """All documents one after another, each closed by the end token: (num_tokens,) int16."""
    end = token_id(tokenizer, END)
    encodings = tokenizer.encode_batch([document.text for document in documents])
    return torch.cat([torch.tensor([*each.ids, end], dtype=torch.int16) for each in encodings])


class PackedBatches:
    """Batches of (B, T) tokens; every window of a domain comes once before any comes again.

    Args:
        streams: packed tokens by domain.
        shares: relative weight of each domain in `streams`.

    Raises:
        ValueError: a stream is shorter than one window, or has no share.
    """

    def __init__(
        self,
        streams: Mapping[str, Tensor],
        shares: Mapping[str, float],
        *,
        batch_size: int,
        window: int,
        seed: int,
    ) -> None:
        self._streams = dict(sorted(streams.items()))
        for name, stream in self._streams.items():
            if len(stream) < 2 * window:
                raise ValueError(f"domain {name!r} has {len(stream)} tokens; give it {2 * window}")
            if not shares.get(name, 0.0) > 0.0:
                raise ValueError(f"domain {name!r} has no share; give it a positive one")
        self._shares = torch.tensor([shares[name] for name in self._streams])
        self._batch_size = batch_size
        self._window = window
        self._seed = seed
        self._drawn = dict.fromkeys(self._streams, 0)
        self._generator = torch.Generator().manual_seed(seed)

    def next_batch(self) -> Tensor:
        """The next (B, T) int64 tokens; advances the position."""
        names = list(self._streams)
        picks = torch.multinomial(
            self._shares, self._batch_size, replacement=True, generator=self._generator
        )
        return torch.stack([self._next_window(names[pick]) for pick in picks.tolist()])

    def _next_window(self, name: str) -> Tensor:
        stream = self._streams[name]
        num_windows = len(stream) // self._window - 1
        epoch, rank = divmod(self._drawn[name], num_windows)
        self._drawn[name] += 1
        order = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        # A new offset each epoch shifts where windows begin, so no text is always cut alike.
        offset = int(torch.randint(self._window, (1,), generator=order))
        start = offset + self._window * int(torch.randperm(num_windows, generator=order)[rank])
        return stream[start : start + self._window].long()

    def _settings(self) -> dict[str, int]:
        return {
            "seed": self._seed,
            "batch_size": self._batch_size,
            "window": self._window,
            "num_tokens": sum(len(stream) for stream in self._streams.values()),
        }

    def state_dict(self) -> dict[str, Any]:
        """The position: windows drawn per domain, and the generator that picks domains."""
        return {
            "drawn": dict(self._drawn),
            "generator": self._generator.get_state(),
            "settings": self._settings(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position that `state_dict` gave.

        Raises:
            ValueError: the position belongs to other settings.
        """
        saved, current = state["settings"], self._settings()
        for name in current:
            if saved[name] != current[name]:
                raise ValueError(
                    f"{name} {current[name]} differs from {saved[name]} in the checkpoint; "
                    "use that, or train without resume"
                )
        self._drawn = dict(state["drawn"])
        self._generator.set_state(state["generator"])
